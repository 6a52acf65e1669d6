"""The pool: who gets which VM, who may give it back, and what is left when somebody dies."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tables
from cli_lab import until
from conftest import ROOT, Cli

import vmrm
from vmrm import POOL_MOVES, NoVmAvailable, VmError, VmManager, VmStates

ME = os.getpid()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[VmManager]:
    """Yield a manager of two empty groups, 7 and arm, with a limit of two VMs per owner."""
    with VmManager(db=tmp_path / "lab.db") as manager:
        for group in ("7", "arm"):
            vmrm.put_group(manager.db, group, {"max_vm_per_user": 2})
        yield manager
        for row in tables.pool_history(manager.db.path):
            if row["old_state"] and row["new_state"]:
                assert row["new_state"] in POOL_MOVES[VmStates(row["old_state"])], row


def add(pool: VmManager, *names: str, group: int | str = 7) -> None:
    """Add VMs and find them well."""
    for name in names:
        pool.add_vm_to_pool("", name, group)
        check(pool, name)


def check(pool: VmManager, name: str, well: bool = True) -> None:
    """Check a VM's health as the keeper does."""
    with pool.db.transaction() as db:
        if pool.get_vm_by_name(name).state != VmStates.IN_USE:
            vmrm.move_pool_vm(db, name, VmStates.CHECK_HEALTH, check_started_at=1.0)
    (pool.mark_vm_checked if well else pool.mark_vm_check_failed)(name)


def state(pool: VmManager, name: str) -> str:
    """Return a VM's state."""
    return pool.get_vm_by_name(name).state


# === moves =======================================================================================

DECIDED = {
    "spawning": {"got_ip", "terminating"},
    "got_ip": {"check_health", "check_health_failed", "terminating"},
    "check_health": {"ready", "check_health_failed", "terminating"},
    "check_health_failed": {"check_health", "held", "terminating"},
    "ready": {"check_health", "check_health_failed", "in_use", "held", "terminating"},
    "in_use": {"ready", "check_health", "check_health_failed", "held", "terminating"},
    "held": {"terminating"},
    "terminating": set(),
}


def test_exactly_the_decided_moves_are_made() -> None:
    for old, new in product(DECIDED, DECIDED):
        if new == old or new in DECIDED[old]:
            assert vmrm.checked_pool_move(old, new) == new
        else:
            with pytest.raises(ValueError, match=f"cannot move from '{old}' to '{new}'"):
                vmrm.checked_pool_move(old, new)


def test_a_refused_move_is_a_vm_error_and_changes_nothing(pool: VmManager) -> None:
    pool.add_vm_to_pool("192.0.2.1", "a", 7)
    before = pool.get_vm_by_name("a")
    with (
        pytest.raises(VmError, match="VM 'a': a pool VM cannot move from 'got_ip' to 'in_use'"),
        pool.db.transaction() as db,
    ):
        vmrm.move_pool_vm(db, "a", "in_use")
    assert pool.get_vm_by_name("a") == before


# === who gets which VM ===========================================================================


def test_the_owners_sandbox_comes_first_then_a_fresh_vm_then_the_next_group(
    pool: VmManager,
) -> None:
    add(pool, "a", "b")
    add(pool, "c", group="arm")
    first = pool.acquire_vm([7, "arm"], "ann", "sb", ME)
    second = pool.acquire_vm([7, "arm"], "ann", "other", ME)
    assert {first.vm_name, second.vm_name} == {"a", "b"}
    assert pool.acquire_vm([7, "arm"], "ann", "sb", ME).vm_name == "c"
    pool.release_vm(first.vm_name)
    pool.release_vm(second.vm_name)
    again = pool.acquire_vm([7, "arm"], "ann", "other", ME, task_id=5, chroot="f42")
    assert again.vm_name == second.vm_name
    assert (again.task_id, again.chroot, again.builds_count, again.group) == ("5", "f42", 1, 7)
    assert pool.get_vm_by_task_id("5") == again
    with pytest.raises(NoVmAvailable, match="none ready"):
        pool.acquire_vm(["arm"], "bob", "sb", ME)


