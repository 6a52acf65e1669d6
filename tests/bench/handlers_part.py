"""An experiment of many handlers on stand-in agents: memory, idle CPU, launch, stop, lateness."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from figures import Figure, bound, cost, environment, percentile, vmrm_command

import vmrm

_LAUNCH_S = 600.0
_STOP_S = 120.0


@dataclass(frozen=True)
class _Plan:
    """When things happen, in seconds.

    The guests' programs run on this host, so the entries lie so far apart that those of one have
    ended before the next is due; 40 ms of one core is what a guest's script takes.
    """

    count: int
    window_s: float

    @property
    def gap_s(self) -> float:
        return 8 + 0.04 * self.count

    @property
    def times(self) -> tuple[float, float, float]:
        # Entries are armed up to 5 s before they are due, hence 6.
        return -1, 6, 6 + self.gap_s

    @property
    def start_buffer_s(self) -> float:
        return self.window_s + 4


class _Experiment:
    """N stand-in agents and an experiment on them, with everything in one folder."""

    def __init__(self, folder: Path, plan: _Plan) -> None:
        self.folder, self.plan = folder, plan
        self.variables = environment(folder)
        self.db = vmrm.Database(folder / "lab.db")
        self.wal_bytes = 0

    def write(self) -> Path:
        """Write the experiment file."""
        vm = {
            "name": "vm{n}",
            "count": self.plan.count,
            "path": f"{self.folder}/agents/{{n}}.sock",
            "launch_dir": f"{self.folder}/agents/{{n}}/launch",
            "schedule": [{"start_time": at, "executable": "true"} for at in self.plan.times],
        }
        path = self.folder / "lab.json"
        experiment = {"start_buffer": self.plan.start_buffer_s}
        path.write_text(json.dumps({"experiment": experiment, "vm": [vm]}))
        return path

    def vmrm(self, *words: str | Path) -> None:
        """Run one command of vmrm to its end."""
        command = vmrm_command("--db", self.db.path, *words)
        subprocess.run(command, env=self.variables, stdout=subprocess.DEVNULL, check=True)

    def count(self, condition: str) -> int:
        """Return how many VMs meet a condition, and look at the size of the WAL by the way."""
        with contextlib.suppress(FileNotFoundError):
            size = Path(f"{self.db.path}-wal").stat().st_size
            self.wal_bytes = max(self.wal_bytes, size)
        return int(self.db.value(f"SELECT count(*) FROM vm_status WHERE {condition}"))  # noqa: S608

    def until_all(self, condition: str, seconds: float) -> None:
        """Wait until all VMs meet a condition; raises TimeoutError, or RuntimeError if one failed.

        One query twice a second, so that the bench is not what is measured.
        """
        deadline = time.monotonic() + seconds
        while self.count(condition) < self.plan.count:
            if self.count("state = 'failed' OR failed > 0 OR unknown > 0"):
                sql = "SELECT server_name, reason FROM vm_status WHERE state = 'failed' LIMIT 3"
                raise RuntimeError(f"the experiment went wrong: {self.db.query(sql)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all VMs: {condition} within {seconds:g} s")
            time.sleep(0.5 if self.plan.count > 50 else 0.05)

    def handlers(self) -> list[int]:
        """Return the handlers' pids."""
        return [row["handler_pid"] for row in self.db.query("SELECT handler_pid FROM vm_status")]

    def lateness_ms(self, at: float) -> list[float]:
        """Return by how much the entries of one time were sent after their planned time."""
        sql = """SELECT (sent_at - planned_at) * 1000 AS late FROM entry_status
                 WHERE start_time = :at"""
        return [row["late"] for row in self.db.query(sql, at=at)]


@contextlib.contextmanager
def _agents(experiment: _Experiment) -> Iterator[int]:
    """Run the stand-in agents in one process; yield its pid."""
    folder = experiment.folder / "agents"
    folder.mkdir()
    command = vmrm_command("agent", folder, "--count", str(experiment.plan.count))
    with subprocess.Popen(command, env=experiment.variables, stdout=subprocess.PIPE) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError("the stand-in agents do not listen")
            yield process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def _ended_in_any_case(experiment: _Experiment) -> Iterator[None]:
    """End the supervisor, and by that its handlers, if the block leaves it running."""
    try:
        yield
    finally:
        if pid := vmrm.supervisor_pid(experiment.db):
            os.kill(pid, signal.SIGTERM)
        experiment.db.close()


