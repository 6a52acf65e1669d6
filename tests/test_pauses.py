"""Pauses, breaks and resumes by command, what is appended to a schedule, and what comes late."""

from __future__ import annotations

import gzip
import json
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import guests
import pytest
import tables
from cli_lab import until
from lab import Lab, kill, stand_ins
from test_handler import load, sh, vm
from test_views import check_slices, checked

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
    return sorted(tables.attempts(lab.db, name), key=lambda row: row["ordinal"])


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
    tables.put(db.path, "experiments", {"start_at": vmrm.CLOCK.wall() - ago})


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
    said = [row["reason"] for row in vmrm.vm_rows(db)]
    assert said == ["in a break since 15", "", ""]
    assert did(vmrm.resume_vms(db)) == [("web", "resume: ends the break of 15")]
    assert not any(row["reason"] for row in vmrm.vm_rows(db))
    assert vmrm.resume_vms(db) == []
    assert did(vmrm.resume_vms(db, ["web"])) == [("web", "ignored: it is in no break")]
    rows = tables.holds(db.path)
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
    assert vmrm.entry_rows(db, "web")[-1]["at"] == "held"


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
        assert vmrm.entry_rows(db, "web")[-1]["at"] == "held"
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
    assert tables.holds(db.path) == []


@pytest.mark.parametrize("names", [["nosuch"], ["web", "nosuch"], ["router"]])
def test_what_cannot_be_paused_changes_nothing(db: vmrm.Database, names: list[str]) -> None:
    for give in (vmrm.pause_vms, vmrm.resume_vms):
        with pytest.raises(vmrm.NotFound, match=f"no VM '{names[-1]}' that is managed"):
            give(db, names)
    assert tables.holds(db.path) == []


def test_the_command_line_pauses(lab: Lab) -> None:
    load_both(lab, note(1, "a"))
    assert done(lab, "pause", "vm2", "VM1", "--duration", "1.5").splitlines() == [
        "vm2\t0\tpause of 1.5 s",
        "vm1\t0\tpause of 1.5 s",
    ]
    assert done(lab, "break", "vm1") == "vm1\t0\tbreak\n"
    assert done(lab, "resume") == "vm1\t0\tresume: ends the break of 0\n"
    for words in (["pause", "vm1"], ["pause", "--duration", "1"], ["break"], ["resume"]):
        refused = lab.run(*words)
        assert (refused.returncode, refused.stdout) == (2, ""), words
        assert refused.stderr.startswith("error: "), words


# === a running experiment ========================================================================


def test_an_armed_entry_that_was_not_sent_is_held_and_starts_once(lab: Lab) -> None:
    load_both(lab, note(0.2, "first"), note(6, "second"), note(6.2, "third"))
    done(lab, "run", "--detach")
    until(lambda: record(lab) and armed(lab, 2))
    with vmrm.Database(lab.db) as db:
        vmrm.pause_vms(db, ["vm1"])
    until(lambda: not armed(lab, 2))
    until(lambda: record(lab, 2) == ["first", "second", "third"])
    assert record(lab) == ["first"]
    pid = tables.vms(lab.db)["vm1"]["handler_pid"]
    kill(pid)  # a new handler finds it held
    until(lambda: lab.logs().count("break at") == 2)
    assert tables.vms(lab.db)["vm1"]["finished_at"] is None
    done(lab, "resume", "vm1")
    done(lab, "run")
    assert record(lab) == ["first", "second", "third"]
    rows = attempts(lab)
    assert [(row["ordinal"], row["attempt"], row["outcome"]) for row in rows] == [
        (1, 1, "done"),
        (2, 1, "done"),
        (3, 1, "done"),
    ]
    start = tables.experiment(lab.db)["start_at"]
    resumed = tables.holds(lab.db)[-1]["experiment_time"]
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
    until(lambda: tables.experiment(lab.db)["start_at"])
    more = lab.folder / "more.json"
    placed = [{"location": "placed", "content": "by content\n"}]
    more.write_text(json.dumps([sh(0.1, "cat placed >> ../../record", content=placed)]))
    done(lab, "schedule", "add", "vm1", str(more))
    until(lambda: record(lab) == ["by", "content"])  # it comes before the break
    more.write_text(json.dumps([note(0.9, "held"), note(-1, "negative")]))
    done(lab, "schedule", "add", "vm1", str(more))
    until(lambda: record(lab) == ["by", "content", "negative"])
    until(lambda: tables.holds(lab.db) or _resume(lab))
    until(lambda: record(lab) == ["by", "content", "negative", "held", "first"])
    until(lambda: all(row["finished_at"] for row in tables.vms(lab.db).values()))
    more.write_text(json.dumps([note(0.5, "overdue"), note(0.4, "before")]))
    done(lab, "schedule", "add", "vm1", str(more))
    until(lambda: sorted(record(lab)[-2:]) == ["before", "overdue"])
    overdue, before = (row["sent_at"] for row in attempts(lab)[-2:])
    assert before < overdue
    done(lab, "stop")
    more.write_text(json.dumps([note(0.6, "stopped")]))
    done(lab, "schedule", "add", "vm1", str(more))
    done(lab, "run")
    assert len(record(lab)) == 8
    assert record(lab)[-1] == "stopped"
    assert all(row["attempt"] == 1 for row in attempts(lab))


