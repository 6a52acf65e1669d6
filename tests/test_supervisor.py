"""What the supervisor promises, and what only two processes together can break."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tables
from cli_lab import until
from hostile import Asked, hostile
from lab import Lab, kill, stand_ins
from test_handler import load, outcomes, sh, vm

import vmrm


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with two stand-ins, nothing loaded, and nothing left of it afterwards."""
    made = Lab(tmp_path, count=2)
    with stand_ins(tmp_path / "agents", 2):
        try:
            yield made
        finally:
            for pid in (made.supervisor_pid(), *made.handler_pids()):
                if pid:
                    kill(pid)


def loaded(lab: Lab, *schedules: list[dict[str, Any]], **settings: Any) -> None:
    """Load a VM with each schedule."""
    agents = lab.folder / "agents"
    vms = [
        vm(f"vm{n}", agents / f"{n}.sock", lab.guest(n) / "launch", *schedule)
        for n, schedule in enumerate(schedules, 1)
    ]
    load(lab, *vms, **settings)


def ended(lab: Lab, *words: str, code: int = 0) -> Any:
    done = lab.run(*words, timeout=60)
    assert done.returncode == code, done.stderr + lab.logs()
    return done


def record(lab: Lab, n: int = 1) -> list[str]:
    """Return what the programs of guest n have written to ../../record."""
    path = lab.guest(n) / "launch" / "record"
    return path.read_text().split() if path.exists() else []


def alive(pid: int) -> bool:
    return vmrm.process_started(pid) is not None


def only_handler(lab: Lab) -> int:
    """Return the pid of the one handler, once there is one."""
    until(lambda: len(lab.handler_pids()) == 1)
    return lab.handler_pids()[0]


# === handlers that die, or do not leave ========================================================


def test_stop_kills_a_handler_that_is_stopped(lab: Lab) -> None:
    loaded(lab, [sh(-1, "echo $$ > ../../pid; exec sleep 4321")])
    with lab.start("run") as run:
        pid = lab.guest(1) / "launch" / "pid"
        until(lambda: pid.exists() and pid.read_text())
        handler = only_handler(lab)
        os.kill(handler, signal.SIGSTOP)
        ended(lab, "stop")
        assert not alive(handler)
        assert run.wait(60) == 1
    assert lab.supervisor_pid() is None
    assert alive(int(pid.read_text())), "the program goes on"
    ended(lab, "stop", "--kill")
    until(lambda: not alive(int(pid.read_text())))


def test_a_handler_that_always_dies_fails_its_vm_and_no_other(lab: Lab) -> None:
    (lab.guest(1) / "file").write_text("x")
    bring = {"start_time": -1, "transfer": [{"location": str(lab.guest(1) / "file")}]}
    loaded(lab, [bring], [sh(0.1, "true")], on_failure="drop")
    crash = {"VMRM_CRASH": "transfer-before-rename:1", "VMRM_TIMEOUT_SCALE": "0.1"}
    done = lab.run("run", **crash)
    assert done.returncode == 1, done.stderr
    assert tables.states(lab.db) == {"vm1": "failed", "vm2": "configured"}
    reason = tables.vms(lab.db)["vm1"]["reason"]
    assert re.match(r"its handler died \d+ times in a row: SIGKILL", reason), reason
    assert [row[1] for row in outcomes(lab, "vm2")] == ["done"]
    told = [line for line in lab.logs().splitlines() if "the handler of vm1 died" in line]
    pauses = [float(line.rpartition("again in ")[2].split()[0]) for line in told]
    assert 5 <= len(pauses) < 20
    assert pauses == sorted(pauses)
    assert pauses[-1] > 5 * pauses[0]
    times = [datetime.fromisoformat(line.split()[0]).timestamp() for line in told]
    waited = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(seconds > pause - 0.01 for seconds, pause in zip(waited, pauses, strict=False))


