"""The keeper: what it plans, what it does, and what is left when it is killed in the middle."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import guests
import pytest
import tables
from cli_lab import until
from conftest import Cli, unavailable
from keepers import Provider, group, keep, log, reasons, served, states

import vmrm

NOW = 1_000_000.0


# === what is planned =============================================================================


def vm(state: str, **columns: Any) -> dict[str, Any]:
    """Return the columns of a VM of group ci that is well."""
    row = {"vm_name": "vm1", "group": "CI", "state": state, "state_at": NOW - 30}
    return row | {"spawned_at": NOW - 30, "last_health_check": NOW - 30} | columns


CHECKED = {"last_health_check": NOW - 130}  # the period is 120 s
BOUND = {"bound_to_user": "me", "bound_sandbox": "box"}
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any], str, float]] = {
    # the group's settings, the VM, what is planned, seconds until the next look
    "new": ({}, vm("got_ip"), "check", 0),
    "checked": ({}, vm("ready"), "", 90),
    "due": ({}, vm("ready", **CHECKED), "check", 0),
    "never told": ({}, vm("ready", **CHECKED, check_started_at=NOW - 1), "", 4),
    "before the server": ({}, vm("ready", last_health_check=NOW - 100), "check", 0),
    "interrupted": ({}, vm("check_health"), "check", 0),
    "being checked": ({}, vm("check_health", hook="check"), "", 0),
    "failed": ({}, vm("check_health_failed", check_fails=1), "", 90),
    "failed long ago": ({}, vm("check_health_failed", check_fails=2, state_at=0.0), "check", 0),
    "failed too often": ({}, vm("check_health_failed", check_fails=3), "end", 0),
    "in use": ({}, vm("in_use", **CHECKED), "", 0),
    "in use, own check": ({"check": "x"}, vm("in_use", **CHECKED), "check", 0),
    "in use, ill": ({}, vm("in_use", check_fails=9), "", 0),
    "held": ({}, vm("held", held_until=NOW + 7, **CHECKED), "", 7),
    "held too long": ({}, vm("held", held_until=NOW), "end", 0),
    "released": ({"release": "x"}, vm("check_health", releasing_at=NOW), "release", 0),
    "spawning": ({}, vm("spawning", hook="spawn"), "", 0),
    "spawn lost": ({}, vm("spawning"), "end", 0),
    "to be ended": ({}, vm("terminating"), "terminate", 0),
    "being ended": ({}, vm("terminating", hook="terminate"), "", 0),
    "ended while checked": ({}, vm("terminating", hook="check"), "kill", 0),
    "ended in vain": ({}, vm("terminating", terminate_tries=1, terminating_at=NOW - 1), "", 599),
    "ended again": ({}, vm("terminating", terminate_tries=1, terminating_at=1.0), "terminate", 0),
    "dirty": ({"vm_dirty_terminating_timeout": 12}, vm("ready", **BOUND), "end", 0),
    "dirty, clean": ({"vm_dirty_terminating_timeout": 12}, vm("ready"), "", 90),
    "dirty, lately": (
        {"vm_dirty_terminating_timeout": 12},
        vm("ready", **BOUND, last_release=NOW - 2),
        "",
        10,
    ),
    "used up": ({"reuse_max_count": 2}, vm("ready", builds_count=2), "end", 0),
    "used up, in use": ({"reuse_max_count": 2}, vm("in_use", builds_count=2), "", 0),
    "old": ({"reuse_max_age": 30}, vm("ready"), "end", 0),
    "idle": ({"reuse_max_idle": 20}, vm("ready", last_release=NOW - 25), "end", 0),
    "clock set back": ({}, vm("ready", last_health_check=NOW + 3600), "check", 0),
    "group gone": ({"name": "other"}, vm("got_ip"), "", 0),
    "not idle": ({"reuse_max_idle": 20}, vm("ready", last_release=NOW - 5), "", 15),
}


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[vmrm.Database]:
    """Yield a database with the time-outs of real life, for plans one after the other."""
    folder = tmp_path_factory.mktemp("plans")
    with vmrm.Database(folder / "lab.db", timeouts=vmrm.Timeouts()) as database:
        assert database.connection
        yield database


@pytest.mark.parametrize("case", PLANS)
def test_the_plan_for_a_vm(case: str, patient: vmrm.Database) -> None:
    settings, row, what, wait = PLANS[case]
    settings = {"min_ready": 0, "terminate": "x", **settings}
    for table in ("pool_groups", "pool_vms", "pool_server"):
        tables.empty(patient.path, table)
    vmrm.put_group(patient, str(settings.pop("name", "ci")), settings)
    if case == "before the server":
        vmrm.VmManager(db=patient).mark_server_start()
        tables.put(patient.path, "pool_server", {"started_at": NOW - 60})
    tables.add_pool_vm(patient.path, row)
    actions, again_at = vmrm.keeper_plan(patient, NOW)
    assert [action.what for action in actions] == ([what] if what else [])
    assert again_at == (NOW + wait if wait else float("inf"))


def spawns(db: vmrm.Database, vms: Sequence[dict[str, Any]] = (), **settings: Any) -> int:
    """Return how many VMs a plan spawns for a group with these settings and VMs."""
    hooks = {"spawn": "x", "terminate": "x"}
    limits = {"max_vm_total": 8, "max_vm_per_user": None, "max_spawn_processes": 2}
    vmrm.put_group(db, "ci", {**hooks, "vm_spawn_min_interval": 0, **limits, **settings})
    tables.empty(db.path, "pool_vms")
    for number, row in enumerate(vms):
        tables.add_pool_vm(db.path, {**row, "vm_name": f"vm{number}"})
    actions, _ = vmrm.keeper_plan(db, NOW)
    return sum(action.what == "spawn" for action in actions)


def test_spawns_stay_within_every_limit(db: vmrm.Database) -> None:
    assert spawns(db, min_ready=0) == 0
    assert spawns(db, min_ready=5) == 2  # max_spawn_processes
    assert spawns(db, min_ready=5, spawn="") == 0
    assert spawns(db, min_ready=5, max_spawn_processes=9) == 5
    assert spawns(db, min_ready=5, max_spawn_processes=9, max_vm_total=3) == 3
    assert spawns(db, min_ready=5, vm_spawn_min_interval=1) == 1
    tables.put(db.path, "pool_groups", {"last_spawn_at": NOW - 5})
    assert spawns(db, min_ready=5, vm_spawn_min_interval=10) == 0
    coming = [vm(state) for state in ("spawning", "got_ip", "ready", "check_health")]
    gone = [vm("terminating"), vm("in_use", **BOUND), vm("ready", **BOUND)]
    ill = [vm("check_health_failed", check_fails=1)]
    assert spawns(db, coming, min_ready=4) == 0
    assert spawns(db, coming, min_ready=6, max_spawn_processes=2) == 1
    assert spawns(db, [*gone, *ill], min_ready=1) == 1
    assert spawns(db, [*gone, *ill], min_ready=1, max_vm_total=4) == 0
    tables.note_spawn_failures(db.path, "ci", 4, NOW - 7)
    assert spawns(db, min_ready=1) == 0
    tables.note_spawn_failures(db.path, "ci", 3, NOW - 7)
    assert spawns(db, min_ready=1) == 1


def test_who_waits_is_spawned_for_unless_the_limit_forbids_it(db: vmrm.Database) -> None:
    pool, mine = vmrm.VmManager(db=db), [vm("in_use", **BOUND)]
    vmrm.put_group(db, "ci", {"min_ready": 0})
    vmrm.put_group(db, "other", {"min_ready": 0})
    wants = (("other", "ci"), ("ci",))
    with vmrm.Waiting(pool, vmrm.Request(wants, "me", "box", vmrm.Process.of())) as place:
        assert not place.try_again()
        assert spawns(db, mine, min_ready=0) == 2
        assert spawns(db, mine, min_ready=0, max_vm_per_user=2) == 1
        assert spawns(db, mine, min_ready=0, max_vm_per_user=1) == 0
    with vmrm.Waiting(pool, vmrm.Request((("other",),), "me", "box", vmrm.Process.of())) as place:
        assert not place.try_again()
        assert spawns(db, min_ready=0) == 0


# === what is done ================================================================================


def test_a_pool_is_kept_at_its_size(db: vmrm.Database, provider: Provider) -> None:
    group(db, provider.hooks, min_ready=2, max_vm_total=3)
    keep(db)
    assert list(states(db).values()) == ["ready", "ready"]
    manager = vmrm.VmManager(db=db)
    mine = manager.acquire_vm(["ci"], "me", "box", os.getpid())
    keep(db)
    assert sorted(states(db).values()) == ["in_use", "ready", "ready"]
    assert provider.running() == set(states(db))
    manager.release_vm(mine.vm_name)
    again = manager.acquire_vm(["ci"], "me", "box", os.getpid())
    assert again.vm_name == mine.vm_name
    manager.release_vm(mine.vm_name)
    vmrm.put_group(db, "ci", {"reuse_max_count": 2})
    keep(db)
    assert mine.vm_name not in states(db)
    keep(db)
    assert provider.running() == set(states(db))
    assert len(states(db)) == 2


def test_a_vm_of_a_dead_holder_is_taken_back(db: vmrm.Database, provider: Provider) -> None:
    group(db, provider.hooks)
    keep(db)
    with subprocess.Popen(["sleep", "1000"]) as holder:
        vmrm.VmManager(db=db).acquire_vm(["ci"], "me", "box", holder.pid)
        holder.kill()
    vmrm.put_group(db, "ci", {"vm_dirty_terminating_timeout": 0, "min_ready": 0})
    keep(db)
    assert states(db) == {}
    assert provider.running() == set()


def test_a_vm_whose_hook_chose_its_name_is_known_by_that(
    db: vmrm.Database, provider: Provider
) -> None:
    own = provider.hooks["spawn"].replace("cd ", "VMRM_VM=chosen; cd ", 1)
    group(db, {**provider.hooks, "spawn": own})
    keep(db)
    assert states(db) == {"chosen": "ready"}
    assert "spawn: done" in log(db, "chosen")
    loud = provider.hooks["spawn"] + "; echo vm_name=$VMRM_VM | tr a-z A-Z"
    group(db, {**provider.hooks, "spawn": loud.replace(" vm_name=$VMRM_VM;", ";")}, min_ready=2)
    keep(db)
    assert sorted(states(db).values()) == ["ready", "ready"], log(db)


def test_what_is_old_history_is_forgotten(db: vmrm.Database) -> None:
    group(db, {"check": "true"})
    manager = vmrm.VmManager(db=db)
    manager.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    folder, long_ago = db.directory("pool", "logs"), time.time() - 2 * vmrm.KEPT_S
    for name in ("vm1.log", "gone.log", "gone.log.1"):
        (folder / name).touch()
        os.utime(folder / name, (long_ago, long_ago))
    (folder / "late.log").touch()
    tables.put(db.path, "pool_history", {"at": long_ago}, new_state="got_ip")
    keep(db)
    assert {path.name for path in folder.iterdir()} == {"vm1.log", "late.log"}
    assert [row["new_state"] for row in tables.pool_history(db.path)] == ["check_health", "ready"]


def test_machines_and_rows_that_miss_each_other_are_ended(
    db: vmrm.Database, provider: Provider
) -> None:
    group(db, provider.hooks, vm_health_check_period=0.01)
    keep(db)
    before = states(db)
    tables.put(db.path, "pool_groups", {"min_ready": 0})
    provider.end()
    provider.start("stranger")
    with vmrm.Database(db.path) as patient:  # for which all are young
        for _ in range(3):
            keep(patient)
    assert states(db) == before
    tables.put(db.path, "pool_vms", {"spawned_at": 0})
    tables.empty(db.path, "pool_info")
    keep(db)
    assert states(db) == before  # at the first look

    def ended() -> bool:
        keep(db)
        return not states(db) and not provider.running()

    until(ended)
    assert "its machine is gone" in reasons(db)
    assert "a machine that the pool did not know" in reasons(db)


@pytest.mark.parametrize("said", ["exit 1", "echo /etc/passwd", "head -c 3000000 /dev/zero"])
def test_a_list_that_makes_no_sense_ends_nothing(
    said: str, db: vmrm.Database, provider: Provider
) -> None:
    group(db, {**provider.hooks, "list": said}, vm_health_check_period=0.01)
    for _ in range(3):
        keep(db)
    assert list(states(db).values()) == ["ready"]


def test_a_termination_that_fails_is_tried_again(db: vmrm.Database, tmp_path: Path) -> None:
    group(db, {"terminate": f"test -e {tmp_path}/now"})
    manager = vmrm.VmManager(db=db)
    manager.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    manager.start_vm_termination("vm1")
    keep(db)
    assert manager.get_vm_by_name("vm1").reason == "terminate hook: exit code 1"
    (tmp_path / "now").touch()
    keep(db)
    assert list(states(db)) == ["vm1"]  # not before vm_terminating_timeout
    tables.put(db.path, "pool_vms", {"terminating_at": 1})
    keep(db)
    assert states(db) == {}


def test_a_vm_removed_while_it_is_spawned_leaves_no_machine(
    db: vmrm.Database, provider: Provider
) -> None:
    slow = provider.hooks["spawn"] + "; sleep 0.5"
    group(db, {**provider.hooks, "spawn": slow})
    with served(db.path) as keeper:
        until(provider.running)
        tables.put(db.path, "pool_groups", {"min_ready": 0})
        tables.empty(db.path, "pool_vms")
        until(lambda: not provider.running() and not states(db))
        keeper.terminate()
    assert keeper.returncode == 0


def test_a_vm_added_again_while_it_is_terminated_stays(db: vmrm.Database, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    group(db, {"check": "true", "terminate": f"read -r _ < {gate}"})
    manager = vmrm.VmManager(db=db)
    manager.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    manager.start_vm_termination("vm1")
    with served(db.path) as keeper:
        until(lambda: "terminate" in hooks_of(db))
        manager.remove_vm_from_pool("vm1")
        manager.add_vm_to_pool("10.0.0.1", "vm1", "ci")
        gate.write_text("\n")
        until(lambda: "terminate: done" in log(db))
        until(lambda: states(db) == {"vm1": "ready"})
        keeper.terminate()
    assert keeper.returncode == 0


def test_a_second_keeper_names_the_first_and_leaves(cli: Cli, db: vmrm.Database) -> None:
    vmrm.put_group(db, "ci", {})
    with served(cli.db) as keeper:
        until(lambda: tables.keeper_runs(cli.db))
        second = cli("pool", "serve")
        assert second.code == 2
        assert f"kept already, by process {keeper.pid}" in second.err
        keeper.send_signal(signal.SIGINT)
    assert keeper.returncode == 0


def test_a_keeper_told_to_stop_kills_its_hooks_and_leaves_vms(
    db: vmrm.Database, provider: Provider
) -> None:
    group(db, provider.hooks)
    keep(db)
    (ready,) = states(db)
    stuck = {"spawn": "trap '' TERM; sleep 1000 & wait; sleep 1000"}
    group(db, {**provider.hooks, **stuck}, min_ready=2)
    with served(db.path) as keeper:
        until(lambda: "spawning" in states(db).values())
        pid = hooks_of(db)["spawn"]
        keeper.terminate()
    assert keeper.returncode == 0
    assert vmrm.session_members(pid, 0) == []
    assert sorted(states(db).values()) == ["ready", "terminating"]
    assert "spawn hook: the keeper was stopped" in reasons(db)
    vmrm.put_group(db, "ci", {"min_ready": 1})
    keep(db)
    assert states(db) == {ready: "ready"}
    assert provider.running() == {ready}


def test_who_waits_gets_a_vm_spawned_and_who_is_done_has_it_ended(
    db: vmrm.Database, provider: Provider
) -> None:
    group(db, provider.hooks, min_ready=0, vm_dirty_terminating_timeout=0)
    manager = vmrm.VmManager(db=db)
    with served(db.path) as keeper:
        until(lambda: db.lock(vmrm.KEEPER).holder == keeper.pid)
        with manager.lease(["ci"], "me", "box", wait=30) as mine:
            assert provider.running() == {mine.vm_name}
        until(lambda: not states(db) and not provider.running())
        keeper.terminate()
    assert keeper.returncode == 0
    manager.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    with pytest.raises(vmrm.NoVmAvailable, match="no keeper runs"):
        manager.acquire_vm(["ci"], "me", "box", os.getpid())


# === killed in the middle ========================================================================


def survive(db: vmrm.Database, provider: Provider, seed: int, setting: dict[str, Any]) -> None:
    """Kill a keeper that has `setting` to bring about; then expect what the next one leaves."""
    chance = random.Random(seed)
    points = ("hook-claimed", "hook-begun", "hook-ended")
    crash = chance.choice([*(f"{p}:{chance.randint(1, 3)}" for p in points), ""])
    vmrm.put_group(db, "ci", setting)
    with served(db.path, "--once", VMRM_CRASH=crash) as keeper:
        if not crash:
            time.sleep(chance.uniform(0.2, 0.6))
            keeper.kill()
        keeper.wait(20)
    keep(db)
    keep(db)  # what was begun anew
    assert set(states(db).values()) <= {"ready"}, (crash, states(db), reasons(db), log(db))
    assert provider.running() == set(states(db)), (crash, log(db))
    assert not hooks_of(db)


def test_a_keeper_killed_while_it_spawns_or_terminates_leaks_nothing(
    db: vmrm.Database, provider: Provider
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    slow = {key: f"sleep 0.1; {provider.hooks[key]}; sleep 0.1" for key in ("spawn", "terminate")}
    group(db, {**provider.hooks, **slow}, max_spawn_processes=3)
    for round_ in range(10):
        survive(db, provider, seed + round_, {"min_ready": 2, "reuse_max_age": None})
        assert len(states(db)) == 2
        survive(db, provider, seed - round_, {"min_ready": 0, "reuse_max_age": 0.001})
        assert states(db) == {}


# === real VMs ====================================================================================


def qcow2(path: Path, backing: Path) -> Path:
    """Write an empty qcow2 image over a raw one; the format is that of QEMU's docs/interop."""
    size, cluster = backing.stat().st_size, 1 << 16
    name = os.fsencode(backing)
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 72, len(name), 16, size, 0, 1, cluster,
                         2 * cluster, 1, 0, 0)  # fmt: skip
    image = bytearray(4 * cluster)
    image[: len(header) + len(name)] = header + name
    image[2 * cluster : 2 * cluster + 8] = struct.pack(">Q", 3 * cluster)  # the refcount table
    image[3 * cluster : 3 * cluster + 8] = struct.pack(">4H", 1, 1, 1, 1)
    path.write_bytes(image)
    return path


