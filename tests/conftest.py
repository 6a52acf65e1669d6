"""Fixtures that more than one test file uses.

`limit` (automatic)      a test that hangs fails
`children` (automatic)   a test that leaves a child process fails
`leftovers` (automatic)  a run that leaves any process working in its temporary directory fails
`qemu_ga`                starts the real guest agent on a socket of this host
`micro_vm`               one real micro VM for the whole run; `guests` has the means for more
`cli`                    runs vmrm as a user does
`db`, `provider`         of keepers.py: a pool's database, and machines for it
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Every command that a test starts would compile the module anew, which takes a quarter of a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

pytest_plugins = ["keepers"]

# The path comes first.
import agents  # noqa: E402
import guests  # noqa: E402
from lab import VMRM  # noqa: E402

# How fast examples are made and run is the host's affair.
settings.register_profile("any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")

# What runs in the background of a shell ignores SIGINT, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# Seconds after which a test hangs, on any host; it is failed and shows where.
LIMIT_S = 600.0

# Seconds that processes get to end by themselves, once nobody needs them.
GRACE_S = 2.0


def unavailable(reason: str) -> NoReturn:
    """Skip the calling test for want of a tool; in CI, where nothing may be missing, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


# === Processes left behind =====================================================================


class Process(NamedTuple):
    """A process as the kernel lists it."""

    pid: int
    parent: int
    state: str
    words: str


def processes() -> Iterator[Process]:
    """List the processes of this host; one that ends meanwhile is left out."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The command name before the last bracket may itself hold brackets and blanks.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield Process(int(folder.name), int(parent), state, words.strip())


def await_exit(pids: set[int], seconds: float) -> None:
    """Wait until all *pids* ended, but no longer than *seconds*; a zombie counts as ended."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        os.close(descriptor)


def _report(found: list[Process]) -> str:
    return "; ".join(f"{p.pid} ({p.state}) {p.words or 'zombie'}" for p in found)


def own_children() -> set[int]:
    """Return the pids of our children, without reading every process of a busy host."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found.update(map(int, path.read_text().split()))
    return found


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Fail a test that hangs, wherever its main thread waits, and go on with the others."""

    def fail(*_: object) -> NoReturn:
        pytest.fail(f"not done within {LIMIT_S:g} s")

    old = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(autouse=True)
def children() -> Iterator[None]:
    """Fail a test that leaves a child process, dead or alive.

    Fixtures of a wider scope are set up before this one, so their processes are not counted.
    """
    before = own_children()
    yield
    await_exit(own_children() - before, GRACE_S)
    left_pids = own_children() - before
    left = [p for p in processes() if p.pid in left_pids] if left_pids else []
    for process in left:
        _end(process.pid)
    assert not left, f"the test left child processes: {_report(left)}"


def _end(pid: int) -> None:
    """Kill and reap one of our children, so that the next test does not suffer for it."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


@pytest.fixture(scope="session", autouse=True)
def leftovers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a run after which some process still names the run's temporary directory.

    Looked for in command lines and environments (``VMRM_DB``), so that an orphan is found too.
    """
    base = str(tmp_path_factory.getbasetemp())
    yield
    await_exit({p.pid for p in _concerned(base)}, GRACE_S)
    left = _concerned(base)
    assert not left, f"the run left processes: {_report(left)}"


def _concerned(base: str) -> list[Process]:
    return [p for p in processes() if p.pid != os.getpid() and base in f"{p.words}{_environ(p)}"]