def test_a_handler_that_gets_on_may_die_as_often_as_it_likes(lab: Lab) -> None:
    loaded(lab, [sh(-n, "echo x >> ../../record") for n in range(14, 0, -1)])
    done = lab.run("run", VMRM_CRASH="running-recorded:1")
    assert done.returncode == 0, done.stderr + lab.logs()
    assert len(record(lab)) == 14


def test_a_dead_supervisor_takes_its_handlers_along_and_no_program(lab: Lab) -> None:
    programs = [sh(0.1, "echo x >> ../../record; while [ ! -e ../../go ]; do sleep 0.1; done")]
    loaded(lab, programs, programs)
    with lab.start("run") as run:
        until(lambda: record(lab) and record(lab, 2))
        handlers = lab.handler_pids()
        assert len(handlers) == 2
        supervisor = lab.supervisor_pid()
        assert supervisor
        kill(supervisor)
        until(lambda: not any(alive(pid) for pid in handlers))
        assert run.wait(60) == 1
    for n in (1, 2):
        (lab.guest(n) / "launch" / "go").touch()
    ended(lab, "run")
    assert record(lab) == record(lab, 2) == ["x"]
    assert [row["outcome"] for row in tables.attempts(lab.db)] == ["done", "done"]


def test_sigterm_to_the_supervisor_is_stop(lab: Lab) -> None:
    loaded(lab, [sh(0.1, "echo x >> ../../record; while [ ! -e ../../go ]; do sleep 0.1; done")])
    with lab.start("run") as run:
        until(lambda: record(lab))
        handler, supervisor = only_handler(lab), lab.supervisor_pid()
        assert supervisor
        os.kill(supervisor, signal.SIGTERM)
        assert run.wait(60) == 1
    assert not alive(supervisor)
    assert not alive(handler)
    (lab.guest(1) / "launch" / "go").touch()
    ended(lab, "run")
    assert record(lab) == ["x"]


# === who gets a handler ========================================================================


def test_a_failed_vm_is_waited_for_until_a_retry_gives_it_another_handler(lab: Lab) -> None:
    go = lab.folder / "go"
    loaded(lab, [sh(-1, f"test -e {go}")], on_failure="wait")
    with lab.start("run") as run:
        until(lambda: tables.states(lab.db) == {"vm1": "failed"} and not lab.handler_pids())
        time.sleep(1.5)  # longer than the supervisor ever sleeps
        assert run.poll() is None
        go.touch()
        ended(lab, "retry", "vm1")
        assert run.wait(60) == 0, lab.logs()
    assert [row[1] for row in outcomes(lab)] == ["failed", "done"]


def test_a_vm_added_to_a_running_experiment_gets_a_handler(lab: Lab) -> None:
    loaded(lab, [sh(-1, "while [ ! -e ../../go ]; do sleep 0.1; done")])
    with lab.start("run") as run:
        until(lambda: outcomes(lab))
        with vmrm.Database(lab.db) as db:
            path = str(lab.folder / "agents" / "2.sock")
            launch = str(lab.guest(2) / "launch")
            schedule = json.dumps([sh(-1, "echo here >> ../../record")])
            vmrm.ScheduleDb(db=db).put("vm2", schedule)
            vmrm.VMMapping(db=db).put("u2", "vm2", path=path, launch_dir=launch)
        until(lambda: record(lab, 2) == ["here"])
        (lab.guest(1) / "launch" / "go").touch()
        assert run.wait(60) == 0, lab.logs()
    assert tables.states(lab.db) == {"vm1": "configured", "vm2": "configured"}


def test_the_supervisor_may_open_files_for_a_thousand_handlers(lab: Lab) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (256, hard))
    try:
        loaded(lab, [sh(0.1, "sleep 1")])
        with lab.start("run") as run:
            until(lambda: outcomes(lab))
            supervisor = lab.supervisor_pid()
            assert supervisor
            soft, _ = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
            assert soft > 256
            assert run.wait(60) == 0
    finally:
        resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (hard, hard))


