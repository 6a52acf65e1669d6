"""Small experiment files for the tests of the command line and of the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


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


def until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Return as soon as *holds()* is true; fail when it is not within *seconds*."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)
