"""Hundreds of handlers at once: all work is done, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tables
from lab import VMRM, Lab, entry, kill, stand_ins

COUNT = 200
KILLED, KILLS, SEED = 100, 120, 20261122


def write_large(lab: Lab) -> Path:
    """Write an experiment of COUNT VMs, made by `count`, with three entries each."""
    note = "echo $N >> ../../record"
    schedule = [
        {"start_time": at, "executable": "sh", "arguments": ["-c", note], "env": {"N": str(n)}}
        for n, at in ((1, -1), (2, 1), (3, 1.5))
    ]
    vm = {
        "name": "vm{n}",
        "count": COUNT,
        "path": "agents/{n}.sock",
        "launch_dir": f"{lab.folder}/agents/{{n}}/launch",
        "schedule": schedule,
    }
    path = lab.folder / "lab.json"
    path.write_text(json.dumps({"experiment": {"start_buffer": 1}, "vm": [vm]}))
    return path


def flocks_in(folder: Path) -> list[str]:
    """Return the locks that anybody holds on a file below a folder."""
    inodes = {str(path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}
    lines = Path("/proc/locks").read_text().splitlines()
    return [line for line in lines if line.split()[5].rpartition(":")[2] in inodes]


@pytest.mark.slow
def test_two_hundred_handlers_do_all_their_work(tmp_path: Path) -> None:
    lab = Lab(tmp_path, count=COUNT)
    with stand_ins(tmp_path / "agents", COUNT) as agent:
        before = len(list(Path(f"/proc/{agent.pid}/fd").iterdir()))
        done = lab.run("run", str(write_large(lab)), timeout=300, VMRM_TIMEOUT_SCALE="1")
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [line.split("\t") for line in done.stdout.splitlines()]
        assert [row[1:6] for row in rows] == [["configured", "3", "3", "0", "0"]] * COUNT
        lab.run("exec", "vm1", "true")  # the agent has seen every client go by now
        assert len(list(Path(f"/proc/{agent.pid}/fd").iterdir())) == before
    for n in range(1, COUNT + 1):
        assert (lab.guest(n) / "launch" / "record").read_text() == "1\n2\n3\n"
    outcomes = [row["outcome"] for row in tables.attempts(lab.db)]
    assert outcomes == ["done"] * (3 * COUNT)
    assert not flocks_in(tmp_path)
    assert not list((tmp_path / "lab.db.d" / "wake").iterdir())
    running = subprocess.run(
        ["pgrep", "-f", f"{VMRM[1]}.*{tmp_path}"], capture_output=True, check=False
    )
    assert not running.stdout.split()


def simple_entries(guest: str) -> list[dict[str, Any]]:
    """Return twenty entries: eight in four negative times, twelve after the start."""
    times = [-4, -4, -3, -3, -2, -2, -1, -1, *(0.4 * n for n in range(1, 13))]
    return [entry(number, at) for number, at in enumerate(times, 1)]


@pytest.mark.slow
def test_two_thousand_entries_survive_random_kills_of_their_handlers(tmp_path: Path) -> None:
    dice, kills = random.Random(SEED), 0
    lab = Lab(tmp_path, count=KILLED, start_buffer=1)
    with stand_ins(tmp_path / "agents", KILLED):
        assert lab.run("load", str(lab.write(simple_entries))).returncode == 0
        with lab.start("--quiet", "run", VMRM_TIMEOUT_SCALE="1") as run:
            while run.poll() is None:
                if kills < KILLS and (pids := lab.handler_pids()):
                    kill(dice.choice(pids))
                    kills += 1
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(dice.uniform(0, 0.3))
        print(f"seed {SEED}: {kills} handlers killed; then exit code {run.returncode}")
        if run.returncode:
            lab.run_to_the_end()
    lab.audit()
    counts = [(row["entries"], row["done"]) for row in tables.status(lab.db).values()]
    assert counts == [(20, 20)] * KILLED
    assert kills == KILLS