# === the end of all work, and who adds to it then ==============================================


def held_until(lab: Lab, name: str) -> dict[str, Any]:
    """Return an entry that ends when its guest has a file."""
    return sh(0.1, f"echo first >> ../../record; while [ ! -e ../../{name} ]; do sleep 0.1; done")


def finished(lab: Lab) -> bool:
    """Whether the VM's own handler says that its work is done."""
    return tables.vms(lab.db)["vm1"]["finished_at"] is not None


def test_an_entry_added_while_the_handler_finds_that_all_is_done_is_not_lost(lab: Lab) -> None:
    """Its wake-up is lost, so the handler takes the old schedule for the whole."""
    loaded(lab, [held_until(lab, "go")])
    with lab.start("run", VMRM_TIMEOUT_SCALE="0.5") as run:
        until(lambda: record(lab))
        for path in (lab.folder / "lab.db.d" / "wake").iterdir():
            path.unlink()
        with vmrm.Database(lab.db) as db, db.transaction():
            tables.append_entry(db.connection, "vm1", sh(0.2, "echo second >> ../../record"))
        (lab.guest(1) / "launch" / "go").touch()
        assert run.wait(60) == 0, lab.logs()
    assert record(lab) == ["first", "second"]


def test_an_entry_added_while_the_supervisor_ends_the_experiment_is_not_lost(lab: Lab) -> None:
    loaded(lab, [held_until(lab, "go")])
    with lab.start("run") as run:
        until(lambda: record(lab))
        supervisor = lab.supervisor_pid()
        assert supervisor
        os.kill(supervisor, signal.SIGSTOP)
        try:
            (lab.guest(1) / "launch" / "go").touch()
            until(lambda: finished(lab))
            with vmrm.Database(lab.db) as db, db.transaction():
                os.kill(supervisor, signal.SIGCONT)
                time.sleep(1)  # for it to see that all is done, and to wait for its turn
                tables.append_entry(db.connection, "vm1", sh(0.2, "echo second >> ../../record"))
        finally:
            os.kill(supervisor, signal.SIGCONT)
        assert run.wait(60) == 0, lab.logs()
    assert record(lab) == ["first", "second"]


# === what a handler does not know yet ==========================================================


def test_a_pause_that_meets_an_entry_just_sent_leaves_its_attempt(tmp_path: Path) -> None:
    """The agent has the request and is stopped; the pause moves the entry's time behind it."""
    lab = Lab(tmp_path)
    with stand_ins(tmp_path / "agents", 1) as agent:
        loaded(lab, [sh(2, "date +%s.%N >> ../../record")])
        with lab.start("run", VMRM_TIMEOUT_SCALE="1") as run:  # the agent is waited for
            until(lambda: tables.attempts(lab.db))
            planned = tables.attempts(lab.db)[0]["planned_at"]
            os.kill(agent.pid, signal.SIGSTOP)
            try:
                until(lambda: time.time() > planned + 0.5)
                more = lab.folder / "more.json"
                more.write_text(json.dumps([{"start_time": 1, "pause": 6}]))
                ended(lab, "schedule", "add", "vm1", str(more))
            finally:
                os.kill(agent.pid, signal.SIGCONT)
            assert run.wait(60) == 0, lab.logs()
    (ran,) = record(lab)
    (attempt,) = tables.attempts(lab.db)
    assert attempt["outcome"] == "done"
    assert float(ran) > attempt["planned_at"], "it ran before the time that its row tells"


