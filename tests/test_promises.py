"""The table of promises names tests that exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def rows() -> list[tuple[str, list[str]]]:
    """Return the table's points, each with the tests that it names."""
    found = []
    for line in (HERE / "promises.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and re.fullmatch(r"N?\d+", cells[0]):
            found.append((cells[0], re.findall(r"`(test_\w+\.py::\w+)`", cells[2])))
    return found


@functools.cache
def functions(file: str) -> set[str]:
    """Return the names of a file's functions."""
    tree = ast.parse((HERE / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_promises_name_tests_that_exist() -> None:
    assert len(rows()) > 40
    for point, tests in rows():
        assert tests, f"point {point} names no test"
        for name in tests:
            file, _, function = name.partition("::")
            assert function in functions(file), f"point {point} names {name}: there is none"
