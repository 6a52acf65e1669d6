"""Stand-in agents and experiment files for the tests of the command line and of README."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def agents(folder: Path, count: int = 1) -> Iterator[Path]:
    """Play *count* agents at ``<folder>/<n>.sock`` for the length of the block."""
    command = [sys.executable, str(ROOT / "vmrm.py"), "agent", str(folder), "--count", str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield folder
        finally:
            process.terminate()


def lab(folder: Path, *schedules: str, buffer: float = 0) -> Path:
    """Write ``lab.toml`` for VMs vm1, vm2, … on the agents below *folder*; return its path."""
    parts = [f"[experiment]\nstart_buffer = {buffer}\n"]
    for n, schedule in enumerate(schedules or ("",), 1):
        parts.append(f'[[vm]]\nname = "vm{n}"\npath = "agents/{n}.sock"\n')
        parts.append(f'launch_dir = "{folder}/agents/{n}/launch"\n{schedule}\n')
    path = folder / "lab.toml"
    path.write_text("".join(parts))
    return path


def entry(at: float, script: str, more: str = "") -> str:
    """Return one entry of an experiment file that has the guest's shell do *script*."""
    words = f"arguments = ['-c', '''{script}''']"
    return f'[[vm.schedule]]\nstart_time = {at}\nexecutable = "sh"\n{words}\n{more}\n'


def until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Return as soon as *holds()* is true; fail when it is not within *seconds*."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)
