"""What programs, agents and guests can do to a handler: each has one clear outcome."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tables
from cli_lab import until
from lab import Lab, lone_agent, stand_ins

import vmrm

# --- means


def sh(at: float, words: str, **more: Any) -> dict[str, Any]:
    return {"start_time": at, "executable": "sh", "arguments": ["-c", words], **more}


def vm(
    name: str, path: Path, launch: Path, *schedule: dict[str, Any], **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "path": str(path),
        "launch_dir": str(launch),
        "agent_timeout": 20,
        "schedule": list(schedule),
        **more,
    }


def load(lab: Lab, *vms: dict[str, Any], **settings: Any) -> None:
    path = lab.folder / "lab.json"
    path.write_text(json.dumps({"experiment": {"start_buffer": 0, **settings}, "vm": list(vms)}))
    done = lab.run("load", str(path))
    assert done.returncode == 0, done.stderr


def outcomes(lab: Lab, name: str = "vm1") -> list[tuple[int, str, int | None, str]]:
    return [
        (row["ordinal"], row["outcome"], row["exit_code"], row["error"])
        for row in tables.attempts(lab.db, name)
    ]


def states(lab: Lab) -> dict[str, str]:
    return tables.states(lab.db)


class OneAgent:
    """A lab with one agent: the real qemu-ga on a host socket, or the stand-in."""

    def __init__(self, lab: Lab, path: Path, restart: Callable[[], None]) -> None:
        self.lab, self.path, self.restart = lab, path, restart
        self.launch = lab.guest(1) / "launch"

    def load(self, *schedule: dict[str, Any], **more: Any) -> None:
        load(self.lab, vm("vm1", self.path, self.launch, *schedule, **more))

    def run(self) -> Any:
        return self.lab.run("run")

    def log(self, name: str) -> Path:
        return self.lab.folder / "lab.db.d" / "logs.1" / "vm1" / name


@pytest.fixture(params=["standin", pytest.param("qemu-ga", marks=pytest.mark.qga)])
def one(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OneAgent]:
    """The same test on both agents."""
    lab = Lab(tmp_path)
    if request.param == "qemu-ga":
        real = request.getfixturevalue("qemu_ga")(
            "-b", "guest-set-time,guest-shutdown", retry=False
        )
        lab.guest(1).mkdir(parents=True)
        yield OneAgent(lab, real.path, real.restart)
        return
    with stand_ins(tmp_path / "agents", 1):
        yield OneAgent(lab, tmp_path / "agents" / "1.sock", lambda: None)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with two stand-ins, nothing loaded."""
    made = Lab(tmp_path, count=2)
    with stand_ins(tmp_path / "agents", 2):
        yield made


def two(
    lab: Lab, first: list[dict[str, Any]], second: list[dict[str, Any]], **settings: Any
) -> None:
    vms = [
        vm(f"vm{n}", lab.folder / "agents" / f"{n}.sock", lab.guest(n) / "launch", *schedule)
        for n, schedule in ((1, first), (2, second))
    ]
    load(lab, *vms, **settings)


# --- programs


def test_all_of_a_large_output_is_kept(one: OneAgent) -> None:
    one.load(sh(-1, "head -c 20971520 /dev/zero | tr '\\0' x; echo end >&2"))
    assert one.run().returncode == 0
    assert one.log("1.1.out").stat().st_size == 20 << 20
    assert one.log("1.1.err").read_text() == "end\n"


def test_output_that_is_not_text_is_kept_raw(one: OneAgent) -> None:
    one.load(sh(-1, r"printf '\303'; sleep 0.4; printf '\274\377\033[2J\n'"))
    assert one.run().returncode == 0
    assert one.log("1.1.out").read_bytes() == b"\xc3\xbc\xff\x1b[2J\n"
    text = (one.lab.folder / "lab.db.d" / "logs.1" / "vm1.log").read_text()
    assert "ü�\\u001b[2J" in text
    assert "\x1b" not in text


