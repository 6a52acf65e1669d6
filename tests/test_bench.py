"""The benchmarks keep working: each part runs with tiny sizes. No timing is asserted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, unavailable

RUN = ROOT / "tests" / "bench" / "run.py"


def bench(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmarks in the test's own temporary directory."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, str(RUN), *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def figures(tmp_path: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Return what a run of the benchmarks found, by name."""
    done = bench(tmp_path, "--json", *words)
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert all(row["ours"] >= 0 for row in found.values())
    assert not list(tmp_path.iterdir()), "the benchmark left files behind"
    return found


@pytest.mark.qga
def test_agent_part_compares_four_calls_with_a_raw_socket(tmp_path: Path) -> None:
    if not shutil.which("qemu-ga"):
        unavailable("qemu-ga is not installed")
    found = figures(tmp_path, "agent", "--size-mib", "1", "--rounds", "1", "--calls", "5")
    assert list(found) == ["push 1 MiB", "pull 1 MiB", "ping", "exec of true"]
    for row in found.values():
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
        assert row["goal"]
        assert row["met"] in (True, False)


def test_status_part_compares_with_a_bare_interpreter(tmp_path: Path) -> None:
    found = figures(tmp_path, "status", "--rounds", "1", "--vms", "3")
    assert list(found) == ["vmrm status --json, 3 VMs", "python vmrm.py status --json, 3 VMs"]
    assert all(row["theirs"] > 0 for row in found.values())


def test_pool_part_compares_with_plain_sqlite(tmp_path: Path) -> None:
    words = ["--pool", "5", "6", "--pairs", "5", "--rounds", "1", "--contend", "0.2"]
    found = figures(tmp_path, "pool", *words)
    assert len(found) == 5
    assert found["acquire + release, 6 VMs"]["theirs"] > 0
    assert 0 < found["4 processes contending: least / most served"]["ours"] <= 1


def test_viewer_part_watches_a_lab_at_rest_and_at_work(tmp_path: Path) -> None:
    found = figures(tmp_path, "viewer", "--view", "3", "--watch", "0.5")
    assert list(found) == [
        "live view of 3 VMs, nothing changes",
        "live view of 3 VMs, 100 changes/s",
    ]


@pytest.mark.slow
def test_lateness_part_works_beside_what_it_measures(tmp_path: Path) -> None:
    found = figures(tmp_path, "lateness", "--files", "1500", "--entries", "3", "--due", "3")
    assert len(found) == 6
    assert all(row["theirs"] is not None for row in found.values())


@pytest.mark.slow
def test_handlers_part_takes_an_experiment_to_its_end(tmp_path: Path) -> None:
    found = figures(tmp_path, "handlers", "--handlers", "2", "--window", "0.5")
    names = {name.removeprefix("2 handlers: ") for name in found}
    assert {"launch, until all handlers are at work on their VM", "stop", "largest WAL"} <= names
    assert found["2 handlers: private memory while waiting, median"]["ours"] > 0
    late = [row for name, row in found.items() if "lateness" in name]
    assert len(late) == 4
    assert all(row["theirs"] is not None for row in late)


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = bench(tmp_path, "agents")
    assert done.returncode == 2
    assert "no such part: agents" in done.stderr


def test_the_table_says_which_goals_are_met(tmp_path: Path) -> None:
    done = bench(tmp_path, "status", "--rounds", "1", "--vms", "1")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["figure", "unit", "ours", "theirs", "ratio", "goal", "met"]
    assert len(rows) == 2
