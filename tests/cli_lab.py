"""What the tests of the command line share: small experiment files, waiting, a terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect  # type: ignore[import-untyped]
from conftest import Cli

ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[()].)")


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


def until(holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Return what *holds()* gives as soon as it is true; fail when it is not within *seconds*."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)
    return found


@contextmanager
def terminal(
    cli: Cli, *words: str | Path, command: Sequence[str] = (), columns: int = 120, **env: str
) -> Iterator[Any]:
    """Run a command line on a terminal of 24 lines; what is left of it is killed.

    *command* is run instead of vmrm with these words, if it is given.
    """
    command = command or cli.command(*words)
    variables = cli.environment | {"TERM": "xterm-256color"} | env
    variables.pop("COLUMNS")
    child = pexpect.spawn(
        command[0],
        list(command[1:]),
        env=variables,
        cwd=str(cli.folder),
        dimensions=(24, columns),
        encoding="utf-8",
        codec_errors="replace",
        timeout=60,
    )
    try:
        yield child
    finally:
        child.close(force=True)


def ended(child: Any) -> tuple[str, int]:
    """Return everything that a command on a terminal wrote, and its exit code."""
    child.expect(pexpect.EOF)
    child.wait()
    return str(child.before), int(child.exitstatus)


def plain(text: str) -> str:
    """Return what a terminal got without what moves, colours or hides."""
    return ESCAPE.sub("", text)