def test_a_daemon_left_behind_does_not_hold_its_entry(one: OneAgent) -> None:
    one.load(sh(-1, "sleep 60 & echo $! > ../../pid; echo started"))
    started = time.monotonic()
    assert one.run().returncode == 0
    assert time.monotonic() - started < 50
    os.kill(int((one.launch / "pid").read_text()), signal.SIGKILL)
    assert one.log("1.1.out").read_text() == "started\n"


def test_a_program_past_its_timeout_is_killed_with_its_children(one: OneAgent) -> None:
    one.load(sh(-1, "sleep 61 & echo $! > ../../pid; sleep 62", timeout=0.5, ignore_failure=True))
    assert one.run().returncode == 0
    assert outcomes(one.lab)[0][1:] == ("failed", None, "timed out after 0.5 s and was killed")
    pid = int((one.launch / "pid").read_text())
    until(lambda: vmrm.process_started(pid) is None)


def test_a_program_that_kills_itself_has_failed(one: OneAgent) -> None:
    one.load(sh(1, "kill -9 $$"))
    assert one.run().returncode == 1
    assert outcomes(one.lab) == [(1, "failed", 137, "exit code 137")]


def test_json_lines_are_kept_apart(one: OneAgent) -> None:
    one.load(sh(-1, """echo '{"answer": 42}'; echo '{broken'; echo '[1]'"""))
    assert one.run().returncode == 0
    lines = (one.lab.folder / "lab.db.d" / "logs.1" / "vm1.json").read_text().splitlines()
    assert [json.loads(line)["output"] for line in lines] == [{"answer": 42}]


def test_a_program_that_need_not_end_does_not_hold_the_run(one: OneAgent) -> None:
    one.load(sh(0.5, "echo $$ > ../../pid; exec sleep 63", wait=False), sh(0.6, "true"))
    assert one.run().returncode == 0
    os.kill(int((one.launch / "pid").read_text()), signal.SIGKILL)


# --- agents


@pytest.mark.qga
def test_an_agent_restarted_in_the_middle_loses_nothing(
    qemu_ga: Callable[..., Any], tmp_path: Path
) -> None:
    lab = Lab(tmp_path)
    real = qemu_ga("-b", "guest-set-time", retry=False)
    launch = lab.guest(1) / "launch"
    load(lab, vm("vm1", real.path, launch, sh(-1, "echo run >> ../../record; sleep 1.5; exit 0")))
    process = lab.start("run")
    until((launch / "record").exists)
    real.restart()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err + lab.logs()
    assert (launch / "record").read_text() == "run\n"
    assert [row[:3] for row in outcomes(lab)] == [(1, "done", 0)]


@pytest.mark.qga
def test_a_blocked_command_is_named(qemu_ga: Callable[..., Any], tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    load(lab, vm("vm1", qemu_ga("-b", "guest-exec").path, lab.guest(1), sh(-1, "true")))
    done = lab.run("run")
    assert done.returncode == 1
    assert "guest-exec" in done.stderr
    assert "disabled" in done.stderr
    assert states(lab) == {"vm1": "failed"}


def test_a_missing_socket_is_told_from_a_silent_one(tmp_path: Path) -> None:
    lab = Lab(tmp_path, count=2)
    silent = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(silent))
        listener.listen(1)
        vms = [
            vm("vm1", tmp_path / "none.sock", tmp_path / "l1", agent_timeout=1),
            vm("vm2", silent, tmp_path / "l2", agent_timeout=1),
        ]
        load(lab, *vms, on_failure="wait")
        done = lab.run("run", "--timeout", "8")
    assert done.returncode == 124
    reasons = {name: row["reason"] for name, row in tables.vms(lab.db).items()}
    assert states(lab) == {"vm1": "failed", "vm2": "failed"}
    assert reasons["vm1"] != reasons["vm2"]
    assert "none.sock" in reasons["vm1"]
    assert "silent.sock" in reasons["vm2"]


