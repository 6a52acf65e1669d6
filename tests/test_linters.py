"""Formatter, linter and type checker are part of the tests."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT, unavailable

CHECKS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    # The files are listed in setup.cfg.
    "types": ["mypy", "--strict"],
    "types-of-the-tests": ["mypy", "--strict", "tests/conftest.py", "tests/guests.py"],
}


@pytest.mark.parametrize("words", CHECKS.values(), ids=CHECKS.keys())
def test_the_code_passes(words: list[str]) -> None:
    if not importlib.util.find_spec(words[0]):
        unavailable(f"{words[0]} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
