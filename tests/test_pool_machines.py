"""The machines of the pool: one is never two VMs, and none is forgotten."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Cli
from keepers import FAST, group, keep, states

import vmrm


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Path]:
    """Yield the path of a socket, to which there are other ways."""
    path = tmp_path / "vms" / "a.sock"
    path.parent.mkdir()
    (tmp_path / "link.sock").symlink_to(path)
    (tmp_path / "linked").symlink_to(path.parent)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        yield path


def spellings(agent: Path) -> list[str]:
    """Return ways to write an agent's address, for a command that runs in its grandparent."""
    folder = agent.parent.parent
    return [
        str(agent),
        f"unix:{agent}",
        "vms/a.sock",
        "unix:vms/a.sock",
        f"{folder}//vms/./../vms/a.sock",
        f"{folder}/link.sock",
        "link.sock",
        f"{folder}/linked/a.sock",
    ]


# === one machine, one VM =========================================================================


def test_a_socket_is_one_machine_however_it_is_spelled(
    db: vmrm.Database, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(agent.parent.parent)
    pool = vmrm.VmManager(db=db)
    vmrm.put_group(db, "g", {})
    assert pool.add_vm_to_pool("", "first", "g", path="vms/a.sock").path == str(agent)
    for spelling in spellings(agent):
        with pytest.raises(vmrm.VmError, match="is the machine that the pool has as 'first'"):
            pool.add_vm_to_pool("", "second", "g", path=spelling)
    pool.start_vm_termination("first")
    pool.remove_vm_from_pool("first")
    assert pool.add_vm_to_pool("", "second", "g", path="vms/a.sock").path == str(agent)


def test_a_machine_is_added_once_by_the_command_line(cli: Cli, agent: Path) -> None:
    assert cli("pool", "group", "g").code == 0
    assert cli("pool", "add", "first", "g", "--path", "vms/a.sock").code == 0
    assert json.loads(cli("pool", "info", "first", "--json").out)["path"] == str(agent)
    again = cli("pool", "add", "second", "g", "--path", "link.sock")
    assert again.code == 2
    assert "is the machine that the pool has as 'first'" in again.err
    assert [row["vm"] for row in json.loads(cli("pool", "list", "--json").out)] == ["first"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("tcp:10.0.0.1:022", "tcp:10.0.0.1:22", True),
        ("tcp:[::1]:5", "tcp:[0:0::1]:5", True),
        ("tcp:127.1:5", "tcp:127.0.0.1:5", True),
        ("tcp:[::ffff:10.0.0.1]:5", "tcp:10.0.0.1:5", True),
        ("tcp:Lab.Example.:5", "tcp:lab.example:5", True),
        ("vsock:03:5", "vsock:3:05", True),
        ("tcp:10.0.0.1:5", "tcp:10.0.0.1:6", False),
        ("vsock:3:5", "vsock:5:3", False),
        ("/run/a.sock", "/run/A.sock", False),
        ("/run/a.sock", "unix:/run/../run//a.sock", True),
    ],
)
def test_addresses_are_compared_by_what_they_mean(
    db: vmrm.Database, one: str, other: str, same: bool
) -> None:
    pool = vmrm.VmManager(db=db)
    vmrm.put_group(db, "g", {})
    pool.add_vm_to_pool("", "a", "g", path=one)
    if same:
        with pytest.raises(vmrm.VmError, match="the pool has as 'a'"):
            pool.add_vm_to_pool("", "b", "g", path=other)
    else:
        pool.add_vm_to_pool("", "b", "g", path=other)


