"""One client at a time talks to an agent: who comes second waits, and whoever may use it can."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import agents
import pytest
from cli_lab import until
from conftest import Cli, Result, unavailable

import vmrm


def _load(cli: Cli, path: Path) -> None:
    text = f'[[vm]]\nname = "vm"\npath = "{path}"\nlaunch_dir = "{cli.folder}/launch"\n'
    (cli.folder / "lab.toml").write_text(text)
    assert cli("load", "lab.toml").code == 0


def test_a_second_command_waits_within_its_time_out(cli: Cli, tmp_path: Path) -> None:
    began, done = tmp_path / "began", tmp_path / "done"
    with agents.stand_in(tmp_path / "agent") as agent:
        _load(cli, agent.path)
        script = f"touch {began}; sleep 2; touch {done}"
        words = cli.command("exec", "vm", "sh", "-c", script)
        with subprocess.Popen(words, env=cli.environment) as first:
            until(began.exists)
            late = cli("exec", "--timeout", "0.2", "vm", "true")
            assert late.code == 255
            assert f"held by process {first.pid}" in late.err
            second = cli("exec", "--timeout", "50", "vm", "test", "-e", done)
        assert (first.returncode, second.code) == (0, 0), second.err


def test_a_socket_that_is_not_there_yet_is_waited_for(cli: Cli, tmp_path: Path) -> None:
    _load(cli, tmp_path / "agent" / "agent.sock")
    words = cli.command("exec", "--timeout", "50", "vm", "true")
    with subprocess.Popen(words, env=cli.environment) as client:
        time.sleep(1)
        assert client.poll() is None
        with agents.stand_in(tmp_path / "agent"):
            assert client.wait(60) == 0


def test_a_command_that_waits_goes_through_a_handler_that_comes(cli: Cli, tmp_path: Path) -> None:
    """The handler has the agent for as long as it lives; the command must not wait for its end."""
    began, go = tmp_path / "began", tmp_path / "go"
    with agents.stand_in(tmp_path / "agent") as agent:
        _load(cli, agent.path)
        script = f"touch {began}; until [ -e {go} ]; do sleep 0.1; done"
        words = cli.command("exec", "vm", "sh", "-c", script)
        waits = cli.command("exec", "--timeout", "50", "vm", "true")
        with (
            subprocess.Popen(words, env=cli.environment) as first,
            subprocess.Popen(waits, env=cli.environment) as second,
        ):
            until(began.exists)
            assert cli("run", "--stay", "--detach").code == 0
            time.sleep(1)
            go.touch()
            assert first.wait(60) == 0
            assert second.wait(60) == 0
        assert cli("wait", "--timeout", "30").code == 0
        assert cli("stop", "--kill").code == 0


# === other users of the same host ================================================================

NOBODY, OTHER = 65534, 65533
# The interpreter may lie where only root can read; nothing can be written, or locked, by that.
READS = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that every user of this host may write to, removed at the end."""
    if os.geteuid() != 0:
        unavailable("only root can become somebody else")
    with tempfile.TemporaryDirectory(prefix="vmrm-users-") as name:
        Path(name).chmod(0o1777)
        yield Path(name)


