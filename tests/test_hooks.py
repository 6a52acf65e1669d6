"""Hooks: how they run, what is taken of their output, and all the ways in which they go wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tables
from cli_lab import until
from conftest import ROOT, HostAgent
from keepers import group, keep, log, reasons, states
from lab import VMRM

import vmrm


def alive(pid: int) -> bool:
    return vmrm.process_started(pid) is not None


# === what a spawn hook prints ====================================================================

SAID = {
    "words": ("IP=10.0.0.7 vm_name=web", ("web", "10.0.0.7", "")),
    "playbook": ('ok: [x] => {"msg": "IP=10.0.0.7 vm_name=web"}', ("web", "10.0.0.7", "")),
    "last": ("IP=10.0.0.1\nIP=fe80::1\n", ("mine", "fe80::1", "")),
    "object": ('{"name": "web", "ip": "", "path": "/a.sock"}', ("web", "", "/a.sock")),
    "pretty": ('{\n "path": "tcp:h:1"\n}\n', ("mine", "", "tcp:h:1")),
    "last object": (
        'IP=1.1.1.1\n{"ip": "2.2.2.2"}\n{"ip": "3.3.3.3"}\nbye',
        ("mine", "3.3.3.3", ""),
    ),
}


@pytest.mark.parametrize("said", SAID)
def test_what_a_spawn_hook_says_is_understood(said: str) -> None:
    text, told = SAID[said]
    assert vmrm.parse_spawned(text, "mine") == told


NONSENSE = {
    "nothing": ("", "neither"),
    "no address": ("IP=10.0.0", "no IP address"),
    "shell": ("IP=$(reboot)", "no IP address"),
    "number": ('{"ip": 7}', "no text"),
    "list": ('["10.0.0.1"]', "neither"),
    "name": ("IP=10.0.0.1 vm_name=../../etc", "not usable"),
    "path": ('{"path": "tcp:nowhere"}', "tcp:nowhere"),
    "no characters": (r'{"path": "/run/\ud800"}', "no text"),
    "no scope": (r'{"ip": "fe80::1%\ud800"}', "no text"),
    "deep": ("{" + '"a":{' * 100_000 + "}" * 100_001, "neither"),
}


@pytest.mark.parametrize("said", NONSENSE)
def test_nonsense_of_a_spawn_hook_is_refused(said: str) -> None:
    text, why = NONSENSE[said]
    with pytest.raises(ValueError, match=why):
        vmrm.parse_spawned(text, "mine")


# === hooks that go wrong =========================================================================

FAULTS = {
    "hangs": ("echo begun; sleep 1000", "took longer than 0.4 s"),
    "will not end": ("trap '' TERM; echo begun; sleep 1000; sleep 1000", "took longer than 0.4 s"),
    "garbage": ("head -c 4096 /dev/urandom", "neither IP=… nor"),
    "wrong IP": ("echo IP=300.1.2.3", "'300.1.2.3', which is no IP address"),
    "other's name": ("echo IP=10.0.0.9 vm_name=OTHER", "'OTHER', which the pool has already"),
    "fails": ("echo no quota left >&2; exit 1", "exit code 1: no quota left"),
    "dies": ("kill -9 $$", "killed by SIGKILL"),
    "dies of a nameless signal": ("kill -40 $$", "killed by signal 40"),
    "100 MiB": ("head -c 104857600 /dev/zero | tr '\\0' x", "neither IP=… nor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_spawn_hook_is_told_and_its_vm_terminated(
    fault: str, db: vmrm.Database, tmp_path: Path
) -> None:
    command, why = FAULTS[fault]
    hooks = {"spawn": command, "terminate": f"echo $VMRM_VM >> {tmp_path}/ended", "check": "true"}
    slow = 20.0 if fault == "100 MiB" else 0.4
    group(db, hooks, spawn_timeout=slow, min_ready=2, max_spawn_processes=1, max_vm_total=2)
    vmrm.VmManager(db=db).add_vm_to_pool("10.0.0.9", "other", "ci")
    before = len(list(Path("/proc/self/fd").iterdir()))
    keep(db)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert states(db) == {"other": "ready"}
    assert any(why in reason for reason in reasons(db)), reasons(db)
    (name,) = (tmp_path / "ended").read_text().split()
    text = log(db, name)
    assert why in text
    assert "terminate: done" in text
    if fault == "100 MiB":
        assert f"{100 * 2**20 - vmrm.HOOK_KEPT_BYTES} bytes before this are dropped" in text
        assert len(text) < 1.1 * vmrm.HOOK_KEPT_BYTES


def test_a_failing_spawn_hook_is_tried_ever_more_seldom(db: vmrm.Database) -> None:
    group(db, {"spawn": "exit 1"})
    keep(db)
    keep(db)  # within the pause of the first failure
    assert re.search(r"spawn hook failed \S+: exit code 1", vmrm.VmManager(db=db).info())
    vmrm.VmManager(db=db).write_vm_pool_info("ci", "failed", "a script's word")
    tables.date_back_pool_info(db.path)
    keep(db)
    assert ", 2 times in a row: exit code 1" in vmrm.VmManager(db=db).info()


def test_the_vm_that_a_spawn_hook_leaves_behind_stays(db: vmrm.Database, tmp_path: Path) -> None:
    spawn = f"setsid sleep 1000 & echo $! > {tmp_path}/pid; echo IP=10.0.0.1"  # keeps the pipes
    hooks = {"spawn": spawn, "check": "true", "terminate": f"kill -9 $(cat {tmp_path}/pid)"}
    group(db, hooks, max_vm_total=1)
    keep(db)
    (name,) = states(db)
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    vmrm.VmManager(db=db).start_vm_termination(name)
    vmrm.put_group(db, "ci", {"min_ready": 0})
    keep(db)
    assert not alive(pid)
    assert states(db) == {}


def test_what_another_hook_leaves_in_its_session_is_killed(
    db: vmrm.Database, tmp_path: Path
) -> None:
    group(db, {"check": f"sleep 1000 & echo $! > {tmp_path}/pid"})
    vmrm.VmManager(db=db).add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    assert states(db) == {"vm1": "ready"}
    until(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_a_process_of_any_name_is_found_among_hidden_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == Path("/proc/1/stat"):
            raise PermissionError("proc is mounted with hidepid=1")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    program = os.fsencode(tmp_path) + b"/\xff) Z"
    shutil.copyfile("/bin/sleep", program)
    os.chmod(program, 0o700)  # noqa: PTH101 (bytes)
    process = subprocess.Popen([program, "1000"], start_new_session=True)
    try:
        started = vmrm.process_started(process.pid)
        assert started
        assert vmrm.session_members(process.pid, started) == [process.pid]
    finally:
        process.kill()
        process.wait()


def test_a_hook_that_comes_too_late_never_runs(db: vmrm.Database, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    hook = vmrm.Hook(vmrm.HookKind.CHECK, "ci", "vm1", f"touch {mark}", dict(os.environ), 5)
    hook.abandon()
    assert not mark.exists()
    assert hook.process.returncode == 1


def test_a_hook_is_told_about_its_vm_and_finds_our_command(db: vmrm.Database) -> None:
    group(db, {"check": "env | grep ^VMRM_ | grep -v ^VMRM_TEST_ | sort; command -v vmrm"})
    vmrm.VmManager(db=db).add_vm_to_pool("10.0.0.1", "vm1", "ci", path="/a.sock")
    keep(db)
    said = [line.partition("[out] ")[2] for line in log(db, "vm1").splitlines() if "[out]" in line]
    told = dict(line.split("=", 1) for line in said[:-1])
    readme = (ROOT / "README.md").read_text()
    documented = readme.partition("\nA hook's environment has ")[2].partition("\n\n")[0]
    assert sorted(told) == sorted(re.findall(r"`(VMRM_\w+)`", documented))
    assert told["VMRM_HOOK"] == "check"
    assert told["VMRM_VM"] == "vm1"
    assert told["VMRM_GROUP"] == "ci"
    assert told["VMRM_IP"] == "10.0.0.1"
    assert told["VMRM_PATH"] == "/a.sock"
    assert told["VMRM_STATE"] == "got_ip"
    assert told["VMRM_DB"] == str(db.path)
    assert said[-1] == f"{told['VMRM_STATE_DIR']}/bin/vmrm"


def test_no_word_of_an_owner_keeps_a_hook_from_running(db: vmrm.Database) -> None:
    group(db, {"check": "true", "release": 'echo "$VMRM_OWNER" | wc -c; echo "<$VMRM_SANDBOX>"'})
    manager = vmrm.VmManager(db=db)
    manager.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    manager.acquire_vm(["ci"], "o" * 3_000_000, "a\0$(reboot)\n\x1b[2J", os.getpid())
    manager.release_vm("vm1")
    keep(db)
    assert states(db) == {"vm1": "ready"}
    assert "[out] 4097\n" in log(db, "vm1")
    assert "[out] <a$(reboot)\n" in log(db, "vm1")
    assert "\x1b" not in log(db, "vm1")


def test_the_log_of_hooks_begins_anew_before_it_fills_the_disk(
    db: vmrm.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmrm, "HOOK_LOG_BYTES", 200)
    group(db, {"check": "echo 0123456789; exit 75"})
    vmrm.VmManager(db=db).add_vm_to_pool("10.0.0.1", "vm1", "ci")
    for _ in range(8):
        keep(db)
        tables.put(db.path, "pool_vms", {"check_started_at": None})
    folder = db.directory("pool", "logs")
    assert {path.name for path in folder.iterdir()} == {"vm1.log", "vm1.log.1"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 700


# === checks, releases ============================================================================


def test_a_check_that_fails_too_often_ends_the_vm(db: vmrm.Database, tmp_path: Path) -> None:
    hooks = {"check": "echo gone >&2; exit 1", "terminate": "true"}
    group(db, hooks, vm_max_check_fails=1)
    vmrm.VmManager(db=db).add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    assert states(db) == {"vm1": "check_health_failed"}
    keep(db)
    assert list(states(db)) == ["vm1"]  # not before the next period
    tables.put(db.path, "pool_vms", {"state_at": 1})
    keep(db)
    assert states(db) == {}
    assert "check: exit code 1: gone" in reasons(db)
    assert "it failed 2 checks in a row" in reasons(db)


def test_a_check_that_takes_too_long_has_failed(db: vmrm.Database) -> None:
    group(db, {"check": "sleep 1000"}, vm_health_check_max_time=0.2)
    vmrm.VmManager(db=db).add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    assert states(db) == {"vm1": "check_health_failed"}
    assert reasons(db) == ["check: took longer than 0.2 s"]


def test_a_check_that_cannot_tell_counts_neither_way(db: vmrm.Database) -> None:
    group(db, {"check": "exit 75"}, vm_max_check_fails=0)
    vmrm.VmManager(db=db).add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    assert states(db) == {"vm1": "check_health"}
    manager = vmrm.VmManager(db=db)
    assert manager.get_vm_by_name("vm1").check_fails == 0
    manager.mark_vm_checked("vm1")
    tables.put(db.path, "pool_vms", {"last_health_check": 1})
    keep(db)
    assert states(db) == {"vm1": "ready"}
    assert "health check inconclusive" in reasons(db)


def test_the_default_check_tells_no_agent_from_no_exec(
    db: vmrm.Database, tmp_path: Path, qemu_ga: Callable[..., HostAgent]
) -> None:
    group(db, {}, vm_health_check_max_time=60)
    manager = vmrm.VmManager(db=db)
    agents = {"ok": str(qemu_ga().path), "mute": str(qemu_ga("-b", "guest-exec").path)}
    for name, path in {**agents, "lost": ""}.items():
        manager.add_vm_to_pool("", name, "ci", path=path)
    with vmrm.agent_lock(agents["ok"], db.path, vmrm.time_to_wait, 0):
        keep(db)
    failed = "check_health_failed"
    assert states(db) == {"ok": "check_health", "mute": failed, "lost": failed}
    told = {name: row["reason"] for name, row in tables.pool_vms(db.path).items()}
    assert "no-exec" in told["mute"]
    words = [*VMRM, "_check_agent", str(tmp_path / "no.sock"), str(db.path), "0.1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:11]) == (1, "no-answer: ")
    assert "no path" in told["lost"]
    assert "in-use" in log(db, "ok")
    tables.put(db.path, "pool_vms", {"check_started_at": None})
    keep(db)
    assert states(db)["ok"] == "ready"


@pytest.mark.parametrize(
    ("release", "left"), [("true", {"vm1": "ready"}), ("echo no snapshot; exit 3", {})]
)
def test_a_release_hook_has_the_last_word_before_a_vm_is_given_out_again(
    release: str, left: dict[str, str], db: vmrm.Database
) -> None:
    group(db, {"check": "true", "release": release, "terminate": "true"}, release_cleans=1)
    manager = vmrm.VmManager(db=db)
    manager.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    manager.acquire_vm(["ci"], "me", "box", os.getpid())
    manager.release_vm("vm1")
    assert states(db) == {"vm1": "check_health"}
    keep(db)
    assert states(db) == left
    if left:
        assert manager.get_vm_by_name("vm1").bound_to_user is None
    else:
        assert "release hook: exit code 3: no snapshot" in reasons(db)
