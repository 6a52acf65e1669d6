"""What a reviewer broke: each test is named after what the user saw."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import tables
from cli_lab import until
from lab import Lab, stand_ins
from test_handler import load, outcomes, sh, states, two, vm

import vmrm


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with two stand-ins, nothing loaded."""
    made = Lab(tmp_path, count=2)
    with stand_ins(tmp_path / "agents", 2):
        yield made


def only(lab: Lab, *schedule: dict[str, Any], **settings: Any) -> None:
    """Load one VM with a schedule."""
    path, launch = lab.folder / "agents" / "1.sock", lab.guest(1) / "launch"
    load(lab, vm("vm1", path, launch, *schedule), **settings)


def made(folder: Path) -> vmrm.Database:
    """Return a database with one VM, vm1."""
    db = vmrm.Database(folder / "a.db")
    vmrm.VMMapping(db=db).put("u1", "vm1", path="/nowhere")
    return db


# --- handler


def test_news_do_not_start_an_armed_entry_early(lab: Lab) -> None:
    only(lab, sh(4, "true"), start_buffer=1)
    with lab.start("run") as run:
        until(lambda: outcomes(lab))
        while run.poll() is None:
            lab.run("exec", "vm1", "true")
    (row,) = tables.attempts(lab.db)
    assert row["sent_at"] >= row["planned_at"]


def test_a_repeating_transfer_in_negative_time_does_not_hold_the_vm(lab: Lab) -> None:
    note = lab.guest(1) / "note"
    note.write_text("hello")
    transfer = {"location": str(note), "interval": 0.2, "destination": "out"}
    only(lab, {"start_time": -1, "transfer": [transfer]}, sh(0.1, "true"))
    done = lab.run("run", timeout=30)
    assert done.returncode == 0, done.stderr
    assert [path.read_text() for path in (lab.folder / "out").rglob("note")] == ["hello"]


def test_an_abort_ends_a_vm_that_waits_for_a_resume(lab: Lab) -> None:
    held = [{"start_time": "-inf", "pause": "inf"}, sh(-1, "true")]
    two(lab, held, [sh(-1, "exit 1")])
    assert lab.run("run", timeout=30).returncode == 1
    assert outcomes(lab) == []


def test_a_stopped_experiment_is_not_a_success(lab: Lab) -> None:
    only(lab, sh(0.1, "sleep 60"))
    with lab.start("run") as run:
        until(lambda: outcomes(lab) and outcomes(lab)[0][1] == "running")
        assert lab.run("stop").returncode == 0
        assert run.wait() == 1
    assert lab.run("run", "--detach").returncode == 0
    assert lab.run("stop", "--kill").returncode == 0


def test_stop_kill_kills_every_program(lab: Lab) -> None:
    only(lab, *(sh(0.1, "sleep 4321") for _ in range(6)))
    with lab.start("run") as run:
        until(lambda: [row[1] for row in outcomes(lab)] == ["running"] * 6)
        assert lab.run("stop", "--kill").returncode == 0
        assert run.wait() == 1
    assert [row[1] for row in outcomes(lab)] == ["failed"] * 6
    pids = [row["pid"] for row in tables.attempts(lab.db)]
    assert not [pid for pid in pids if vmrm.process_started(pid)]


def test_a_schedule_that_is_replaced_before_it_runs_is_the_one_that_runs(lab: Lab) -> None:
    path, launch = lab.folder / "agents", lab.guest(1) / "launch"
    late = vm("vm2", path / "2.sock", lab.guest(2) / "launch", sh(-1, "sleep 3"))
    load(lab, vm("vm1", path / "1.sock", launch, sh(0.1, "touch ../../old")), late)
    with lab.start("run") as run:
        until(lambda: states(lab)["vm1"] == "configured")
        with vmrm.Database(lab.db) as db:
            vmrm.ScheduleDb(db=db).put("vm1", json.dumps([sh(0.2, "touch ../../new")]))
        assert run.wait() == 0, run.stderr.read() if run.stderr else ""
    assert (launch / "new").exists()
    assert not (launch / "old").exists()