def test_an_owner_is_limited_to_bound_vms_whether_in_use_or_idle(pool: VmManager) -> None:
    add(pool, "a", "b", "c")
    for sandbox in ("1", "2"):
        vm = pool.acquire_vm([7], "ann", sandbox, ME)
        assert pool.can_user_acquire_more_vm("ann", 7) is (sandbox == "1")
        pool.release_vm(vm.vm_name)
    with pytest.raises(
        NoVmAvailable, match=r"7: limit reached \(2 of 2 bound to ann, 2 of them idle in other"
    ):
        pool.acquire_vm([7], "ann", "3", ME)
    assert pool.acquire_vm([7], "bob", "3", ME)
    pool.start_vm_termination(vm.vm_name, allowed_pre_state="ready")
    assert pool.can_user_acquire_more_vm("ann", 7)


def test_a_vm_that_is_ill_or_was_not_checked_since_the_start_is_never_given(
    pool: VmManager,
) -> None:
    pool.add_vm_to_pool("", "new", 7)
    with pytest.raises(NoVmAvailable, match="1 of 1 not checked yet"):
        pool.acquire_vm([7], "ann", "s", ME)
    check(pool, "new", well=False)
    assert state(pool, "new") == "check_health_failed"
    with pytest.raises(NoVmAvailable, match="1 failed their check"):
        pool.acquire_vm([7], "ann", "s", ME)
    check(pool, "new")
    pool.mark_server_start()
    with pytest.raises(NoVmAvailable, match="1 of 1 not checked yet"):
        pool.acquire_vm([7], "ann", "s", ME)
    check(pool, "new")
    assert pool.acquire_vm([7], "ann", "s", ME).vm_name == "new"


@pytest.mark.parametrize("limit", [{"reuse_max_count": 1}, {"reuse_max_age": 60}])
def test_a_vm_that_was_used_enough_is_not_given_again(
    pool: VmManager, limit: dict[str, int]
) -> None:
    add(pool, "a", "b")
    vmrm.put_group(pool.db, "7", limit)
    vm = pool.acquire_vm([7], "ann", "s", ME)
    pool.db.write("UPDATE pool_vms SET spawned_at = spawned_at - 61 WHERE state = 'in_use'")
    pool.release_vm(vm.vm_name)
    assert pool.acquire_vm([7], "ann", "s", ME).vm_name != vm.vm_name


def test_a_check_that_fails_during_a_lease_counts_at_its_release(pool: VmManager) -> None:
    add(pool, "a")
    pool.acquire_vm([7], "ann", "s", ME)
    check(pool, "a", well=False)
    assert state(pool, "a") == "in_use"
    assert pool.release_vm("a") is True
    assert state(pool, "a") == "check_health_failed"


# === release =====================================================================================


def test_a_release_hook_stands_between_release_and_the_next_lease(pool: VmManager) -> None:
    hooks = {"release": "revert", "release_cleans": 1, "terminate": "x"}
    vmrm.put_group(pool.db, "7", hooks)
    add(pool, "a", "b")
    for name, failure in (("a", ""), ("b", "no snapshot")):
        vm = pool.acquire_vm([7], "ann", "s", ME)
        pool.release_vm(vm.vm_name)
        pool.mark_vm_checked(vm.vm_name)
        assert state(pool, vm.vm_name) == "check_health", name
        pool.mark_vm_released(vm.vm_name, failure)
        assert state(pool, vm.vm_name) == ("terminating" if failure else "ready")
        if not failure:
            assert pool.get_vm_by_name(vm.vm_name).bound_to_user is None
            pool.start_vm_termination(vm.vm_name)


def test_removal_needs_a_terminating_vm_and_is_remembered(pool: VmManager) -> None:
    add(pool, "a")
    with pytest.raises(VmError, match="only a terminating one"):
        pool.remove_vm_from_pool("a")
    with pytest.raises(VmError, match="is ready, not in_use"):
        pool.start_vm_termination("a", allowed_pre_state="in_use")
    pool.start_vm_termination("a")
    pool.remove_vm_from_pool("A")
    with pytest.raises(VmError, match="no VM 'a'"):
        pool.get_vm_by_name("a")
    assert [row["new_state"] for row in tables.pool_history(pool.db.path)] == [
        *("got_ip", "check_health", "ready", "terminating", None)
    ]


# === leases ======================================================================================