def _environ(process: Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace")
    except OSError:  # gone, or another user's
        return ""


# === A real agent on this host =================================================================


class HostAgent:
    """The real qemu-ga serving a UNIX socket of this host, without a VM.

    What would shut down, freeze or change this host itself is blocked.
    ``start`` returns when the socket accepts; ``kill`` ends it as a crash would; ``restart`` does
    both. Attributes: ``path`` (the socket), ``state`` (its state directory), ``pid``.
    """

    def __init__(self, directory: Path, words: tuple[str, ...]) -> None:
        self.path = directory / "qga.sock"
        self.state = directory / "state"
        self.log = directory / "qga.log"
        self.words = words
        self._process: subprocess.Popen[bytes] | None = None
        self.state.mkdir(parents=True)

    @property
    def pid(self) -> int:
        """The process id; raises RuntimeError while there is none."""
        if self._process is None:
            raise RuntimeError("qemu-ga is not started")
        return self._process.pid

    def start(self) -> None:
        """Start the agent."""
        self.path.unlink(missing_ok=True)
        command = ["setpriv", "--pdeathsig", "KILL", str(guests.QEMU_GA), "-m", "unix-listen"]
        command += ["-p", str(self.path), "-t", str(self.state), "-b", ",".join(agents.DANGEROUS)]
        command += self.words
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        self._await_socket(self._process, time.monotonic() + 10)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it signal *number*, which must end it, and wait for that."""
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait(10)
        self._process = None

    def restart(self) -> None:
        """Kill it and start another on the same socket and state."""
        self.kill()
        self.start()

    def _await_socket(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.path))
                    return
                except (FileNotFoundError, ConnectionRefusedError):
                    pass
            try:
                code = process.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"qemu-ga ended with {code}: {self.log.read_text()}")
        raise RuntimeError(f"qemu-ga does not listen: {self.log.read_text()}")


@pytest.fixture
def qemu_ga(tmp_path: Path, children: None) -> Iterator[Callable[..., HostAgent]]:
    """Start real agents: ``qemu_ga()``, ``qemu_ga("-b", "guest-exec")``, any number of them.

    Without ``-r`` this agent exits when a client leaves with an answer unread (QEMU 7.2), which no
    agent behind QEMU does; so ``-r`` is given, unless ``retry=False``.
    """
    if not guests.QEMU_GA.exists() or not shutil.which("setpriv"):
        unavailable(f"{guests.QEMU_GA} or setpriv is not installed")
    with ExitStack() as stack:
        started: list[HostAgent] = []

        def start(*words: str, retry: bool = True) -> HostAgent:
            folder = tmp_path / f"qga{len(started) + 1}"
            agent = HostAgent(folder, (*words, "-r") if retry else words)
            started.append(agent)
            stack.callback(agent.kill)
            agent.start()
            return agent

        yield start


# === A real VM =================================================================================


@pytest.fixture(scope="session")
def micro_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[guests.Guest]:
    """Boot one micro VM for the whole run. A test that disturbs it waits for its agent again."""
    guests.require_guests()
    with guests.Guest("shared", tmp_path_factory.mktemp("shared")) as guest:
        guest.wait_agent()
        yield guest


# === The command line ==========================================================================


class Result(NamedTuple):
    """What a run of the command line gave."""

    out: str
    err: str
    code: int


@dataclass(frozen=True)
class Cli:
    """Call it with the words of a command line: ``cli("status", "--json").out``.

    ``db`` is the database it uses, ``environment`` the variables it runs with.
    """

    db: Path
    folder: Path

    def __call__(
        self,
        *words: str | Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        stdin: str = "",
        timeout: float = 120.0,
    ) -> Result:
        """Run ``vmrm WORDS`` to its end.

        Parameters:
            cwd: where; by default the test's temporary directory, never the checkout.
            env: variables in addition.
            timeout: seconds; past them it is killed and ``subprocess.TimeoutExpired`` raised.
        """
        done = subprocess.run(
            self.command(*words),
            cwd=cwd or self.folder,
            env=self.environment | (env or {}),
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=timeout,
            check=False,
        )
        return Result(done.stdout, done.stderr, done.returncode)

    def command(self, *words: str | Path) -> list[str]:
        """Return the words to start it with, for a test that keeps it running."""
        return [*VMRM, *map(str, words)]

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables to start it with."""
        return os.environ | {"VMRM_DB": str(self.db), "COLUMNS": "200"}


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run vmrm on a database of the test's own, as a subprocess; see `Cli`."""
    return Cli(tmp_path / "lab.db", tmp_path)
