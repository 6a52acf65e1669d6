"""Handlers and supervisors are killed; nothing is lost, and nothing runs twice in silence."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import tables
from lab import Lab, crash_labels, entry, kill, stand_ins

# Where a label is passed only by another command, or is not a place in a handler's life: those of
# the pool and of an upgrade are tested with these.
OF_OTHERS = ("file-", "hook-", "pool-", "program-", "pull-", "push-", "qemu-")
OF_OTHERS += ("store-", "upgrade-")
ELSEWHERE = {"destroyed", "request-claimed", "vm-failed"}
SEED = 20261121


AT_ONCE = 5  # labs beside each other: they mostly wait


def made_lab(folder: Path) -> Lab:
    folder.mkdir()
    lab = Lab(folder)
    assert lab.run("load", str(lab.write())).returncode == 0
    return lab


def finished_well(lab: Lab) -> None:
    lab.audit()
    row = tables.status(lab.db)["vm1"]
    assert (row["state"], row["done"], row["failed"]) == ("configured", 19, 1)
    assert list((lab.folder / "lab.db.d/transfers.1/vm1").rglob("record"))
    assert lab.run("check").returncode == 0


def test_without_a_crash_every_entry_runs_once(tmp_path: Path) -> None:
    lab = made_lab(tmp_path / "lab")
    with stand_ins(lab.folder / "agents", 1):
        assert lab.run_to_the_end() == [0]
    finished_well(lab)
    attempts = [(row["ordinal"], row["attempt"]) for row in tables.attempts(lab.db)]
    assert sorted(attempts) == [
        *((n, 1) for n in range(1, 8)),
        (7, 2),
        *((n, 1) for n in range(8, 21)),
    ]


def test_the_audit_notices_what_is_not_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.write(lambda _: [entry(1, 0.1), entry(2, 0.2)])
    with stand_ins(lab.folder / "agents", 1):
        assert lab.run("run", str(lab.folder / "lab.json")).returncode == 0
    lab.audit()
    record = lab.guest(1) / "launch" / "record"
    noted = record.read_text()
    for wrong in (noted + "1 begin\n", noted.replace("2 begin\n", "")):
        record.write_text(wrong)
        with pytest.raises(AssertionError):
            lab.audit()
    record.write_text(noted)
    start = tables.experiment(lab.db)["start_at"]
    for change in ({"start_at": start + 1}, {"start_at": None}):
        tables.put(lab.db, "experiments", change)
        with pytest.raises(AssertionError):
            lab.audit()
    tables.put(lab.db, "experiments", {"start_at": start})
    lab.audit()
    tables.put(lab.db, "attempts", {"outcome": "unknown"}, ordinal=1)
    record.write_text("")
    with pytest.raises(AssertionError):
        lab.audit()


def killed_at_label(folder: Path, victim: str, label: str) -> None:
    """Kill who passes a crash point, or its parent: a handler or its supervisor, as a rule."""
    lab = made_lab(folder / label)
    once = lab.folder / "crashed"
    crash = {"VMRM_CRASH": f"{label}:1", "VMRM_CRASH_ONCE": str(once)}
    if victim == "parent":
        crash["VMRM_CRASH_PARENT"] = "1"
    with stand_ins(lab.folder / "agents", 1):
        first = lab.run("run", **crash)
        assert once.exists(), f"nobody passed {label}: {first.stderr}"
        if first.returncode:
            lab.run_to_the_end()
    finished_well(lab)


def killed_after(folder: Path, moment: int) -> None:
    after = random.Random(f"{SEED} {moment}").uniform(0.1, 5.0)
    print(f"seed {SEED}, moment {moment}: handler and supervisor killed after {after:.3f} s")
    lab = made_lab(folder / f"{moment}")
    with stand_ins(lab.folder / "agents", 1):
        process = lab.start("run")
        time.sleep(after)
        for pid in filter(None, [*lab.handler_pids(), lab.supervisor_pid()]):
            kill(pid)
        process.communicate(timeout=60)
        if process.returncode:
            lab.run_to_the_end()
    finished_well(lab)


def at_once(*calls: Callable[[], None]) -> None:
    """Run all calls, a few at a time; raise what the first one raised."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


@pytest.mark.parametrize("victim", ["itself", "parent"])
def test_kill_at_every_crash_point(tmp_path: Path, victim: str) -> None:
    labels = [label for label in crash_labels() if label not in ELSEWHERE]
    labels = [label for label in labels if not label.startswith(OF_OTHERS)]
    assert len(labels) > 10
    at_once(*(partial(killed_at_label, tmp_path, victim, label) for label in labels))


def test_kill_of_both_at_random_moments(tmp_path: Path) -> None:
    at_once(*(partial(killed_after, tmp_path, moment) for moment in range(10)))
