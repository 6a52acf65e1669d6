"""The pool: who gets which VM, who may give it back, and what is left when somebody dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

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
        for row in manager.db.query("SELECT * FROM pool_history WHERE new_state IS NOT NULL"):
            if row["old_state"]:
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


@pytest.mark.parametrize(("old", "new"), list(product(DECIDED, DECIDED)))
def test_exactly_the_decided_moves_are_made(old: str, new: str) -> None:
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


def test_a_check_that_fails_during_a_lease_counts_at_its_release(pool: VmManager) -> None:
    add(pool, "a")
    pool.acquire_vm([7], "ann", "s", ME)
    check(pool, "a", well=False)
    assert state(pool, "a") == "in_use"
    assert pool.release_vm("a") is True
    assert state(pool, "a") == "check_health_failed"


# === release =====================================================================================


def test_a_release_hook_stands_between_release_and_the_next_lease(pool: VmManager) -> None:
    vmrm.put_group(pool.db, "7", {"release": "revert", "release_cleans": 1})
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
    states = pool.db.query("SELECT new_state FROM pool_history ORDER BY id")
    assert [row["new_state"] for row in states] == [
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
        assert vm.token
        assert stranger.renew_vm(vm.vm_name, 60, token=vm.token) > time.time() + 59
        assert stranger.release_vm(vm.vm_name, force=True)
        with pytest.raises(VmError, match="nobody has a lease"):
            stranger.release_vm(vm.vm_name)
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
    last = pool.db.query("SELECT reason FROM pool_history WHERE new_state = 'ready'")[-1]
    assert f"process {child.pid}, is dead" in last["reason"]
