"""The pool's acquire and release against the same two transactions by plain `sqlite3`."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from figures import ROOT, Figure, interleaved, rate

import vmrm

CONTENDERS = 4
CHOICE = """
SELECT (SELECT vm_name FROM pool_vms WHERE "group" = 'g' AND state = 'ready'
        AND bound_to_user = :owner AND bound_sandbox = 's' AND last_health_check > 0
        ORDER BY last_health_check DESC LIMIT 1),
       (SELECT vm_name FROM pool_vms WHERE "group" = 'g' AND state = 'ready'
        AND bound_to_user IS NULL AND bound_sandbox = '' AND last_health_check > 0
        ORDER BY last_health_check DESC LIMIT 1),
       max_vm_per_user,
       (SELECT count(*) FROM pool_vms INDEXED BY pool_bound
        WHERE "group" = 'g' AND bound_to_user = :owner AND state <> 'terminating')
FROM pool_groups WHERE name = 'g'"""
CHUNKS = 8  # per round: short ones, so that what else the host does falls on all alike


def _fill(path: Path, vms: int) -> None:
    with vmrm.VmManager(db=path) as pool:
        vmrm.put_group(pool.db, "g", {"max_vm_per_user": 5})
        with pool.db.transaction() as db:
            db.connection.executemany(
                """INSERT INTO pool_vms (vm_name, "group", state, state_at, spawned_at,
                       last_health_check) VALUES (?, 'g', 'ready', 1, 1, ?)""",
                [(f"v{number}", 1.0 + number) for number in range(vms)],
            )


class Plain:
    """Acquire and release as somebody would write them for one process and these tables."""

    def __init__(self, path: Path, lock: Path | None = None) -> None:
        self.db = sqlite3.connect(path, isolation_level=None, timeout=60)
        self.db.execute("PRAGMA synchronous = NORMAL")  # as for VMs bound to their owner already
        self.lock = os.open(lock, os.O_RDWR | os.O_CREAT) if lock else None

    def _within(self, work: Callable[[], str]) -> str:
        if self.lock is not None:
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.db.execute("BEGIN IMMEDIATE")
        found = work()
        self.db.execute("COMMIT")
        if self.lock is not None:
            fcntl.flock(self.lock, fcntl.LOCK_UN)
        return found

    def acquire(self, owner: str) -> str:
        """Lease a VM; return its name."""
        return self._within(functools.partial(self._acquire, owner))

    def _acquire(self, owner: str) -> str:
        own, fresh, limit, bound = self.db.execute(CHOICE, {"owner": owner}).fetchone()
        name, now = own or (bound < limit and fresh), time.time()
        self.db.execute(
            "INSERT INTO leases (vm_name, token, holder, acquired_at) VALUES (?, ?, ?, ?)",
            (name, os.urandom(16).hex(), f"{os.getpid()}", now),
        )
        self.db.execute(
            """UPDATE pool_vms SET state = 'in_use', state_at = ?, bound_to_user = ?,
               bound_sandbox = 's' WHERE vm_name = ?""",
            (now, owner, name),
        )
        return str(name)

    def release(self, name: str) -> str:
        """Give a VM back."""
        return self._within(functools.partial(self._release, name))

    def _release(self, name: str) -> str:
        select = "SELECT token, check_fails FROM pool_list WHERE vm_name = ?"
        self.db.execute(select, (name,)).fetchone()
        self.db.execute(  # which ends the lease, by a trigger
            """UPDATE pool_vms SET state = 'ready', state_at = ?, last_release = ?,
               builds_count = builds_count + 1 WHERE vm_name = ?""",
            (time.time(), time.time(), name),
        )
        return name


def _acquire_ours(pool: vmrm.VmManager, owner: str) -> str:
    return pool.acquire_vm(["g"], owner, "s", os.getpid()).vm_name


def _pairs_per_second(
    acquire: Callable[[str], str], release: Callable[[str], object], pairs: int
) -> float:
    before = time.perf_counter()
    for number in range(pairs):
        release(acquire(f"o{number % 5}"))  # each has a VM of its own
    return pairs / (time.perf_counter() - before)


def measure(
    folder: Path, *, sizes: Sequence[int], pairs: int, rounds: int, seconds: float
) -> list[Figure]:
    """Measure pairs of acquire and release in pools of *sizes*, and four processes contending."""
    runs: dict[int, tuple[Callable[[], float], Callable[[], float]]] = {}
    found: dict[int, tuple[list[float], list[float]]] = {vms: ([], []) for vms in sizes}
    with contextlib.ExitStack() as stack:
        for vms in sizes:
            paths = folder / f"ours{vms}.db", folder / f"plain{vms}.db"
            for path in paths:
                _fill(path, vms)
            pool = stack.enter_context(vmrm.VmManager(db=paths[0]))
            plain = Plain(paths[1])
            stack.callback(plain.db.close)
            acquire = functools.partial(_acquire_ours, pool)
            runs[vms] = (
                functools.partial(_pairs_per_second, acquire, pool.release_vm, pairs),
                functools.partial(_pairs_per_second, plain.acquire, plain.release, pairs),
            )
        for number, vms in itertools.product(range(CHUNKS * rounds), sizes):
            for which in (0, 1) if number % 2 else (1, 0):
                found[vms][which].append(runs[vms][which]())
    figures = [
        rate(
            f"acquire + release, {vms} VMs",
            "pairs/s",
            (statistics.median(found[vms][0]), statistics.median(found[vms][1])),
            0.3,
        )
        for vms in sizes
    ]
    best = [max(ours) for ours, _ in found.values()]
    spread = max(best) / min(best)
    name = "fastest / slowest size, at best"
    figures.append(Figure(name, "", spread, None, "<= 1.5", spread <= 1.5))
    return figures + _contention(folder, rounds, seconds)


def _contention(folder: Path, rounds: int, seconds: float) -> list[Figure]:
    """Let processes contend for VMs; the median over rounds of longest wait and fairness."""
    for kind in ("ours", "plain"):
        _fill(folder / f"{kind}.db", 50)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}

    def one(kind: str) -> float:
        words = [sys.executable, __file__, kind, str(folder / f"{kind}.db"), str(seconds)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
        workers = [
            subprocess.Popen([*words, f"o{n}"], env=environment, stdout=subprocess.PIPE)
            for n in range(CONTENDERS)
        ]
        rows = [json.loads(worker.communicate()[0]) for worker in workers]
        pairs = [row["pairs"] for row in rows]
        found[kind].append({"fair": min(pairs) / max(pairs)})
        return 1e3 * float(max(row["longest"] for row in rows))

    pair = interleaved(rounds, functools.partial(one, "ours"), functools.partial(one, "plain"))
    fair = [sorted(row["fair"] for row in found[kind])[rounds // 2] for kind in found]
    name = f"{CONTENDERS} processes contending"
    goal = "ratio <= 2"
    return [
        Figure(f"{name}: longest wait", "ms", *pair, goal, pair[0] <= 2 * pair[1]),
        Figure(f"{name}: least / most served", "", *fair, ">= 0.4", fair[0] >= 0.4),
    ]


def _contend(kind: str, path: Path, seconds: float, owner: str) -> dict[str, float]:
    if kind == "ours":
        pool = vmrm.VmManager(db=path)
        acquire: Callable[[str], str] = functools.partial(_acquire_ours, pool)
        release: Callable[[str], object] = pool.release_vm
    else:
        plain = Plain(path, path.with_suffix(".lock"))
        acquire, release = plain.acquire, plain.release
    start = time.time() // 1 + 2  # all begin together
    time.sleep(start - time.time())
    pairs, longest, end = 0, 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        before = time.perf_counter()
        name = acquire(owner)
        longest = max(longest, time.perf_counter() - before)
        release(name)
        pairs += 1
    return {"pairs": pairs, "longest": longest}


if __name__ == "__main__":
    print(json.dumps(_contend(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4])))
