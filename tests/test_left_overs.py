"""What kill -9 leaves of commands and handlers is named, and removed by what comes next."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_lab import until
from lab import Command, Lab, lone_agent, stand_ins
from test_copies import left, load

import vmrm

KILLED = -signal.SIGKILL


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with one stand-in, whose experiment does next to nothing."""
    made = Lab(tmp_path)
    with stand_ins(tmp_path / "agents", 1):
        (tmp_path / "here").mkdir()
        item = {"location": str(made.guest(1) / "note"), "destination": str(tmp_path / "out")}
        load(
            made,
            tmp_path / "agents" / "1.sock",
            {"start_time": -1, "executable": "true"},
            {"start_time": 0.1, "transfer": [item]},
        )
        (made.guest(1) / "note").write_text("note")
        try:
            yield made
        finally:
            if made.supervisor_pid():
                made.run("stop")


def files(lab: Lab) -> set[Path]:
    """Return all that lies in the state directory and where commands were to put something.

    Locks stay, whoever has them, and so does what an experiment has brought out.
    """
    state = lab.folder / "lab.db.d"
    places = [state / name for name in ("store", "wake", "requests", "host", "bin")]
    places += [lab.folder / "here", lab.folder / "out"]
    found = {path for place in places for path in place.rglob("*") if not path.is_dir()}
    return found | set((state / "requests").glob("*"))


def named(lab: Lab) -> str:
    """Return what `check` tells."""
    with vmrm.Database(lab.db) as db:
        return "\n".join(vmrm.check(db))


def kill_all_sorts(lab: Lab) -> None:
    """Have commands killed, each in the midst of what it does."""
    here, state = lab.folder / "here", lab.folder / "lab.db.d"
    (lab.folder / "content").write_text("content")
    ended = {
        "store-before-rename": ["store", "add", str(lab.folder / "content")],
        "pull-before-rename": ["pull", "vm1", str(lab.guest(1) / "note"), f"{here}/note"],
    }
    commands = [lab.start(*words, VMRM_CRASH=f"{label}:1") for label, words in ended.items()]
    waiting = lab.start("pool", "acquire", "ci", "--wait")
    until(lambda: list((state / "wake").glob("wait-*")))
    waiting.kill()
    waiting.communicate()
    for command in commands:
        _, told = command.communicate()
        assert command.returncode == KILLED, (command.args, told)
    # Last, for a pull that begins later would remove it; and a handler may remove what a pull left.
    backup = lab.run("backup", f"{here}/copy.db", VMRM_CRASH="file-before-rename:1")
    assert backup.returncode == KILLED, backup
    (state / "requests" / ("0" * 32)).mkdir()  # killed before it wrote a word


def test_what_killed_commands_leave_is_named_and_removed_by_what_comes_next(lab: Lab) -> None:
    note = lab.folder / "out" / "vm1" / str(lab.guest(1) / "note")[1:]
    assert lab.run("pool", "group", "ci").returncode == 0
    for how in ("check --fix", "run --stay --detach", "stop", "destroy --yes"):
        before = files(lab) | {note}
        kill_all_sorts(lab)
        told = named(lab)
        parts = ["0" * 32, "here/.vmrm-", "store: nothing names", "wake/wait-"]
        assert [part for part in parts if part not in told] == [], (how, told)
        left = files(lab) - before
        assert len(left) >= 5, left
        done = lab.run(*how.split())
        assert done.returncode == 0, (how, done)
        if "stay" in how:  # what is new is the sockets of those who live
            assert lab.run("wait", "--timeout", "60").returncode == 0
            assert files(lab) & left == set()
        else:
            assert files(lab) - before == set(), how
        assert named(lab) == "", how
    assert not list((lab.folder / "lab.db.d" / "wake").iterdir())


def test_a_backup_that_was_killed_can_be_repeated(lab: Lab) -> None:
    copy = lab.folder / "here" / "copy.db"
    assert lab.run("backup", str(copy), VMRM_CRASH="file-before-rename:1").returncode == KILLED
    assert not copy.exists()
    assert lab.run("backup", str(copy)).returncode == 0
    assert lab.run("backup", str(copy)).returncode == 2
    assert lab.run("exec", "vm1", "true").returncode == 0  # as any command, it tidies up
    assert [path.name for path in copy.parent.iterdir()] == ["copy.db"]
    assert copy.stat().st_mode & 0o777 == 0o600


