"""Windows guests: what our batch files say to cmd.exe, and whole experiments on a played guest.

The stand-in plays cmd.exe by its documented rules; where wine is installed, its cmd.exe, written by
other people, runs the very same files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import unavailable
from hypothesis import given
from hypothesis import strategies as st
from lab import FAST, ROOT, VMRM, Lab, _agent

import drivers
import vmrm

SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]))"

# What cmd.exe, the C run time or both would take for something else.
HARD = [
    "",
    " ",
    "two words",
    "%PATH%",
    "100%",
    "%%",
    "%1",
    "%~dp0",
    "%a:b=c%",
    "^",
    "^^",
    "a^b c^d",
    "&",
    "a & del b",
    "a&&b||c",
    "|",
    "<in >out 2>&1",
    "(a)",
    "!x!",
    '"',
    '""',
    'say "hi there"',
    'a"b & c',
    '"quoted & whole"',
    "\\",
    "\\\\",
    'end\\',
    "C:\\dir with blank\\",
    '\\"',
    '\\\\"',
    'a\\\\b"c\\"d',
    "a,b;c=d",
    "/flag",
    "-x",
    "@at",
    ":label",
    "*?.txt",
    "'single'",
    "`back`",
    "\t",
    "~#{}[]$",
    "ä€😀",
    "2",
    "x" * 3000,
]


class Player:
    """cmd.exe on a folder that is drive C: the stand-in's, or wine's."""

    def __init__(self, root: Path, command: list[str]) -> None:
        self.root, self.command = root, command
        self.environment = {**os.environ, "WINEDEBUG": "-all", "DISPLAY": ""}

    def run(self, *words: str) -> tuple[int, str]:
        done = subprocess.run(
            [*self.command, *words], capture_output=True, cwd=self.root, env=self.environment
        )
        return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


@pytest.fixture(scope="session")
def wine_prefix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not shutil.which("wine"):
        pytest.skip("wine is not installed")
    prefix = tmp_path_factory.mktemp("wine") / "prefix"
    quiet = {"WINEPREFIX": str(prefix), "WINEDEBUG": "-all", "DISPLAY": ""}
    quiet["WINEDLLOVERRIDES"] = "mscoree=;mshtml="
    environment = {**os.environ, **quiet}
    subprocess.run(["wine", "wineboot", "-i"], env=environment, capture_output=True, check=True)
    yield prefix
    subprocess.run(["wineserver", "-k"], env=environment, capture_output=True)
