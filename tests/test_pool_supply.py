"""Who waits for a VM gets one: recycled, spawned, from whichever of the groups can serve it."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tables
from cli_lab import until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keepers import FAST, Provider, group, keep, reasons, served, states
from lab import VMRM

import vmrm

ME = os.getpid()


@pytest.fixture
def pool(db: vmrm.Database) -> vmrm.VmManager:
    return vmrm.VmManager(db=db)


# === who gets what ===============================================================================

OWNERS, BOXES, GROUPS = ("ann", "bob"), ("s", "t"), ("a", "b")


def vm(number: int, group: str, bound: tuple[str, str] | None, ready: bool) -> dict[str, Any]:
    """Return a row of pool_vms."""
    row = {"vm_name": f"vm{number}", "group": group, "state": "ready" if ready else "in_use"}
    return row | {"bound_to_user": bound and bound[0], "bound_sandbox": bound[1] if bound else ""}


bindings = st.none() | st.tuples(st.sampled_from(OWNERS), st.sampled_from(BOXES))
machines = st.lists(st.tuples(st.sampled_from(GROUPS), bindings, st.booleans()), max_size=8)
wishes = st.lists(
    st.tuples(
        st.lists(
            st.lists(st.sampled_from(GROUPS), min_size=1, max_size=2, unique=True),
            min_size=1,
            max_size=2,
        ),
        st.sampled_from(OWNERS),
        st.sampled_from(BOXES),
    ),
    max_size=5,
)
limits = st.fixed_dictionaries({name: st.none() | st.integers(0, 3) for name in GROUPS})


@given(machines=machines, wishes=wishes, limits=limits)
@example(  # what is hopeless for the first is there for the second
    machines=[("a", None, True)],
    wishes=[([["a"], ["a"]], "ann", "s"), ([["a"]], "ann", "s")],
    limits={"a": 1, "b": None},
)
def test_who_can_be_served_is_served_and_nobody_beyond_a_limit(
    machines: list[tuple[str, tuple[str, str] | None, bool]],
    wishes: list[tuple[list[list[str]], str, str]],
    limits: dict[str, int | None],
) -> None:
    vms = [vm(number, *machine) for number, machine in enumerate(machines)]
    vms = [
        {**row, "bound_to_user": row["bound_to_user"] or "zoe"} if row["state"] == "in_use" else row
        for row in vms
    ]
    bound = Counter((row["group"], row["bound_to_user"]) for row in vms)

    def free(group: str, owner: str | None, sandbox: str) -> list[str]:
        wanted = {"group": group, "state": "ready", "bound_to_user": owner}
        wanted["bound_sandbox"] = sandbox
        return [row["vm_name"] for row in vms if wanted.items() <= row.items()]

    def room(group: str, owner: str) -> float:
        limit = limits[group]
        return math.inf if limit is None else limit - bound[group, owner]

    queue = [
        vmrm.Request(tuple(map(tuple, wants)), owner, box, None) for wants, owner, box in wishes
    ]
    shares = vmrm.allot(queue, free, room)
    assert [share.request for share in shares] == queue
    rows = {row["vm_name"]: row for row in vms}
    given = [name for share in shares for name in share.vm_names]
    assert len(given) == len(set(given)), "nothing is given twice"
    for share in shares:
        request = share.request
        assert len(share.vm_names) + len(share.missing) <= len(request.wants)
        assert share.missing or len(share.vm_names) == len(request.wants), "all, or some miss"
        for name in share.vm_names:
            row = rows[name]
            assert row["state"] == "ready"
            assert row["bound_to_user"] in (None, request.owner)
            if row["bound_to_user"] is None:
                bound[row["group"], request.owner] += 1
                limit = limits[row["group"]]
                assert limit is None or bound[row["group"], request.owner] <= limit
            else:
                assert row["bound_sandbox"] == request.sandbox
    for share in shares:  # what is left is nobody's who could have had it
        for groups_of_want in share.missing if len(share.request.wants) == 1 else ():
            for name in rows.keys() - set(given):
                row, owner = rows[name], share.request.owner
                own = (row["bound_to_user"], row["bound_sandbox"]) == (owner, share.request.sandbox)
                limit = limits[row["group"]]
                fresh = row["bound_to_user"] is None and (
                    limit is None or bound[row["group"], owner] < limit
                )
                usable = row["state"] == "ready" and row["group"] in groups_of_want
                assert not (usable and (own or fresh))


class Taken(Exception):
    """Undoes a lease after it was seen what was leased."""


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[vmrm.Database, float]]:
    """Yield a pool with VMs of every kind, and since when their checks count."""
    with vmrm.Database(tmp_path_factory.mktemp("crowd") / "lab.db", timeouts=FAST) as db:
        pool, now = vmrm.VmManager(db=db), time.time()
        for name in GROUPS:
            vmrm.put_group(db, name, {})
        kinds = [("ann", "s"), ("ann", "s"), ("ann", "t"), ("bob", "s"), *5 * [None]]
        tokens = {}
        for number, (name, bound) in enumerate(itertools.product(GROUPS, kinds)):
            vm = pool.add_vm_to_pool("", f"vm{number}", name)
            vm.store_field(db, "state", "check_health")
            vm.store_field(db, "spawned_at", now - 1000 * (number // 3 % 2))
            vm.store_field(db, "builds_count", number % 3)
            pool.mark_vm_checked(vm.vm_name)
            if bound:
                mine = pool.acquire_vm([name], *bound, ME)
                tokens[mine.vm_name] = mine.token
        for number, (vm_name, token) in enumerate(tokens.items()):
            if number % 4:
                pool.release_vm(vm_name, token=token)
        pool.mark_server_start()
        since = time.time()
        for vm in pool.get_all_vm():
            if vm.state == "ready" and int(vm.vm_name[2:]) % 5:
                vm.store_field(db, "state", "check_health")
                pool.mark_vm_checked(vm.vm_name)
        yield db, since


@given(
    wants=st.lists(
        st.lists(st.sampled_from(GROUPS), min_size=1, max_size=2, unique=True),
        min_size=1,
        max_size=3,
    ),
    owner=st.sampled_from((*OWNERS, "eve")),
    box=st.sampled_from(BOXES),
    limits=limits,
    reuse=st.fixed_dictionaries(
        {"reuse_max_count": st.sampled_from([None, 1, 2]), "reuse_max_age": st.none() | st.just(9)}
    ),
)
@settings(deadline=None)
def test_who_comes_alone_gets_what_the_rows_have_for_him(
    crowd: tuple[vmrm.Database, float],
    wants: list[list[str]],
    owner: str,
    box: str,
    limits: dict[str, int | None],
    reuse: dict[str, int | None],
) -> None:
    db, since = crowd
    for name in GROUPS:
        vmrm.put_group(db, name, {"max_vm_per_user": limits[name], **reuse})

    def within(rows: list[dict[str, Any]]) -> None:
        raise Taken([row["vm_name"] for row in rows])

    request = vmrm.Request(tuple(map(tuple, wants)), owner, box, vmrm.Process.of(ME), within=within)
    vms = sorted(tables.pool_vms(db.path).values(), key=lambda row: row["last_health_check"])

    def free(group: str, owner: str | None, sandbox: str) -> list[str]:
        wanted = {"group": group, "state": "ready", "bound_to_user": owner}
        wanted["bound_sandbox"] = sandbox
        return [
            row["vm_name"]
            for row in vms
            if wanted.items() <= row.items() and row["last_health_check"] > since
            if row["builds_count"] < (reuse["reuse_max_count"] or math.inf)
            if row["spawned_at"] > time.time() - (reuse["reuse_max_age"] or math.inf)
        ]

    def room(group: str, owner: str) -> float:
        bound = sum((row["group"], row["bound_to_user"]) == (group, owner) for row in vms)
        return math.inf if (limit := limits[group]) is None else limit - bound

    [share] = vmrm.allot([request], free, room)
    try:
        vmrm.VmManager(db=db).acquire(request)
    except Taken as taken:
        assert (share.vm_names, share.missing) == (taken.args[0], [])
    except vmrm.NoVmAvailable:
        assert share.missing


# === a group with hooks never starves ============================================================


@pytest.mark.parametrize("by", ["sandboxes", "owners", "sandboxes of an owner at its limit"])
def test_a_group_serves_more_than_it_has_machines(
    by: str, db: vmrm.Database, pool: vmrm.VmManager, provider: Provider
) -> None:
    limit = 1 if "limit" in by else None
    group(db, provider.hooks, max_vm_total=2, max_vm_per_user=limit)
    with served(db.path) as keeper:
        for number in range(4):
            owner, sandbox = ("me", f"box{number}") if by != "owners" else (f"o{number}", "box")
            with pool.lease(["ci"], owner, sandbox, wait=60) as mine:
                assert mine.vm_name in provider.running()
            assert len(provider.running()) <= 2
        keeper.terminate()


def test_the_machine_that_is_idle_for_the_longest_time_goes_and_no_other(
    db: vmrm.Database, pool: vmrm.VmManager, provider: Provider
) -> None:
    group(db, provider.hooks, max_vm_total=4, min_ready=4, max_spawn_processes=4)
    keep(db)
    used = [pool.acquire_vm(["ci"], f"o{number}", "box", ME).vm_name for number in range(4)]
    group(db, {}, min_ready=0)
    for name in (used[2], used[1]):
        pool.release_vm(name)
    pool.hold_vm(used[3], time.time() + 1000)
    before = set(states(db))
    keep(db)
    assert set(states(db)) == before, "nobody waits"
    with served(db.path) as keeper, pool.lease(["ci"], "new", "box", wait=60) as mine:
        assert mine.vm_name not in used
        assert states(db) == {
            used[0]: "in_use",
            used[1]: "ready",
            used[3]: "held",
            mine.vm_name: "in_use",
        }
        keeper.terminate()
    assert "new waits for one, and there is no room" in reasons(db)


@pytest.mark.parametrize("lacking", ["spawn", "terminate"])
def test_no_machine_is_recycled_that_cannot_be_made_anew(
    lacking: str, db: vmrm.Database, pool: vmrm.VmManager, provider: Provider
) -> None:
    group(db, provider.hooks, max_vm_total=1)
    keep(db)
    mine = pool.acquire_vm(["ci"], "me", "box", ME).vm_name
    pool.release_vm(mine)
    group(db, {lacking: "", "list": ""})
    request = vmrm.Request((("ci",),), "you", "box", vmrm.Process.of(ME))
    with vmrm.Waiting(pool, request) as place:
        assert not place.try_again()
        keep(db)
        assert states(db) == {mine: "ready"}


def test_who_was_given_his_vms_keeps_no_others_from_those_behind_him(
    db: vmrm.Database, pool: vmrm.VmManager, provider: Provider
) -> None:
    group(db, provider.hooks, max_vm_total=2, min_ready=2)
    keep(db)
    request = vmrm.Request((("ci",),), "me", "box", vmrm.Process.of(ME))
    with vmrm.Waiting(pool, request) as place:
        assert place.try_again()
        assert pool.queue() == []
        assert pool.acquire_vm(["ci"], "you", "box", ME)


def test_no_more_machines_are_recycled_than_one_while_none_can_be_made(
    db: vmrm.Database, pool: vmrm.VmManager, provider: Provider
) -> None:
    group(db, provider.hooks, max_vm_total=3, min_ready=3)
    keep(db)
    for owner in ("ann", "bob", "eve"):
        pool.release_vm(pool.acquire_vm(["ci"], owner, "box", ME).vm_name)
    group(db, {"spawn": "exit 1"}, max_vm_total=4, min_ready=1)
    keep(db)
    group(db, {}, max_vm_total=3)
    with ExitStack() as stack:
        for number in range(3):
            request = vmrm.Request((("ci",),), f"new{number}", "box", vmrm.Process.of(ME))
            assert not stack.enter_context(vmrm.Waiting(pool, request)).try_again()
        for _ in range(3):
            keep(db)
    assert list(states(db).values()) == ["ready", "ready"]


def test_no_machine_is_recycled_for_somebody_whose_own_is_about_to_be_clean(
    db: vmrm.Database, pool: vmrm.VmManager, provider: Provider
) -> None:
    group(db, provider.hooks | {"release": "true"}, max_vm_total=2, min_ready=2)
    keep(db)
    bobs, anns = (pool.acquire_vm(["ci"], owner, "box", ME).vm_name for owner in ("bob", "ann"))
    pool.release_vm(bobs)
    keep(db)
    pool.release_vm(anns)
    request = vmrm.Request((("ci",),), "ann", "box", vmrm.Process.of(ME))
    with vmrm.Waiting(pool, request) as place:
        assert not place.try_again()
        keep(db)
        assert [row["vm_name"] for row in place.try_again()] == [anns]
    assert states(db) == {bobs: "ready", anns: "in_use"}


def test_no_machine_is_recycled_for_somebody_who_is_dead(
    db: vmrm.Database, pool: vmrm.VmManager, provider: Provider
) -> None:
    group(db, provider.hooks, max_vm_total=1)
    keep(db)
    mine = pool.acquire_vm(["ci"], "me", "box", ME).vm_name
    pool.release_vm(mine)
    words = [*VMRM, "--db", str(db.path), "pool", "acquire", "ci", "--owner", "you", "--wait"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as waiter:
        until(lambda: tables.pool_waiters(db.path))
        waiter.kill()
    keep(db)
    assert states(db) == {mine: "ready"}


def test_a_machine_that_cannot_be_ended_does_not_cost_the_others(
    db: vmrm.Database, pool: vmrm.VmManager, provider: Provider
) -> None:
    hooks = provider.hooks | {"terminate": "exit 1"}
    group(db, hooks, max_vm_total=3, min_ready=3, vm_terminating_timeout=3600)
    keep(db)
    for owner in ("ann", "bob", "eve"):
        pool.release_vm(pool.acquire_vm(["ci"], owner, "box", ME).vm_name)
    request = vmrm.Request((("ci",),), "new", "box", vmrm.Process.of(ME))
    with vmrm.Waiting(pool, request) as place:
        for _ in range(3):
            assert not place.try_again()
            keep(db)
        assert Counter(states(db).values()) == {"terminating": 1, "ready": 2}
        group(db, {}, vm_terminating_timeout=0.01)  # it has failed again: another one has to go
        until(lambda: keep(db) or Counter(states(db).values())["terminating"] > 1)


# === a waiter for several groups =================================================================


@pytest.mark.parametrize("why", ["full", "limit", "fails", "none"])
def test_a_waiter_is_served_by_the_first_of_its_groups_that_can_serve_it(
    why: str, db: vmrm.Database, pool: vmrm.VmManager, provider: Provider
) -> None:
    settings: dict[str, Any] = {"vm_spawn_min_interval": 0, "min_ready": 0, **provider.hooks}
    limits = {"full": {"max_vm_total": 1}, "limit": {"max_vm_per_user": 1}}.get(why, {})
    with ExitStack() as stack:
        for name in ("first", "second"):
            vmrm.put_group(db, name, settings | {"list": ""})
        vmrm.put_group(db, "first", limits | ({"spawn": "exit 1"} if why == "fails" else {}))
        keeper = stack.enter_context(served(db.path))
        if why in ("full", "limit"):
            stack.enter_context(pool.lease(["first"], "me", "other", wait=60))
        with pool.lease(["first", "second"], "me", "box", wait=60) as mine:
            assert mine.group == ("first" if why == "none" else "second")
        keeper.terminate()


# === slow boots ==================================================================================


def test_a_machine_that_boots_slowly_is_looked_at_often_and_waited_for(
    db: vmrm.Database, pool: vmrm.VmManager, provider: Provider, tmp_path: Path
) -> None:
    up, looked = tmp_path / "up", tmp_path / "looked"
    check = f"echo >> {looked}; test -e {up}"
    group(db, provider.hooks | {"check": check}, max_vm_total=5, vm_max_check_fails=0)
    with served(db.path) as keeper:
        until(lambda: looked.exists() and len(looked.read_text()) >= 4, 60)
        (booting,) = states(db)
        assert provider.running() == {booting}, "no other was spawned in its place"
        with pytest.raises(vmrm.NoVmAvailable, match="1 of 1 not checked yet"):
            pool.acquire_vm(["ci"], "me", "box", ME)
        up.touch()
        until(lambda: states(db) == {booting: "ready"})
        up.unlink()  # once it has answered, a failed check is one
        group(db, {}, vm_health_check_period=0.001, min_ready=0)
        until(lambda: not states(db))
        keeper.terminate()
    assert "it failed 1 check in a row" in reasons(db)


def test_a_machine_that_never_answers_is_given_up_after_the_spawn_timeout(
    db: vmrm.Database, provider: Provider
) -> None:
    hooks = provider.hooks | {"check": "exit 1", "list": ""}
    group(db, hooks, max_vm_total=2, spawn_timeout=3, vm_max_check_fails=0)
    with served(db.path) as keeper:
        until(lambda: states(db), 30)
        (lost,) = states(db)
        until(lambda: "it failed 1 check in a row" in reasons(db), 60)
        until(lambda: states(db).keys() - {lost}, 30)
        keeper.terminate()


# === between the keeper's plan and its deed ======================================================


def between(monkeypatch: pytest.MonkeyPatch, happens: Any) -> list[vmrm.Row]:
    """Have something happen once the keeper has planned what it does; return all it planned."""
    plan, planned = vmrm.keeper_plan, []

    def planning(*words: Any) -> Any:
        actions, again_at = plan(*words)
        if actions and not planned:
            happens()
        planned.extend(actions)
        return actions, again_at

    monkeypatch.setattr(vmrm, "keeper_plan", planning)
    return planned


@pytest.mark.parametrize("then", ["in use", "released again", "held for longer"])
def test_a_vm_that_is_acquired_between_plan_and_deed_is_not_terminated(
    then: str, db: vmrm.Database, pool: vmrm.VmManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(db, {"check": "true", "terminate": "true"}, min_ready=0)
    pool.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    if then == "held for longer":
        pool.hold_vm("vm1", time.time())
    else:
        pool.acquire_vm(["ci"], "me", "box", ME)
        pool.release_vm("vm1")
        group(db, {}, vm_dirty_terminating_timeout=0)

    def happens() -> None:
        if then == "held for longer":
            pool.hold_vm("vm1", time.time() + 1000)
            return
        group(db, {}, vm_dirty_terminating_timeout=1000)
        pool.acquire_vm(["ci"], "me", "box", ME)
        if then == "released again":
            pool.release_vm("vm1")

    planned = between(monkeypatch, happens)
    keep(db)
    assert planned[0].what == "end"
    wanted = {"in use": "in_use", "released again": "ready", "held for longer": "held"}
    assert states(db) == {"vm1": wanted[then]}


@pytest.mark.parametrize("hook", ["check", "release"])
def test_no_hook_is_started_for_a_vm_that_moved_between_plan_and_deed(
    hook: str,
    db: vmrm.Database,
    pool: vmrm.VmManager,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    ran = tmp_path / "ran"
    group(db, {"check": "true", "terminate": "true"}, min_ready=0)
    pool.add_vm_to_pool("10.0.0.1", "vm1", "ci")
    keep(db)
    group(db, {hook: f"echo {hook} >> {ran}"}, vm_health_check_period=0.001)
    if hook == "release":
        pool.acquire_vm(["ci"], "me", "box", ME)
        pool.release_vm("vm1")

    def happens() -> None:
        group(db, {}, vm_health_check_period=1000)
        if hook == "release":
            pool.start_vm_termination("vm1")
        else:
            pool.acquire_vm(["ci"], "me", "box", ME)

    planned = between(monkeypatch, happens)
    time.sleep(db.timeouts.recheck)
    keep(db)
    assert planned[0].what == hook
    assert not ran.exists()
    assert states(db) == ({} if hook == "release" else {"vm1": "in_use"})