def test_an_entry_that_was_replaced_is_not_armed(tmp_path: Path) -> None:
    """The handler asks the guest for its boot, the last thing before it arms, and waits for it."""
    lab = Lab(tmp_path)
    old, new = (sh(-1, f"echo {word} >> ../../record") for word in ("old", "new"))
    honest, asked, replaced = tmp_path / "agents" / "1.sock", threading.Event(), threading.Event()

    def answer_late(request: Asked) -> Iterator[bytes]:
        launched = tables.experiment(lab.db)["launched_at"]
        if "boot_id" in request.request["arguments"]["path"] and time.time() > launched + 3:
            asked.set()
            replaced.wait(60)
        yield request.honest()

    with stand_ins(tmp_path / "agents", 1), hostile(honest, tmp_path / "late.sock") as guest:
        schedule = [{"start_time": "-inf", "pause": 3}, old]
        load(lab, vm("vm1", tmp_path / "late.sock", lab.guest(1) / "launch", *schedule))
        guest.rules["guest-file-open"] = answer_late
        with lab.start("run") as run:
            until(asked.is_set)
            with vmrm.Database(lab.db) as db:
                vmrm.ScheduleDb(db=db).put("vm1", json.dumps([new]))
            replaced.set()
            assert run.wait(60) == 0, lab.logs()
    assert record(lab) == ["new"]
    assert [row["outcome"] for row in tables.attempts(lab.db)] == ["done"]


# === what begins anew and must remember ========================================================


@pytest.mark.qga
def test_late_skip_skips_nothing_of_this_run_after_a_lost_link(
    qemu_ga: Callable[..., Any], tmp_path: Path
) -> None:
    lab = Lab(tmp_path)
    agent = qemu_ga("-b", "guest-set-time", retry=False)
    launch = lab.guest(1) / "launch"
    schedule = [sh(2, "echo x >> ../../record")]
    load(lab, vm("vm1", agent.path, launch, *schedule))
    with lab.start("run", "--late", "skip") as run:
        until(lambda: tables.attempts(lab.db))
        planned = tables.attempts(lab.db)[0]["planned_at"]
        agent.kill()
        until(lambda: time.time() > planned + 0.2)
        agent.start()
        assert run.wait(60) == 0, lab.logs()
    assert record(lab) == ["x"]


def interrupted(lab: Lab, seconds: float, more: dict[str, Any]) -> float:
    """Stop what runs, add an entry to vm2, run to the end `seconds` later; return when it ran."""
    since = time.monotonic()
    ended(lab, "stop")
    path = lab.folder / "more.json"
    path.write_text(json.dumps([more]))
    ended(lab, "schedule", "add", "vm2", str(path))
    time.sleep(max(0.0, since + seconds - time.monotonic()))
    lab.run("run")
    return float(tables.attempts(lab.db, "vm2")[-1]["sent_at"])


def test_a_timeout_counts_from_the_start_of_the_program_whoever_watches(lab: Lab) -> None:
    loaded(lab, [sh(0.1, "echo x > ../../record; exec sleep 4321", timeout=5)], [sh(0.1, "true")])
    with lab.start("run"):
        until(lambda: record(lab) and tables.attempts(lab.db, "vm1")[0]["sent_at"])
        compare = interrupted(lab, 5, sh(0.2, "true"))
    (attempt,) = tables.attempts(lab.db, "vm1")
    assert attempt["error"] == "timed out after 5 s and was killed"
    assert attempt["ended_at"] < compare + 3, "it had been running for so long already"


def test_a_pause_at_minus_infinity_counts_from_the_launch(lab: Lab) -> None:
    begin = [{"start_time": "-inf", "pause": 5}, sh(-1, "echo x >> ../../record")]
    loaded(lab, begin, [sh(-2, "true")])
    with lab.start("run"):
        until(lambda: tables.states(lab.db) == {"vm1": "configuring", "vm2": "configured"})
        compare = interrupted(lab, 5, sh(-1, "true"))
    (attempt,) = tables.attempts(lab.db, "vm1")
    assert attempt["sent_at"] > tables.experiment(lab.db)["launched_at"] + 5
    assert attempt["sent_at"] < compare + 3, "it had been waiting for so long already"