def test_the_supervisor_is_idle_beside_a_failed_vm(lab: Lab) -> None:
    two(lab, [sh(-1, "exit 1")], [sh(0.1, "sleep 4")], on_failure="drop")
    with lab.start("run") as run:
        until(lambda: outcomes(lab, "vm2"))
        pid = until(lab.supervisor_pid)
        time.sleep(1)
        before = context_switches(pid)
        time.sleep(2)
        assert context_switches(pid) - before < 40
        run.wait()


def context_switches(pid: int) -> int:
    """Return how often a process went to sleep by itself."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))


def test_two_runs_at_once_watch_one_experiment(lab: Lab) -> None:
    only(lab, sh(-1, "sleep 1"), sh(0.1, "true"))
    runs = [lab.start("run") for _ in range(3)]
    codes = [run.wait() for run in runs]
    assert codes == [0, 0, 0], [run.communicate()[1] for run in runs]
    assert [row[1] for row in outcomes(lab)] == ["done", "done"]


def test_who_came_second_watches_the_supervisor_that_came_first(tmp_path: Path) -> None:
    db = made(tmp_path)
    lock = db.lock("supervisor")
    assert lock.try_()
    with subprocess.Popen(["true"]) as refused:
        refused.wait()
    over = threading.Event()

    def end() -> None:
        over.set()
        lock.release()

    threading.Timer(0.3, end).start()
    with pytest.raises(vmrm.VmrmError, match="the supervisor died"):
        vmrm.Viewer(db, vmrm.Screen(quiet=True)).watch(refused)
    assert over.is_set()


def test_who_looks_whether_a_lock_is_held_does_not_keep_its_taker_out(tmp_path: Path) -> None:
    lock, over, refused = vmrm.FileLock(tmp_path / "lock"), threading.Event(), 0
    seen = set()
    lock.path.touch()

    def look() -> None:
        while not over.is_set():
            seen.add(vmrm.FileLock(lock.path).is_held)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(300):
        refused += not lock.take()
        lock.release()
    over.set()
    thread.join()
    assert refused == 0


def test_an_entry_runs_in_a_guest_without_proc(tmp_path: Path) -> None:
    entry = vmrm.ScheduleEntry.from_dict(sh(1, "echo ran"), 1)
    entry.working_dir, entry.reboot_filepath = tmp_path, tmp_path / "reboot"
    entry.call_arguments_filename = tmp_path / "call_arguments.sh"
    script = vmrm.Guest(cast(Any, None)).scripts(entry, "", "t1", [])[0].text
    (tmp_path / "call_arguments.sh").write_text(script.replace("/proc/", "/no-proc/"))
    command = ["/bin/sh", str(tmp_path / "call_arguments.sh"), "attempt.1", "t1"]
    subprocess.run(command, timeout=10, check=False, start_new_session=True)
    until((tmp_path / "attempt.1" / "exit").exists, 5)
    assert (tmp_path / "attempt.1" / "out").read_text() == "ran\n"


def test_nested_json_of_any_depth_does_not_break_the_handler(tmp_path: Path) -> None:
    output = vmrm.OutputLog(tmp_path, "vm1", logging.getLogger("test"))
    for depth in range(sys.getrecursionlimit() + 50, 0, -1):
        output.json_lines('{"a":' * depth + "1" + "}" * depth)
    output.json_lines('{"a": "x\u2028y"}')
    last = (tmp_path / "vm1.json").read_text().splitlines()[-1]
    assert json.loads(last)["output"] == {"a": "x\u2028y"}


def test_a_file_that_vanishes_while_it_is_listed_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    (tmp_path / "gone").touch()
    # What find has found is gone when stat looks.
    script = vmrm.Guest(cast(Any, None)).argv("list")[2].replace("quick=yes", ":")
    script = script.replace("kind=f;", 'rm -f "${path%/*}/gone"; kind=f;')
    command = ["/bin/sh", "-c", script, "sh", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=True)
    listed = [vmrm.parse_listed(record) for record in done.stdout.split(b"\0") if record]
    assert str(tmp_path / "kept") in [item.path for item in listed]
    assert str(tmp_path / "gone") not in [item.path for item in listed]


# --- schedules and experiment files


@pytest.mark.parametrize(
    "item",
    [
        {"start_time": 1, "executable": "a\ud800"},
        {"start_time": 1, "executable": "a", "arguments": ["\udfff"]},
        {"start_time": 1, "executable": "a", "env": {"A": "\udfff"}},
        {"start_time": 1, "content": [{"location": "a", "content": "\udfff"}]},
    ],
)
def test_text_that_is_no_utf8_is_refused_when_it_is_put(tmp_path: Path, item: Any) -> None:
    schedules = vmrm.ScheduleDb(db=made(tmp_path))
    with pytest.raises(ValueError, match="must be"):
        schedules.put("vm1", json.dumps([item]))


@pytest.mark.parametrize("at", [1e308, -1e308, 10**18, -(10**10)])
def test_a_start_time_beyond_the_calendar_is_refused(tmp_path: Path, at: float) -> None:
    with pytest.raises(ValueError, match="start_time"):
        vmrm.ScheduleDb(db=made(tmp_path)).put("vm1", json.dumps([sh(at, "true")]))


@pytest.mark.parametrize("settings", [{"start_buffer": 1e300}, {"start_buffer": 10**400}])
def test_a_start_buffer_beyond_the_calendar_is_refused(tmp_path: Path, settings: Any) -> None:
    path = tmp_path / "lab.json"
    item = {"name": "a", "path": "a.sock"}
    path.write_text(json.dumps({"experiment": settings, "vm": [item]}))
    with pytest.raises(vmrm.UsageError, match="start_buffer"):
        vmrm.read_experiment(path)


def test_a_count_that_no_host_can_serve_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "lab.json"
    item = {"name": "a{n}", "path": "a{n}.sock", "count": 10**9}
    path.write_text(json.dumps({"vm": [item]}))
    with pytest.raises(vmrm.UsageError, match="count"):
        vmrm.read_experiment(path)


@pytest.mark.parametrize(
    "location",
    [
        "call_arguments.sh",
        "./call_program.sh",
        "attempt.1.12-0a1b2c3d",
        "attempt.1/exit",
        "x/../attempt.2.1-0123abcd/pid",
    ],
)
def test_a_file_in_the_place_of_our_own_is_refused(location: str) -> None:
    item = {"start_time": 1, "content": [{"location": location, "content": "x"}]}
    with pytest.raises(ValueError, match="vmrm's own"):
        vmrm.ScheduleEntry.from_dict(item)


@pytest.mark.parametrize(("location", "program"), [("x.sh", "./x.sh"), ("./x.sh", "x.sh")])
def test_a_placed_program_may_be_spelled_in_two_ways(lab: Lab, location: str, program: str) -> None:
    content = [{"location": location, "content": "#!/bin/sh\necho ran\n"}]
    only(lab, {"start_time": -1, "executable": program, "content": content, "cwd": "/"})
    done = lab.run("run")
    assert done.returncode == 0, done.stderr


# --- database


def test_threads_can_share_a_database(tmp_path: Path) -> None:
    mapping = vmrm.VMMapping(db=made(tmp_path))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                mapping.put(f"{number}.{turn}", f"vm-{number}-{turn}")
                mapping.get_all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert mapping.get_all(length=True) == 81
    mapping.db.close()


def test_who_gives_up_waiting_for_the_database_leaves_no_lock_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = made(tmp_path)
    lock = vmrm.FileLock(tmp_path / "a.db.d" / "locks" / "writer")
    assert lock.try_()

    wait = threading.Event.wait

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        if timeout is not None:  # a thread's start waits without one
            raise KeyboardInterrupt
        return wait(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            db.write("DELETE FROM vms")
    lock.release()
    until(lambda: not lock.is_held)
    assert lock.try_(), "who gave up let go at once"
    lock.release()


def test_a_retry_of_a_failed_vm_wakes_who_gives_it_a_handler(tmp_path: Path) -> None:
    db = made(tmp_path)
    vmrm.VMMapping(db=db).set_vm_state_by_uuid("u1", "failed")
    woken = vmrm.WakeSocket(db, vmrm.SUPERVISOR)
    vmrm.retry_failed(db, "vm1")
    assert woken.recv(1) == b"w"
    woken.close()