def _resume(lab: Lab) -> None:
    """Resume both VMs, unless their break has not come yet."""
    lab.run("resume")


def test_a_handler_alone_takes_up_a_schedule_that_replaces_its_own(lab: Lab) -> None:
    load_both(lab, {"start_time": "-inf", "pause": "inf"}, note(-1, "old"))
    process = lab.start("handle", "vm1")
    until(lambda: "VM is configuring" in lab.logs())
    with vmrm.Database(lab.db) as db:
        vmrm.ScheduleDb(db=db).put("vm1", json.dumps([note(-1, "new")]))
    until(lambda: record(lab) == ["new"])
    process.terminate()
    process.communicate(timeout=60)


def test_a_vm_that_is_testing_is_named_by_who_waits_for_it(lab: Lab) -> None:
    load_both(lab, note(-1, "x"))
    with vmrm.Database(lab.db) as db:
        uuid = tables.vms(db.path)["vm2"]["server_uuid"]
        vmrm.VMMapping(db=db).set_vm_state_by_uuid(uuid, "testing")
    detached = lab.run("run", "--detach")
    assert "VM 'vm2' is testing: it is not run, and all wait for it\n" in detached.stderr


def test_a_step_of_the_wall_clock_moves_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stepped(vmrm.Clock):
        step = 0.0

        def wall(self) -> float:
            return super().wall() + self.step

    clock = Stepped()
    monkeypatch.setattr(vmrm, "CLOCK", clock)
    start = vmrm.StartTime(logging.getLogger("vmrm.web"))
    start.plan(clock.wall() + 10)
    due = start.monotonic
    assert due == pytest.approx(clock.monotonic() + 10, abs=5)
    for clock.step in (3600, -3600):
        start.check()
        assert start.monotonic == due


def test_what_is_due_is_armed_while_added_files_are_pushed() -> None:
    done: list[str] = []

    def push() -> vmrm.Steps:
        for _ in range(3):
            done.append("chunk")
            yield 0

    def arm() -> float:
        done.append("arm")
        return -math.inf if done.count("arm") < 2 else math.inf

    assert list(vmrm.arming_meanwhile(push(), arm)) == [0, 0, 0]
    assert done == ["chunk", "arm", "chunk", "arm", "chunk"]


def test_a_schedule_made_in_python_reaches_the_guest(lab: Lab) -> None:
    """Content by a function, a file unpacked into the store, and arguments in pieces."""
    load_both(lab)
    packed = lab.folder / "stored.txt.gz"
    packed.write_bytes(gzip.compress(b"from the store\n"))
    with vmrm.Database(lab.db) as db:
        vmrm.VmResourceStore(decompress=True, db=db).add_file(packed)
        entry = vmrm.ScheduleEntry(-1)
        entry.set_executable("show.sh", ["a b"])
        entry.append_arguments(["$HOME"])
        calls: list[int] = []
        entry.add_content("show.sh", lambda: calls.append(1) or '#!/bin/sh\ncat here; echo "$2"\n')  # type: ignore[func-returns-value]
        entry.add_file("here", "stored.txt")
        vmrm.ScheduleDb(db=db).put("vm1", vmrm.schedule_text([entry]))
        assert calls == [1]
        entry.add_content("nothing", lambda: cast(str, None))
        with pytest.raises(ValueError, match="content is missing"):
            vmrm.ScheduleDb(db=db).put("vm1", vmrm.schedule_text([entry]))
    done(lab, "run")
    assert "out] from the store" in log_of(lab)
    assert "out] $HOME" in log_of(lab)