def test_handler_and_client_killed_together_leave_nothing_for_good(lab: Lab) -> None:
    assert lab.run("run", "--stay", "--detach").returncode == 0
    assert lab.run("wait", "--timeout", "60").returncode == 0
    begun = lab.folder / "begun"
    with lab.start("exec", "vm1", "sh", "-c", f"touch {begun}; sleep 5") as client:
        until(begun.exists)
        victims = [lab.supervisor_pid(), *lab.handler_pids(), client.pid]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # so that no end is noticed by another
            for pid in victims:
                assert pid is not None
                os.kill(pid, number)
        client.communicate()
    until(lambda: not lab.handler_pids())
    assert len(files(lab)) >= 3, "two sockets and a request"
    assert "wake/1" in named(lab)
    assert lab.run("destroy", "--yes").returncode == 0
    assert not list((lab.folder / "lab.db.d" / "wake").iterdir())
    assert not list((lab.folder / "lab.db.d" / "requests").iterdir())
    assert named(lab) == ""


def test_what_a_killed_handler_leaves_of_programs_and_copies_is_removed(lab: Lab) -> None:
    assert lab.run("destroy", "--yes").returncode == 0
    program = {"start_time": -1, "executable": "/bin/true", "on_host": True}
    item = [{"location": str(lab.guest(1) / "note"), "destination": str(lab.folder / "out")}]
    load(lab, lab.folder / "agents" / "1.sock", program, {"start_time": -1, "transfer": item})
    for label in ("program-before-rename:1", "transfer-before-rename:1"):
        done = lab.run("handle", "vm1", "--allow-host", VMRM_CRASH=label)
        assert done.returncode == KILLED, done.stderr
        (path,) = [path for path in files(lab) if path.name.startswith(".vmrm-")]
        assert str(path) in named(lab)
    assert lab.run("destroy", "--yes").returncode == 0
    assert not [path for path in files(lab) if path.name.startswith(".vmrm-")]
    assert named(lab) == ""


def test_a_push_that_was_killed_is_forgotten_with_its_vm(lab: Lab) -> None:
    (lab.folder / "content").write_text("content")
    words = ["push", "vm1", str(lab.folder / "content"), f"{lab.guest(1)}/to"]
    assert lab.run(*words, VMRM_CRASH="push-arrived:1").returncode == KILLED
    assert left(lab.guest(1))
    assert "vm1" in named(lab)
    done = lab.run("destroy", "--yes")
    assert done.returncode == 0
    assert ".vmrm-" in done.stderr, "it is told what stays in the guest"
    assert named(lab) == ""


def test_who_lives_is_not_taken_for_dead(lab: Lab, tmp_path: Path) -> None:
    assert lab.run("pool", "group", "ci").returncode == 0
    assert lab.run("run", "--stay", "--detach").returncode == 0
    assert lab.run("wait", "--timeout", "60").returncode == 0
    begun, go = tmp_path / "begun", tmp_path / "go"
    running: list[Command] = [
        lab.start("pool", "serve"),
        lab.start("pool", "acquire", "ci", "--wait"),
    ]
    script = f"touch {begun}; until [ -e {go} ]; do sleep 0.1; done; echo well"
    running.append(lab.start("exec", "vm1", "sh", "-c", script))
    try:
        until(begun.exists)
        wake = lab.folder / "lab.db.d" / "wake"
        until(lambda: (wake / "keeper").exists() and list(wake.glob("wait-*")))
        before = files(lab)
        assert lab.run("check", "--fix").stdout == ""
        assert {path for path in before if path.parent == wake} <= files(lab)
        go.touch()
        assert running[2].communicate()[0] == "well\n"
    finally:
        for command in running:
            command.terminate()
            command.communicate()


def test_an_agent_takes_the_place_of_one_that_was_killed(tmp_path: Path) -> None:
    with lone_agent(tmp_path / "a.sock") as agent:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    assert (tmp_path / "a.sock").is_socket()
    with lone_agent(tmp_path / "a.sock") as agent:
        assert agent.poll() is None
