"""Experiments on VMs of the pool: leased all at once, kept while interrupted, given back."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import tables
from cli_lab import entry, until
from conftest import Cli
from lab import lone_agent

import vmrm


@pytest.fixture
def pool(tmp_path: Path, cli: Cli) -> Iterator[vmrm.VmManager]:
    """Yield a pool with two agents in the group g, which are well."""
    with ExitStack() as stack:
        manager = stack.enter_context(vmrm.VmManager(db=cli.db))
        vmrm.put_group(manager.db, "g", {})
        for n in (1, 2):
            path = str(tmp_path / f"{n}.sock")
            stack.enter_context(lone_agent(Path(path)))
            manager.add_vm_to_pool("", f"p{n}", "g", path=path)
            well(manager, f"p{n}")
        yield manager


def well(pool: vmrm.VmManager, name: str) -> None:
    """Find a VM well."""
    with pool.db.transaction():
        vmrm.move_pool_vm(pool.db, name, "check_health")
    pool.mark_vm_checked(name)


def lab(folder: Path, *entries: str) -> Path:
    """Write an experiment of two VMs of the pool."""
    text = "[experiment]\nstart_buffer = 0\n"
    for n in (1, 2):
        text += f'[[vm]]\nname = "vm{n}"\npool = "g"\nlaunch_dir = "{folder}/launch{n}"\n'
        text += "".join(entries)
    (folder / "lab.toml").write_text(text)
    return folder / "lab.toml"


def states(pool: vmrm.VmManager) -> list[str]:
    """Return the states of the pool's VMs."""
    return [vm.state for vm in pool.get_all_vm()]


def test_an_experiment_waits_for_all_its_vms_and_gives_them_back(
    pool: vmrm.VmManager, cli: Cli, tmp_path: Path
) -> None:
    taken = pool.acquire_vm(["g"], "ann", "s", os.getpid())
    file = lab(tmp_path, entry(-1, "echo $$ >> ran"), entry(1, "true"))
    with subprocess.Popen(
        cli.command("run", file), env=cli.environment, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr
        waits = "number 1 in the queue; no VM is available: group g: "
        assert any(waits in line for line in run.stderr)
        assert "number 1 in the queue" in cli("status").out
        assert states(pool).count("ready") == 1, "all or none"
        pool.start_vm_termination(taken.vm_name)
        pool.remove_vm_from_pool(taken.vm_name)
        pool.add_vm_to_pool("", "p3", "g", path=taken.path)
        well(pool, "p3")
        run.stderr.read()
        assert run.wait(60) == 0
    assert states(pool) == ["ready", "ready"]
    rows = tables.vms(pool.db.path)
    assert [(row["path"], row["pool_token"]) for row in rows.values()] == [("", ""), ("", "")]
    assert "has no machine of the pool now" in cli("exec", "vm1", "true").err
    again = cli("run", file)
    assert again.code == 2
    assert "2 of the experiment's 2 VMs of the pool went back to it" in again.err
    assert vmrm.check(pool.db) == []


def test_a_stopped_experiment_continues_on_its_machines_and_a_destroyed_one_gives_them_back(
    pool: vmrm.VmManager, cli: Cli, tmp_path: Path
) -> None:
    file = lab(
        tmp_path,
        entry(-2, "echo $$ >> ../first"),
        entry(-1, "until [ -e ../go ]; do sleep 0.1; done"),
    )
    assert cli("run", file, "--detach").code == 0
    until(lambda: len(list(tmp_path.glob("launch?/-2/first"))) == 2)
    assert cli("exec", "vm1", "echo", "hello").out == "hello\n"
    assert cli("stop").code == 0
    leases = pool.get_all_vm()
    assert [(vm.state, vm.holder_pid) for vm in leases] == [("in_use", None), ("in_use", None)]
    assert all(vm.lease_end_at for vm in leases)
    for folder in tmp_path.glob("launch?/-1"):
        (folder / "go").touch()
    assert cli("run", file, "--detach").code == 0
    until(lambda: all(vm.holder_pid and not vm.lease_end_at for vm in pool.get_all_vm()))
    until(lambda: states(pool) == ["ready", "ready"], 60)
    assert all(len(path.read_text().split()) == 1 for path in tmp_path.glob("launch?/-2/first"))
    assert cli("destroy", "--yes").code == 0


def test_vms_of_a_killed_supervisor_are_taken_back_and_run_says_so(
    pool: vmrm.VmManager, cli: Cli, tmp_path: Path
) -> None:
    file = lab(tmp_path, entry(-1, "sleep 1000"))
    assert cli("run", file, "--detach").code == 0
    until(lambda: [row["outcome"] for row in tables.attempts(cli.db)] == ["running"] * 2)
    pid = vmrm.supervisor_pid(pool.db)
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: not vmrm.live_handlers(pool.db))
    until(lambda: not pool.reap() and states(pool) == ["ready", "ready"])
    done = cli("run", file)
    assert done.code == 2
    assert "went back to it" in done.err
    assert cli("destroy", "--yes").code == 0
    assert states(pool) == ["ready", "ready"]


def test_a_vm_whose_machine_is_taken_away_fails_and_is_left_alone(
    pool: vmrm.VmManager, cli: Cli, tmp_path: Path
) -> None:
    file = lab(tmp_path, entry(-1, "sleep 1000"))
    assert cli("run", file, "--detach").code == 0
    until(lambda: [row["outcome"] for row in tables.attempts(cli.db)] == ["running"] * 2)
    name = tables.vms(cli.db)["vm1"]["pool_vm"]
    pool.release_vm(name, force=True)
    until(lambda: "its machine of the pool was taken back" in cli("status").out)
    until(lambda: "vm1" not in vmrm.live_handlers(pool.db))
    cli("stop", "--kill")
    until(lambda: not vmrm.live_handlers(pool.db))
    assert cli("destroy", "--yes").code == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('pool = "g"\npath = "x.sock"', "it has a path and a pool; one of them"),
        ('pool = "a/b"', "group name 'a/b' is not usable"),
        ("", "path to the guest agent is missing"),
    ],
)
def test_a_wrong_pool_in_an_experiment_file_is_a_fault(
    cli: Cli, tmp_path: Path, line: str, says: str
) -> None:
    (tmp_path / "lab.toml").write_text(f'[[vm]]\nname = "a"\n{line}\n')
    done = cli("load", "lab.toml")
    assert done.code == 2
    assert says in done.err


def test_an_unknown_group_is_refused_before_anything_runs(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", lab(tmp_path, entry(1, "true")))
    assert done.code == 2
    assert "the pool has no group 'g'" in done.err