def test_a_retry_loads_what_could_not_be_loaded(lab: Lab) -> None:
    load_both(lab)
    entry = vmrm.ScheduleEntry(0.1)
    entry.set_executable("./late.sh")
    entry.add_file("late.sh", "late.sh")
    with vmrm.Database(lab.db) as db:
        vmrm.ScheduleDb(db=db).put("vm1", vmrm.schedule_text([entry]))
    done(lab, "run", "--detach", "--stay")
    until(lambda: [row["outcome"] for row in attempts(lab)] == ["failed"])
    (lab.folder / "late.sh").write_text("#!/bin/sh\nexit 0\n")
    done(lab, "store", "add", str(lab.folder / "late.sh"))
    done(lab, "retry", "vm1")
    until(lambda: [row["outcome"] for row in attempts(lab)] == ["failed", "done"])


# === programs on this host =======================================================================


def host(at: float, words: str, **more: Any) -> dict[str, Any]:
    return {**sh(at, words, **more), "executable": "/bin/sh", "on_host": True}


def log_of(lab: Lab, name: str = "vm1.log") -> str:
    return (lab.folder / "lab.db.d" / "logs.1" / name).read_text()


def test_programs_on_the_host_run_only_if_allowed(lab: Lab) -> None:
    load_both(lab, host(-1, "touch ran"), note(0.2, "x"))
    refused = lab.run("run")
    assert refused.returncode == 2
    assert "VM vm1, entry 1 (-1 sh); VM vm2, entry 1 (-1 sh)" in refused.stderr
    experiment = tables.experiment(lab.db)
    assert (experiment["launched_at"], experiment["allow_host"]) == (None, 0)
    refused = lab.run("run", str(lab.folder / "lab.json"))
    assert refused.returncode == 2
    # One that is added to a run that does not allow it never starts.
    (lab.folder / "more.json").write_text(json.dumps([host(0.2, "touch ran")]))
    load_here = lab.run("destroy", "--yes")
    assert load_here.returncode == 0
    load_both(lab, note(0.1, "x"))
    done(lab, "run", "--detach", "--stay")
    done(lab, "schedule", "add", "vm1", str(lab.folder / "more.json"))
    until(lambda: any(row["ordinal"] == 2 and row["ended_at"] for row in attempts(lab)))
    assert attempts(lab)[-1]["error"] == "cannot be loaded: it runs on the host: run --allow-host"
    done(lab, "stop")
    done(lab, "run", "--allow-host", "--retry")
    assert [row["outcome"] for row in attempts(lab)] == ["done", "failed", "done"]


def test_programs_on_the_host_are_entries_like_others(lab: Lab) -> None:
    (lab.folder / "tool.sh").write_text('#!/bin/sh\necho "tool $1 for $VMRM_VM of $VMRM_DB"\n')
    done(lab, "store", "add", str(lab.folder / "tool.sh"))
    stored = {"executable": "tool.sh", "arguments": ["it's"], "on_host": True}
    load_both(
        lab,
        {"start_time": -3, **stored},
        host(-2, "touch reboot; echo err >&2; exit 10", ignore_failure=True),
        host(0.1, "pwd; echo $A", cwd="/", env={"A": "a b", "VMRM_VM": "mine"}),
        host(0.2, "echo $$ > pid; sleep 60 & wait", timeout=0.5),
        {"start_time": 0.3, "executable": "nosuch", "on_host": True},
        host(0.4, "kill -9 $$"),
        note(0.5, "guest"),
    )
    ended = lab.run("run", "--allow-host")
    assert ended.returncode == 1
    assert [(row["outcome"], row["exit_code"], row["error"]) for row in attempts(lab)] == [
        ("done", 0, ""),
        ("failed", 10, "exit code 10"),
        ("done", 0, ""),
        ("failed", None, "timed out after 0.5 s and was killed"),
        ("failed", None, "cannot be loaded: the store has no such file: nosuch"),
        ("failed", 137, "exit code 137"),
        ("done", 0, ""),
    ]
    log = log_of(lab)
    assert f"[-3 tool.sh out] tool it's for vm1 of {lab.db}" in log
    assert "[-2 sh err] err" in log
    assert "[0.1 sh out] /\n" in log
    assert "[0.1 sh out] a b" in log
    here = [row["boot_id"] for row in attempts(lab) if row["ordinal"] == 1]
    assert set(here) == {vmrm.boot_id()}
    (pid,) = (lab.folder / "lab.db.d" / "host").glob("*/vm1/4/pid")
    until(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists())