def test_only_who_has_the_token_or_is_the_holder_may_release(pool: VmManager) -> None:
    add(pool, "a", "b")
    vm = pool.acquire_vm([7], "ann", "s", ME)
    stranger = VmManager(db=pool.db)
    assert stranger.release_vm(vm.vm_name), "it is the same process"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        vm = pool.acquire_vm([7], "ann", "s", child.pid)
        with pytest.raises(VmError, match="not yours; ann has it"):
            stranger.release_vm(vm.vm_name)
        with pytest.raises(VmError, match="was lost"):
            stranger.release_vm(vm.vm_name, token="0" * 32)
        with pytest.raises(VmError, match="not yours; ann has it"):
            stranger.start_vm_termination(vm.vm_name, force=False)
        assert vm.token
        assert stranger.renew_vm(vm.vm_name, 60, token=vm.token) > time.time() + 59
        assert stranger.release_vm(vm.vm_name, force=True)
        assert stranger.release_vm(vm.vm_name) is False
        with pytest.raises(VmError, match="was lost; the VM is ready"):
            pool.release_vm(vm.vm_name)
    finally:
        child.communicate(b"\n")


def test_a_vm_of_a_dead_process_is_taken_back_when_it_is_needed(pool: VmManager) -> None:
    add(pool, "a")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lost = pool.acquire_vm([7], "ann", "s", child.pid)
    assert pool.reap() == []
    with pytest.raises(NoVmAvailable, match="1 in use"):
        pool.acquire_vm([7], "ann", "s", ME)
    child.kill()
    child.communicate()
    with pytest.raises(vmrm.UsageError, match="there is no process"):
        pool.acquire_vm([7], "ann", "s", child.pid)
    assert pool.acquire_vm([7], "ann", "s", ME).token != lost.token
    assert lost.token
    with pytest.raises(VmError, match="was lost"):
        pool.release_vm("a", token=lost.token)
    ready = [row for row in tables.pool_history(pool.db.path) if row["new_state"] == "ready"]
    assert f"process {child.pid}, is dead" in ready[-1]["reason"]