def test_two_databases_cannot_hold_one_agent(lab: Lab, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    two(lab, [sh(-1, f"while [ ! -e {gate} ]; do sleep 0.1; done")], [])
    process = lab.start("run")
    until(lambda: states(lab).get("vm1") == "configuring")
    other = Lab(tmp_path / "other")
    other.folder.mkdir()
    load(other, vm("vm1", lab.folder / "agents" / "1.sock", tmp_path / "l", sh(-1, "true")))
    done = other.run("exec", "--timeout", "0.3", "vm1", "true")
    assert done.returncode == 255
    assert str(lab.db) in done.stderr
    gate.touch()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_two_vms_with_one_launch_directory_are_told(tmp_path: Path) -> None:
    lab, launch = Lab(tmp_path), tmp_path / "launch"
    sockets = [tmp_path / "1.sock", tmp_path / "2.sock"]
    with lone_agent(sockets[0]), lone_agent(sockets[1]):
        schedule = sh(-1, "sleep 1"), sh(1, "true")
        load(lab, *(vm(f"vm{n}", path, launch, *schedule) for n, path in enumerate(sockets, 1)))
        done = lab.run("run")
    assert done.returncode == 1
    assert "this launch directory is used by another VM" in done.stderr


# --- failure and reboot


def test_abort_lets_running_entries_end_and_starts_no_further_time(lab: Lab) -> None:
    two(lab, [sh(-2, "sleep 0.7; exit 5")], [sh(-2, "sleep 2"), sh(-1, "true"), sh(1, "true")])
    done = lab.run("run")
    assert done.returncode == 1
    assert "vm1: failed: entry 1 (-2 sh): exit code 5" in done.stderr
    assert states(lab) == {"vm1": "failed", "vm2": "configuring"}
    assert outcomes(lab, "vm2") == [(1, "done", 0, "")]
    assert tables.experiment(lab.db)["start_at"] is None


def test_a_reboot_that_is_pending_at_an_abort_still_comes_and_no_further_time(lab: Lab) -> None:
    record = lab.guest(2) / "launch" / "record"
    fails = sh(-2, f"until test -s {record}; do sleep 0.05; done; exit 5")
    asks = sh(-2, f"echo x >> {record}; sleep 1; test $(wc -l < {record}) = 2 || exit 10")
    two(lab, [fails], [asks, sh(-1, "true"), sh(1, "true")])
    assert lab.run("run").returncode == 1
    assert states(lab) == {"vm1": "failed", "vm2": "configuring"}
    assert outcomes(lab, "vm2") == [(1, "done", 10, ""), (1, "done", 0, "")]


def test_drop_goes_on_without_the_failed_vm(lab: Lab) -> None:
    two(lab, [sh(-2, "exit 5"), sh(1, "true")], [sh(-1, "true"), sh(1, "true")], on_failure="drop")
    assert lab.run("run").returncode == 1
    assert states(lab) == {"vm1": "failed", "vm2": "configured"}
    assert [row[:2] for row in outcomes(lab, "vm2")] == [(1, "done"), (2, "done")]


def test_wait_goes_on_once_the_failed_vm_is_retried(lab: Lab) -> None:
    flag = lab.folder / "flag"
    two(lab, [sh(-2, f"test -e {flag}")], [sh(1, "true")], on_failure="wait")
    process = lab.start("run")
    until(lambda: states(lab).get("vm1") == "failed")
    flag.touch()
    assert lab.run("retry", "vm1").returncode == 0
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [row[:3] for row in outcomes(lab)] == [(1, "failed", 1), (1, "done", 0)]


def test_run_again_retries_what_failed_and_nothing_else(lab: Lab) -> None:
    flag = lab.folder / "flag"
    two(lab, [sh(-2, "true"), sh(-1, f"test -e {flag}"), sh(1, "true")], [sh(1, "true")])
    assert lab.run("run").returncode == 1
    flag.touch()
    assert lab.run("run").returncode == 0
    assert [row[:2] for row in outcomes(lab)] == [
        (1, "done"),
        (2, "failed"),
        (2, "done"),
        (3, "done"),
    ]
    assert [row[:2] for row in outcomes(lab, "vm2")] == [(1, "done")]


def test_a_negative_entry_added_to_a_configured_vm_runs_at_once(lab: Lab) -> None:
    two(lab, [sh(-1, "true"), sh(2, "true")], [sh(2, "true")])
    process = lab.start("run")
    until(lambda: states(lab).get("vm1") == "configured")
    more = lab.folder / "more.json"
    more.write_text(json.dumps([sh(-5, "echo late > ../../late")]))
    assert lab.run("schedule", "add", "vm1", str(more)).returncode == 0
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (lab.guest(1) / "launch" / "late").read_text() == "late\n"


def test_an_entry_that_always_asks_for_a_reboot_is_stopped(lab: Lab) -> None:
    two(lab, [sh(-1, "echo x >> ../../record; exit 10")], [])
    done = lab.run("run", timeout=200)
    assert done.returncode == 1
    assert "asks for over 10 reboots" in done.stderr
    assert (lab.guest(1) / "launch" / "record").read_text() == "x\n" * 11


def test_exit_code_ten_after_the_start_is_a_failure(lab: Lab) -> None:
    two(lab, [sh(0.5, "exit 10")], [])
    assert lab.run("run").returncode == 1
    assert outcomes(lab) == [(1, "failed", 10, "exit code 10")]


def test_a_file_missing_in_the_store_fails_the_vm_before_anything_runs(lab: Lab) -> None:
    two(lab, [sh(-2, "true")], [])
    entry = vmrm.ScheduleEntry(-1)
    entry.add_file("/tmp/x", "no-such-file")
    with vmrm.ScheduleDb(db=lab.db) as schedules:
        schedules.put("vm1", vmrm.schedule_text([entry]))
    done = lab.run("run")
    assert done.returncode == 1
    assert "no-such-file" in done.stderr
    assert outcomes(lab) == []


NONE, CLAIM = vmrm.Found(claimed=False), vmrm.Found(claimed=True)


@pytest.mark.parametrize(
    ("found", "same_boot", "due", "step"),
    [
        (NONE, True, True, "RUN"),  # it was never begun
        (NONE, True, False, "RUN"),
        (NONE, False, True, "FAILED"),  # the reboot may have taken its claim along
        (NONE, False, False, "RUN"),  # it cannot have been sent
        (CLAIM, True, True, "WATCH"),  # begun this very moment
        (CLAIM, False, True, "FAILED"),
        (vmrm.Found(claimed=True, exit_code=0, pid=7), True, True, "WATCH"),
        (vmrm.Found(claimed=True, exit_code=3, pid=7), False, True, "WATCH"),
        (vmrm.Found(claimed=True, pid=7, alive=True), True, True, "WATCH"),
        (vmrm.Found(claimed=True, pid=7, alive=True), False, True, "FAILED"),  # another's pid
        (vmrm.Found(claimed=True, pid=7), True, True, "WATCH"),  # the agent may know its end
        (vmrm.Found(claimed=True, pid=7), False, True, "FAILED"),
    ],
)
def test_what_becomes_of_an_open_attempt(
    found: vmrm.Found, same_boot: bool, due: bool, step: str
) -> None:
    assert vmrm.recovered(found, same_boot=same_boot, due=due) is vmrm.NextStep[step]


# --- transfers


def test_a_repeating_transfer_follows_a_growing_file_to_its_end(one: OneAgent) -> None:
    guest = one.lab.guest(1)
    one.load(
        {"start_time": 0.2, "transfer": [{"location": f"{guest}/*.log", "interval": 0.2}]},
        sh(0.1, f"for i in 1 2 3 4 5 6; do echo $i >> {guest}/a.log; sleep 0.2; done"),
    )
    assert one.run().returncode == 0
    copy = one.lab.folder / "lab.db.d" / "transfers.1" / "vm1" / str(guest).lstrip("/") / "a.log"
    assert copy.read_text() == "1\n2\n3\n4\n5\n6\n"
    assert [row[:2] for row in sorted(outcomes(one.lab))] == [(1, "done"), (2, "done")]


def test_what_the_last_pass_cannot_bring_is_the_entrys_failure(one: OneAgent) -> None:
    source, out = one.lab.guest(1) / "data", one.lab.folder / "out"
    source.mkdir(parents=True)
    (source / "file").write_text("text")
    inside = out / "vm1" / str(source).lstrip("/") / "file"
    inside.mkdir(parents=True)
    (inside / "present").touch()
    for_ever = {"interval": 0.2, "destination": str(out)}
    one.load(
        {"start_time": 0.1, "transfer": [{"location": str(source), **for_ever}]},
        {"start_time": 0.1, "transfer": [{"location": "/no/such/file", **for_ever}]},
    )
    assert one.run().returncode == 1
    (first, second) = outcomes(one.lab)
    assert first[1] == "failed" and repr(f"{source}/file") in first[3], first
    assert second[1] == "done", "what never came is not lost"


def test_a_transfer_of_nothing_fails_its_entry(one: OneAgent) -> None:
    one.load({"start_time": 0.2, "transfer": [{"location": "/no/such/file"}]})
    assert one.run().returncode == 1
    assert outcomes(one.lab)[0][3].startswith("the VM has no file at '/no/such/file'")


def test_a_file_whose_name_is_no_text_does_not_keep_others_back(one: OneAgent) -> None:
    data = one.lab.guest(1) / "data"
    data.mkdir(parents=True)
    (data / "good").write_text("good")
    Path(os.fsdecode(os.fsencode(data) + b"/\xff")).touch()
    one.load({"start_time": 0.2, "transfer": [{"location": str(data)}]})
    assert one.run().returncode == 1
    copy = one.lab.folder / "lab.db.d" / "transfers.1" / "vm1" / str(data).lstrip("/") / "good"
    assert copy.read_text() == "good"


def test_a_transfer_follows_no_link_on_the_host(one: OneAgent, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    source = one.lab.guest(1) / "data"
    source.mkdir(parents=True)
    (source / "file").write_text("hostile")
    destination = tmp_path / "out"
    inside = destination / "vm1" / str(source.parent).lstrip("/")
    inside.mkdir(parents=True)
    (inside / "data").symlink_to(tmp_path / "victim")
    transfer = {"location": str(source), "destination": str(destination)}
    one.load({"start_time": 0.2, "transfer": [transfer]})
    assert one.run().returncode == 1
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.parametrize(
    "path", ["/..", "/a/../b", "/./a", "/a/b/..", "/", "C:\\..", "C:\\a\\..", "C:\\a/b", "C:\\\\."]
)
def test_a_listed_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        vmrm.safe_parts(path)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"f 644 1 2 3",
        b"f 999 1 2 3 /a",
        b"f 1 2 3 /a",
        b"f 644 -1 2 3 /a",
        b"x 644 1 2 3 /a",
        b"f 644 1 2 3 a",
        b"f 644 1 2 3 C:a",
        b"f 644 9999999999999999999 1 2 /a",
        b"f 644 1 1 2 /\xff",
    ],
)
def test_a_hostile_list_is_refused(record: bytes) -> None:
    with pytest.raises(ValueError):
        vmrm.parse_listed(record)


@pytest.mark.parametrize("line", ["", "claim", "claim:0 0:1 2:dead", "none "])
def test_a_hostile_probe_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        vmrm.parse_found(line)
