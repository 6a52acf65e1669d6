"""`push`, `pull` and transfers: modes are kept, every copy ends, and what is broken off leaves
nothing behind, neither here nor in the guest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_lab import until
from conftest import HostAgent
from lab import Lab, crash_labels, stand_ins

Agents = Callable[..., HostAgent]
COPYING = [label for label in crash_labels() if label.startswith(("pull-", "push-"))]
BIG = 400 << 20  # bytes, of which none are on a disk; it takes an agent many seconds


def load(lab: Lab, path: Path, *schedule: dict[str, Any]) -> None:
    machine = {
        "name": "vm1",
        "path": str(path),
        "launch_dir": f"{lab.guest(1)}/launch",
        "agent_timeout": 20,
        "set_time": False,
        "schedule": list(schedule),
    }
    text = json.dumps({"experiment": {"start_buffer": 0}, "vm": [machine]})
    (lab.folder / "lab.json").write_text(text)
    done = lab.run("load", str(lab.folder / "lab.json"))
    assert done.returncode == 0, done.stderr


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with one stand-in, and an experiment that does nothing."""
    made = Lab(tmp_path)
    with stand_ins(tmp_path / "agents", 1):
        (tmp_path / "here").mkdir()
        load(made, tmp_path / "agents" / "1.sock", {"start_time": 1, "executable": "true"})
        yield made


@contextlib.contextmanager
def handled(lab: Lab, by_handler: bool, **environment: str) -> Iterator[None]:
    """Let a handler have the VM while the body runs, or nobody."""
    if not by_handler:
        yield
        return
    with lab.start("run", "--stay", **environment) as run:
        until(lab.handler_pids)
        try:
            yield
        finally:
            lab.run("stop")
            run.communicate()


def sparse(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


# === Modes =======================================================================================


def test_pull_keeps_a_mode_and_never_widens_it(lab: Lab) -> None:
    modes = {0o600: 0o600, 0o4711: 0o711, 0o666: 0o644}
    old = os.umask(0o022)
    try:
        for by_handler in (False, True):
            with handled(lab, by_handler):
                for there, here in modes.items():
                    source = lab.guest(1) / f"{by_handler}-{there:o}"
                    source.write_text("secret")
                    source.chmod(there)
                    target = lab.folder / "here" / source.name
                    done = lab.run("pull", "vm1", str(source), str(target))
                    assert done.returncode == 0, done.stderr
                    assert (oct(mode(target)), target.read_text()) == (oct(here), "secret")
    finally:
        os.umask(old)


def test_transfers_keep_modes_and_narrow_what_the_guest_narrows(lab: Lab) -> None:
    there = lab.guest(1) / "there"
    (there / "private").mkdir(parents=True)
    for name, wanted in (("a", 0o600), ("b", 0o644), ("private/c", 0o666), ("d", 0o755)):
        (there / name).write_text(name)
        (there / name).chmod(wanted)
        os.utime(there / name, (1, 1))
    (there / "private").chmod(0o700)
    item = [{"location": str(there), "destination": str(lab.folder / "out")}]
    entries = [
        {"start_time": -3, "transfer": item},
        {"start_time": -2, "executable": "chmod", "arguments": ["600", f"{there}/b"]},
        {"start_time": -1, "transfer": item},
    ]
    assert lab.run("destroy", "--yes").returncode == 0
    load(lab, lab.folder / "agents" / "1.sock", *entries)
    done = lab.run("run", VMRM_TIMEOUT_SCALE="0.2")
    assert done.returncode == 0, f"{done.stderr}{lab.logs()}"
    out = Path(f"{lab.folder}/out/vm1{there}")
    modes = {name: oct(mode(out / name)) for name in ("a", "b", "private", "private/c", "d")}
    assert modes == {"a": "0o600", "b": "0o600", "private": "0o700"} | {
        "private/c": "0o644",
        "d": "0o755",
    }


# === Bounds ======================================================================================


@pytest.mark.qga
def test_pull_takes_files_alone_and_as_long_as_they_are_when_it_begins(
    qemu_ga: Agents, tmp_path: Path
) -> None:
    lab, here = Lab(tmp_path), tmp_path / "here"
    here.mkdir()
    load(lab, qemu_ga().path)
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        ("/dev/zero", "not a file"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path, "not a file"),
        (tmp_path / "no", "No such file"),
        (sparse(tmp_path / "huge", 8 << 40), "no space on the host"),
    ):
        done = lab.run("pull", "vm1", str(path), str(here / "x"))
        assert (done.returncode, why in done.stderr) == (1, True), (path, done.stderr)
    done = lab.run("pull", "vm1", "/proc/version", str(here / "version"))
    assert done.returncode == 0, done.stderr
    assert (here / "version").read_text() == Path("/proc/version").read_text()
    growing = sparse(tmp_path / "growing", 8 << 20)
    script = 'while :; do head -c 1000000 /dev/zero >> "$0"; done'
    with subprocess.Popen(["timeout", "60", "sh", "-c", script, str(growing)]) as writer:
        try:
            done = lab.run("pull", "vm1", str(growing), str(here / "grown"))
        finally:
            writer.terminate()
    assert done.returncode == 0, done.stderr
    assert 8 << 20 <= (here / "grown").stat().st_size < growing.stat().st_size
    done = lab.run("push", "vm1", str(tmp_path / "huge"), f"{tmp_path}/pushed")
    assert (done.returncode, "no space in the VM" in done.stderr) == (1, True), done.stderr
    done = lab.run("pull", "vm1", "/proc/version", "/dev/null")
    assert (done.returncode, "is not a file" in done.stderr) == (2, True), done.stderr
    assert sorted(p.name for p in here.iterdir()) == ["grown", "version"]
    assert not list(tmp_path.rglob(".vmrm-*"))
    assert lab.run("check").returncode == 0