def in_python(db: Path, code: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start a process that runs *code* with a manager `pool` of the database."""
    script = f"import os, sys, vmrm\npool = vmrm.VmManager(db={str(db)!r})\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("point", "leased"),
    [
        ("pool-acquiring", False),
        ("pool-acquired", True),
        ("pool-releasing", True),
        ("pool-released", False),
    ],
)
def test_a_process_killed_at_any_step_leaves_a_vm_that_can_be_lent(
    pool: VmManager, point: str, leased: bool
) -> None:
    add(pool, "a")
    code = "vm = pool.acquire_vm([7], 'ann', 's', os.getpid()); pool.release_vm('a')"
    child = in_python(pool.db.path, code, VMRM_CRASH=point)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert state(pool, "a") == ("in_use" if leased else "ready")
    faults = [f"VM a: its holder, process {child.pid}, is dead"] if leased else []
    assert vmrm.check(pool.db) == faults
    vmrm.check(pool.db, fix=True)
    assert vmrm.check(pool.db) == []
    assert pool.acquire_vm([7], "ann", "s", ME)


def test_a_lease_that_changes_hands_while_it_is_looked_at_is_left_alone(
    pool: VmManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(pool, "a")
    child = subprocess.Popen(["sleep", "1000"])
    vm = pool.acquire_vm([7], "ann", "s", child.pid)
    child.kill()
    child.wait()
    is_alive = vmrm.Process.is_alive

    def slow(self: vmrm.Process) -> bool:
        pool.hand_over(vm, vmrm.Process.of(ME))
        return is_alive(self)

    monkeypatch.setattr(vmrm.Process, "is_alive", slow)
    assert pool.reap() == []
    assert pool.get_vm_by_name("a").holder_pid == ME


@pytest.mark.parametrize("never", [math.inf, math.nan, 1e300, 3e11])
def test_an_end_that_no_calendar_has_is_refused(pool: VmManager, never: float) -> None:
    add(pool, "a")
    with pytest.raises(vmrm.UsageError, match="no date"):
        pool.acquire_vm([7], "ann", "s", ME, lease=never)
    pool.acquire_vm([7], "ann", "s", ME, lease=60)
    for refused in (pool.renew_vm, pool.hold_vm):
        with pytest.raises(vmrm.UsageError, match="no date"):
            refused("a", never)
    with pytest.raises(vmrm.UsageError, match="no time"):
        pool.renew_vm("a", 0)
    assert "until" in pool.info()


def test_a_lease_with_an_end_is_taken_back_after_it_but_not_if_renewed(tmp_path: Path) -> None:
    timeouts = vmrm.Timeouts(lease_grace=0.0)
    with vmrm.Database(tmp_path / "lab.db", timeouts=timeouts) as db:
        pool = VmManager(db=db)
        vmrm.put_group(db, "7", {})
        add(pool, "a", "b")
        with pytest.raises(vmrm.UsageError, match="needs an end"):
            pool.acquire_vm([7], "ann", "s", None)
        kept, lost = (pool.acquire_vm([7], "ann", "s", None, lease=0.5) for _ in "12")
        pool.renew_vm(kept.vm_name, 60)
        time.sleep(0.6)
        assert pool.reap() == [lost.vm_name]
        with pytest.raises(VmError, match="was lost; the VM is ready"):
            pool.renew_vm(lost.vm_name, 60)
        assert state(pool, kept.vm_name) == "in_use"


def test_a_holder_of_another_boot_is_dead_and_one_of_another_namespace_is_not_judged(
    pool: VmManager,
) -> None:
    add(pool, "a", "b")
    vms = [pool.acquire_vm([7], "ann", name, ME).vm_name for name in ("a", "b")]
    for name, words in zip(vms, ({"boot": "other"}, {"namespace": 1}), strict=True):
        tables.set_holder(pool.db.path, name, pid=4194303, **words)
    assert len(pool.reap()) == 1
    left = pool.get_vm_by_group_and_state_list(None, ["in_use"])
    assert [vm.holder.split()[-1] for vm in left] == ["1"]


@pytest.fixture
def another_namespace() -> list[str]:
    """Return the words by which a program runs in a pid namespace of its own."""
    words = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*words, "true"], check=False).returncode:
        pytest.skip("this user may not make pid namespaces")
    return words


def test_from_another_pid_namespace_a_lease_needs_an_end_which_alone_decides(
    pool: VmManager, another_namespace: list[str], cli: Cli
) -> None:
    add(pool, "a")
    pool.mark_server_start()
    check(pool, "a")
    acquire = ["pool", "acquire", "7", "--pid", "1"]
    for words, code in ((acquire, 2), ([*acquire, "--lease", "60"], 0)):
        command = [*another_namespace, *cli.command(*words)]
        done = subprocess.run(command, env=cli.environment, capture_output=True, check=False)
        assert done.returncode == code, done.stderr
    assert b"another pid namespace" in done.stderr or code == 0
    assert pool.reap() == [], "process 1 of that namespace has ended, but who knows"
    tables.put(pool.db.path, "leases", {"lease_end_at": 5.0})
    assert pool.reap() == ["a"]


def test_a_leased_vm_is_kept_and_released_by_a_with_block(
    pool: VmManager, caplog: pytest.LogCaptureFixture
) -> None:
    add(pool, "a")
    pool.db.timeouts = vmrm.Timeouts(look=0.02)
    with pool.lease([7], "ann", "s", lease=0.3) as vm:
        until(lambda: (pool.get_vm_by_name("a").lease_end_at or 0) > (vm.lease_end_at or 0) + 0.3)
    assert state(pool, "a") == "ready"
    with pytest.raises(ZeroDivisionError), pool.lease([7], "ann", "s"):
        raise ZeroDivisionError
    assert state(pool, "a") == "ready"
    with pytest.raises(VmError, match="was lost"), pool.lease([7], "ann", "s"):
        VmManager(db=pool.db).release_vm("a", force=True)
        until(lambda: "was lost" in caplog.text)


def test_a_held_vm_outlives_its_lease_and_can_only_be_terminated(pool: VmManager) -> None:
    add(pool, "a")
    date = time.time() + 60
    with pool.lease([7], "ann", "s"):
        pool.hold_vm("a", date)
        assert pool.get_vm_by_name("a").token
    vm = pool.get_vm_by_name("a")
    assert (vm.state, vm.token, vm.held_until) == ("held", None, date)
    pool.hold_vm("a", date + 1)
    assert pool.get_vm_by_name("a").held_until == date + 1
    with pytest.raises(NoVmAvailable):
        pool.acquire_vm([7], "ann", "s", ME)
    pool.start_vm_termination("a")


# === the queue ===================================================================================


@contextmanager
def waiters(pool: VmManager, *wants: dict[str, Any]) -> Iterator[list[str]]:
    """Have threads wait, one after the other; yield who was served, in order."""
    served: list[str] = []
    over = threading.Event()

    def wait(owner: str, **more: Any) -> None:
        with VmManager(db=pool.db.path) as mine:
            vm = mine.acquire_vm([7], owner, "s", ME, wait=60, **more)
            served.append(owner)
            over.wait(60)
            if mine.get_vm_by_name(vm.vm_name).token == vm.token:
                mine.release_vm(vm.vm_name)

    threads = [threading.Thread(target=wait, kwargs=want) for want in wants]
    for count, thread in enumerate(threads, 1):
        thread.start()
        until(lambda count=count: len(pool.queue()) == count)
    yield served
    over.set()
    vmrm.put_group(pool.db, "7", {"max_vm_per_user": None})
    add(pool, *(f"extra{number}" for number in range(len(wants))))
    for thread in threads:
        thread.join()


def test_the_queue_is_served_by_priority_then_in_order_and_by_nobody_overtaken(
    pool: VmManager,
) -> None:
    vmrm.put_group(pool.db, "7", {"release": "true", "release_cleans": 1})
    add(pool, "a")
    pool.acquire_vm([7], "zoe", "s", ME)
    wants = [{"owner": "ann"}, {"owner": "bob"}, {"owner": "cyd", "priority": 1}]
    order = ["cyd", "ann", "bob"]
    with waiters(pool, *wants) as served:
        for count, owner in enumerate(order, 1):
            pool.release_vm("a", force=True)
            pool.mark_vm_released("a")
            with pytest.raises(NoVmAvailable):
                VmManager(db=pool.db).acquire_vm([7], "eve", "s", ME)
            until(lambda count=count: len(served) == count)
            assert served[-1] == owner
    assert not tables.pool_waiters(pool.db.path)


def test_a_waiter_whose_owner_is_at_its_limit_holds_up_nobody(pool: VmManager) -> None:
    vmrm.put_group(pool.db, "7", {"max_vm_per_user": 1})
    add(pool, "a", "b")
    pool.acquire_vm([7], "ann", "other", ME)
    with waiters(pool, {"owner": "ann"}) as served:
        with pytest.raises(NoVmAvailable, match="limit reached"):
            pool.acquire_vm([7], "ann", "s", ME)
        assert pool.acquire_vm([7], "bob", "s", ME)
        assert served == []


def test_a_waiter_that_is_killed_leaves_the_queue(pool: VmManager) -> None:
    add(pool, "a")
    pool.acquire_vm([7], "zoe", "s", ME)
    code = "pool.acquire_vm([7], 'zoe', 's', os.getpid(), wait=60)"
    child = in_python(pool.db.path, code)
    until(pool.queue)
    child.kill()
    child.communicate()
    assert f"queue: process {child.pid} is dead" in vmrm.check(pool.db)
    assert list(pool.db.directory("wake").glob("wait-*"))
    pool.release_vm("a")
    assert pool.acquire_vm([7], "zoe", "s", ME)
    assert vmrm.check(pool.db) == []
    assert not list(pool.db.directory("wake").glob("wait-*"))


def test_a_wait_has_an_end_and_says_what_it_waits_for(pool: VmManager) -> None:
    add(pool, "a")
    pool.acquire_vm([7], "zoe", "s", ME)
    request = vmrm.Request((("7",),), "ann", "s", vmrm.Process.of(ME))
    told: list[str] = []
    with pytest.raises(
        vmrm.TimedOut, match=r"after 0\.1 s no VM is available: group 7: none ready"
    ):
        pool.acquire(request, 0.1, told.append)
    assert told[0].startswith("number 1 in the queue; no VM is available: group 7: none ready")
    assert pool.queue() == []


def test_several_vms_are_leased_at_once_or_none(pool: VmManager) -> None:
    add(pool, "a")
    add(pool, "b", group="arm")
    wants, holder = (("7",), ("arm", "7"), ("7",)), vmrm.Process.of(ME)
    with pytest.raises(NoVmAvailable):
        pool.acquire(vmrm.Request(wants, "ann", "s", holder))
    assert [vm.state for vm in pool.get_all_vm()] == ["ready", "ready"]
    vms = pool.acquire(vmrm.Request(wants[:2], "ann", "s", holder))
    assert [vm.vm_name for vm in vms] == ["a", "b"]


# === what is asked often =========================================================================


def test_no_statement_of_an_acquire_or_release_reads_the_whole_pool(pool: VmManager) -> None:
    add(pool, "a")
    asked: list[str] = []
    pool.db.connection.set_trace_callback(asked.append)
    pool.acquire_vm([7], "ann", "s", ME)
    pool.release_vm("a")
    pool.db.connection.set_trace_callback(None)
    tables_ = re.compile("pool_vms|pool_list|leases")
    read = [sql for sql in asked if tables_.search(sql) and not sql.startswith("--")]
    assert len(read) >= 4
    for sql in read:
        plan = [row["detail"] for row in pool.db.query(f"EXPLAIN QUERY PLAN {sql}")]
        too_much = re.compile(r"SCAN [^C]|SEARCH (pool_vms|p) .*\(group=\?( AND state=\?)?\)$")
        assert not [step for step in plan if too_much.match(step)], (sql, plan)


def test_what_binds_a_vm_or_outlives_its_process_is_synced_and_nothing_else(
    pool: VmManager,
) -> None:
    add(pool, "a")
    asked: list[str] = []
    pool.db.connection.set_trace_callback(asked.append)

    def synced(lease: float | None) -> list[bool]:
        """Whether the acquire, and the release after it, would survive a power cut."""
        found = []
        for step in (lambda: pool.acquire_vm([7], "ann", "s", ME, lease=lease), None):
            asked.clear()
            step() if step else pool.release_vm("a")
            found.append("PRAGMA synchronous = FULL" in asked)
        return found

    assert synced(None) == [True, False], "it was bound"
    assert synced(None) == [False, False]
    assert synced(60) == [True, True]


def test_groups_and_their_settings_come_from_opts_as_in_the_reference(tmp_path: Path) -> None:
    groups = {0: {"name": "x86", "archs": ["x86_64"], "max_vm_per_user": 3}, "arm": {}}
    for opts in ({"build_groups": groups}, SimpleNamespace(build_groups=groups)):
        with VmManager(opts, db=tmp_path / "lab.db") as pool:
            assert pool.vm_groups == [0, "arm"]
            assert pool.group(0)["max_vm_per_user"] == 3
            vm = pool.add_vm_to_pool("192.0.2.7", "v", 0)
            assert (vm.group, vm.state, vm.vm_ip) == (0, "got_ip", "192.0.2.7")
            pool.start_vm_termination("v")
            pool.remove_vm_from_pool("v")
    with (
        VmManager(db=tmp_path / "lab.db") as pool,
        pytest.raises(vmrm.NotFound, match="no group '1'"),
    ):
        pool.acquire_vm([1], "ann", "s", ME)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_vm": 1}, "unknown key 'max_vm'.*max_vm_"),
        ({"min_ready": -1}, "min_ready cannot be -1"),
        ({"min_ready": None}, "min_ready cannot be None"),
        ({"vm_health_check_period": "soon"}, "vm_health_check_period cannot be 'soon'"),
        ({"list": [1]}, r"list cannot be \[1\]"),
    ],
)
def test_a_wrong_setting_is_refused_and_changes_nothing(
    pool: VmManager, settings: dict[str, Any], says: str
) -> None:
    before = tables.pool_groups(pool.db.path)
    with pytest.raises(ValueError, match=says):
        vmrm.put_group(pool.db, "7", {"max_vm_total": 3} | settings)
    assert tables.pool_groups(pool.db.path) == before


def test_a_descriptor_stores_what_was_changed_and_moves_by_the_table(pool: VmManager) -> None:
    add(pool, "a")
    vm = vmrm.VmDescriptor.load(pool.db, "a")
    vm.vm_ip, vm.state = "192.0.2.9", "terminating"
    taken = pool.acquire_vm([7], "ann", "s", ME)
    pool.release_vm("a")
    vm.store(pool.db)
    assert pool.get_vm_by_name("a").bound_to_user == taken.bound_to_user, "it was not changed here"
    assert pool.lookup_vms_by_ip("192.0.2.9")[0].state == "terminating"
    with pytest.raises(VmError, match="cannot move"):
        vm.store_field(pool.db, "state", "ready")
    assert [vm.vm_name for vm in pool._load_multi_safe(["a", "b"])] == ["a"]
    add(pool, "b")
    with pytest.raises(VmError, match="cannot be stored so"):  # without a lease
        pool.get_vm_by_name("b").store_field(pool.db, "state", "in_use")


def test_names_that_others_chose_cannot_steer_a_terminal(pool: VmManager) -> None:
    add(pool, "a")
    pool.acquire_vm([7], "ann\x1b[2J", "s\n", ME, task_id="\x9b")
    assert all(character.isprintable() for line in pool.info().split("\n") for character in line)
    assert len(pool.info().split("\n")) == 3


def test_metrics_are_gauges_and_counters_of_every_group(pool: VmManager) -> None:
    add(pool, "a", "b")
    pool.acquire_vm([7], "ann", "s", ME)
    lines = pool.metrics().splitlines()
    assert 'vmrm_pool_vms{group="7",state="in_use"} 1' in lines
    assert 'vmrm_pool_vms{group="arm",state="ready"} 0' in lines
    assert 'vmrm_pool_moves_total{group="7",state="ready"} 2' in lines
    assert "vmrm_pool_waiters 0" in lines
    for line in lines:
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="\w+",\w+="\w+"\})? \d+', line), line


# === the command line ============================================================================


def test_a_session_of_commands(pool: VmManager, cli: Cli) -> None:
    add(pool, "a")
    done = cli("pool", "acquire", "7", "--owner", "ann", "--json")
    lease = json.loads(done.out)
    assert (done.code, lease["name"], lease["group"]) == (0, "a", 7)
    again = cli("pool", "acquire", "7")
    assert again.code == 75
    assert again.err.startswith("error: no VM is available: group 7: none ready (1 VM: 1 in use")
    timed_out = cli("pool", "acquire", "7", "--wait", "--timeout", "0.1")
    assert timed_out.code == 124
    assert "number 1 in the queue" in timed_out.err
    assert "not yours; ann has it" in cli("pool", "release", "a").err
    assert cli("pool", "terminate", "a").code == 2
    assert cli("pool", "renew", "a", "--token", lease["token"]).code == 0
    assert cli("pool", "release", "a", env={"VMRM_LEASE": lease["token"]}).code == 0
    shown = cli("pool", "acquire", "7", "--owner", "ann", "--format", "{name}={path}")
    assert shown.out == "a=\n"
    assert cli("pool", "hold", "a", "2h", "--force").code == 0
    assert cli("pool", "list").out.startswith("a\t7\theld\t")
    assert cli("pool", "terminate", "a", "--force").code == 0
    assert cli("pool", "remove", "a").code == 0
    assert cli("pool", "history", "a").out.splitlines()[-1].split("\t")[3:5] == [
        *("terminating", "(gone)")
    ]


def test_a_command_holds_the_vm_and_passes_its_exit_code_and_signals(
    pool: VmManager, cli: Cli
) -> None:
    add(pool, "a")
    acquire = ["pool", "acquire", "7", "--owner", "ann", "--lease", "60", "--"]
    script = "echo $VMRM_VM $VMRM_LEASE; exit 7"
    done = cli(*acquire, "sh", "-c", script)
    assert (done.code, done.out.split()[0]) == (7, "a")
    assert cli(*acquire, "/no/such/program").code == 127
    assert state(pool, "a") == "ready"
    script = "trap 'exit 9' TERM INT; echo up; while :; do sleep .1; done"
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            cli.command(*acquire, "sh", "-c", script),
            env=cli.environment,
            stdout=subprocess.PIPE,
            start_new_session=True,  # no terminal, which would tell both
        ) as process:
            assert process.stdout
            process.stdout.readline()
            process.send_signal(number)
            assert process.wait(20) == 9
        assert pool.reap() == ["a"]


def test_a_command_has_its_vm_for_as_long_as_it_lives_and_the_next_gets_it_at_once(
    pool: VmManager, cli: Cli
) -> None:
    add(pool, "a", "b")
    acquire = ["pool", "acquire", "7", "--owner", "ann", "--sandbox"]
    with subprocess.Popen(
        cli.command(*acquire, "s", "--", "sh", "-c", "echo $$; read x"),
        env=cli.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert int(process.stdout.readline()) == process.pid, "vmrm has become the command"
        [mine] = pool.get_vm_by_group_and_state_list(None, ["in_use"])
        assert (mine.holder_pid, mine.lease_end_at) == (process.pid, None)
        assert pool.reap() == []
        assert pool.acquire_vm([7], "ann", "other", ME).vm_name != mine.vm_name
        pool.db.timeouts = vmrm.Timeouts(look=1000)
        served: list[str] = []

        def wait() -> None:
            with VmManager(db=pool.db) as waiting:
                served.append(waiting.acquire_vm([7], "ann", "s", ME, wait=600).vm_name)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        until(pool.queue)
        time.sleep(0.3)  # until it waits
        process.stdin.close()
        thread.join(60)
    assert served == [mine.vm_name]


def test_the_vm_of_a_command_that_has_ended_is_used_again_before_another_is_bound(
    pool: VmManager, cli: Cli
) -> None:
    add(pool, "a", "b")
    for _ in range(3):
        acquire = ["pool", "acquire", "7", "--owner", "ann", "--lease", "60", "--"]
        assert cli(*acquire, "true").code == 0
    assert sorted(vm.bound_to_user or "" for vm in pool.get_all_vm()) == ["", "ann"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("pool acquire", "no group is named"),
        ("pool acquire 7 --", "nothing follows --"),
        ("pool acquire 7 --pid 5 -- true", "takes no --pid"),
        ("pool acquire 7 --format {vm}", "--format: {vm} is none of name, ip"),
        ("pool acquire 8", "no group '8'"),
        ("pool acquire 7 --owner=", "needs an owner"),
        ("pool add a/b 7", "VM name 'a/b' is not usable"),
        ("pool acquire 7 --lease 0", "a lease of no time"),
        ("pool acquire 7 --timeout 5", "--timeout is for --wait"),
        ("pool group 7 --spawn --list x", "--spawn needs a value"),
        ("pool group 7 --min-ready soon", "min_ready cannot be 'soon'"),
        ("pool group 7 --min-redy 1", "min_ready"),
        ("pool list 8", "no group '8'"),
        ("pool add a 8", "no group '8'"),
        ("pool add a 7 --path tcp:", "tcp:"),
        ("pool hold a soon", "'soon' is neither a time"),
        ("pool remove a", "no VM 'a'"),
        ("pool log ../a", "VM name '../a' is not usable"),
    ],
)
def test_a_wrong_command_is_one_clear_line(
    pool: VmManager, cli: Cli, words: str, says: str
) -> None:
    done = cli(*words.split())
    assert done.code == 2, done
    assert says in done.err.splitlines()[0]
    assert not tables.pool_vms(pool.db.path)


def test_a_groups_settings_are_set_cleared_and_shown(pool: VmManager, cli: Cli) -> None:
    words = ["--max-vm-per-user", "3", "--reuse-max-age", "2h", "--spawn", "5m", "--release-cleans"]
    shown = json.loads(cli("pool", "group", "new", *words, "--json").out)
    assert [shown[key] for key in ("max_vm_per_user", "reuse_max_age", "spawn")] == [3, 7200, "5m"]
    assert shown["release_cleans"] == 1
    words = ["--max-vm-per-user", "none", "--spawn", "none"]
    shown = json.loads(cli("pool", "group", "new", *words, "--json").out)
    assert [shown[key] for key in ("max_vm_per_user", "reuse_max_age", "spawn")] == [None, 7200, ""]
    listed = json.loads(cli("pool", "group", "--json").out)
    assert [row["name"] for row in listed] == ["7", "arm", "new"]


def test_a_date_may_be_given_in_several_ways() -> None:
    assert vmrm._moment("2030-12-31T18:00") == datetime(2030, 12, 31, 18, tzinfo=UTC).timestamp()
    assert abs(vmrm._moment("2h") - time.time() - 7200) < 60
    assert [vmrm.parse_seconds(text) for text in ("90", "0.5s", "5m", "3d")] == [
        *(90, 0.5, 300, 259200)
    ]