def micro(disk: Path | None = None) -> str:
    """Return the words of spawn-qemu for a micro VM."""
    guests.require_guests()
    image = guests.image()
    words = f"--kernel {image.kernel} --initrd {image.initramfs} --accel {guests.accelerator()}"
    words += ' --memory 160 --append "quiet panic=-1 guest_name=$VMRM_VM"'
    return words + (f" --disk {disk}" if disk else "")


@pytest.fixture
def root(db: vmrm.Database) -> Iterator[Path]:
    """Yield where the VMs of spawn-qemu live; end those that a failing test leaves."""
    folder = db.directory("qemu")
    yield folder
    for name in [path.name for path in folder.iterdir()]:
        vmrm.QemuVm(folder, name).terminate()


def hooks_of(db: vmrm.Database) -> dict[str, int]:
    """Return the hooks that run for VMs, each with its pid."""
    found = tables.pool_vms(db.path).values()
    return {row["hook"]: row["hook_pid"] for row in found if row["hook"]}


@pytest.mark.vm
def test_real_vms_live_through_the_pool(db: vmrm.Database, root: Path, tmp_path: Path) -> None:
    disk, raw = tmp_path / "base.qcow2", tmp_path / "base.img"
    words = micro(disk)
    guests._make_disk(raw)
    image = qcow2(disk, raw).read_bytes(), raw.read_bytes()
    hooks = {
        "spawn": f"vmrm pool spawn-qemu {words} -- -no-shutdown",
        "list": "vmrm pool list-qemu",
    }
    group(db, {**hooks, "terminate": "vmrm pool terminate-qemu"}, max_vm_per_user=1)
    until(lambda: keep(db) or list(states(db).values()) == ["ready"], 180)  # it may boot slowly
    assert vmrm.qemu_running(root) == list(states(db))
    manager = vmrm.VmManager(db=db)
    mine = manager.acquire_vm(["ci"], "me", "box", os.getpid())
    with guests.RawAgent(Path(mine.path)) as agent:
        assert agent.run("/bin/hostname").out.decode().strip() == mine.vm_name
        assert (
            agent.run(
                "/bin/sh", "-c", "grep -q ' /var ' /proc/mounts && echo > /var/mine && sync"
            ).code
            == 0
        )
    manager.release_vm(mine.vm_name)
    assert manager.acquire_vm(["ci"], "me", "box", os.getpid()).vm_name == mine.vm_name
    with guests.RawAgent(Path(mine.path)) as agent:
        assert agent.run("/bin/ls", "/var/mine").code == 0
    manager.release_vm(mine.vm_name)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for setting in ({"min_ready": 2}, {"min_ready": 0, "reuse_max_age": 0.001}):
        vmrm.put_group(db, "ci", setting)
        with served(db.path, "--once") as keeper:
            until(lambda: hooks_of(db))
            time.sleep(chance.uniform(0, 1))
            keeper.kill()
    until(lambda: keep(db) or not states(db), 180)
    assert not list(root.iterdir())
    assert (disk.read_bytes(), raw.read_bytes()) == image


