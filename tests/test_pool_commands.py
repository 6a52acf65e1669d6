"""What the pool's commands say and refuse, and that what nobody was told of is undone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pexpect
import pytest
import tables
from cli_lab import until
from conftest import Cli, unavailable
from keepers import group, keep

import vmrm
from vmrm import NoVmAvailable, VmError, VmManager

ME = os.getpid()


@pytest.fixture
def pool(cli: Cli) -> Iterator[VmManager]:
    """Yield a manager of an empty group, g."""
    with VmManager(db=cli.db) as manager:
        vmrm.put_group(manager.db, "g", {})
        yield manager


def add(pool: VmManager, *names: str) -> None:
    """Add VMs and find them well."""
    for name in names:
        pool.add_vm_to_pool("", name, "g")
        check(pool, name)


def check(pool: VmManager, name: str) -> None:
    with pool.db.transaction() as db:
        vmrm.move_pool_vm(db, name, "check_health")
    pool.mark_vm_checked(name)


def states(pool: VmManager) -> dict[str, str]:
    return {vm.vm_name: vm.state for vm in pool.get_all_vm()}


# === what nobody was told of =====================================================================


@pytest.mark.parametrize("where", ["/dev/full", "&-", "a pipe that nobody reads"])
def test_a_lease_whose_token_cannot_be_printed_is_given_back(
    pool: VmManager, cli: Cli, where: str
) -> None:
    add(pool, "a")
    words = ["--format", "{token}"] if where == "/dev/full" else ["--json"]
    command = cli.command("pool", "acquire", "g", *words)
    out: int = subprocess.DEVNULL
    if where.startswith("a pipe"):
        read, out = os.pipe()
        os.close(read)
    else:
        command = ["sh", "-c", f'exec "$@" >{where}', "sh", *command]
    done = subprocess.run(
        command, env=cli.environment, stdout=out, stderr=subprocess.PIPE, check=False
    )
    if where.startswith("a pipe"):
        os.close(out)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: VM 'a' was given back, for nobody could be told of it: ")
    assert states(pool) == {"a": "ready"}


def test_a_lease_of_a_command_that_is_killed_before_it_tells_is_taken_back(
    pool: VmManager, cli: Cli
) -> None:
    add(pool, "a")
    killed = cli("pool", "acquire", "g", env={"VMRM_CRASH": "pool-acquired"})
    assert killed.code == -signal.SIGKILL
    told = cli("pool", "acquire", "g", "--lease", "60", "--format", "{token}")
    assert told.code == 0, told
    vm = pool.get_vm_by_name("a")
    assert (vm.token, vm.holder_pid) == (told.out.strip(), None), "only its end decides now"
    assert pool.reap() == []
    assert cli("pool", "release", "a", "--token", told.out.strip()).code == 0


@pytest.mark.parametrize("force", [False, True])
def test_a_command_has_succeeded_although_its_vm_was_taken_back(
    pool: VmManager, cli: Cli, force: bool
) -> None:
    add(pool, "a")
    words = cli.command("pool", "acquire", "g", "--", "sh", "-c", "echo; read _; exit 7")
    with subprocess.Popen(
        words, env=cli.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as ours:
        assert ours.stdin and ours.stdout
        ours.stdout.readline()
        assert states(pool) == {"a": "in_use"}
        if force:
            pool.release_vm("a", force=True)
        ours.stdin.close()
        assert ours.wait(60) == 7
    assert pool.reap() == ([] if force else ["a"])


def test_a_lease_for_another_process_is_its_own_once_it_was_told(pool: VmManager, cli: Cli) -> None:
    add(pool, "a")
    assert cli("pool", "acquire", "g", "--pid", f"{ME}").code == 0
    vm = pool.get_vm_by_name("a")
    assert (vm.holder_pid, vm.lease_end_at) == (ME, None)
    assert pool.reap() == []
    assert pool.release_vm("a"), "the holder needs no token"


def test_a_command_may_have_no_standard_output(pool: VmManager, cli: Cli) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *cli.command("pool", "group", "g", "--list", "x")]
    done = subprocess.run(command, env=cli.environment, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(cli("pool", "group", "g", "--json").out)["list"] == "x"


def need_qemu_and_a_disk(cli: Cli) -> None:
    """Make an empty disk.img for QEMU, or skip."""
    if not shutil.which(vmrm.QEMU):
        unavailable(f"{vmrm.QEMU} is not installed")
    with (cli.folder / "disk.img").open("wb") as disk:
        disk.truncate(1 << 20)


@pytest.mark.vm
def test_a_machine_that_nobody_was_told_of_is_ended(cli: Cli) -> None:
    need_qemu_and_a_disk(cli)
    words = cli.command("pool", "spawn-qemu", "vm1", "--disk", "disk.img", "--accel", "tcg")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            words,
            env=cli.environment,
            cwd=cli.folder,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert b"VM 'vm1' was ended again" in done.stderr
    assert cli("pool", "list-qemu").out == ""


# === several VMs, and no word that is not understood =============================================


def test_several_vms_are_released_terminated_and_removed_by_one_command(
    pool: VmManager, cli: Cli
) -> None:
    add(pool, "a", "b", "c")
    request = vmrm.Request((("g",), ("g",)), "ann", "s", vmrm.Process.of(ME))
    leased = pool.acquire(request)
    names = [vm.vm_name for vm in leased]
    assert cli("pool", "release", *names, "--token", request.token).code == 0
    assert set(states(pool).values()) == {"ready"}
    assert cli("pool", "terminate", "a", "b", "B").code == 0
    assert states(pool) == {"a": "terminating", "b": "terminating", "c": "ready"}
    refused = cli("pool", "remove", "c", "a")
    assert (refused.code, "'c' is ready" in refused.err) == (2, True)
    assert cli("pool", "remove", "b").code == 0
    assert states(pool) == {"c": "ready"}


@pytest.mark.parametrize("command", ["release", "terminate", "remove"])
def test_nothing_is_done_if_one_of_several_vms_is_not_there(
    pool: VmManager, cli: Cli, command: str
) -> None:
    add(pool, "a")
    pool.acquire_vm(["g"], "ann", "s", ME)
    if command == "remove":
        pool.start_vm_termination("a")
    before = states(pool)
    force = ["--force"] if command != "remove" else []
    for names, says in ((["a", "lost"], "no VM 'lost'"), ([], "no VM is named")):
        done = cli("pool", command, *names, *force)
        assert (done.code, says in done.err) == (2, True), done
        assert states(pool) == before


def test_one_of_several_that_is_anothers_is_refused_and_named(pool: VmManager, cli: Cli) -> None:
    add(pool, "a", "b")
    with subprocess.Popen(["sleep", "1000"]) as holder:
        mine = pool.acquire_vm(["g"], "ann", "s", holder.pid)
        done = cli("pool", "terminate", "a", "b")
        holder.kill()
    assert done.code == 2
    assert f"lease of VM '{mine.vm_name}' is not yours" in done.err
    (other,) = {"a", "b"} - {mine.vm_name}
    assert states(pool) == {mine.vm_name: "in_use", other: "terminating"}


@pytest.mark.parametrize(
    "words",
    [
        "renew a 60",
        "hold a 1h TOKEN",
        "add b g /run/b.sock",
        "info a b",
        "list g g",
        "log a b",
        "history a b",
        "metrics a",
        "serve a",
        "acquire g --owner ann --lease 1h --tokn x",
    ],
)
def test_a_word_that_is_not_understood_is_refused(pool: VmManager, cli: Cli, words: str) -> None:
    add(pool, "a")
    done = cli("pool", *words.split())
    assert done.code == 2, done
    assert states(pool) == {"a": "ready"}


# === what is said ================================================================================


def test_every_vm_of_a_group_is_counted_in_the_reason(pool: VmManager) -> None:
    add(pool, "used", "held", "gone")
    pool.hold_vm("held", time.time() + 60)
    pool.start_vm_termination("gone")
    pool.acquire_vm(["g"], "ann", "s", ME)
    with pool.db.transaction() as db:
        vmrm.add_pool_vm(db, "new", "g", vmrm.VmStates.SPAWNING)
    with pytest.raises(NoVmAvailable) as refused:
        pool.acquire_vm(["g"], "bob", "s", ME)
    said = str(refused.value)
    assert "(4 VMs: 1 in use, 0 ready for others, 0 failed their check" in said
    assert "1 spawning, 1 held, 1 terminating" in said


def test_a_second_hold_shows_its_date_and_a_time_of_another_day_has_one(
    pool: VmManager, cli: Cli
) -> None:
    add(pool, "a")
    assert cli("pool", "hold", "a", "2030-01-01T10:00").code == 0
    assert cli("pool", "hold", "a", "2031-12-31T18:00").code == 0
    listed = cli("pool", "list").out
    assert "2030" not in listed
    assert listed.count("2031-12-31T18:00:00") == 2, "the date, and the reason"
    program, *words = cli.command("pool", "list")
    environment = cli.environment | {"TERM": "dumb"}
    terminal = pexpect.spawn(program, words, env=environment, timeout=60)
    terminal.expect(pexpect.EOF)
    terminal.close()
    shown = terminal.before
    assert b"2031-12-31 18:00:00" in shown


def test_a_release_is_done_although_nobody_could_be_woken(
    pool: VmManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(pool, "a")
    pool.acquire_vm(["g"], "ann", "s", ME)
    with vmrm.Waiting(pool, vmrm.Request((("g",),), "bob", "s", vmrm.Process.of(ME))) as place:
        assert not place.try_again()

        def busy(*_: object) -> None:
            raise vmrm.Busy("the database was kept busy")

        monkeypatch.setattr(vmrm.Leases, "next_in_queue", busy)
        assert pool.release_vm("a") is True
    assert states(pool) == {"a": "ready"}


# === the reference's words =======================================================================


def test_a_vm_that_is_not_in_use_is_not_released(pool: VmManager) -> None:
    add(pool, "a")
    assert pool.release_vm("a") is False
    assert states(pool) == {"a": "ready"}
    pool.start_vm_termination("a")
    assert pool.release_vm("a") is False
    with pytest.raises(vmrm.VmDescriptorNotFound):
        pool.release_vm("lost")


def test_none_may_be_said_in_the_references_words(pool: VmManager) -> None:
    add(pool, "a")
    vm = pool.acquire_vm(["g"], "ann", "s", ME, "None", "None", "None")
    assert (vm.task_id, vm.build_id, vm.chroot) == (None, None, None)
    with pytest.raises(VmError, match="is in_use, not ready"):
        pool.start_vm_termination("a", "ready")
    pool.start_vm_termination("a", "None")
    assert states(pool) == {"a": "terminating"}


# === between two processes =======================================================================


@pytest.mark.parametrize("waits", [False, True])
def test_a_vm_not_checked_since_the_keepers_start_is_given_to_nobody(
    pool: VmManager, waits: bool
) -> None:
    add(pool, "a", "new")
    with pool.lease(["g"], "ann", "s") as mine:
        bound = mine.vm_name
    pool.mark_server_start()
    for owner in ("ann", "bob"):
        with pytest.raises((NoVmAvailable, vmrm.TimedOut), match="2 of 2 not checked yet"):
            pool.acquire_vm(["g"], owner, "s", ME, wait=0.1 if waits else None)
    request = vmrm.Request((("g",),), "ann", "s", vmrm.Process.of(ME))
    with vmrm.Waiting(pool, request) as place:
        assert not place.try_again()
        assert pool.next_in_queue() == [], "nor is anybody woken for it"
    check(pool, bound)
    assert pool.acquire_vm(["g"], "ann", "s", ME, wait=60 if waits else None).vm_name == bound


def test_a_release_by_force_of_a_vm_that_nobody_has_is_refused(pool: VmManager, cli: Cli) -> None:
    add(pool, "a")
    for force in ([], ["--force"]):
        done = cli("pool", "release", "a", *force)
        assert done.code == 2
        assert "is ready: nobody has a lease of it" in done.err
    with pytest.raises(VmError, match="nobody has a lease"):
        pool.release_vm("a", force=True)
    vm = pool.get_vm_by_name("a")
    assert (vm.state, vm.builds_count) == ("ready", 0)


def test_a_reused_pid_is_not_the_holder(pool: VmManager) -> None:
    add(pool, "a")
    vm = pool.acquire_vm(["g"], "ann", "s", ME)
    tables.set_holder(pool.db.path, vm.vm_name, started=1)  # it began before us
    with pytest.raises(VmError, match="not yours; ann has it"):
        VmManager(db=pool.db).release_vm("a")
    assert pool.reap() == ["a"]
    assert states(pool) == {"a": "ready"}


# === failures of hooks, and KVM ==================================================================


def test_the_last_failure_of_a_spawn_hook_is_shown_until_one_succeeds(
    pool: VmManager, cli: Cli
) -> None:
    hooks = {"spawn": "echo no room on the host >&2; exit 3", "check": "true", "terminate": "true"}
    group(pool.db, hooks, min_ready=1)
    for _ in range(2):
        keep(pool.db)
        time.sleep(0.6)  # the first pause is half a second
    why = "exit code 3: no room on the host"
    assert why in cli("pool", "info").out
    assert why in cli("pool", "list").err
    assert why in cli("pool", "list", "ci", "--json").err
    assert why in cli("pool", "acquire", "ci").err
    group(pool.db, {"spawn": "echo IP=10.0.0.1"})

    def shown() -> bool:
        keep(pool.db)
        return "hook failed" in pool.info()

    until(lambda: not shown())
    assert cli("pool", "list").err == ""
    assert cli("pool", "acquire", "ci").code == 0


BROKEN = {
    "dies": 'echo "KVM: entry failed" >&2; exit 1',
    "hangs": "exec sleep 1000",
}


@pytest.mark.parametrize("how", [*BROKEN, "works"])
def test_kvm_is_tried_once_and_told_if_it_is_broken(
    cli: Cli, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (real := shutil.which(vmrm.QEMU)):
        unavailable(f"{vmrm.QEMU} is not installed")
    tried, fake = cli.folder / "tried", cli.folder / "bin" / vmrm.QEMU
    fake.parent.mkdir()
    emulated = f'set -- $(echo "$*" | sed "s/-accel kvm/-accel tcg/"); exec {real} "$@"'
    broken = BROKEN.get(how, emulated)
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *"-accel kvm"*) echo >> {tried}; {broken};; esac\n'
        f'exec {real} "$@"\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cli.folder / "cache"))
    first = vmrm.kvm_fault(str(fake))
    wanted = {"dies": "KVM: entry failed", "hangs": "a guest hangs under it", "works": ""}
    assert wanted[how] in first
    assert bool(first) == (how != "works")
    assert vmrm.kvm_fault(str(fake)) == first
    assert len(tried.read_text()) == 1, "tried once, and remembered"
    os.utime(fake, (1, 1))  # another QEMU
    assert bool(vmrm.kvm_fault(str(fake))) == bool(first)
    assert len(tried.read_text()) == 2


@pytest.mark.parametrize("cache", ["deep", "other", "link to a full disk", "a file", "no home"])
def test_whether_kvm_works_is_told_whatever_the_cache_is(
    cli: Cli, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, fake = cli.folder / "tried", cli.folder / vmrm.QEMU
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *"-accel kvm"*) echo >> {tried}; echo broken >&2; exit 1;; esac\n'
        f"exit {vmrm.TRIAL_EXIT_CODE}\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(os, "access", lambda *_: True)
    kept = cli.folder / "cache/vmrm/kvm"
    if cache == "a file":
        kept.parents[1].write_text("")
    else:
        kept.parent.mkdir(parents=True)
    if cache == "link to a full disk":
        kept.symlink_to("/dev/full")
    elif cache in ("deep", "other"):
        kept.write_text({"deep": "[" * 200_000, "other": '[{"for": 1}]'}[cache])
    monkeypatch.setenv("XDG_CACHE_HOME", str(cli.folder / "cache"))
    if cache == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home directory")))
    for looks in range(1, 3):
        assert vmrm.kvm_fault(str(fake)) == "broken"
        keeps = cache in ("deep", "other")
        assert len(tried.read_text()) == (1 if keeps else looks)


@pytest.mark.vm
def test_a_vm_starts_without_an_accelerator_named_whatever_kvm_is_worth(cli: Cli) -> None:
    need_qemu_and_a_disk(cli)
    cache = {"XDG_CACHE_HOME": str(cli.folder / "cache")}
    try:
        done = cli("pool", "spawn-qemu", "vm1", "--disk", "disk.img", "--memory", "32", env=cache)
        assert done.code == 0, done
        pid = int((cli.db.with_name("lab.db.d") / "qemu/vm1/pid").read_text().split()[0])
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        accel = words[words.index(b"-accel") + 1]
        assert (accel, "software emulates" in done.err) in {(b"tcg", True), (b"kvm", False)}
        assert cli("pool", "list-qemu").out == "vm1\n"
    finally:
        assert cli("pool", "terminate-qemu", "vm1").code == 0
