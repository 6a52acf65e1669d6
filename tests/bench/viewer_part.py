"""What the live view takes of a core while nothing changes, and while the handlers are at work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from figures import ROOT, Figure, bound, environment
from status_part import fill

import vmrm

# Watches a process that only sleeps as if it were the supervisor, and prints the CPU it took.
_WATCH = """
import subprocess, sys, time, vmrm
with vmrm.Database(sys.argv[1]) as db:
    process = subprocess.Popen(["sleep", sys.argv[2]])
    before = time.process_time()
    try:
        vmrm.Viewer(db, vmrm.Screen()).watch(process)
    except vmrm.VmrmError:
        pass  # it has not ended the experiment
    print(time.process_time() - before)
"""


def _viewer_percent(database: Path, variables: dict[str, str], seconds: float) -> float:
    """Return what share of a core the view takes on a terminal of 50 lines."""
    near, far = os.openpty()
    sink = threading.Thread(target=_drain, args=[near])
    sink.start()
    size = {"COLUMNS": "120", "LINES": "50", "TERM": "xterm"}
    command = [sys.executable, "-c", _WATCH, str(database), str(seconds)]
    done = subprocess.run(
        command, env=variables | size, cwd=ROOT, stdout=subprocess.PIPE, stderr=far, check=True
    )
    os.close(far)
    sink.join()
    os.close(near)
    return 100 * float(done.stdout) / seconds


def _drain(terminal: int) -> None:
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:  # nobody has the other end any more
        return


class _Handlers(threading.Thread):
    """Journals something of one VM after the other, as all handlers together do near time 0."""

    def __init__(self, database: Path, vms: int) -> None:
        super().__init__()
        self.database, self.vms, self.over = database, vms, threading.Event()

    def run(self) -> None:
        """Commit a hundred times a second."""
        with vmrm.Database(self.database) as db:
            for number in range(10**9):
                if self.over.wait(0.01):
                    return
                db.write(
                    'UPDATE vms SET "current_time" = :at WHERE server_name = :name',
                    at=str(number),
                    name=f"vm{number % self.vms + 1}",
                )


def measure(folder: Path, *, sizes: list[int], seconds: float) -> list[Figure]:
    """Measure the view of labs of these sizes."""
    figures = []
    for vms in sizes:
        database = folder / f"{vms}.db"
        fill(database, vms)
        idle = _viewer_percent(database, environment(folder), seconds)
        handlers = _Handlers(database, vms)
        handlers.start()
        time.sleep(0.1)
        busy = _viewer_percent(database, environment(folder), seconds)
        handlers.over.set()
        handlers.join()
        figures.append(bound(f"live view of {vms} VMs, nothing changes", "% of a core", idle, 5))
        figures.append(bound(f"live view of {vms} VMs, 100 changes/s", "% of a core", busy, 15))
    return figures