def _private_kib(pid: int) -> int:
    """Return the memory that a process shares with nobody (proc(5), smaps_rollup)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_(?:Clean|Dirty): +(\d+)", text, re.MULTILINE)))


def _cpu_s(pids: list[int]) -> float:
    """Return the seconds that processes have run; nanoseconds in /proc/PID/schedstat."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9


def _children_cpu_s(pid: int) -> float:
    """Return the seconds that a process's ended children have run (proc(5), stat 16 and 17)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def _core_percent(groups: list[list[int]], seconds: float) -> list[float]:
    """Return what share of a core each group of processes takes."""
    before, began = [_cpu_s(pids) for pids in groups], time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    return [100 * (_cpu_s(pids) - used) / passed for pids, used in zip(groups, before, strict=True)]


def _seconds(action: Callable[[], object]) -> float:
    before = time.monotonic()
    action()
    return time.monotonic() - before


def _sleepers_late_ms(count: int) -> list[float]:
    script = Path(__file__).with_name("sleepers.py")
    instant = time.time() + 3 + count / 200
    command = [sys.executable, str(script), str(count), str(instant)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(late) for late in json.loads(done.stdout)]


def _memory(when: str, pids: list[int]) -> list[Figure]:
    sizes = [_private_kib(pid) / 1024 for pid in pids]
    return [
        bound(f"private memory {when}, median", "MiB", statistics.median(sizes), 3),
        bound(f"private memory {when}, largest", "MiB", max(sizes), 3),
    ]


def _lateness(experiment: _Experiment) -> list[Figure]:
    figures = []
    for at in experiment.plan.times[1:]:
        ours, theirs = experiment.lateness_ms(at), _sleepers_late_ms(experiment.plan.count)
        p50, p99 = ((percentile(ours, part), percentile(theirs, part)) for part in (50, 99))
        figures.append(Figure(f"lateness at {at:g} s, p50", "ms", *p50))
        figures.append(cost(f"lateness at {at:g} s, p99", "ms", p99, 1.5, 20))
    return figures


def _run(experiment: _Experiment, agents: int) -> list[Figure]:
    plan, before = experiment.plan, _cpu_s([agents])
    file = experiment.write()
    launch = _seconds(
        lambda: (
            experiment.vmrm("run", file, "--detach", "--stay"),
            experiment.until_all("state <> 'uninitialized'", _LAUNCH_S),
        )
    )
    configured = launch + _seconds(lambda: experiment.until_all("state = 'configured'", _LAUNCH_S))
    agents_s, programs_s = _cpu_s([agents]) - before, _children_cpu_s(agents)
    pids = experiment.handlers()
    supervisor = vmrm.supervisor_pid(experiment.db)
    if supervisor is None:
        raise RuntimeError("the supervisor has ended")
    figures = [
        bound("launch, until all handlers are at work on their VM", "s", launch, 20),
        Figure("until the guests have also run an entry each", "s", configured),
        Figure("CPU of handlers and supervisor meanwhile", "s", _cpu_s([supervisor, *pids])),
        Figure("CPU of the stand-in agents meanwhile", "s", agents_s),
        Figure("CPU of their guests' programs meanwhile", "s", programs_s),
    ]
    time.sleep(2)  # the news of the start time is taken in
    idle = _core_percent([[supervisor], pids], plan.window_s)
    figures.append(bound("CPU while idle, handlers and supervisor", "% of a core", sum(idle), 5))
    figures.append(Figure("CPU while idle, the supervisor's part", "% of a core", idle[0]))
    figures += _memory("while waiting", pids)
    experiment.until_all("done = 3", plan.times[-1] + 60 + plan.gap_s)
    figures += _memory("after all entries", pids)
    figures.append(bound("stop", "s", _seconds(lambda: _stop(experiment)), 20))
    figures.append(Figure("largest WAL", "MiB", experiment.wal_bytes / (1 << 20)))
    return figures + _lateness(experiment)


def _stop(experiment: _Experiment) -> None:
    experiment.vmrm("stop", "--timeout", f"{_STOP_S:g}")


def measure(folder: Path, *, count: int, window_s: float) -> list[Figure]:
    """Run an experiment of *count* handlers, idle for *window_s* seconds before its start."""
    experiment = _Experiment(folder, _Plan(count, window_s))
    with _agents(experiment) as agents, _ended_in_any_case(experiment):
        return [
            Figure(f"{count} handlers: {f.name}", f.unit, f.ours, f.theirs, f.goal, f.met)
            for f in _run(experiment, agents)
        ]
