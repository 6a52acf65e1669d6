"""The pool against a model of it, and against eight processes of which any may die at any time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import tables
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import vmrm

# === a model =====================================================================================


@dataclass(eq=False)
class Model:
    """What is to be known of one VM."""

    group: str
    state: str = "got_ip"
    trusted: bool = False  # found well since the server's start
    fails: int = 0
    owner: str | None = None
    sandbox: str = ""
    holder: int = 0  # the holding process; 0: nobody
    machine: int = 0  # which one it is; 0: nobody can tell


class PoolMachine(RuleBasedStateMachine):
    """Random steps on the pool and on a dictionary; real processes hold the VMs, and die.

    After every step the manager is a new one, as if the process before had crashed.
    """

    LIMIT = 2
    GROUPS = ("0", "arm")
    names = st.sampled_from(["a", "b", "c", "d", "e"])
    owners = st.sampled_from(["ann", "bob"])
    sandboxes = st.sampled_from(["s", "t"])
    groups = st.lists(st.sampled_from(GROUPS), min_size=1, max_size=2, unique=True)

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.db = self.stack.enter_context(vmrm.Database(Path(folder) / "lab.db"))
        for group in self.GROUPS:
            vmrm.put_group(self.db, group, {"max_vm_per_user": self.LIMIT})
        self.vms: dict[str, Model] = {}
        self.children: dict[int, subprocess.Popen[bytes]] = {}

    def teardown(self) -> None:
        for pid in list(self.children):
            self._kill(pid)
        self.stack.close()

    @property
    def pool(self) -> vmrm.VmManager:
        return vmrm.VmManager(db=self.db)

    def _kill(self, pid: int) -> None:
        child = self.children.pop(pid)
        child.kill()
        child.wait()

    def _agree(self, allowed: bool, step: Callable[[], object]) -> bool:
        """Do a step, which must be refused exactly if the model says so."""
        if allowed:
            step()
        else:
            with pytest.raises(vmrm.VmError):
                step()
        return allowed

    def _free(self, group: str, owner: str, sandbox: str) -> set[str]:
        ready = {
            name: vm
            for name, vm in self.vms.items()
            if vm.group == group and vm.state == "ready" and vm.trusted
        }
        own = {n for n, vm in ready.items() if (vm.owner, vm.sandbox) == (owner, sandbox)}
        fresh = {n for n, vm in ready.items() if vm.owner is None}
        return own or (fresh if self._bound(group, owner) < self.LIMIT else set())

    def _bound(self, group: str, owner: str) -> int:
        return sum(
            (vm.group, vm.owner) == (group, owner) and vm.state != "terminating"
            for vm in self.vms.values()
        )

    def _released(self, vm: Model) -> None:
        vm.holder = 0
        if vm.state == "in_use":
            vm.state = "check_health_failed" if vm.fails else "ready"

    @rule(
        name=names,
        group=st.sampled_from(GROUPS),
        machine=st.integers(0, 3),
        spelling=st.sampled_from(["tcp:h:{}", "tcp:H.:0{}"]),
    )
    def add(self, name: str, group: str, machine: int, spelling: str) -> None:
        path = spelling.format(machine) if machine else ""
        step = lambda: self.pool.add_vm_to_pool("", name.upper(), group, path=path)  # noqa: E731
        other = machine and any(vm.machine == machine for vm in self.vms.values())
        if self._agree(name not in self.vms and not other, step):
            self.vms[name] = Model(group, machine=machine)

    @rule(name=names, well=st.booleans())
    def check(self, name: str, well: bool) -> None:
        vm = self.vms.get(name)
        if vm is None or vm.state == "terminating":
            return
        if vm.state not in ("in_use", "held"):
            with self.db.transaction():
                vmrm.move_pool_vm(self.db, name, "check_health")
            vm.state = "ready" if well else "check_health_failed"
        (self.pool.mark_vm_checked if well else self.pool.mark_vm_check_failed)(name)
        vm.fails, vm.trusted = 0 if well else vm.fails + 1, True

    @rule(groups=groups, owner=owners, sandbox=sandboxes)
    def acquire(self, groups: list[str], owner: str, sandbox: str) -> None:
        wanted = self._wanted(groups, owner, sandbox)
        bound = [vm for vm in self.vms.values() if (vm.owner, vm.state) == (owner, "in_use")]
        if not wanted:  # then the dead are looked at, and it is tried once more
            self._bury(self.vms.values())
        elif all(self.vms[name].owner is None for name in wanted):  # or the owner's dead
            self._bury(bound)
        wanted = self._wanted(groups, owner, sandbox)
        pid = self._idle_process()
        try:
            name = self.pool.acquire_vm(groups, owner, sandbox, pid).vm_name.lower()
        except vmrm.NoVmAvailable:
            assert not wanted
            return
        assert name in wanted
        vm = self.vms[name]
        vm.state, vm.owner, vm.sandbox, vm.holder = "in_use", owner, sandbox, pid

    def _wanted(self, groups: list[str], owner: str, sandbox: str) -> set[str]:
        return next((f for g in groups if (f := self._free(g, owner, sandbox))), set())

    def _bury(self, vms: Iterable[Model]) -> list[Model]:
        dead = [vm for vm in vms if vm.holder and vm.holder not in self.children]
        for vm in dead:
            self._released(vm)
        return dead

    def _idle_process(self) -> int:
        """Return a process that holds nothing; to start one takes longer than a step."""
        for pid in self.children.keys() - {vm.holder for vm in self.vms.values()}:
            return pid
        child = subprocess.Popen(["sleep", "1000"])
        self.children[child.pid] = child
        return child.pid

    @rule(name=names)
    def release(self, name: str) -> None:
        vm = self.vms.get(name)
        leased = vm is not None and vm.holder != 0
        if self._agree(leased, lambda: self.pool.release_vm(name, force=True)) and vm:
            self._released(vm)

    @rule(name=names)
    def holder_dies(self, name: str) -> None:
        vm = self.vms.get(name)
        if vm and vm.holder in self.children:
            self._kill(vm.holder)

    @rule()
    def reap(self) -> None:
        reaped = {name.lower() for name in self.pool.reap()}
        dead = self._bury(self.vms.values())
        assert reaped == {name for name, vm in self.vms.items() if vm in dead}

    @rule(name=names)
    def hold(self, name: str) -> None:
        vm = self.vms.get(name)
        can = vm is not None and vm.state in ("in_use", "ready", "check_health_failed", "held")
        if self._agree(can, lambda: self.pool.hold_vm(name, 9e9, force=True)) and vm:
            vm.state = "held"

    @rule(name=names)
    def terminate(self, name: str) -> None:
        vm = self.vms.get(name)
        if self._agree(vm is not None, lambda: self.pool.start_vm_termination(name)) and vm:
            vm.state, vm.holder = "terminating", 0

    @rule(name=names)
    def remove(self, name: str) -> None:
        vm = self.vms.get(name)
        gone = vm is not None and vm.state == "terminating"
        if self._agree(gone, lambda: self.pool.remove_vm_from_pool(name)):
            del self.vms[name]

    @rule()
    def server_starts(self) -> None:
        self.pool.mark_server_start()
        for vm in self.vms.values():
            vm.trusted = False

    @invariant()
    def rows_are_the_model(self) -> None:
        rows = {vm.vm_name.lower(): vm for vm in self.pool.get_all_vm()}
        assert {n: vm.state for n, vm in rows.items()} == {n: m.state for n, m in self.vms.items()}
        for name, vm in rows.items():
            model = self.vms[name]
            assert (str(vm.group), vm.check_fails) == (model.group, model.fails)
            assert (vm.bound_to_user, vm.bound_sandbox) == (model.owner, model.sandbox)
            assert (vm.holder_pid or 0) == model.holder
        for group in self.GROUPS:
            for owner in ("ann", "bob"):
                assert self._bound(group, owner) <= self.LIMIT


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPoolModel = PoolMachine.TestCase


# === eight processes =============================================================================

WORKERS, VMS, OWNERS, LIMIT, PAIRS = 8, 50, 12, 4, 20_000

LINE = len("+ v49 o15 ") + 21


def work(path: Path, seed: int, record: Path) -> None:
    """Lease and release until killed; write each use to a record of our own, by single writes."""
    chance, pool = random.Random(seed), vmrm.VmManager(db=path)
    out = os.open(record, os.O_WRONLY | os.O_APPEND)

    def write(word: str) -> None:
        os.write(out, f"{word} {vm:3} {owner:3} {time.monotonic_ns():20}\n".encode())

    while True:
        owner = f"o{chance.randrange(OWNERS)}"
        sandbox, wait = chance.choice("st"), chance.choice((None, None, 0.1))
        try:
            vm = pool.acquire_vm(["g"], owner, sandbox, os.getpid(), wait=wait).vm_name
        except (vmrm.NoVmAvailable, vmrm.TimedOut):
            continue
        write("+")
        if chance.random() < 0.02:
            time.sleep(0.002)
        write("-")
        pool.release_vm(vm)
        if chance.random() < 0.02:  # so that owners change
            with suppress(vmrm.VmError):
                pool.start_vm_termination(vm, allowed_pre_state="ready")
                pool.remove_vm_from_pool(vm)
                add(pool, vm)


class Use:
    """From when to when a worker used a VM, by its own record."""

    def __init__(self, vm: str, owner: str, start: int, end: int) -> None:
        self.vm, self.owner, self.start, self.end = vm, owner, start, end


def uses(record: Path, killed_at: int) -> list[Use]:
    """Return what a record says; what was in use when the worker was killed ended then."""
    found: list[Use] = []
    for line in record.read_text().splitlines():
        word, vm, owner, at = line.split()
        if word == "+":
            found.append(Use(vm, owner, int(at), killed_at))
        else:
            assert (found[-1].vm, found[-1].owner) == (vm, owner)
            found[-1].end = int(at)
    return found


def add(pool: vmrm.VmManager, vm: str) -> None:
    """Add a VM and find it well."""
    pool.add_vm_to_pool("", vm, "g")
    with pool.db.transaction():
        vmrm.move_pool_vm(pool.db, vm, "check_health")
    pool.mark_vm_checked(vm)


@pytest.mark.slow
def test_no_vm_has_two_holders_and_no_owner_too_many_whoever_is_killed(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "lab.db"
    workers: dict[Path, int] = {}
    ended: dict[Path, int] = {}

    def start() -> None:
        record = tmp_path / f"record.{len(workers) + len(ended)}"
        record.touch()
        seed = chance.randrange(1 << 30)
        pid = os.fork()
        if pid == 0:
            try:
                work(path, seed, record)
            finally:
                traceback.print_exc()
                os._exit(1)
        workers[record] = pid

    def kill(record: Path) -> None:
        pid = workers.pop(record)
        ended[record] = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it ended by itself"

    with vmrm.VmManager(db=path) as pool:
        vmrm.put_group(pool.db, "g", {"max_vm_per_user": LIMIT})
        for number in range(VMS):
            add(pool, f"v{number}")
        pool.db.close()  # no connection crosses a fork
        try:
            for _ in range(WORKERS):
                start()
            while sum(r.stat().st_size for r in [*workers, *ended]) < 2 * PAIRS * LINE:
                time.sleep(chance.uniform(0.3, 1.2))
                kill(chance.choice(list(workers)))
                start()
        finally:
            for record in list(workers):
                kill(record)
        found = [use for record, at in ended.items() for use in uses(record, at)]
        assert len(found) >= PAIRS
        by_vm = sorted(found, key=lambda use: (use.vm, use.start))
        for first, second in pairwise(by_vm):
            assert first.vm != second.vm or first.end <= second.start, vars(first) | vars(second)
        present: Counter[str] = Counter()
        events = [(use.start, 1, use.owner) for use in found]
        for _, step, owner in sorted([*events, *((use.end, -1, use.owner) for use in found)]):
            present[owner] += step
            assert present[owner] <= LIMIT
        pool.reap()
        assert tables.most_bound(path) <= LIMIT
        assert not pool.get_vm_by_group_and_state_list(None, ["in_use"])
        pool.drop_dead_waiters()
        assert vmrm.check(pool.db) == []
