"""Pauses, breaks and resumes by command, what is appended to a schedule, and what comes late."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, kill, stand_ins
from test_handler import load, sh, until, vm

import vmrm

INF = math.inf


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with two stand-ins, nothing loaded."""
    made = Lab(tmp_path, count=2)
    with stand_ins(tmp_path / "agents", 2):
        yield made
        made.run("stop", "--kill")


def load_both(lab: Lab, *schedule: dict[str, Any], **settings: Any) -> None:
    """Load the same schedule for both VMs."""
    vms = [
        vm(f"vm{n}", lab.folder / "agents" / f"{n}.sock", lab.guest(n) / "launch", *schedule)
        for n in (1, 2)
    ]
    load(lab, *vms, **settings)


def note(at: float, word: str, **more: Any) -> dict[str, Any]:
    return sh(at, f"echo {word} >> ../../record", **more)


def record(lab: Lab, n: int = 1) -> list[str]:
    path = lab.guest(n) / "launch" / "record"
    return path.read_text().split() if path.exists() else []


def attempts(lab: Lab, name: str = "vm1") -> list[dict[str, Any]]:
    return lab.query("SELECT * FROM attempts WHERE server_name = ? ORDER BY ordinal, id", name)


def armed(lab: Lab, ordinal: int) -> bool:
    return any(row["ordinal"] == ordinal and row["outcome"] == "armed" for row in attempts(lab))


def done(lab: Lab, *words: str) -> str:
    result = lab.run(*words)
    assert result.returncode == 0, result.stderr
    return result.stdout


# === commands ====================================================================================


@pytest.fixture
def db(tmp_path: Path) -> Iterator[vmrm.Database]:
    """A database with VMs web (with a schedule), idle and, not managed, router."""
    with vmrm.Database(tmp_path / "lab.db") as made:
        mapping = vmrm.VMMapping(db=made)
        for name, state in (("web", "uninitialized"), ("idle", "uninitialized"), ("router", "n/a")):
            mapping.put(f"u-{name}", name, state)
        yield made


def put(db: vmrm.Database, *items: dict[str, Any]) -> None:
    vmrm.ScheduleDb(db=db).put("web", json.dumps(items))


def begin(db: vmrm.Database, ago: float) -> None:
    """Make VM web configured and time 0 so many seconds ago."""
    vmrm.VMMapping(db=db).set_vm_state_by_uuid("u-web", "configuring")
    vmrm.VMMapping(db=db).set_vm_state_by_uuid("u-web", "configured")
    db.write("UPDATE experiments SET start_at = :start", start=vmrm.CLOCK.wall() - ago)


def did(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["vm"], row["done"]) for row in rows]


def test_a_command_records_the_experiment_time_and_what_it_did(db: vmrm.Database) -> None:
    put(db, {"start_time": 15, "pause": "inf"}, {"start_time": 30, "executable": "e2"})
    begin(db, 1000)
    assert did(vmrm.pause_vms(db, ["WEB", "idle"], 2.5)) == [
        ("web", "pause of 2.5 s"),
        ("idle", "pause of 2.5 s"),
    ]
    assert did(vmrm.pause_vms(db, ["web"])) == [("web", "ignored: it is in a break since 15")]
    assert did(vmrm.resume_vms(db)) == [("web", "resume: ends the break of 15")]
    assert vmrm.resume_vms(db) == []
    assert did(vmrm.resume_vms(db, ["web"])) == [("web", "ignored: it is in no break")]
    rows = db.query("SELECT duration_s, ignored, experiment_time FROM holds ORDER BY id")
    assert [(row["duration_s"], row["ignored"]) for row in rows] == [
        (2.5, 0),
        (2.5, 0),
        (INF, 1),
        (None, 0),
        (None, 1),
    ]
    assert all(1000 <= row["experiment_time"] < 1060 for row in rows)
    shown = {row["entry"]: float(row["at"]) for row in vmrm.entry_rows(db, "web")}
    assert shown[2] == pytest.approx(rows[3]["experiment_time"] + 15 + 2.5)
    # What was ignored stays so, whatever is added to the past.
    text = vmrm.ScheduleDb(db=db).get("web")
    assert text is not None
    vmrm.ScheduleDb(db=db).put("web", text[:-1] + ', {"start_time": 14, "pause": "inf"}]')
    assert vmrm.entry_rows(db, "web")[-1]["at"] == "inf"