@pytest.mark.vm
def test_a_spawn_killed_at_any_moment_is_found(cli: Cli, db: vmrm.Database, root: Path) -> None:
    words = ["sh", "-c", f"exec {shlex.join(cli.command())} pool spawn-qemu {micro()}"]
    environment = cli.environment | {"VMRM_VM": "vm1"}
    assert db.connection
    died = subprocess.run(words, env=environment | {"VMRM_CRASH": "qemu-started"}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert cli("pool", "list-qemu").out == "vm1\n"
    again = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert (again.returncode, again.stdout) == (2, b"")
    assert b"runs already" in again.stderr
    pid, started = map(int, (root / "vm1" / "pid").read_text().split())
    assert vmrm.process_started(pid) == started
    assert cli("pool", "terminate-qemu", "vm1", env={"VMRM_CRASH": "qemu-ended"}).code < 0
    assert cli("pool", "list-qemu").out == ""
    for _ in range(2):  # what is gone already is no error
        assert cli("pool", "terminate-qemu", "vm1").code == 0
        assert vmrm.process_started(pid) is None
        assert not list(root.iterdir())


@pytest.mark.vm
def test_a_vm_that_will_not_quit_is_killed(db: vmrm.Database, root: Path, cli: Cli) -> None:
    words = f"exec {shlex.join(cli.command())} pool spawn-qemu {micro()}"
    subprocess.run(
        ["sh", "-c", words], env=cli.environment | {"VMRM_VM": "vm1"}, check=True, stdout=-3
    )
    pid = int((root / "vm1" / "pid").read_text().split()[0])
    os.kill(pid, signal.SIGSTOP)  # which ignores QMP and TERM
    grace, vmrm.QEMU_GRACE_S = vmrm.QEMU_GRACE_S, 0.2
    try:
        vmrm.QemuVm(root, "vm1").terminate()
    finally:
        vmrm.QEMU_GRACE_S = grace
    assert vmrm.process_started(pid) is None
    assert not list(root.iterdir())


def test_a_directory_that_is_no_vms_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    precious = tmp_path / "home" / "work" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.touch()
    home = precious.parent.parent
    assert cli("pool", "list-qemu", "--dir", home).out == ""
    assert cli("pool", "terminate-qemu", "work", "--dir", home).code == 0
    if shutil.which(vmrm.QEMU):
        told = cli("pool", "spawn-qemu", "work", "--dir", home, "--disk", precious)
        assert told.code == 2
        assert "is not a VM directory of vmrm" in told.err
    assert list(precious.parent.iterdir()) == [precious]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["vm1"], "nothing to boot"),
        (["vm1", "--disk", "no.img"], "there is no file 'no.img'"),
        (["../vm", "--kernel", "x"], "VM name '../vm'"),
        (["--kernel", "x"], "no VM is named"),
        (["vm1", "--kernel", "x", "--memory", "many"], "'many' is not a whole number"),
        (["vm1", "--kernel", "x", "--accel", "tcg", "--", "-S"], "could not load kernel"),
    ],
)
def test_a_vm_that_cannot_be_started_leaves_nothing(
    words: list[str], why: str, cli: Cli, db: vmrm.Database
) -> None:
    if "-S" in words and not shutil.which(vmrm.QEMU):
        unavailable(f"{vmrm.QEMU} is not installed")
    assert db.connection
    (cli.folder / "x").touch()
    told = cli("pool", "spawn-qemu", *words)
    assert (told.code, told.out) == (1 if "-S" in words else 2, "")
    assert why in told.err
    assert not list((db.state_dir / "qemu").glob("*"))