@pytest.mark.qga
@pytest.mark.parametrize(("operation", "program"), [("push", "mkdir"), ("pull", "ls")])
def test_a_program_of_the_guest_that_never_ends_does_not_hold_a_copy(
    qemu_ga: Agents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, program: str
) -> None:
    fake = tmp_path / "bin" / program
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexec sleep 1000\n")
    fake.chmod(0o755)
    lab = Lab(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
        agent = qemu_ga()
    load(lab, agent.path)
    (tmp_path / "f").write_text("x")
    (tmp_path / "to").mkdir()
    target = f"{tmp_path}/to/{'new/' if operation == 'push' else ''}g"
    words = [operation, "vm1", str(tmp_path / "f"), target]
    try:
        done = lab.run(*words, VMRM_TIMEOUT_SCALE="0.05", timeout=60)
        assert done.returncode == 1
        assert "does not end" in done.stderr
    finally:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes(), (folder / "environ").read_text()
                if words[0] == b"sleep\x001000\x00" and str(fake.parent) in words[1]:
                    os.kill(int(folder.name), signal.SIGKILL)


# === Broken off ==================================================================================


def begin(lab: Lab, operation: str) -> tuple[subprocess.Popen[str], Path]:
    """Begin a long copy; return its process and where its temporary file lies."""
    if operation == "push":
        source, folder = sparse(lab.folder / "big", BIG), lab.guest(1) / "to"
        process = lab.start("push", "vm1", str(source), f"{folder}/big")
    else:
        source, folder = sparse(lab.guest(1) / "big", BIG), lab.folder / "here"
        process = lab.start("pull", "vm1", str(source), f"{folder}/big")
    until(lambda: process.poll() is not None or left(folder))
    assert process.poll() is None, process.communicate()
    return process, folder


def left(folder: Path) -> list[Path]:
    """Return what lies under a temporary name and has content."""
    found = [p for p in folder.rglob("*") if ".vmrm-" in str(p.relative_to(folder))]
    return [p for p in found if p.is_file() and p.stat().st_size]


def remains(lab: Lab) -> list[str]:
    """Return all that a copy may leave, on either side: not its source, nor where it should go."""
    places = (lab.folder / "here", lab.guest(1), lab.folder / "lab.db.d" / "requests")
    kept = {"big", "to"}
    return [str(p) for place in places for p in place.rglob("*") if p.name not in kept]


def make_room(lab: Lab) -> None:
    """Take away the source of the copy before."""
    for path in (lab.folder / "big", lab.guest(1) / "big"):
        path.unlink(missing_ok=True)


def test_a_signal_ends_a_copy_and_nothing_is_left(lab: Lab) -> None:
    for operation, number in (
        ("push", signal.SIGTERM),
        ("pull", signal.SIGHUP),
        ("push", signal.SIGINT),
    ):
        process, folder = begin(lab, operation)
        with process:
            process.send_signal(number)
            process.communicate()
        assert process.returncode in (128 + number, 130)
        assert not (folder / "big").exists()
        make_room(lab)
        assert remains(lab) == [], (operation, number)
    assert lab.run("check").returncode == 0


def test_what_a_killed_copy_leaves_is_named_and_removed(lab: Lab) -> None:
    for operation in ("push", "pull"):
        process, folder = begin(lab, operation)
        with process:
            process.kill()
            process.communicate()
        assert left(folder)
        named = lab.run("check")
        assert (named.returncode, "'vm1'" in named.stdout + named.stderr) == (1, True), named
        assert lab.run("check", "--fix").returncode in (0, 1)
        if operation == "push":  # it is the guest that has it
            assert left(folder)
            assert lab.run("exec", "vm1", "true").returncode == 0
        make_room(lab)
        assert remains(lab) == [], operation
    assert lab.run("check").returncode == 0


def test_a_handler_breaks_off_the_copy_of_a_client_that_has_gone(lab: Lab) -> None:
    with handled(lab, True):
        for operation, number in (("push", signal.SIGTERM), ("pull", signal.SIGKILL)):
            process, folder = begin(lab, operation)
            with process:
                process.send_signal(number)
                process.communicate()
            until(lambda folder=folder: not left(folder) or None)
            if number is signal.SIGKILL:
                assert lab.run("exec", "vm1", "true").returncode == 0
            until(lambda: not [n for n in remains(lab) if re.search("vmrm-|requests/", n)])
            assert not (folder / "big").exists()
            make_room(lab)
        assert lab.run("exec", "vm1", "echo", "well").stdout == "well\n"
    assert lab.run("check").returncode == 0


@pytest.mark.parametrize(  # it is the client that puts what was pulled in its place
    ("label", "by_handler"),
    [(n, h) for n in COPYING for h in (False, True) if n.startswith("push-") or not h],
)
def test_what_a_copy_leaves_that_was_killed_at_a_crash_point(
    lab: Lab, label: str, by_handler: bool
) -> None:
    operation, crash = label.partition("-")[0], {"VMRM_CRASH": f"{label}:1"}
    crash["VMRM_CRASH_ONCE"] = str(lab.folder / "killed")
    source, target = lab.folder / "here" / "from", lab.guest(1) / "copy"
    if operation == "pull":
        source, target = lab.guest(1) / "from", lab.folder / "here" / "copy"
    source.write_text("content")
    with handled(lab, by_handler, **crash if by_handler else {}):
        done = lab.run(operation, "vm1", str(source), str(target), **crash)
        assert (lab.folder / "killed").exists()
        assert done.returncode == (255 if by_handler and operation == "push" else -9), done
        assert not target.exists()
        again = lab.run(operation, "vm1", str(source), str(target))
        assert (again.returncode, target.read_text()) == (0, "content"), again.stderr
        assert lab.run("check", "--fix").returncode == 0
    kept = {str(source), str(target)}
    assert {p for p in remains(lab) if not p.startswith(f"{lab.guest(1)}/launch")} == kept
    assert lab.run("check").returncode == 0


def test_what_a_killed_handler_leaves_of_a_push_is_removed_by_the_next(lab: Lab) -> None:
    with handled(lab, True):
        process, folder = begin(lab, "push")
        with process:
            (pid,) = lab.handler_pids()
            os.kill(pid, signal.SIGKILL)
            process.communicate()
        assert process.returncode == 255
        until(lambda: [p for p in lab.handler_pids() if p != pid])
        until(lambda: not [n for n in remains(lab) if re.search("vmrm-|requests/", n)])
    assert not (folder / "big").exists()


def test_what_a_killed_handler_leaves_of_a_transfer_is_removed_by_the_next(lab: Lab) -> None:
    source, out = lab.guest(1) / "data", lab.folder / "out"
    source.write_text("content")
    item = [{"location": str(source), "destination": str(out)}]
    assert lab.run("destroy", "--yes").returncode == 0
    load(lab, lab.folder / "agents" / "1.sock", {"start_time": -1, "transfer": item})
    alone = lab.run("handle", "vm1", VMRM_CRASH="transfer-before-rename:1")
    assert alone.returncode != 0
    assert left(out)
    named = lab.run("check")
    assert (named.returncode, str(left(out)[0]) in named.stdout + named.stderr) == (1, True), named
    assert lab.run("run").returncode == 0
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["data"]
    assert lab.run("check").returncode == 0