def test_before_time_0_a_resume_ends_a_break_at_minus_infinity_then_one_at_0(
    db: vmrm.Database,
) -> None:
    put(
        db,
        {"start_time": "-inf", "pause": "inf"},
        {"start_time": -1, "executable": "e"},
        {"start_time": 0, "pause": "inf"},
        {"start_time": 5, "executable": "e"},
    )
    for expected in ("resume: ends the break of -inf", "resume: ends the break of 0"):
        assert vmrm.entry_rows(db, "web")[-1]["at"] == "inf"
        assert did(vmrm.resume_vms(db, ["web"])) == [("web", expected)]
    assert vmrm.entry_rows(db, "web")[-1]["at"] == "5", "time 0 has not come: nothing is shifted"
    assert did(vmrm.resume_vms(db, ["web"])) == [("web", "ignored: it is in no break")]
    assert did(vmrm.pause_vms(db, ["web"], 7)) == [("web", "pause of 7 s")]
    assert vmrm.entry_rows(db, "web")[-1]["at"] == "12"
    assert did(vmrm.pause_vms(db, ["web"])) == [("web", "break")]
    begin(db, 100)
    assert did(vmrm.resume_vms(db)) == [("web", "resume: ends the break of 0")]
    assert float(vmrm.entry_rows(db, "web")[-1]["at"]) == pytest.approx(105, abs=5)


@pytest.mark.parametrize("duration", [0, -1, math.nan, -INF, 2e9, True])
def test_a_pause_without_sense_is_refused_everywhere(db: vmrm.Database, duration: float) -> None:
    with pytest.raises(ValueError, match="is not positive"):
        vmrm.pause_vms(db, ["web"], duration)
    with pytest.raises(ValueError, match=r"is not positive|must be a positive number"):
        vmrm.ScheduleEntry(5).add_pause(duration)
    assert db.value("SELECT count(*) FROM holds") == 0


@pytest.mark.parametrize("names", [["nosuch"], ["web", "nosuch"], ["router"]])
def test_what_cannot_be_paused_changes_nothing(db: vmrm.Database, names: list[str]) -> None:
    for give in (vmrm.pause_vms, vmrm.resume_vms):
        with pytest.raises(vmrm.NotFound, match=f"no VM '{names[-1]}' that is managed"):
            give(db, names)
    assert db.value("SELECT count(*) FROM holds") == 0


def test_the_command_line_pauses(lab: Lab) -> None:
    load_both(lab, note(1, "a"))
    assert done(lab, "pause", "vm2", "VM1", "--duration", "1.5").splitlines() == [
        "vm2\t0.0\tpause of 1.5 s",
        "vm1\t0.0\tpause of 1.5 s",
    ]
    assert done(lab, "break", "vm1") == "vm1\t0.0\tbreak\n"
    assert done(lab, "resume") == "vm1\t0.0\tresume: ends the break of 0\n"
    for words in (["pause", "vm1"], ["pause", "--duration", "1"], ["break"], ["resume"]):
        refused = lab.run(*words)
        assert (refused.returncode, refused.stdout) == (2, ""), words
        assert refused.stderr.startswith("error: "), words


# === a running experiment ========================================================================