def by(uid: int, folder: Path, *words: str) -> Result:
    """Run a command line as user *uid*, on a database of that user's own."""
    home = folder / str(uid)
    if not home.exists():
        home.mkdir()
        os.chown(home, uid, uid)
    cli = Cli(home / "lab.db", home)
    as_user = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", *READS]
    done = subprocess.run(
        [*(as_user if uid else []), *cli.command(*words)],
        cwd=home, env=cli.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return Result(done.stdout, done.stderr, done.returncode)


def experiment(folder: Path, *paths: Path) -> str:
    """Write an experiment of vm1, vm2, … at *paths* that anybody may read; return its path."""
    vms = [f'[[vm]]\nname = "vm{n}"\npath = "{path}"\n' for n, path in enumerate(paths, 1)]
    (folder / "lab.toml").write_text("".join(vms))
    (folder / "lab.toml").chmod(0o644)
    return str(folder / "lab.toml")


@pytest.mark.parametrize("first", [0, NOBODY])
def test_whoever_comes_first_locks_nobody_out(shared: Path, first: int) -> None:
    with agents.stand_in(shared / "agent") as agent:
        (shared / "agent").chmod(0o1777)
        agent.path.chmod(0o666)
        lab = experiment(shared, agent.path)
        for uid in (first, OTHER, 0):
            assert by(uid, shared, "load", lab).code == 0
            result = by(uid, shared, "exec", "vm1", "true")
            assert result.code == 0, (uid, result)
        lock = agent.path.with_name(agent.path.name + ".vmrm-lock").stat()
        assert (lock.st_uid, stat.S_IMODE(lock.st_mode)) == (0, 0o666)  # root handed it over


def test_who_may_not_use_a_socket_cannot_lock_it(shared: Path) -> None:
    with agents.stand_in(shared / "agent") as agent:
        (shared / "agent").chmod(0o1777)
        os.chown(agent.path, NOBODY, OTHER)
        agent.path.chmod(0o755)
        assert by(0, shared, "load", experiment(shared, agent.path)).code == 0
        assert by(0, shared, "exec", "vm1", "true").code == 0
        lock = agent.path.with_name(agent.path.name + ".vmrm-lock").stat()
        assert (lock.st_uid, lock.st_gid, stat.S_IMODE(lock.st_mode)) == (NOBODY, OTHER, 0o600)


def test_a_run_that_locks_keep_out_says_so_in_one_line_and_starts_nothing(shared: Path) -> None:
    paths = [shared / "agents" / f"{n}.sock" for n in (1, 2, 3)]
    with agents.stand_ins(shared / "agents", 3):
        (shared / "agents").chmod(0o1777)
        for path in paths:
            path.chmod(0o666)
            path.with_name(path.name + ".vmrm-lock").touch(0o600)
        assert by(NOBODY, shared, "load", experiment(shared, *paths)).code == 0
        for words, code in (("run", 2), ("exec vm1 true", 255)):
            result = by(NOBODY, shared, *words.split())
            error, hint = result.err.splitlines()
            assert result.code == code
            assert "1.sock.vmrm-lock', which belongs to root, cannot be opened" in error
            assert "(and 2 more)" in error or code == 255
            assert re.fullmatch(r"hint: As root: chown 0:0 \S*1.sock.vmrm-lock", hint)
        assert "running" not in by(NOBODY, shared, "status").out
        # root hands over what was made before the locks had their sockets' rights
        assert by(0, shared, "load", str(shared / "lab.toml")).code == 0
        assert by(0, shared, "exec", "vm1", "true").code == 0
        assert by(NOBODY, shared, "exec", "vm1", "true").code == 0


def test_what_is_no_lock_is_neither_overwritten_nor_given_away(shared: Path) -> None:
    with agents.stand_in(shared / "agent") as agent:
        os.chown(agent.path, NOBODY, NOBODY)
        lock, secret = agent.path.with_name(agent.path.name + ".vmrm-lock"), shared / "secret"
        secret.write_text("root's own\n")
        secret.chmod(0o600)
        assert by(0, shared, "load", experiment(shared, agent.path)).code == 0
        for plant in (lock.hardlink_to, lock.symlink_to):
            plant(secret)
            assert by(0, shared, "exec", "vm1", "true").code == 255
            lock.unlink()
            assert (secret.read_text(), secret.stat().st_uid) == ("root's own\n", 0)


def as_user(uid: int, action: Callable[[], None]) -> int:
    """Do something in a child that is user *uid*; return 0, or 1 if it met a conflict."""
    child = os.fork()
    if not child:
        code = 2
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            action()
            code = 0
        except vmrm.Conflict as conflict:
            os.write(2, f"{conflict} ({conflict.hint})\n".encode())
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_lock_directory_of_others_is_not_used_and_root_takes_it_over(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever owns the directory could remove the lock that another holds."""
    places = (shared / "one", shared / "two")
    monkeypatch.setattr(vmrm, "SHARED_LOCKS", places)

    def lock() -> None:
        with vmrm.agent_lock("tcp:127.0.0.1:9", Path("/else/lab.db"), lambda _: None, 0):
            pass

    assert as_user(NOBODY, lock) == 0
    assert as_user(NOBODY, lock) == 0
    made = places[0].stat()
    assert (made.st_uid, stat.S_IMODE(made.st_mode)) == (NOBODY, 0o1777)
    places[1].mkdir(0o777)
    places[1].chmod(0o777)  # not sticky
    assert as_user(OTHER, lock) == 1
    said = capfd.readouterr().err
    assert f"'{places[0]}' of nobody" in said
    assert f"As root: install -d -o root -m 1777 {places[0]}" in said
    assert as_user(0, lock) == 0
    made = places[0].stat()
    assert (made.st_uid, stat.S_IMODE(made.st_mode)) == (0, 0o1777)
    assert as_user(OTHER, lock) == 0
    assert as_user(NOBODY, lock) == 0


def test_users_who_cannot_write_beside_the_socket_meet_at_one_lock(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also root, who could write there, but came later."""
    monkeypatch.setattr(vmrm, "SHARED_LOCKS", (shared / "one",))
    (shared / "one").mkdir()
    (shared / "one").chmod(0o1777)
    (shared / "agent").mkdir(0o755)
    path = shared / "agent" / "agent.sock"

    def lock(wait: Callable[[], object] = lambda: None) -> None:
        with vmrm.agent_lock(str(path), Path("/else/lab.db"), lambda _: None, 0):
            wait()

    def hold() -> None:
        lock(lambda: (os.write(began, b"x"), os.read(end, 1)))

    (begun, began), (end, ended) = os.pipe(), os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        holder = threading.Thread(target=as_user, args=(NOBODY, hold))
        holder.start()
        os.read(begun, 1)
        assert as_user(0, lock) == 1
        assert as_user(OTHER, lock) == 1
        os.write(ended, b"x")
        holder.join(10)
        assert as_user(0, lock) == 0
        assert as_user(OTHER, lock) == 0
    for fd in (begun, began, end, ended):
        os.close(fd)