@pytest.mark.parametrize("label", ["exec-answered", "before-journal"])
def test_a_program_on_the_host_outlives_its_handler_and_runs_once(lab: Lab, label: str) -> None:
    words = f"echo begin >> {lab.folder}/ran; sleep 1; echo end; exit 3"
    load(
        lab,
        vm("vm1", lab.folder / "agents" / "1.sock", lab.guest(1) / "launch", host(0.2, words)),
    )
    crash = {"VMRM_CRASH": label, "VMRM_CRASH_ONCE": str(lab.folder / "crashed")}
    assert lab.run("run", "--allow-host", **crash).returncode == 1
    assert (lab.folder / "crashed").exists()
    assert (lab.folder / "ran").read_text() == "begin\n"
    assert [(row["outcome"], row["exit_code"]) for row in attempts(lab)] == [("failed", 3)]
    assert log_of(lab).count("[0.2 sh out] end") == 1


def test_stop_kill_ends_programs_on_the_host_and_stop_does_not(lab: Lab) -> None:
    load_both(lab, host(0.1, f"echo $$ >> {lab.folder}/pids; sleep 300"))
    done(lab, "run", "--detach", "--allow-host")
    until(lambda: all(row["pid"] for row in attempts(lab) + attempts(lab, "vm2")) and attempts(lab))
    path = lab.folder / "pids"
    until(lambda: path.exists() and len(path.read_text().split()) == 2)
    pids = [Path("/proc") / pid for pid in path.read_text().split()]
    done(lab, "stop")
    assert all(pid.exists() for pid in pids)
    done(lab, "run", "--detach", "--allow-host")
    until(lambda: len(lab.handler_pids()) == 2)
    done(lab, "stop", "--kill")
    until(lambda: not any(pid.exists() for pid in pids))
    for name in ("vm1", "vm2"):
        assert [row["outcome"] for row in attempts(lab, name)] == ["failed"]
    done(lab, "run", "--detach", "--allow-host", "--retry")
    until(lambda: len(path.read_text().split()) == 4)
    until(lambda: [row["outcome"] for row in attempts(lab, "vm2")] == ["failed", "running"])
    pids = [Path("/proc") / pid for pid in path.read_text().split()]
    done(lab, "stop", "--kill")  # by the handler that began it
    until(lambda: not any(pid.exists() for pid in pids))
    assert [row["outcome"] for row in attempts(lab)] == ["failed", "failed"]
    assert "the handler broke" not in log_of(lab)


def test_stop_kill_ends_programs_on_the_host_if_the_guest_is_gone(tmp_path: Path) -> None:
    lab, pid = Lab(tmp_path), tmp_path / "pid"
    with stand_ins(tmp_path / "agents", 1):
        words = f"echo $$ > {pid}; sleep 300"
        load(lab, vm("vm1", tmp_path / "agents/1.sock", lab.guest(1) / "launch", host(-1, words)))
        done(lab, "run", "--detach", "--allow-host")
        until(lambda: pid.exists() and attempts(lab)[0]["pid"])
    process = Path("/proc") / pid.read_text().strip()
    assert process.exists()
    done(lab, "stop", "--kill")
    until(lambda: not process.exists())
    assert [row["error"] for row in attempts(lab)] == ["killed by stop --kill"]


# === what comes late =============================================================================


def interrupted(lab: Lab) -> None:
    """Run the first of four entries and kill all processes; return when two more are overdue."""
    load_both(lab, note(0.1, "one"), note(1, "two"), note(2, "three"), note(8, "four"))
    done(lab, "run", "--detach")
    until(lambda: record(lab) and record(lab, 2))
    pid = lab.supervisor_pid()
    assert pid is not None
    for victim in (*lab.handler_pids(), pid):
        kill(victim)
    tables.let_time_go_by(lab.db, 5)


@pytest.mark.parametrize("late", ["start", "skip", "shift"])
def test_overdue_entries_after_an_outage(lab: Lab, late: str) -> None:
    interrupted(lab)
    early = set(record(lab))  # two may have been quick
    ended = lab.run("run", "--late", late)
    assert ended.returncode == 0, ended.stderr
    rows = {row["ordinal"]: row for row in attempts(lab)}
    assert [row["attempt"] for row in rows.values()] == [1, 1, 1, 1]
    overdue = [rows[n] for n, word in ((2, "two"), (3, "three")) if word not in early]
    assert overdue
    if late == "skip":
        assert {row["outcome"] for row in overdue} == {"skipped"}
        assert record(lab) == [*("one", "two")[: len(early)], "four"]
        assert "skipped" in ended.stderr
    else:
        assert sorted(record(lab)) == ["four", "one", "three", "two"]
        assert {row["outcome"] for row in overdue} == {"done"}
        assert overdue == sorted(overdue, key=lambda row: row["sent_at"])
    first = overdue[0]
    gap = rows[4]["planned_at"] - first["planned_at"]
    assert gap == pytest.approx(7 if first["ordinal"] == 2 else 6, abs=0.01)
    holds = {(row["experiment_time"], row["duration_s"]) for row in tables.holds(lab.db)}
    if late == "shift":
        assert len(holds) == 1, "all VMs have the same"
        continued = tables.experiment(lab.db)["continued_at"]
        assert first["planned_at"] == pytest.approx(continued, abs=1)
    else:
        assert not holds