def test_an_armed_entry_that_was_not_sent_is_held_and_starts_once(lab: Lab) -> None:
    load_both(lab, note(0.2, "first"), note(3, "second"), note(3.2, "third"))
    done(lab, "run", "--detach")
    until(lambda: record(lab) and armed(lab, 2))
    with vmrm.Database(lab.db) as db:
        vmrm.pause_vms(db, ["vm1"])
    until(lambda: not armed(lab, 2))
    until(lambda: record(lab, 2) == ["first", "second", "third"])
    assert record(lab) == ["first"]
    (pid,) = {row["handler_pid"] for row in lab.query("SELECT * FROM vms WHERE ordinal = 1")}
    kill(pid)  # a new handler finds it held
    until(lambda: lab.logs().count("break at") == 2)
    assert lab.query("SELECT finished_at FROM vms WHERE server_name = 'vm1'") == [
        {"finished_at": None}
    ]
    done(lab, "resume", "vm1")
    done(lab, "run")
    assert record(lab) == ["first", "second", "third"]
    rows = attempts(lab)
    assert [(row["ordinal"], row["attempt"], row["outcome"]) for row in rows] == [
        (1, 1, "done"),
        (2, 1, "done"),
        (3, 1, "done"),
    ]
    start = lab.query("SELECT start_at FROM experiments")[0]["start_at"]
    resumed = lab.query("SELECT experiment_time FROM holds ORDER BY id DESC")[0]["experiment_time"]
    for row in rows[1:]:
        assert row["planned_at"] > start + resumed
        assert row["sent_at"] >= row["planned_at"]
    assert rows[2]["planned_at"] - rows[1]["planned_at"] == pytest.approx(0.2, abs=0.001)


def test_a_break_at_minus_infinity_holds_a_vm_before_its_first_entry(lab: Lab) -> None:
    load_both(lab, {"start_time": "-inf", "pause": "inf"}, note(-1, "ready"), note(0.3, "go"))
    done(lab, "run", "--detach")
    done(lab, "wait", "--state", "configuring")
    done(lab, "resume", "vm2")
    done(lab, "wait", "vm2", "--timeout", "60")
    assert record(lab) == []
    done(lab, "resume")
    done(lab, "run")
    assert record(lab) == record(lab, 2) == ["ready", "go"]


# === what is appended ============================================================================


def test_two_who_append_at_once_lose_nothing(lab: Lab) -> None:
    load_both(lab, note(0.2, "first"))

    def append(word: str) -> None:
        with vmrm.Database(lab.db) as db:
            for n in range(10):
                path = lab.folder / f"{word}{n}.json"
                path.write_text(json.dumps([note(1, f"{word}{n}")]))
                vmrm.append_entries(db, "vm1", path)

    with ThreadPoolExecutor() as pool:
        list(pool.map(append, "ab"))
    done(lab, "run")
    ran = record(lab)
    assert sorted(ran) == sorted(["first", *(f"{word}{n}" for word in "ab" for n in range(10))])


def test_entries_appended_in_a_break_and_after_the_end(lab: Lab) -> None:
    load_both(lab, {"start_time": 0.2, "pause": "inf"}, note(1, "first"))
    done(lab, "run", "--detach", "--stay")
    until(lambda: lab.query("SELECT start_at FROM experiments")[0]["start_at"])
    more = lab.folder / "more.json"
    placed = [{"location": "placed", "content": "by content\n"}]
    more.write_text(json.dumps([sh(0.1, "cat placed >> ../../record", content=placed)]))
    done(lab, "schedule", "add", "vm1", str(more))
    until(lambda: record(lab) == ["by", "content"])  # it comes before the break
    more.write_text(json.dumps([note(0.9, "held"), note(-1, "negative")]))
    done(lab, "schedule", "add", "vm1", str(more))
    until(lambda: record(lab) == ["by", "content", "negative"])
    until(lambda: lab.query("SELECT experiment_time FROM holds") or _resume(lab))
    until(lambda: record(lab) == ["by", "content", "negative", "held", "first"])
    finished = "SELECT count(*) AS n FROM vms WHERE finished_at IS NOT NULL"
    until(lambda: lab.query(finished)[0]["n"] == 2)
    more.write_text(json.dumps([note(0.5, "overdue"), note(0.4, "before")]))
    done(lab, "schedule", "add", "vm1", str(more))
    until(lambda: record(lab)[-2:] == ["before", "overdue"])
    done(lab, "stop")
    more.write_text(json.dumps([note(0.6, "stopped")]))
    done(lab, "schedule", "add", "vm1", str(more))
    done(lab, "run")
    assert record(lab) == [
        "by",
        "content",
        "negative",
        "held",
        "first",
        "before",
        "overdue",
        "stopped",
    ]
    assert all(row["attempt"] == 1 for row in attempts(lab))


def _resume(lab: Lab) -> None:
    """Resume both VMs, unless their break has not come yet."""
    lab.run("resume")
