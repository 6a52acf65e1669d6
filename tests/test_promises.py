"""The table of promises names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def rows() -> list[tuple[str, list[str]]]:
    """Return the table's points, each with the tests that it names."""
    found = []
    for line in (HERE / "promises.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and re.fullmatch(r"N?\d+", cells[0]):
            found.append((cells[0], re.findall(r"`(test_\w+\.py::\w+)`", cells[2])))
    return found


@pytest.mark.parametrize(("point", "tests"), rows())
def test_promise_names_tests_that_exist(point: str, tests: list[str]) -> None:
    for name in tests:
        file, _, function = name.partition("::")
        tree = ast.parse((HERE / file).read_text())
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in there, f"point {point} names {name}, which does not exist"