@pytest.mark.parametrize("wrong", ["nonsense", "tcp:", "tcp:host", "vsock:x:1", "/", "vms", "file"])
def test_an_address_that_cannot_be_one_is_refused(
    db: vmrm.Database, agent: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(agent.parent.parent)
    Path("file").touch()
    pool = vmrm.VmManager(db=db)
    vmrm.put_group(db, "g", {})
    with pytest.raises(ValueError, match=f"address '{wrong}' is n"):
        pool.add_vm_to_pool("", "a", "g", path=wrong)
    assert pool.get_all_vm() == []


def test_a_machine_cannot_become_another_by_its_descriptor(db: vmrm.Database, agent: Path) -> None:
    pool = vmrm.VmManager(db=db)
    vmrm.put_group(db, "g", {})
    pool.add_vm_to_pool("", "a", "g", path=str(agent))
    other = pool.add_vm_to_pool("", "b", "g")
    with pytest.raises(vmrm.VmError, match="the pool has as 'a'"):
        other.store_field(db, "path", f"unix:{agent.parent}/../link.sock")
    pool.get_vm_by_name("b").store_field(db, "path", str(agent.with_name("b.sock")))
    assert pool.get_vm_by_name("b").path == str(agent.with_name("b.sock"))


@pytest.mark.parametrize("asked", [("new", "old"), ("old", "new")])
def test_an_ip_tells_machines_apart_where_a_group_says_so(
    db: vmrm.Database, asked: tuple[str, str]
) -> None:
    pool = vmrm.VmManager(db=db)
    for name in asked:
        vmrm.put_group(db, name, {"unique_ip": name == "new"})
    pool.add_vm_to_pool("10.0.0.1", "a", asked[0])
    pool.add_vm_to_pool("fe80::1", "b", asked[0])
    for ip in ("10.0.0.1", "fe80:0::1"):
        with pytest.raises(vmrm.VmError, match="is the machine that the pool has as"):
            pool.add_vm_to_pool(ip, "c", asked[1])
    vmrm.put_group(db, "new", {"unique_ip": 0})
    pool.add_vm_to_pool("10.0.0.1", "c", asked[1])


@pytest.mark.parametrize("said", ["{agent}", "unix:{agent}", "{folder}/link.sock"])
def test_a_machine_that_two_spawn_hooks_say_they_made_is_one_vm(
    db: vmrm.Database, agent: Path, said: str
) -> None:
    printed = [str(agent), said.format(agent=agent, folder=agent.parent.parent)]
    count, ended = agent.parent / "count", agent.parent / "ended"
    paths = " ".join(f"'{path}'" for path in printed)
    spawn = f"echo >> {count}; set -- {paths}; shift $(($(wc -l < {count}) - 1)); "
    spawn += 'printf \'{"path": "%s"}\' "$1"'
    hooks = {"spawn": spawn, "check": "true", "terminate": f"echo $VMRM_VM=$VMRM_PATH >> {ended}"}
    group(db, hooks, min_ready=1)
    keep(db)
    (first,) = states(db)
    group(db, hooks, min_ready=2)
    keep(db)
    assert states(db) == {first: "ready"}
    (line,) = ended.read_text().splitlines()
    assert line.endswith("="), "it was ended by its own name, not by the other's address"
    assert not line.startswith(first)


# === the pool's machines and the experiment's ====================================================


def experiment(folder: Path, path: str) -> Path:
    """Write an experiment of one VM."""
    file = folder / "lab.toml"
    file.write_text(f'[[vm]]\nname = "web"\npath = "{path}"\n')
    return file


def test_a_machine_of_the_pool_is_no_vm_of_an_experiment(cli: Cli, agent: Path) -> None:
    assert cli("pool", "group", "g").code == 0
    assert cli("pool", "add", "a", "g", "--path", f"{agent}").code == 0
    for command, spelling in (("load", "vms/a.sock"), ("run", "link.sock")):
        done = cli(command, experiment(cli.folder, spelling))
        assert done.code == 2, (command, spelling)
        assert "is VM 'a' of the pool" in done.err
    mapping = vmrm.VMMapping(db=cli.db)
    with pytest.raises(vmrm.Conflict, match="is VM 'a' of the pool"):
        mapping.put("uuid", "web", path=f"unix:{agent}")
    assert mapping.get_all(length=True) == 0
    mapping.put("uuid", "web", path=f"{agent}.other")
    mapping.close()


def test_the_experiments_machine_is_none_of_the_pool(cli: Cli, agent: Path) -> None:
    assert cli("pool", "group", "g").code == 0
    assert cli("load", experiment(cli.folder, "link.sock")).code == 0
    done = cli("pool", "add", "a", "g", "--path", "vms/a.sock")
    assert done.code == 2
    assert "is the path of the experiment's VM 'web'" in done.err
    spawn = f'printf \'{{"path": "{agent}"}}\''
    with vmrm.Database(cli.db, timeouts=FAST) as db:
        group(db, {"spawn": spawn, "check": "true", "terminate": "true"})
        keep(db)
        assert states(db) == {}
        group(db, {}, min_ready=0)
    assert cli("destroy", "--yes").code == 0
    assert cli("pool", "add", "a", "g", "--path", "link.sock").code == 0


def test_a_run_looks_again_whether_its_machines_are_the_pools(cli: Cli, agent: Path) -> None:
    assert cli("load", experiment(cli.folder, "later.sock")).code == 0
    assert cli("pool", "group", "g").code == 0
    assert cli("pool", "add", "a", "g", "--path", f"{agent}").code == 0
    (cli.folder / "later.sock").symlink_to(agent)
    done = cli("run")
    assert done.code == 2
    assert "is VM 'a' of the pool" in done.err


def test_two_vms_of_an_experiment_are_two_machines(cli: Cli, agent: Path) -> None:
    file = experiment(cli.folder, "vms/a.sock")
    with file.open("a") as text:
        text.write('[[vm]]\nname = "db"\npath = "link.sock"\n')
    done = cli("load", file)
    assert done.code == 2
    assert "is already that of vm 'web'" in done.err


@pytest.mark.parametrize("first", ["pool", "experiment"])
def test_pool_and_experiment_do_not_take_one_machine_at_the_same_time(
    db: vmrm.Database, agent: Path, first: str
) -> None:
    vmrm.put_group(db, "g", {})
    took: list[str] = []

    def take(who: str) -> None:
        with contextlib.suppress(vmrm.VmError, vmrm.Conflict), vmrm.Database(db.path) as mine:
            if who == "pool":
                vmrm.VmManager(db=mine).add_vm_to_pool("", "a", "g", path=f"unix:{agent}")
            else:
                vmrm.VMMapping(db=mine).put("uuid", "web", path=str(agent))
            took.append(who)

    others = {"pool": "experiment", "experiment": "pool"}
    threads = [threading.Thread(target=take, args=[who]) for who in (first, others[first])]
    with db.transaction():  # so that both have looked before one of them writes
        for thread in threads:
            thread.start()
            time.sleep(0.5)
    for thread in threads:
        thread.join(60)
    assert len(took) == 1


def test_an_experiments_path_is_relative_to_where_it_was_named(
    db: vmrm.Database, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmrm.put_group(db, "g", {})
    monkeypatch.chdir(agent.parent)
    with vmrm.VMMapping(db=db) as mapping:
        mapping.put("uuid", "web", path="a.sock")
    monkeypatch.chdir("/")
    with pytest.raises(vmrm.VmError, match="is the path of the experiment's VM 'web'"):
        vmrm.VmManager(db=db).add_vm_to_pool("", "a", "g", path=str(agent))


def test_a_field_is_stored_of_a_vm_whatever_its_path_has_become(
    db: vmrm.Database, agent: Path
) -> None:
    vmrm.put_group(db, "g", {})
    vm = vmrm.VmManager(db=db).add_vm_to_pool("", "a", "g", path=str(agent))
    agent.unlink()
    agent.mkdir()
    vm.store_field(db, "builds_count", 7)
    assert vmrm.VmDescriptor.load(db, "a").builds_count == 7


@pytest.mark.parametrize("path", [f"/tmp/{'a' * 300}", "loop"])
def test_a_keeper_outlives_a_machine_that_cannot_be(
    db: vmrm.Database, tmp_path: Path, path: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    path = os.path.join(tmp_path, path)  # noqa: PTH118 (an absolute one stays)
    spawn = f"printf %s '{json.dumps({'path': path})}'"
    group(db, {"spawn": spawn, "check": "true", "terminate": "true"})
    with pytest.raises(ValueError, match="is none: "):
        vmrm.VmManager(db=db).add_vm_to_pool("", "a", "ci", path=path)
    keep(db)
    assert states(db) == {}
    assert "is none: " in vmrm.VmManager(db=db).spawn_failure("ci")


def test_a_link_that_leads_elsewhere_makes_no_two_vms_of_one_machine(
    db: vmrm.Database, agent: Path, tmp_path: Path
) -> None:
    def lead(link: str, name: str) -> None:
        (tmp_path / "new").symlink_to(agent.with_name(name))
        (tmp_path / "new").rename(tmp_path / link)

    group(db, {"check": "true"}, vm_health_check_period=0.001, vm_max_check_fails=0)
    pool, other = vmrm.VmManager(db=db), socket.socket(socket.AF_UNIX)
    other.bind(f"{agent.with_name('b.sock')}")
    other.close()
    for vm in ("a", "b"):
        lead(vm, f"{vm}.sock")
        pool.add_vm_to_pool("", vm, "ci", path=f"{tmp_path / vm}")
    keep(db)
    assert states(db) == {"a": "ready", "b": "ready"}
    lead("b", "a.sock")
    keep(db)
    assert states(db) == {"a": "ready", "b": "check_health_failed"}
    assert "the machine that the pool has as 'a'" in pool.get_vm_by_name("b").reason
    lead("a", "b.sock")  # so they have changed places
    for _ in range(2):
        keep(db)
        time.sleep(0.01)
    assert states(db) == {"a": "ready", "b": "ready"}
    with pytest.raises(vmrm.VmError, match="that the pool has as 'b'"):
        pool.add_vm_to_pool("", "c", "ci", path=str(agent))


# === without a terminate hook nothing is forgotten ===============================================


def test_an_ill_machine_that_nobody_can_end_stays_unlent_until_it_is_well(
    db: vmrm.Database, tmp_path: Path
) -> None:
    well = tmp_path / "well"
    group(db, {"check": f"test -e {well}"}, vm_max_check_fails=0, vm_health_check_period=0.001)
    pool = vmrm.VmManager(db=db)
    pool.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    for _ in range(5):
        keep(db)
        time.sleep(db.timeouts.recheck)
        assert states(db) == {"vm1": "check_health_failed"}
        with pytest.raises(vmrm.NoVmAvailable, match="1 failed their check"):
            pool.acquire_vm(["ci"], "me", "box", os.getpid())
    well.touch()
    keep(db)
    assert pool.acquire_vm(["ci"], "me", "box", os.getpid()).vm_name == "vm1"


@pytest.mark.parametrize(
    "limit",
    [
        {"reuse_max_count": 1},
        {"reuse_max_age": 0.001},
        {"reuse_max_idle": 0.001},
        {"vm_dirty_terminating_timeout": 0},
        {"list": "true", "vm_health_check_period": 0.001},
        {},
    ],
)
def test_a_machine_that_nobody_can_end_is_not_forgotten_for_any_limit(
    db: vmrm.Database, limit: dict[str, float]
) -> None:
    group(db, {"check": "true"})
    pool = vmrm.VmManager(db=db)
    pool.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    pool.acquire_vm(["ci"], "me", "box", os.getpid())
    if limit:
        pool.release_vm("vm1")
    else:
        pool.hold_vm("vm1", time.time())
    group(db, {}, **limit)
    for _ in range(3):
        time.sleep(db.timeouts.young)
        keep(db)
        assert states(db) == {"vm1": "ready" if limit else "held"}


def test_a_machine_that_cannot_be_cleaned_nor_ended_stays_unlent_until_it_is_clean(
    db: vmrm.Database, tmp_path: Path
) -> None:
    clean, tried = tmp_path / "clean", tmp_path / "tried"
    hooks = {"check": "true", "release": f"echo >> {tried}; test -e {clean}"}
    group(db, hooks, release_cleans=1, vm_health_check_period=1000)
    pool = vmrm.VmManager(db=db)
    pool.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    pool.acquire_vm(["ci"], "me", "box", os.getpid())
    pool.release_vm("vm1")
    for _ in range(3):
        keep(db)
        assert states(db) == {"vm1": "check_health_failed"}
    assert len(tried.read_text()) == 1, "not again before the period is over"
    clean.touch()
    group(db, {}, vm_health_check_period=0.001)
    keep(db)
    assert len(tried.read_text()) == 2
    keep(db)
    assert pool.acquire_vm(["ci"], "you", "box", os.getpid()).vm_name == "vm1"
