"""How late due entries start while the same handler lays others out, or looks at many files."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from figures import Figure, environment, percentile, vmrm_command

import vmrm

_GAP_S = 0.25  # between two of the entries whose lateness counts
_AGE_S = 10_000  # of files that will not change any more


class _Lab:
    """An experiment of one stand-in agent in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.variables = folder, environment(folder)
        folder.mkdir(exist_ok=True)
        self.db = vmrm.Database(folder / "lab.db")

    def vmrm(self, *words: str | Path) -> None:
        """Run one command of vmrm to its end."""
        command = vmrm_command("--db", self.db.path, *words)
        subprocess.run(command, env=self.variables, stdout=subprocess.DEVNULL, check=True)

    def write(self, phases: list[list[float]], transfer: dict[str, object]) -> Path:
        """Write the experiment file: entries at the times of all phases, and a transfer's."""
        due = [{"start_time": at, "executable": "true"} for times in phases for at in times]
        vm = {
            "name": "vm",
            "path": f"{self.folder}/agent.sock",
            "launch_dir": f"{self.folder}/launch",
            "schedule": [*due, {"start_time": phases[2][0] - 1, "transfer": [transfer]}],
        }
        path = self.folder / "lab.json"
        path.write_text(json.dumps({"experiment": {"start_buffer": 1}, "vm": [vm]}))
        return path

    def lateness_ms(self, times: list[float], seconds: float) -> list[float]:
        """Return by how much the entries of these times were sent late; wait until they are done.

        Raises:
            TimeoutError: that took too long.
        """
        sql = """SELECT (sent_at - planned_at) * 1000 AS late FROM entry_status
                 WHERE start_time BETWEEN :first AND :last AND outcome = 'done'"""
        deadline = time.monotonic() + seconds
        while len(rows := self.db.query(sql, first=times[0], last=times[-1])) < len(times):
            if time.monotonic() > deadline:
                raise TimeoutError(f"only {len(rows)} entries were done within {seconds:g} s")
            time.sleep(0.1)
        return [row["late"] for row in rows]


@contextlib.contextmanager
def _agent(lab: _Lab) -> Iterator[None]:
    command = vmrm_command("agent", lab.folder / "agent.sock")
    with subprocess.Popen(command, env=lab.variables, stdout=subprocess.PIPE) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError("the stand-in agent does not listen")
            yield
        finally:
            process.terminate()


def _unchanged(folder: Path, files: int) -> dict[str, object]:
    """Make files of the guest and the host's copies of them; return the transfer that looks.

    What is there already is known by size and time.
    """
    source, copies = folder / "data", folder / "copies"
    at = time.time() // 1 - _AGE_S
    for root in (source, copies / "vm" / str(source)[1:]):
        for number in range(files):
            path = root / str(number // 1000) / f"{number}"
            if number % 1000 == 0:
                path.parent.mkdir(parents=True)
            path.write_bytes(b"x")
            os.utime(path, (at, at))
    return {"location": str(source), "interval": 0.5, "destination": str(copies)}


def _add(lab: _Lab, entries: int) -> None:
    """Add entries that are far from due."""
    path = lab.folder / "more.json"
    placed = [{"location": "note", "content": "x" * 1000}]
    added = [
        {"start_time": 1e6 + number, "executable": "true", "content": placed}
        for number in range(entries)
    ]
    path.write_text(json.dumps(added))
    lab.vmrm("schedule", "add", "vm", path)


def measure(folder: Path, *, files: int, entries: int, due: int) -> list[Figure]:
    """Measure the lateness of so many entries: by themselves, and during each of the other two."""
    span = 5 + _GAP_S * due
    phases = [[4 + phase * span + _GAP_S * n for n in range(due)] for phase in range(3)]
    lab = _Lab(folder / "lab")
    file = lab.write(phases, _unchanged(folder, files))
    with _agent(lab):
        lab.vmrm("run", file, "--detach", "--stay")
        alone = lab.lateness_ms(phases[0], 60 + span)
        _add(lab, entries)
        busy = {
            f"{entries} entries are laid out": lab.lateness_ms(phases[1], 60 + 2 * span),
            f"a transfer looks at {files} files": lab.lateness_ms(phases[2], 120 + 2 * span),
        }
        lab.vmrm("stop", "--timeout", "60")
    lab.db.close()
    return [
        Figure(
            f"lateness while {what}, {name}", "ms", percentile(late, part), percentile(alone, part)
        )
        for what, late in busy.items()
        for name, part in (("p50", 50), ("p90", 90), ("worst", 100))
    ]