# === on a real VM ================================================================================


EXAMPLE = r"""
[experiment]
start_buffer = 1

[[vm]]
name = "web1"
path = "/tmp/lab/agents/1.sock"
launch_dir = "/tmp/lab/agents/1/launch"

[[vm.schedule]]
start_time = -1
executable = "mkdir"
arguments = ["-p", "/tmp/lab/agents/1/data"]

[[vm.schedule]]
start_time = 0.5
executable = "sh"
arguments = "-c 'for n in $(seq 6); do echo line $n; sleep 0.5; done > /tmp/lab/agents/1/data/log'"

[[vm.schedule]]
start_time = 1
transfer = [{ location = "/tmp/lab/agents/1/data", interval = 1, destination = "out" }]

[[vm.schedule]]
start_time = 1.5
executable = "/bin/sh"                          # of this host, not of the VM
arguments = ["-c", "echo the host knows $VMRM_VM"]
on_host = true

[[vm.schedule]]
start_time = 2
pause = inf                                     # a break: until somebody resumes

[[vm.schedule]]
start_time = 3
executable = "echo"
arguments = ["after the break"]
"""
ADDED = '[{"start_time": 3.5, "executable": "echo", "arguments": ["added"]}]'


@pytest.mark.vm
def test_everything_that_moves_a_schedule_at_once_on_a_real_guest(
    tmp_path: Path, micro_vm: guests.Guest, children: None
) -> None:
    """Break, resume and pause from outside, addition, growing log, host entry: all at once."""
    lab = Lab(tmp_path)
    text = EXAMPLE.replace("/tmp/lab/agents/1.sock", str(micro_vm.agent_path))
    (tmp_path / "time.toml").write_text(text)
    run = ("run", str(tmp_path / "time.toml"), "--allow-host")
    done(lab, *run, "--detach")
    try:
        done(lab, "wait", "--timeout", "120")
        done(lab, "pause", "web1", "--duration", "0.5")
        until(lambda: "ends the break" in done(lab, "resume", "web1"))
        (tmp_path / "more.json").write_text(ADDED)
        done(lab, "schedule", "add", "web1", str(tmp_path / "more.json"))
        done(lab, *run)
    finally:
        lab.run("stop", "--kill")
    ran = attempts(lab, "web1")
    assert [(row["ordinal"], row["outcome"]) for row in ran] == [
        (n, "done") for n in (1, 2, 3, 4, 6, 7)
    ]
    *paused, resumed = (
        row["experiment_time"] for row in tables.holds(lab.db) if not row["ignored"]
    )
    start = tables.experiment(lab.db)["start_at"]
    planned = {row["ordinal"]: row["planned_at"] - start for row in ran[1:]}
    if paused and paused[0] > 2:  # the break was quicker than the command, on a busy host
        return
    assert planned[6] == pytest.approx(resumed + 1, abs=0.001)
    assert planned[7] == pytest.approx(resumed + 1.5, abs=0.001)
    if paused and paused[0] < 0.5:
        assert planned[2] == pytest.approx(1, abs=0.001)
    assert all(row["sent_at"] >= row["planned_at"] for row in ran[1:])
    log = log_of(lab, "web1.log")
    for words in ("[1.5 sh out] the host knows web1", "[3 echo out] after", "[3.5 echo out] added"):
        assert words in log
    pulled = (
        tmp_path / "out" / "web1" / "tmp" / "lab" / "agents" / "1" / "data" / "log"
    ).read_text()
    with micro_vm.agent() as agent:
        assert pulled == agent.run("cat", "/tmp/lab/agents/1/data/log").out.decode()
        agent.run("rm", "-rf", "/tmp/lab")
    assert pulled.splitlines()[-1] == "line 6"
    assert ran[2]["ended_at"] >= ran[1]["ended_at"], "the last pass is the last"
    check_slices(lab, checked(done(lab, "trace")))
