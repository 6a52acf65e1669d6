"""What is ours in a guest is nobody else's there: real agents, and another user who tries.

The agent runs as root on a socket of this host. The other user knows every name that we use, and
tries all the time to read, to change and to make what is below the places where we work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import select
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tables
from conftest import HostAgent, unavailable
from lab import Lab

OTHER = 65534
USER = "daemon"
MARK = "k3y-0f-th3-h0st"

Agents = Callable[..., HostAgent]


@pytest.fixture(autouse=True)
def root() -> None:
    """Only root can play a guest's root and another user of it."""
    if os.getuid():
        unavailable("only root can become somebody else")


@pytest.fixture
def base() -> Iterator[Path]:
    """Yield a directory that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="vmrm-guest-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """Start agents with a umask; that of a daemon of systemd is 022, of `qemu-ga -d` 077."""
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def vm(path: Path, launch: Path, *schedule: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "vm1",
        "path": str(path),
        "launch_dir": str(launch),
        "agent_timeout": 20,
        "set_time": False,
        "schedule": list(schedule),
    }


def sh(at: float, words: str, **more: Any) -> dict[str, Any]:
    return {"start_time": at, "executable": "sh", "arguments": ["-c", words], **more}


def load(lab: Lab, *vms: dict[str, Any]) -> None:
    path = lab.folder / "lab.json"
    path.write_text(json.dumps({"experiment": {"start_buffer": 0}, "vm": list(vms)}))
    done = lab.run("load", str(path))
    assert done.returncode == 0, done.stderr


# === Another user ================================================================================


class Intruder:
    """Looks below `places` and at paths that it guesses, as fast as it can, until it is told."""

    def __init__(self, places: list[Path], guesses: list[Path]) -> None:
        self.places, self.guesses = places, guesses
        self.got: set[str] = set()
        self.looks = 0
        self.kept: list[int] = []

    def paths(self) -> Iterator[str]:
        for place in self.places:
            for folder, folders, files in os.walk(place):
                for name in (*folders, *files):
                    yield f"{folder}/{name}"
        for guess in self.guesses:
            yield str(guess)

    def look(self) -> None:
        self.looks += 1
        attempts = [p for g in self.guesses if g.name == "sh" for p in g.glob("attempt.*")]
        inner = [f"{p}/{name}" for p in attempts for name in ("out", "err", "exit", "pid")]
        for path in (*self.paths(), *inner):
            for flags in (os.O_RDWR, os.O_RDONLY, os.O_WRONLY):
                try:
                    opened = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
                except OSError:
                    continue
                facts = os.fstat(opened)
                if facts.st_uid != OTHER and flags != os.O_RDONLY:
                    self.got.add(f"may write {path} {oct(facts.st_mode)}")
                if stat.S_ISREG(facts.st_mode) and flags == os.O_RDONLY and len(self.kept) < 500:
                    self.kept.append(opened)  # who has it open keeps it
                    self.read(opened, path)
                else:
                    os.close(opened)
            if "/launch/" not in path:
                continue
            for name in (f"{path}/mine", f"{path}/attempt.1", f"{path}.part"):
                with contextlib.suppress(OSError):
                    Path(name).mkdir()
                    self.got.add(f"may make {name}")

    def read(self, opened: int, path: str) -> None:
        with contextlib.suppress(OSError):
            if MARK.encode() in os.pread(opened, 1 << 22, 0):
                self.got.add(f"may read {path}")

    def run(self, told: int, answer: int) -> None:
        poll = select.poll()
        poll.register(told, select.POLLIN)
        self.look()
        os.write(answer, b"\n")
        while not poll.poll(1):
            self.look()
        for opened in self.kept:
            self.read(opened, f"what was {Path(f'/proc/self/fd/{opened}').readlink()}")
        os.write(answer, json.dumps([self.looks, sorted(self.got)[:20]]).encode())


@contextlib.contextmanager
def intruder(places: list[Path], guesses: list[Path]) -> Iterator[list[str]]:
    """Let another user try while the body runs; the list yielded says afterwards what it got."""
    told, tell = os.pipe()
    answer, answering = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(tell)
            os.setgroups([])
            os.setgid(OTHER)
            os.setuid(OTHER)
            Intruder(places, guesses).run(told, answering)
        finally:
            os._exit(0)
    os.close(told)
    os.close(answering)
    got: list[str] = []
    try:
        with os.fdopen(answer, "rb") as report:
            assert report.readline() == b"\n"
            try:
                yield got
            finally:
                os.close(tell)  # its end is the word to stop
            looks, found = json.loads(report.read())
            assert looks > 1
            got += found
    finally:
        os.waitpid(pid, 0)


# === Tests =======================================================================================


def guesses(launch: Path, contents: list[bytes]) -> list[Path]:
    """Return what somebody who knows vmrm and the experiment would look for."""
    stage, found = launch / ".stage", [launch, launch / ".stage"]
    for content in contents:
        name = hashlib.sha256(content).hexdigest()
        found += [stage / name, stage / f"{name}.part"]
    for at, name in ((-2, "sh"), (-1, "sh"), (1, "sh")):
        place = launch / str(at) / name
        found += [place.parent, place, place / "call_arguments.sh", place / "call_program.sh"]
    return found


@pytest.mark.qga
def test_another_user_of_the_guest_gets_nothing(
    qemu_ga: Agents, tmp_path: Path, base: Path
) -> None:
    with umask(0):
        agent = qemu_ga()
    launch, shared, theirs = base / "launch", base / "shared", base / "theirs"
    shared.mkdir()
    shared.chmod(0o1777)
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    secret = (MARK * 100_000).encode()
    source = tmp_path / "secret.bin"
    source.write_bytes(secret)
    source.chmod(0o600)
    lab = Lab(tmp_path)
    show = 'echo "$KEY"; echo "$KEY" >&2; id -u; cat note'
    note = [{"location": "note", "content": "for everybody\n"}]
    load(
        lab,
        vm(
            agent.path,
            launch,
            {"start_time": -2, "file": [{"location": "/dev/null/no", "filename": str(source)}]}
            | {"ignore_failure": True, "executable": "sh"},
            sh(-1, show, env={"KEY": MARK}, content=note),
            sh(1, show, env={"KEY": MARK}, content=note, user=USER),
        ),
    )
    with intruder([base], guesses(launch, [secret])) as got:
        done = lab.run("run")
        for folder in (shared, theirs, base / "made"):
            pushed = lab.run("push", "vm1", str(source), f"{folder}/secret")
            assert pushed.returncode == 0, pushed.stderr
        shown = lab.run("exec", "vm1", "echo", MARK)
    assert done.returncode == 0, f"{done.stderr}\n{lab.logs()}"
    assert shown.stdout == f"{MARK}\n"
    assert got == []
    for folder in (shared, theirs, base / "made"):
        facts = (folder / "secret").stat()
        assert (stat.S_IMODE(facts.st_mode), facts.st_uid) == (0o600, 0)
        assert [p.name for p in folder.glob(".vmrm-*")] == []
    assert stat.S_IMODE((launch / "-1" / "sh" / "note").stat().st_mode) == 0o644
    logs = lab.run("logs", "vm1").stdout
    uid = pwd.getpwnam(USER).pw_uid
    assert all(f" out] {word}\n" in logs for word in (MARK, "0", str(uid), "for everybody")), logs


@pytest.mark.qga
@pytest.mark.parametrize("place", ["theirs", "link", "below", "open", "chain", "acl"])
def test_a_launch_directory_that_others_can_change_is_refused(
    qemu_ga: Agents, tmp_path: Path, base: Path, place: str
) -> None:
    agent, launch = qemu_ga(), base / "open" / "launch"
    (base / "open").mkdir()
    (base / "open").chmod(0o777 if place in ("below", "open", "chain") else 0o1777)
    if place == "theirs":
        launch.mkdir()
        os.chown(launch, OTHER, OTHER)
    if place == "link":
        (base / "target").mkdir()
        launch.symlink_to(base / "target")
        os.lchown(launch, OTHER, OTHER)
    if place == "chain":  # root's link leads through what others can change
        (base / "target").mkdir()
        (base / "open" / "next").symlink_to(base / "target")
        (base / "way").symlink_to(base / "open" / "next")
        launch = base / "way" / "launch"
    if place == "acl":
        (base / "open").chmod(0o755)
        entries = [(1, 7, -1), (2, 7, OTHER), (4, 5, -1), (16, 7, -1), (32, 5, -1)]
        packed = b"".join(struct.pack("<HHi", *entry) for entry in entries)
        try:
            os.setxattr(base / "open", "system.posix_acl_access", struct.pack("<I", 2) + packed)
        except OSError as error:
            unavailable(f"no access control lists here: {error}")
    if place == "open":
        launch = base / "open"
    lab = Lab(tmp_path)
    load(lab, vm(agent.path, launch, sh(-1, f"touch {base}/ran")))
    done = lab.run("run")
    assert done.returncode == 1
    assert "other users of the VM can change" in done.stderr
    assert str(base / "open") in done.stderr
    assert not (base / "ran").exists()
    assert not list(base.rglob(".stage"))


@pytest.mark.qga
def test_what_others_planted_while_a_launch_directory_was_open_is_not_used(
    qemu_ga: Agents, tmp_path: Path, base: Path
) -> None:
    agent, launch, lab = qemu_ga(), base / "launch", Lab(tmp_path)
    (base / "target").mkdir()
    for folder in (launch / ".stage", launch / "1", launch / "2"):
        folder.mkdir(parents=True, mode=0o700)
        os.chown(folder, OTHER, OTHER)
    (launch / "2" / "sh").symlink_to(base / "target")
    load(lab, vm(agent.path, launch, sh(-1, f"echo {MARK}")))
    assert lab.run("run").returncode == 0
    assert (launch / ".stage").stat().st_uid == 0
    for at in (1, 2):
        later = tmp_path / "later.json"
        later.write_text(json.dumps({"schedule": [sh(at, f"touch {base}/ran")]}))
        assert lab.run("schedule", "add", "vm1", str(later)).returncode == 0
        lab.run("run")
    assert not (base / "ran").exists()
    assert not list((base / "target").iterdir())
    assert f"{launch}/1 is another user's" in lab.logs()


@pytest.mark.qga
def test_root_follows_no_link_of_another_user_to_put_a_file(
    qemu_ga: Agents, tmp_path: Path, base: Path
) -> None:
    agent, launch, lab = qemu_ga(), base / "launch", Lab(tmp_path)
    target, theirs = base / "target", base / "theirs"
    for folder in (target, theirs):
        folder.mkdir()
    os.chown(theirs, OTHER, OTHER)
    (theirs / "way").symlink_to(target)
    (base / "way").symlink_to(theirs)  # root's, to where somebody else may put links
    (base / "good").symlink_to("real")
    (base / "real").mkdir()
    swap = f"mv sub old; ln -s {target} sub; exit 3"
    placed = [{"location": f"sub/{name}", "content": "x"} for name in ("data", "new/data")]
    load(lab, vm(agent.path, launch, sh(-1, swap, user=USER, content=placed)))
    lab.run("run")
    assert (launch / "-1" / "sh" / "work" / "sub").is_symlink()
    lab.run("retry", "vm1", "1")
    lab.run("run")
    assert "other users of the VM can change" in lab.logs()
    (tmp_path / "f").write_text("f")
    for way in (theirs / "way", base / "way" / "way", theirs / "way" / "new"):
        done = lab.run("push", "vm1", str(tmp_path / "f"), f"{way}/f")
        assert done.returncode == 1, way
        assert "other users of the VM can change" in done.stderr
    assert not list(target.iterdir())
    assert not list(base.rglob(".vmrm-*"))
    for place in (theirs / "new" / "f", base / "good" / "new" / ".." / "f", base / "real" / "g"):
        done = lab.run("push", "vm1", str(tmp_path / "f"), str(place))
        assert (done.returncode, place.read_text()) == (0, "f"), done.stderr


@pytest.mark.qga
def test_an_entrys_user_cannot_replace_what_root_runs_or_writes(
    qemu_ga: Agents, tmp_path: Path, base: Path
) -> None:
    agent, launch, lab = qemu_ga(), base / "launch", Lab(tmp_path)
    target = base / "target"
    target.write_text("precious")
    tries = (
        "for f in ../call_arguments.sh $(echo ../attempt.*)/exit; do "
        "(echo x > $f) 2>/dev/null && echo $f; "
        "done; rm -f ../call_arguments.sh && echo removed; mv .. ../../x && echo moved; "
        f"for d in ../attempt.*; do ln -s {target} $d/exit.new && echo linked; done; "
        "mkdir ../attempt.2 && echo made; "
        f"rm -f note; ln -s {target} note; ln -s {target} .vmrm-1; exit 3"
    )
    load(
        lab,
        vm(
            agent.path,
            launch,
            sh(-1, tries, user=USER, content=[{"location": "note", "content": "x"}]),
        ),
    )
    for words in (["run"], ["retry", "vm1", "1"], ["run"]):
        lab.run(*words)
    attempts = tables.attempts(lab.db)
    assert len(attempts) > 1
    assert {(row["outcome"], row["exit_code"]) for row in attempts} == {("failed", 3)}, attempts
    assert target.read_text() == "precious"
    logs = lab.run("logs", "vm1").stdout
    assert " out] " not in logs, logs


@pytest.mark.qga
@pytest.mark.parametrize("mask", [0o077, 0o027])
def test_entries_with_a_user_work_whatever_the_agents_umask(
    qemu_ga: Agents, tmp_path: Path, base: Path, mask: int
) -> None:
    with umask(mask):
        agent = qemu_ga()
    launch, lab = base / "new" / "launch", Lab(tmp_path)
    script = "#!/bin/sh\ncat sub/data; pwd; umask; touch made\n"
    placed = [
        {"location": "run.sh", "content": script, "executable": True},
        {"location": "sub/data", "content": "read\n"},
        {"location": f"{base}/etc/conf", "content": "conf\n"},
    ]
    words = f"./run.sh && cat {base}/etc/conf && echo seen >> /dev/stdout"
    load(lab, vm(agent.path, launch, sh(-1, words, user=USER, content=placed)))
    done = lab.run("run")
    assert done.returncode == 0, f"{done.stderr}\n{lab.logs()}"
    work = launch / "-1" / "sh" / "work"
    logs = lab.run("logs", "vm1").stdout
    for word in ("read", str(work), "0022", "conf", "seen"):
        assert f" out] {word}\n" in logs, logs
    owner = pwd.getpwnam(USER).pw_uid
    assert {p.stat().st_uid for p in (work, work / "made")} == {owner}
    for folder in (base / "new", launch, launch / "-1"):
        facts = folder.stat()
        assert (stat.S_IMODE(facts.st_mode), facts.st_uid) == (0o711, 0)
    assert stat.S_IMODE((launch / ".stage").stat().st_mode) == 0o700
    assert stat.S_IMODE((base / "etc" / "conf").stat().st_mode) == 0o644


@pytest.mark.qga
def test_a_stage_that_was_open_is_not_trusted(qemu_ga: Agents, tmp_path: Path, base: Path) -> None:
    agent, launch, lab = qemu_ga(), base / "launch", Lab(tmp_path)
    content = b"echo good\n"
    stage = launch / ".stage"
    stage.mkdir(parents=True, mode=0o755)
    planted = stage / hashlib.sha256(content).hexdigest()
    planted.write_bytes(b"echo evil\n")
    (stage / "rest.part").touch()
    entry = {"start_time": -1, "executable": "sh", "arguments": ["x"]}
    entry["content"] = [{"location": "x", "content": content.decode()}]
    load(lab, vm(agent.path, launch, entry))
    assert lab.run("run").returncode == 0
    text = lab.run("logs", "vm1").stdout
    assert "good" in text
    assert "evil" not in text
    assert stat.S_IMODE(stage.stat().st_mode) == 0o700
    assert not list(stage.glob("*.part")), "a layout, or what a full disk left"
