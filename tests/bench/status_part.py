"""`vmrm status --json` against an interpreter that does nothing."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from figures import ROOT, Figure, environment, interleaved, vmrm_command

import vmrm

_SCHEDULE = [{"start_time": at, "executable": "true"} for at in (-1, 1, 2)]


def fill(path: Path, vms: int) -> None:
    """Make a database of so many VMs with three entries each."""
    with vmrm.Database(path) as db:
        rows = [
            {"server_uuid": f"uuid-{n}", "server_name": f"vm{n}", "path": f"/run/qga/{n}.sock"}
            for n in range(1, vms + 1)
        ]
        vmrm.VMMapping(db=db).batch_put(rows)
        schedules = [
            {"server_name": row["server_name"], "text": json.dumps(_SCHEDULE)} for row in rows
        ]
        vmrm.ScheduleDb(db=db).batch_put(schedules)


def _milliseconds(command: Sequence[str], variables: dict[str, str]) -> float:
    before = time.perf_counter()
    subprocess.run(command, env=variables, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - before) * 1e3


def measure(folder: Path, *, vms: int, rounds: int) -> list[Figure]:
    """Measure `status --json` of *vms* VMs, installed and from a checkout, *rounds* times each.

    From a checkout, `python vmrm.py` compiles the whole file at every start.
    """
    database, variables = folder / "lab.db", environment(folder)
    fill(database, vms)
    words = ["--db", str(database), "status", "--json"]
    bare = functools.partial(_milliseconds, [sys.executable, "-c", "pass"], variables)
    commands = {
        "vmrm status --json": vmrm_command(*words),
        "python vmrm.py status --json": [sys.executable, str(ROOT / "vmrm.py"), *words],
    }
    figures = []
    for name, command in commands.items():
        ours = functools.partial(_milliseconds, command, variables)
        ours()  # the first run writes the bytecode
        figures.append(Figure(f"{name}, {vms} VMs", "ms", *interleaved(rounds, ours, bare)))
    return figures
