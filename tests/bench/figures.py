"""What a benchmark gives: figures, each beside its measure and its goal, and the table of them."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Figure:
    """One line of the table; `ours` and `theirs` in `unit`, `theirs` None if there is no such.

    `met` is None where the figure has no goal.
    """

    name: str
    unit: str
    ours: float
    theirs: float | None = None
    goal: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        """Return ours / theirs, or None if there is nothing to compare with."""
        return self.ours / self.theirs if self.theirs else None


def rate(name: str, unit: str, pair: tuple[float, float], least: float) -> Figure:
    """Return a figure of which more is better; the goal is `least` times theirs."""
    ours, theirs = pair
    return Figure(name, unit, ours, theirs, f"ratio >= {least:g}", ours >= least * theirs)


def cost(name: str, unit: str, pair: tuple[float, float], most: float, slack: float = 0) -> Figure:
    """Return a figure of which less is better; the goal is `most` times theirs plus `slack`."""
    ours, theirs = pair
    goal = f"ratio <= {most:g}" if not slack else f"<= {most:g} x theirs + {slack:g} {unit}"
    return Figure(name, unit, ours, theirs, goal, ours <= most * theirs + slack)


def bound(name: str, unit: str, ours: float, most: float) -> Figure:
    """Return a figure that ought not to exceed `most`."""
    return Figure(name, unit, ours, None, f"<= {most:g} {unit}", ours <= most)


def interleaved(
    rounds: int, ours: Callable[[], float], theirs: Callable[[], float]
) -> tuple[float, float]:
    """Measure both in turn, each first every other time; return both medians."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            found[which].append((ours, theirs)[which]())
    return statistics.median(found[0]), statistics.median(found[1])


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100).__int__() - 1)]


def environment(folder: Path) -> dict[str, str]:
    """Return the variables to run vmrm with as if installed: its bytecode is kept, in `folder`."""
    ours = {"PYTHONPYCACHEPREFIX": str(folder / "pycache"), "PYTHONPATH": str(ROOT)}
    unwanted = ("PYTHONDONTWRITEBYTECODE", "VMRM_DB", "VMRM_TIMEOUT_SCALE", "VMRM_CRASH")
    return {k: v for k, v in os.environ.items() if k not in unwanted} | ours


def vmrm_command(*words: str | Path) -> list[str]:
    """Return the words that run vmrm as the installed console command does."""
    return [sys.executable, "-P", "-c", "import vmrm; vmrm.console()", *map(str, words)]


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as lines of text, columns aligned."""
    rows = [("figure", "unit", "ours", "theirs", "ratio", "goal", "met")]
    rows += [
        (
            figure.name,
            figure.unit,
            _plain(figure.ours),
            _plain(figure.theirs),
            _plain(figure.ratio),
            figure.goal,
            {True: "yes", False: "NO", None: ""}[figure.met],
        )
        for figure in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 2 <= column <= 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _plain(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
