"""vmrm: a VM resource manager for one lab host, in one module and one SQLite file.

An *experiment* takes every VM of a lab through its *schedule*: entries with a start time. Negative
times configure a VM, in order, each a local barrier; at time 0 all VMs wait for each other;
positive times are seconds after the common start. This file reads in the direction the data takes:

    experiment file -> ScheduleDb, VMMapping (rows) -> supervisor -> one VMResourceHandler per VM
        -> drivers.py -> guest agent -> a script of ours in the guest -> journal (rows) -> report

Vocabulary: an *entry* is one item of a schedule, known by (VM, generation, ordinal). An *attempt*
is one try at it, a journal row: armed, running, then done, failed or unknown. The *claim* is the
directory by which a guest runs an attempt once at most. The *barrier* is the statement that sets
the start time. A *wake* is a byte to a process that ought to look at the database again.

The rule that must not be broken: rows are the truth and memory is a cache. Whoever dies at any
instruction leaves rows from which the next process carries on. Every read-then-write is one
statement or one transaction; inside a transaction there is no other I/O.

`grep '^# ===' vmrm.py` prints the map of this file; schema.sql is the data model.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - who has an older one has not come by way of pip
    _too_old = f"vmrm needs Python 3.11 or later, and this is {sys.version.split()[0]}"
    if __name__ == "__main__":
        sys.exit(f"error: {_too_old}\nhint: Start it with a newer one: python3.11 vmrm.py …")
    raise ImportError(_too_old)

import codecs
import collections
import contextlib
import copy
import dataclasses
import errno
import fcntl
import fnmatch
import functools
import hashlib
import heapq
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import select
import shlex
import signal
import socket
import sqlite3
import stat
import string
import subprocess
import threading
import time
import traceback
import types
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from datetime import UTC, datetime
from enum import Enum, StrEnum
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from queue import Empty, SimpleQueue
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    BinaryIO,
    ClassVar,
    NamedTuple,
    NoReturn,
    Self,
    TypeGuard,
    TypeVar,
    cast,
    get_args,
)

import drivers
from drivers import printable

if TYPE_CHECKING:
    import tarfile
    import zipfile
    from queue import Queue

    import sqlite_utils

__version__ = "0.1.0"

# === errors ======================================================================================


class VmrmError(Exception):
    """What a user can understand and act upon: one line, a hint what to do, and an exit code."""

    code = 1

    def __init__(self, message: str, hint: str = "", code: int | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if code is not None:
            self.code = code


class UsageError(VmrmError):
    """The request is wrong; nothing was changed."""

    code = 2


# Where somebody gave the value, this is raised and never ValueError itself. What reaches `main` as
# a bare ValueError or OSError is therefore a fault of ours.
class WrongValue(UsageError, ValueError):
    """A value that cannot be; to scripts a ValueError."""


class NotFound(UsageError, LookupError):
    """Nothing of that name is known."""


class Conflict(UsageError):
    """Somebody else holds it, or did it already."""


class VmError(UsageError):
    """The pool's VM is not in a state for that, or is somebody else's."""


class VmDescriptorNotFound(VmError, NotFound):
    """The pool has no VM of that name."""


class Unavailable(VmrmError):
    """The request is right, and may well succeed later."""

    code = 75


class NoVmAvailable(Unavailable):
    """The pool has no VM to give now; the message says why, per group."""


class Busy(Unavailable):
    """The database's writer lock was not free in time."""


class ScheduleDbTimeoutError(Busy):
    """The schedule database did not answer in time."""


class Unwritable(Unavailable):
    """The database cannot be used at present: its disk is full, for example."""


class TimedOut(VmrmError):
    """What was waited for did not happen in time."""

    code = 124


class MissingPackage(VmrmError, ImportError):
    """This Python lacks a package that vmrm needs."""


class SchemaError(VmrmError):
    """The database file is not ours, damaged, or written by another version."""

    code = 3


# === vocabulary: states, moves, clock, bounds ====================================================


class VMState(StrEnum):
    """Where a VM of an experiment is on its way to time 0."""

    UNINITIALIZED = "uninitialized"  # known, not contacted yet
    CONFIGURING = "configuring"  # its handler works on negative times
    CONFIGURED = "configured"  # ready for, or past, time 0
    FAILED = "failed"  # could not be configured, or was lost
    TESTING = "testing"  # taken out by a person
    NOT_APPLICABLE = "n/a"  # not managed; ignored everywhere


_State = TypeVar("_State", bound=StrEnum)


def moves(states: type[_State], table: str) -> dict[_State, frozenset[_State]]:
    """Read a table of moves: on each line a state, and those it may move to; * is any of them."""
    lines = [line.partition("#")[0].split() for line in table.splitlines()]
    return {
        states(old): frozenset(states if new == ["*"] else map(states, new))
        for old, *new in filter(None, lines)
    }


VM_MOVES = moves(
    VMState,
    """
    uninitialized  configuring n/a failed testing
    configuring    configured failed
    configured     failed
    failed         configuring configured  # a retry: before the start time, or after it
    testing        *
    n/a
    """,
)


class Outcome(StrEnum):
    """How far an attempt of an entry has come."""

    ARMED = "armed"  # recorded; its program is about to be sent, or was just sent
    RUNNING = "running"  # the guest has started it
    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"  # it may have run: nobody can tell any more
    SKIPPED = "skipped"  # passed over on purpose


OPEN_OUTCOMES = (Outcome.ARMED, Outcome.RUNNING)  # whose end is still to come


class OnFailure(StrEnum):
    """What one failed VM means to the others before the start time."""

    ABORT = "abort"  # finish what runs, start nothing further
    DROP = "drop"  # go on without it
    WAIT = "wait"  # wait until somebody retries it


class Late(StrEnum):
    """What becomes of entries that are overdue when an experiment is continued."""

    START = "start"  # they start at once, in planned order
    SKIP = "skip"  # they are recorded as skipped
    SHIFT = "shift"  # a pause for as long as nothing ran is recorded for every VM


class Halt(StrEnum):
    """What every handler of the experiment must do now, if the experiment's row says anything."""

    ABORT = "abort"  # a VM failed: finish running entries, start no further time
    STOP = "stop"  # leave at once; guest programs go on
    KILL = "kill"  # end the guest programs, then leave
    END = "end"  # all work is done: one last pass of repeating transfers, then leave


class VmStates(StrEnum):
    """Where a VM of the pool is between its spawning and its end."""

    SPAWNING = "spawning"  # its row exists; its spawn hook may be running
    GOT_IP = "got_ip"  # it is there, and was never checked
    CHECK_HEALTH = "check_health"  # being checked, or waiting for its release hook
    CHECK_HEALTH_FAILED = "check_health_failed"
    READY = "ready"
    IN_USE = "in_use"  # somebody's, by a lease
    HELD = "held"  # kept for a person, until a date
    TERMINATING = "terminating"  # being ended, until its row is removed


VmState = VmStates  # the reference spells it both ways

POOL_MOVES = moves(
    VmStates,
    """
    spawning             got_ip terminating
    got_ip               check_health check_health_failed terminating
    check_health         ready check_health_failed terminating
    check_health_failed  check_health held terminating
    ready                check_health check_health_failed in_use held terminating
    in_use               ready check_health check_health_failed held terminating
    held                 terminating  # whatever a person did with it
    terminating
    """,
)


def _checked(kind: str, allowed: Mapping[_State, Collection[_State]], old: str, new: str) -> _State:
    """Return `new` as a state if it may be reached from `old`; staying put is no move."""
    states = type(next(iter(allowed)))
    target = checked_word(f"{kind} state", new, states, f" (from {str(old)!r})")
    if target not in (old, *allowed[states(old)]):
        raise WrongValue(f"a {kind} cannot move from {str(old)!r} to {str(new)!r}")
    return target


checked_move = functools.partial(_checked, "VM", VM_MOVES)
checked_pool_move = functools.partial(_checked, "pool VM", POOL_MOVES)


def checked_word(kind: str, word: object, known: type[_State], more: str = "") -> _State:
    """Return `word` as one of the known ones, else raise `WrongValue`, which names them all."""
    if word in [*known]:
        return known(str(word))
    raise WrongValue(f"unknown {kind} {word!r}{more}; one of {', '.join(known)}")


NAME_PATTERN = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checked_name(kind: str, name: object) -> str:
    """Return `name` if it may name a VM, group or stored file, else raise `ValueError`."""
    if isinstance(name, str) and NAME_PATTERN.fullmatch(name):
        return name
    raise WrongValue(
        f"{kind} name {printable(repr(name), 200)} is not usable: 1 to 64 of A-Z a-z 0-9 . _ - "
        "with a letter or digit first"
    )


def _matching(pattern: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value))


_is_content = _matching("[^\ud800-\udfff]*")  # a surrogate has no UTF-8
_is_word = _matching("[^\0\ud800-\udfff]*")
_is_text = _matching("[^\0\ud800-\udfff]+")
_is_user = _matching("[A-Za-z_][A-Za-z0-9._-]*")


def _is_a(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


_is_switch, _is_list = _is_a(bool), _is_a(list)


def _is_number(value: object) -> TypeGuard[float]:
    try:
        return not _is_switch(value) and isinstance(value, int | float) and not math.isnan(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is_time(value: object) -> TypeGuard[float]:
    return _is_number(value) and (abs(value) <= MAX_SECONDS or math.isinf(value))


def _is_duration(value: object) -> TypeGuard[float]:
    return _is_time(value) and value > 0


def _is_positive(value: object) -> TypeGuard[float]:
    return _is_duration(value) and value <= MAX_SECONDS


def _is_arguments(value: object) -> bool:
    return all(map(_is_word, value if isinstance(value, list) else [value]))


def _is_environment(value: object) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key) and _is_word(item)
        for key, item in value.items()
    )


_Keys = dict[str, tuple[Callable[[object], bool], str]]  # whether a value will do; what it must be


class Clock:
    """Both clocks in one place: wall time (UTC) for what is shared, monotonic time for waiting."""

    wall = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


class Timeouts(NamedTuple):
    """Every time-out and interval, in seconds; tests scale them."""

    writer: float = 60.0  # for the database's writer lock
    call: float = 30.0  # one guest-agent call
    negative_entry: float = 3600.0  # an entry in negative time that names none
    term_grace: float = 5.0  # between TERM and KILL of a guest's process group
    claim_grace: float = 2.0  # for a started script to leave its first trace
    poll_first: float = 0.02  # the first look at a running program; then ever more seldom …
    poll_last: float = 1.0  # … up to this
    look: float = 5.0  # the safety net: the VM's revision, with jitter
    watch: float = 1.0  # between two looks of a supervisor or keeper that nobody wakes
    reconnect: float = 5.0  # longest pause between two tries to reach a lost agent
    reboot_start: float = 60.0  # for a guest to be seen going down after an accepted reboot
    lock: float = 10.0  # for the agent's lock, held by a handler on its way out
    leave: float = 10.0  # for handlers to leave before they are killed
    restart: float = 10.0  # the longest pause before a handler that died is started again
    lease_grace: float = 10.0  # after a pool lease's end, before the VM is taken back
    recheck: float = 5.0  # until a pool VM's check that told nothing is repeated
    young: float = 60.0  # of a pool VM whose absence, or unknown machine, is not acted upon yet
    heartbeat: float = 30.0  # after which a silent waiter for a pool VM counts no more

    @classmethod
    def from_environment(cls) -> Timeouts:
        """Return the defaults, scaled as `$VMRM_TIMEOUT_SCALE` says: `0.2`, `0.2,look=1000`."""
        scale, *more = os.environ.get("VMRM_TIMEOUT_SCALE", "1").split(",")
        scales = dict.fromkeys(cls._fields, scale) | dict(word.split("=") for word in more)
        return cls(**{name: cls._field_defaults[name] * float(scales[name]) for name in scales})


CLOCK = Clock()
MAX_REBOOTS = 10
MAX_SECONDS = 1e9  # of any time in a schedule: 31 years, which every calendar here can add
MAX_VMS = 10_000  # of one table with `count`
MAX_OUTPUT_BYTES = 256 << 20
MAX_FILES = 1 << 16  # cap for RLIMIT_NOFILE; the hard limit can be absurdly high
MAX_LISTED = 1 << 17  # files and directories of one transfer
MAX_PATH_BYTES, MAX_PATH_PARTS = 4096, 128  # of a guest's path that a copy is to have
MAX_FAULTS = 100  # of one pass of a transfer, and told of one transfer in all
MIN_FREE_BYTES, MIN_FREE_FILES = 64 << 20, 1000  # are left by what fills the host's disk
SLICE_S = 0.005  # a step that takes longer lets others go first
MAX_DEATHS = 10  # of one handler in a row without any progress
REBOOT_EXIT_CODE = 10

# Looked up once: between two forks the supervisor must touch as little memory as it can.
_CRASH, _, _crash_nth = os.environ.get("VMRM_CRASH", "").partition(":")
_crash_count = itertools.count(1)


def _crash(label: str) -> None:
    """Die here, as by kill -9, if `VMRM_CRASH=label:n` names this point and its n-th passing.

    `$VMRM_CRASH_ONCE` names a file that is created first and must not exist yet, so that of
    many processes one dies, once. With `$VMRM_CRASH_PARENT` set, our parent dies instead.
    """
    if label != _CRASH or next(_crash_count) != int(_crash_nth or 1):
        return
    if once := os.environ.get("VMRM_CRASH_ONCE"):
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return
    os.kill(os.getppid() if "VMRM_CRASH_PARENT" in os.environ else os.getpid(), signal.SIGKILL)


def counted(count: int, thing: str) -> str:
    """Return a number of things for people: 1 entry, 2 entries."""
    many = f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s"
    return f"{count} {thing if count == 1 else many}"


def backoff(tries: int, first: float, longest: float) -> float:
    """Return how long to wait after so many failures in a row: twice as long each time."""
    return min(first * 2.0 ** min(tries - 1, 60), longest)


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # most real-time signals have none
        return signal.Signals(number).name
    return f"signal {number}"


# What has to be installed, by the name that is imported; setup.cfg has it for pip.
PACKAGES = {"sqlite_utils": "sqlite-utils>=4.0", "rich": "rich>=13.7", "fire": "fire>=0.7"}


def need_packages(*names: str) -> None:
    """Raise `MissingPackage` now, before anything is begun, if packages cannot be imported."""
    import importlib.util

    if missing := [PACKAGES[name] for name in names if importlib.util.find_spec(name) is None]:
        lacks = " and ".join(repr(wanted.partition(">")[0]) for wanted in missing)
        raise MissingPackage(
            f"this Python ({sys.executable}) lacks {lacks}",
            f"Install: {shlex.join([sys.executable, '-m', 'pip', 'install', *missing])}",
        )


def own_command(*words: str) -> list[str]:
    """Return the command line that starts this very vmrm anew."""
    # By import, from cached bytecode: a script is compiled anew at every start, which takes a fifth
    # of a second and leaves scattered heap to every fork.
    folder = str(Path(__file__).absolute().parent)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import vmrm; vmrm.console()"
    return [sys.executable, "-P", "-c", code, folder, *words]


def time_to_wait(seconds: float) -> None:
    """Sleep, in commands that have nothing else to attend to."""
    select.poll().poll(math.ceil(max(0.0, seconds) * 1000))


def parse_seconds(text: str) -> float:
    """Return a duration in seconds, given so or with a unit: 90, 0.5, 90s, 5m, 2h, 3d."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    seconds = float(text[:-1]) * unit if unit else float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{text!r} is no duration")
    return seconds


# === processes and locks =========================================================================


def boot_id() -> str:
    """Return this host's boot id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def process_started(pid: int) -> int | None:
    """Return when a process started, in clock ticks after boot, or None if it has ended."""
    try:  # as bytes: a process may have any name
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in b"ZX" else int(fields[19])  # proc(5), field 22


class Process(NamedTuple):
    """A process of this host, so named that no other is ever taken for it.

    Its text, and what the database has of it, is these four words in this order.
    """

    pid: int
    started: int  # clock ticks after boot; 0 if this cannot be seen
    boot: str
    namespace: int  # of its pid: the inode of /proc/self/ns/pid; 0 if /proc shows another one's

    @classmethod
    def of(cls, pid: int | None = None) -> Process:
        """Return the process that has this pid now; without one, this process."""
        here = _this_process(os.getpid())
        if pid in (None, here.pid):
            return here
        if (started := process_started(pid) if here.namespace else 0) is None:
            raise NotFound(f"there is no process {pid}")
        return here._replace(pid=pid, started=started)

    @classmethod
    def parse(cls, text: str) -> Process:
        pid, started, boot, namespace = text.split()
        return cls(int(pid), int(started), boot, int(namespace))

    def __str__(self) -> str:
        return " ".join(map(str, self[:]))

    def is_alive(self) -> bool:
        """Whether it may live; of one in another pid namespace nobody here can say."""
        here = _this_process(os.getpid())
        if self.boot != here.boot:
            return False
        if self.namespace != here.namespace or not here.namespace:
            return True
        return process_started(self.pid) == self.started


@functools.lru_cache(maxsize=1)  # a child has another pid
def _this_process(pid: int) -> Process:
    seen = str(Path("/proc/self").readlink()) == str(pid)
    namespace = Path("/proc/self/ns/pid").stat().st_ino if seen else 0
    return Process(pid, process_started(pid) or 0 if seen else 0, boot_id(), namespace)


LOOK_S = 0.2  # far longer than `is_held` has a lock to see whether it is free


class FileLock:
    """An exclusive flock on a file: this process's until it lets go, or ends.

    The file is created if need be and never removed: a lock on a removed file excludes nobody.
    Each acquisition has a descriptor of its own, so threads exclude each other, too.
    """

    def __init__(self, path: Path, opened: Callable[[], int] | None = None) -> None:
        self.path, self._opened = path, opened or self._open
        self.fd = -1  # while it is ours

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.path, flags, 0o600)

    def try_(self) -> bool:
        """Take the lock if it is free."""
        fd = self._opened()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self.fd = fd
        return True

    def take(self, seconds: float = LOOK_S, nap: Callable[[float], object] | None = None) -> bool:
        """Take the lock within so many seconds, trying again after each nap."""
        deadline = CLOCK.monotonic() + seconds
        while not self.try_():
            if CLOCK.monotonic() >= deadline:
                return False
            (nap or time_to_wait)(min(0.1, seconds / 100))
        return True

    def take_in_turn(self, seconds: float) -> bool:
        """Take the lock within so many seconds, after those who came before us."""
        if self.try_():
            return True
        # Trying again and again would be fair, too, but takes twice as long.
        if had := _LockWaiter.wait(fd := self._opened(), seconds):
            self.fd = fd
        return had

    def release(self) -> None:
        """Let go of the lock, also for a child that has inherited it."""
        if self.fd != -1:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            self.leave()

    def leave(self) -> None:
        """Close our descriptor: a child that has inherited it keeps the lock."""
        fd, self.fd = self.fd, -1
        os.close(fd)

    @contextlib.contextmanager
    def held(self, what: str, hint: str = "") -> Iterator[Self]:
        """Hold the lock for the length of the block, else raise `Conflict`: `what`, and by whom."""
        if not self.take():
            raise Conflict(f"{what}, by {self.holder_name}", hint)
        try:
            yield self
        finally:
            self.release()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Share the lock, for the length of the block, with others who do so."""
        fd = self._opened()
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)

    @property
    def is_held(self) -> bool:
        """Whether anybody holds the lock; the file need not exist and is not made."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:  # shared, so that two who look do not see each other
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    @property
    def holder(self) -> int | None:
        """The pid that took the lock, from /proc/locks; None if nobody did."""
        if not self.is_held:
            return None
        inode = str(self.path.stat().st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                return int(fields[4])
        return None

    @property
    def holder_name(self) -> str:
        """The holder in words."""
        return f"process {pid}" if (pid := self.holder) else "another process"


class _LockWaiter(threading.Thread):
    """A thread that waits for locks in the stead of others, so that they can have a deadline."""

    _idle: ClassVar[list[_LockWaiter]] = []

    def __init__(self) -> None:
        super().__init__(daemon=True, name="vmrm-lock")
        self._wanted: SimpleQueue[tuple[int, threading.Lock, threading.Event] | None]
        self._wanted = SimpleQueue()
        self.start()

    @classmethod
    def wait(cls, fd: int, seconds: float) -> bool:
        """Return whether a flock was had in time; else its descriptor is closed, if late."""
        decided, had = threading.Lock(), threading.Event()  # by whoever takes it first
        try:
            waiter = cls._idle.pop()
        except IndexError:
            waiter = cls()
        waiter._wanted.put((fd, decided, had))
        try:
            had.wait(seconds)
        except BaseException:  # an interrupt must not leave the lock to nobody
            if not decided.acquire(blocking=False):
                os.close(fd)
            raise
        return not decided.acquire(blocking=False)

    @classmethod
    def end_idle(cls) -> None:
        """Have no second thread at a fork, unless it waits in vain for a lock still."""
        with contextlib.suppress(IndexError):  # the last may just end by itself
            while waiter := cls._idle.pop():
                waiter._wanted.put(None)
                waiter.join()

    def run(self) -> None:
        """Take one lock after the other, until there is none; let go of what comes too late."""
        while True:
            try:
                wanted = self._wanted.get(timeout=1)
            except Empty:
                with contextlib.suppress(ValueError):  # else somebody has just chosen us
                    self._idle.remove(self)
                    return
                continue
            if wanted is None:
                return
            fd, decided, had = wanted
            fcntl.flock(fd, fcntl.LOCK_EX)
            in_time = decided.acquire(blocking=False)
            self._idle.append(self)
            if in_time:
                had.set()
            else:
                os.close(fd)


os.register_at_fork(before=_LockWaiter.end_idle, after_in_child=_LockWaiter._idle.clear)


def session_members(session: int, started: int) -> list[int]:
    """Return the pids of a session that began at `started` (clock ticks), zombies left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone, or another user's and hidden from us
            fields = path.read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) == session and fields[0] not in b"ZX":
                found.append((int(path.parent.name), int(fields[19])))
    # Another leader of that number has begun another session; so have members older than it.
    if any(began < started or (pid == session and began != started) for pid, began in found):
        return []
    return [pid for pid, _ in found]


def signal_session(session: int, started: int, number: signal.Signals) -> None:
    """Send a signal to all processes of a session, those being forked meanwhile included."""
    told: set[int] = set()
    for _ in range(8):  # who forks faster than that meets KILL, or the next deadline
        new = set(session_members(session, started)) - told
        if not new:
            return
        for pid in new:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        told |= new


def gated(words: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
    """Start a program, in a session of its own, that runs only once `open_gate` lets it.

    So its pid is on record before it does anything; if we die before, it never runs.
    """
    gate = ["/bin/sh", "-c", 'read -r _ && exec "$@" </dev/null', "sh"]
    return subprocess.Popen(
        [*gate, *words], stdin=subprocess.PIPE, bufsize=0, start_new_session=True, **how
    )


def open_gate(process: subprocess.Popen[bytes]) -> None:
    """Let a program run that waits behind its gate."""
    assert process.stdin
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(b"\n")


def handler_lock(db: Database, ordinal: int) -> FileLock:
    """Return the lock of the handler of the VM with this ordinal."""
    return db.lock(f"handler.{ordinal}")


def live_handlers(db: Database) -> list[str]:
    """Return the names of the VMs whose handler lives in this database's experiment."""
    rows = db.query("SELECT ordinal, server_name FROM vms ORDER BY ordinal")
    return [row.server_name for row in rows if handler_lock(db, row.ordinal).is_held]


def _refuse_while_live(db: Database, what: str) -> None:
    if live := live_handlers(db):
        raise Conflict(
            f"{what} is refused while {counted(len(live), 'handler')} "
            f"{'live' if live[1:] else 'lives'} ({', '.join(live[:3])}"
            f"{', …' if len(live) > 3 else ''})",
            "Stop them first: vmrm stop",
        )


# === database ====================================================================================

NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb3 smbfs 9p ceph glusterfs lustre afs ncpfs fuse.sshfs fuse.glusterfs "
    "fuse.ceph virtiofs gfs2 ocfs2 beegfs orangefs".split()
)


def default_database() -> Path:
    """Return `$VMRM_DB`, else `vmrm/vmrm.db` in the user's state directory (XDG)."""
    if named := os.environ.get("VMRM_DB"):
        return Path(named)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "vmrm" / "vmrm.db"


def _file_system(path: Path) -> str:
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0]
    return ""


# SQLite's error codes for a temporary problem, which is not the statement's fault; and for damage.
_TROUBLE = {
    getattr(sqlite3, f"SQLITE_{what}") for what in "BUSY LOCKED FULL IOERR READONLY".split()
}
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
RESTORE = "Put a copy of vmrm backup in its place, or save what can be read: sqlite3 FILE .recover"


class _TellingTrouble:
    """Raise `Unwritable` for a temporary problem, and `SchemaError` for a damaged file."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, sqlite3.DatabaseError):
            return
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGE:
            raise SchemaError(f"the database is damaged: {error}", RESTORE) from error
        if code in _TROUBLE:
            raise Unwritable(
                f"the database cannot be used now: {error}",
                "Make room on its disk, or see who else has it open; nothing is lost",
            ) from error


class Row(dict[str, Any]):
    """A row of the database: `row["state"]` and `row.state` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Connection(sqlite3.Connection):
    """A connection that notes whom a transaction is to wake: the sockets' names."""

    def set_up(self) -> None:
        """Have every change that somebody waits for note who that is."""
        self.to_wake: set[int | str] = set()
        self.create_function("wake_up", 1, self.to_wake.add)
        self.create_function("whole_seconds_up", 1, math.ceil, deterministic=True)
        self.execute("PRAGMA synchronous = NORMAL")
        self.execute("PRAGMA temp_store = MEMORY")
        for number, line in enumerate(_AWAITED.strip().splitlines()):
            change, who = line.split(" WAKES ")
            trigger = f"CREATE TEMP TRIGGER wakes_{number} AFTER {change}"
            self.execute(f"{trigger} BEGIN SELECT wake_up({who}); END")


SUPERVISOR = "supervisor"  # its lock, and its wake-up socket; those of VMs are their ordinals
KEEPER = "keeper"  # the same
POOL = "pool"  # the keeper, and those who wait for a VM and would be given one now

_POOL = f"iif(EXISTS (SELECT 1 FROM pool_waiters), '{POOL}', '{KEEPER}')"  # noqa: S608 (ours)

# What changes, and the wake-up socket of whom that concerns. The schema's triggers raise the
# revision of a VM with all that its handler must see. A lease of the experiment that ends was taken
# back; a VM in use that is bound otherwise is one less for anybody.
_AWAITED = f"""
UPDATE OF revision ON vms WAKES new.ordinal
UPDATE OF state, finished_at ON vms WAKES '{SUPERVISOR}'
INSERT ON vms WAKES '{SUPERVISOR}'
DELETE ON vms WAKES '{SUPERVISOR}'
UPDATE OF start_at, halt ON experiments WAKES '{SUPERVISOR}'
UPDATE OF answered_at ON requests WAKES 'c-' || new.id
DELETE ON leases WHEN EXISTS (SELECT 1 FROM vms WHERE pool_token = old.token) WAKES '{SUPERVISOR}'
INSERT ON pool_vms WAKES {_POOL}
DELETE ON pool_vms WAKES {_POOL}
UPDATE ON pool_vms WHEN new.state <> 'in_use' WAKES {_POOL}
UPDATE OF bound_to_user ON pool_vms WHEN new.state = 'in_use'
    AND old.bound_to_user IS NOT new.bound_to_user WAKES '{KEEPER}'
INSERT ON pool_groups WAKES {_POOL}
UPDATE ON pool_groups WAKES {_POOL}
INSERT ON pool_waiters WAKES '{KEEPER}'
DELETE ON pool_waiters WAKES {_POOL}
""".replace("\n    ", " ")  # noqa: S608 (ours)

_inherited: list[object] = []  # a parent process's connections, kept from every destructor


class Database:
    """A database file, with a connection for each thread, and the state directory beside it.

    A connection is opened when it is first used, and anew after a fork: none may cross one.

    Args:
        path: The file; None means `default_database()`. It is created with its directory.
        timeouts: Supplies the bound for the writer lock.
        checkpoint: Whether a connection may checkpoint the WAL by itself.
        create: Whether a missing file is created; otherwise it is a `NotFound`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeouts: Timeouts | None = None,
        checkpoint: bool = True,
        create: bool = True,
    ) -> None:
        self.path = Path(path or default_database()).absolute()
        self.state_dir = self.path.with_name(self.path.name + ".d")
        self.timeouts = timeouts or Timeouts.from_environment()
        self._writer_path = self.state_dir / "locks" / "writer"
        self._checkpoint, self._create = checkpoint, create
        self._opened, self._pid = threading.local(), os.getpid()
        self._file: os.stat_result | None = None  # as it was when last seen

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that this process opened; leave a parent's alone."""
        opened, self._opened = self._opened, threading.local()
        if self._pid != os.getpid():
            _inherited.append(opened)
            self._pid = os.getpid()
        elif found := getattr(opened, "connection", None):
            found.close()  # those of other threads end with `opened`

    @property
    def connection(self) -> _Connection:
        """The open connection of this very process and thread: SQLite's cannot be shared."""
        if self._pid != os.getpid():
            self.close()
        found: _Connection | None = getattr(self._opened, "connection", None)
        if found is None or not found.in_transaction:
            self._refuse_another_file()
        if found is None:
            found = self._opened.connection = self._open()
        return found

    def _refuse_another_file(self) -> None:
        """Refuse to go on with a file that is gone from its place: nobody would find the rows."""
        if (before := self._file) is None:
            return
        try:
            now = self.path.stat()
        except FileNotFoundError:
            how = "removed"
        else:
            how = "truncated" if now.st_size < before.st_size else ""
            how = how if os.path.samestat(before, now) else "replaced"
        if how:
            raise SchemaError(f"{str(self.path)!r} was {how} while it was in use", RESTORE)
        self._file = now

    def _open(self) -> _Connection:
        """Connect, see whose file it is, make it ours if it is new or older, then set it up."""
        if not self._create and not (self.path.exists() and self.path.stat().st_size):
            raise NotFound(f"no database at {str(self.path)!r}", "Name it with --db")
        with contextlib.ExitStack() as unless_done:
            try:
                self._make_file()
                patience = self.timeouts.writer
                connection = sqlite3.connect(
                    self.path, isolation_level=None, timeout=patience, factory=_Connection
                )
                unless_done.callback(connection.close)  # who tries again must not run out of them
                connection.row_factory = sqlite3.Row
                with _TellingTrouble():
                    self._make_ours(connection)
                    connection.set_up()
                    if not self._checkpoint:
                        connection.execute("PRAGMA wal_autocheckpoint = 0")
            except (OSError, sqlite3.OperationalError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise UsageError(f"cannot open {str(self.path)!r}: {why}") from error
            unless_done.pop_all()
        self._file = self.path.stat()
        return connection

    def _make_file(self) -> None:
        if self.path.exists() and not self.path.is_file():
            raise UsageError(f"{str(self.path)!r} is not a file", "Name one with --db")
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (kind := _file_system(self.path.parent)) in NETWORK_FILE_SYSTEMS:
            raise UsageError(
                f"{str(self.path)!r} is on a network file system ({kind}), where SQLite's "
                "locks cannot be trusted",
                "Name a file on a local disk with --db",
            )
        # Only ever at its birth: closing a descriptor of a database drops SQLite's locks on it.
        with contextlib.suppress(FileExistsError):
            self.path.touch(0o600, exist_ok=False)

    def _make_ours(self, connection: sqlite3.Connection) -> None:
        """Create or upgrade what can be; nothing is made beside, or in, what is not ours."""
        try:
            found = _identity(connection)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
                raise self._unusable(str(error)) from error
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY or self.state_dir.exists():
                raise
            raise UsageError(f"cannot open {str(self.path)!r}: {error}") from error
        if found != _NEW and found[0] != _IDENTITY[0]:
            raise self._unusable("it is another program's database")
        for name in ("store", "locks", "wake", "requests"):
            self.directory(name)
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        if found[:2] != _IDENTITY or mode != "wal":
            with self._writing():  # two that set the mode at once lock each other out
                connection.execute("PRAGMA journal_mode = WAL")
                found = _identity(connection)  # somebody may have been faster
                if found == _NEW:
                    # Experiments begin after those that have left files here.
                    last = max((n for _, n in run_directories(self.state_dir)), default=0)
                    after = f"INSERT INTO sqlite_sequence VALUES ('experiments', {last});"  # noqa: S608
                    schema = _schema() + (after if last else "")
                    connection.executescript(f"BEGIN IMMEDIATE; {schema} COMMIT;")
                elif found[1] == OLDEST_VERSION:
                    self._upgrade(connection)
                found = _identity(connection)
        if found[:2] != _IDENTITY:
            why = f"it has schema version {found[1]}, this vmrm wants {_IDENTITY[1]}"
            raise self._unusable(why)

    def _unusable(self, why: str) -> SchemaError:
        hint = "Name another file with --db, or move this one away"
        return SchemaError(f"{str(self.path)!r} is not usable: {why}", hint)

    def _upgrade(self, connection: sqlite3.Connection) -> None:
        """Bring an older database to this schema: a copy beside it, then one transaction."""
        for path in sorted(self.directory("locks").iterdir()):
            pid = FileLock(path).holder if path.name != "writer" else None
            if pid not in (None, os.getpid()):
                raise Conflict(
                    f"{str(self.path)!r} is of schema version {OLDEST_VERSION}, and process {pid} "
                    "of an older vmrm works with it",
                    f"End that process first: kill {pid}",
                )
        kept = self.path.with_name(f"{self.path.name}.v{OLDEST_VERSION}")
        half = kept.with_name(f"{kept.name}.part")
        half.unlink(missing_ok=True)  # of an upgrade that was killed
        try:
            half.touch(0o600, exist_ok=False)
            copy_database(connection, half)
            half.rename(kept)
        finally:
            half.unlink(missing_ok=True)
        _crash("upgrade-copied")
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            _conform(connection)
            _take_steps(connection)
            # Output gets its experiment's number, as later versions have it: last of all, for after
            # a kill in between there is nothing left to move.
            now = connection.execute("SELECT id FROM experiments WHERE destroyed_at IS NULL")
            number = now.fetchone()
            for path in (self.state_dir / kind for kind in RUN_DIRECTORIES):
                with contextlib.suppress(OSError):
                    path.rmdir()  # most are empty where no experiment has run
                if number and path.exists():
                    path.rename(f"{path}.{number[0]}")
            _crash("upgrade-before-commit")
            connection.execute("COMMIT")
        _crash("upgrade-committed")
        _log.warning("upgraded %s to version %d; a copy of it is %s", self.path, _IDENTITY[1], kept)

    def directory(self, *parts: str) -> Path:
        """Return a directory inside the state directory, made private to the user if missing."""
        path = self.state_dir
        for part in ("", *parts):  # mkdir's own way of making parents ignores the mode
            path = path / part
            path.mkdir(exist_ok=True, mode=0o700)
        return path

    def lock(self, name: str) -> FileLock:
        """Return the lock `locks/<name>` of this database."""
        return FileLock(self.directory("locks") / name)

    # --- reading and writing

    def query(self, sql: str, **parameters: object) -> list[Row]:
        """Return all rows of one statement; it belongs to the open transaction, if there is one."""
        with _TellingTrouble():
            found = self.connection.execute(sql, parameters)
            names = [column[0] for column in found.description or ()]
            return [Row(zip(names, row, strict=True)) for row in found.fetchall()]

    def row(self, sql: str, **parameters: object) -> Row | None:
        """Return the first row, or None if there is none."""
        rows = self.query(sql, **parameters)
        return rows[0] if rows else None

    def value(self, sql: str, **parameters: object) -> Any:
        """Return the first column of the first row, or None if there is none."""
        with _TellingTrouble():
            row = self.connection.execute(sql, parameters).fetchone()
        return row[0] if row else None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the one writer: SQLite's own busy handler starves some for seconds."""
        lock = FileLock(self._writer_path)
        if not lock.take_in_turn(self.timeouts.writer):
            raise Busy(
                f"the database was kept busy for {self.timeouts.writer:g} s by {lock.holder_name}",
                "Try again, or look at what that process does",
            )
        try:
            with _TellingTrouble():
                yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[Self]:
        """Run the block as one write transaction; then wake who waits for what it has changed.

        With `durable` its commit survives a power cut of the host, and not just kill -9.
        """
        connection = self.connection
        connection.to_wake.clear()
        with self._writing():
            if durable:
                connection.execute("PRAGMA synchronous = FULL")
            try:
                connection.execute("BEGIN IMMEDIATE")
                with connection:  # which leaves nothing behind if this raises
                    yield self
                    connection.execute("COMMIT")
            finally:
                if durable:
                    connection.execute("PRAGMA synchronous = NORMAL")
        wake(self, *connection.to_wake)

    def write(self, sql: str, *, durable: bool = False, **parameters: object) -> list[Row]:
        """Run a writing statement, in the open transaction or its own; return what it RETURNs."""
        if self.connection.in_transaction:
            assert not durable, "its transaction would have to be"
            return self.query(sql, **parameters)
        with self.transaction(durable=durable):
            return self.query(sql, **parameters)

    def upsert(self, table: str, *keys: str, **values: Any) -> Row:
        """Add a row of these values, or set them in the one that has the same keys; return it."""
        names, places = ", ".join(f'"{name}"' for name in values), ", :".join(values)
        sql = f'INSERT INTO "{table}" ({names}) VALUES (:{places})'  # noqa: S608 (our own names)
        if keys:
            sets = [f'"{name}" = excluded."{name}"' for name in values if name not in keys]
            conflict = ", ".join(f'"{key}"' for key in keys)
            sql += f" ON CONFLICT ({conflict}) DO UPDATE SET {', '.join(sets)}"
        return self.write(f"{sql} RETURNING *", **values)[0]

    insert = upsert  # of a row that must be new, without keys

    def update(self, table: str, where: Mapping[str, Any], **values: Any) -> list[Row]:
        """Set these values in all rows that have those others; return these rows."""
        sets = ", ".join(f'"{name}" = :{name}' for name in values)
        match = " AND ".join(f'"{name}" IS :where_{name}' for name in where)
        wanted = {f"where_{name}": value for name, value in where.items()}
        sql = f'UPDATE "{table}" SET {sets} WHERE {match} RETURNING *'  # noqa: S608 (our names)
        return self.write(sql, **values, **wanted)

    def data_version(self) -> int:
        """Return a number that differs from the last one if another connection committed."""
        return cast(int, self.value("PRAGMA data_version"))

    def checkpoint(self, truncate: bool = False) -> None:
        """Move what the WAL holds into the database file; with `truncate`, empty the WAL too."""
        with self._writing() if truncate else contextlib.nullcontext():
            self.query(f"PRAGMA wal_checkpoint({'TRUNCATE' if truncate else 'PASSIVE'})")

    @property
    def utils(self) -> sqlite_utils.Database:
        """This connection as a `sqlite_utils.Database`; write with it inside `transaction`."""
        need_packages("sqlite_utils")
        from sqlite_utils import Database as Utils

        return Utils(self.connection, execute_plugins=False)


def _schema() -> str:
    return Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")


_IDENTITY = (1986884205, 3)  # application_id and user_version, as schema.sql sets them
_NEW = (0, 0, True)  # the identity of a database that nobody has used


def _identity(connection: sqlite3.Connection) -> tuple[int, int, bool]:
    sql = """SELECT application_id, user_version, NOT EXISTS (SELECT 1 FROM sqlite_schema)
             FROM pragma_application_id, pragma_user_version"""
    application, version, is_empty = connection.execute(sql).fetchone()
    return application, version, bool(is_empty)


# <kind>.<experiment> holds what an experiment leaves: nothing is ever moved, or mixed.
RUN_DIRECTORIES = ("logs", "transfers")
_RUN_DIRECTORY = re.compile(rf"(?:{'|'.join(RUN_DIRECTORIES)})\.(\d+)|(\d+)-.*")


def run_directories(state_dir: Path) -> list[tuple[Path, int]]:
    """Return the directories that experiments have left, each with the experiment's number."""
    listed = sorted([*state_dir.glob("*"), *state_dir.glob("host/*")])
    matches = [(path, _RUN_DIRECTORY.fullmatch(path.name)) for path in listed]
    return [(path, int(match[1] or match[2])) for path, match in matches if match]


OLDEST_VERSION = 2  # of the schema that can be upgraded
_WHOLE = "{0}_pid || ' ' || {0}_started || ' ' || {0}_boot || ' ' || {1}"  # its text of a process
_HOLDER = _WHOLE.format("holder", "holder_namespace")


def _spelt_otherwise() -> dict[str, dict[str, str]]:
    # No process of that older vmrm lives any more: where it had a pid alone, that will do.
    boot, here = Process.of()[2:]
    return {
        "pool_vms": {"hook_process": _WHOLE.format("hook", here)},
        "pool_waiters": {"holder": _HOLDER},
        "requests": {"claimed_by": f"claimed_by || ' 0 {boot} {here}'"},
        "vms": {"handler": f"handler_pid || ' 0 {boot} {here}'"},
    }


def _conform(connection: sqlite3.Connection) -> None:
    """Make an older database's tables anew, with their rows, and all else of schema.sql.

    So a change that only adds, drops or constrains a column needs nothing but schema.sql. The older
    tables stay for the steps after that, as "old NAME".
    """
    listed = """SELECT name, type, sql FROM sqlite_schema WHERE sql IS NOT NULL
                AND name NOT LIKE 'sqlite_%' ORDER BY type <> 'table', rowid"""
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        model.executescript(_schema())
        wanted = model.execute(listed).fetchall()
    for name, kind, _ in connection.execute(listed).fetchall()[::-1]:
        changed = f'RENAME TO "old {name}"' if kind == "table" else ""
        connection.execute(f'{"ALTER" if changed else "DROP"} {kind} "{name}" {changed}')
    otherwise = _spelt_otherwise()
    for name, kind, sql in wanted:  # tables first: no trigger must see the rows come
        connection.execute(sql)
        new, old = (
            {row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')}
            for table in (name, f"old {name}")
        )
        if kind == "table" and old:
            taken = {column: f'"{column}"' for column in new & old} | otherwise.get(name, {})
            names, values = (", ".join(f'"{n}"' for n in taken)), ", ".join(taken.values())
            take = f'INSERT INTO "{name}" ({names}) SELECT {values} FROM "old {name}"'  # noqa: S608
            connection.execute(take)
    for sql in (  # numbers that are never used again
        "DELETE FROM sqlite_sequence WHERE 'old ' || name IN (SELECT name FROM sqlite_sequence)",
        "UPDATE sqlite_sequence SET name = substr(name, 5) WHERE name LIKE 'old %'",
    ):
        connection.execute(sql)


def _take_steps(connection: sqlite3.Connection) -> None:
    need_packages("sqlite_utils")
    from sqlite_utils import Database as Utils
    from sqlite_utils import Migrations

    steps = Migrations("vmrm")

    @steps()
    def version_3(db: Utils) -> None:
        """Write leases down, tell machines apart, name each attempt's directory in the guest."""
        db.execute(
            f"""INSERT INTO leases SELECT vm_name, token, {_HOLDER}, acquired_at, lease_end_at,
                    task_id, build_id, chroot FROM "old pool_vms" WHERE token IS NOT NULL"""  # noqa: S608
        )
        for vm in with_addresses(db.query("SELECT server_name, path, pool FROM vms")):
            db.execute("UPDATE vms SET address = :address WHERE server_name = :server_name", vm)
        _find_twins(db.conn)
        db.execute("UPDATE attempts SET claim = 'attempt.' || attempt")
        for row in db.query("SELECT rowid, value FROM pool_info WHERE key = 'keeper.listed'"):
            if (found := json.loads(row["value"])).get("hook"):
                found["hook"] = " ".join(map(str, [*found["hook"], Process.of().namespace]))
                row["value"] = json.dumps(found)
                db.execute("UPDATE pool_info SET value = :value WHERE rowid = :rowid", row)

    steps.apply(Utils(connection, execute_plugins=False))
    old = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE 'old %'"
    for (name,) in connection.execute(old).fetchall():
        connection.execute(f'DROP TABLE "{name}"')
    connection.execute(f"PRAGMA user_version = {_IDENTITY[1]}")


def copy_database(source: sqlite3.Connection, copy: Path) -> None:
    """Copy a database, which may be in use, and read the copy back."""
    with contextlib.closing(sqlite3.connect(copy)) as target, _TellingTrouble():
        source.backup(target)
        refuse_damaged(target)


def refuse_damaged(connection: sqlite3.Connection) -> None:
    """Read all of a database; raise `SchemaError` if anything in it is not as it must be."""
    with _TellingTrouble():
        faults = [row[0] for row in connection.execute("PRAGMA integrity_check(10)")]
    if faults != ["ok"]:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        told = " ".join(faults[0].split())
        raise SchemaError(f"the database is damaged: {told}{more}", RESTORE)


# What the reference's classes take: the database's path, an open one, or None for the default one.
_AnyDatabase = Database | str | os.PathLike[str] | None
_Logger = logging.Logger | None


def _database(db: _AnyDatabase) -> Database:
    return db if isinstance(db, Database) else Database(db)


class _Rows:
    """What the reference's database classes share: one database, opened here or borrowed."""

    def __init__(self, db: _AnyDatabase) -> None:
        self._borrowed, self.db = isinstance(db, Database), _database(db)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database connection, unless it was borrowed."""
        if not self._borrowed:
            self.db.close()


def checkpoint_wal(db: Database) -> None:
    """Move the WAL into the database file; empty it if it is big, but not near a start time."""
    wal = Path(f"{db.path}-wal")
    big = wal.exists() and wal.stat().st_size > 16 << 20
    start = db.value("SELECT start_at FROM current_experiment")
    near = start is not None and abs(start - CLOCK.wall()) < 2
    db.checkpoint(truncate=big and not near)


# --- waking up


_Datagrams = functools.partial(
    socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
)


class WakeSocket(socket.socket):
    """A datagram socket `wake/<ordinal>`: a byte on it means "look at the database again"."""

    def __init__(self, db: Database, name: int | str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._path = db.directory("wake") / str(name)
        self._path.unlink(missing_ok=True)
        with drivers.short_path(self._path) as target:
            self.bind(target)

    def drain(self) -> None:
        """Forget all bytes that came; one look at the database answers them all."""
        with contextlib.suppress(BlockingIOError):
            while self.recv(64):
                pass

    def close(self) -> None:
        """Close the socket and remove its path."""
        super().close()
        self._path.unlink(missing_ok=True)


def dead_sockets(db: Database) -> list[Path]:
    """Return the wake-up sockets of processes that were killed."""
    found = []
    for path in sorted(db.directory("wake").iterdir()):
        with _Datagrams() as probe:
            try:
                with drivers.short_path(path) as target:
                    probe.connect(target)
            except ConnectionRefusedError:
                found.append(path)
            except OSError:  # it has just been closed
                continue
    return found


def remove_dead_sockets(db: Database) -> None:
    """Remove them, but none that somebody is binding anew: who may do so has its lock."""
    for path in dead_sockets(db):
        if "-" in path.name:  # a command's or a waiter's, whose name nobody has again
            path.unlink(missing_ok=True)
        elif (lock := db.lock(f"handler.{path.name}" if path.name.isdigit() else path.name)).try_():
            path.unlink(missing_ok=True)
            lock.release()


def wake(db: Database, *names: int | str) -> None:
    """Send a byte to each named wake-up socket; nobody listening is no error."""
    sockets = {*map(str, names)}
    if POOL in sockets:
        sockets = sockets - {POOL} | {KEEPER}
        with contextlib.suppress(Unavailable):  # what we tell of is done
            sockets |= {f"wait-{token}" for token in Leases(db).next_in_queue()}
    folder = f"{db.state_dir}/wake"  # (a Path takes longer than to look whether somebody listens)
    for path in filter(os.path.exists, [f"{folder}/{name}" for name in sockets]):
        with contextlib.suppress(OSError), drivers.short_path(path) as to, _Datagrams() as sender:
            sender.sendto(b"w", to)


class Seat(contextlib.ExitStack):
    """The place of the one process that runs a database's experiment, or that keeps its pool.

    Its lock keeps others out. Its wait ends with a wake-up, a signal, or what else is waited for:
    signals are acted upon in the loop, never in the middle of a transaction.
    """

    def __init__(
        self, db: Database, name: str, what: str, hint: str, *stops: signal.Signals
    ) -> None:
        super().__init__()
        self.told_to_stop, self._stops = False, stops
        with contextlib.ExitStack() as stack:
            stack.enter_context(db.lock(name).held(what, hint))
            self._wake = WakeSocket(db, name)
            stack.callback(self._wake.close)
            self._signals, sent = (stack.enter_context(end) for end in socket.socketpair())
            self._signals.setblocking(False)
            sent.setblocking(False)
            before = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
            stack.callback(signal.set_wakeup_fd, before)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                stack.callback(signal.signal, number, signal.signal(number, self._note))
            self.push(stack.pop_all())

    def _note(self, number: int, _: object) -> None:  # ignored, programs would inherit that
        self.told_to_stop |= number in self._stops

    def wait(self, seconds: float, *descriptors: int) -> set[int]:
        """Wait for so long, but not past a wake-up; return which descriptors have something."""
        poll = select.poll()
        for descriptor in (self._wake.fileno(), self._signals.fileno(), *descriptors):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(math.ceil(max(0.0, seconds) * 1000))}
        self.drain()
        return ready

    def drain(self) -> None:
        """Forget all wake-ups until now: the rows are looked at next."""
        self._wake.drain()
        with contextlib.suppress(BlockingIOError):
            while self._signals.recv(4096):
                pass


# === the experiment, its barrier and its VMs =====================================================


def _utc(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(int(seconds), UTC)


def current_experiment(db: Database) -> Row:
    """Return the current experiment's row, making one if there is none yet."""
    sql = "SELECT * FROM current_experiment"
    if found := db.row(sql):
        return found
    made = "INSERT INTO experiments (created_at) VALUES (:now) ON CONFLICT DO NOTHING"
    db.write(made, now=CLOCK.wall())  # somebody may have been faster
    return db.query(sql)[0]


def run_directory(db: Database, kind: str, *parts: str) -> Path:
    """Return a directory below one of `RUN_DIRECTORIES` of this experiment, made if missing."""
    return db.directory(f"{kind}.{current_experiment(db).id}", *parts)


@contextlib.contextmanager
def _changing_vms(db: Database) -> Iterator[Database]:
    """Open a durable transaction that ends with the barrier.

    Whatever changes a VM's state, adds or removes a VM, launches, or changes on_failure does so in
    one; so the two decisions, to start and to abort, can be neither missed nor made twice.
    """
    with db.transaction(durable=True):
        current_experiment(db)
        yield db
        _set_start(db, "id IN (SELECT id FROM barrier WHERE is_open)")
        db.write(
            """UPDATE experiments SET halt = 'abort'
               WHERE destroyed_at IS NULL AND launched_at IS NOT NULL AND start_at IS NULL
                 AND halt IS NULL AND on_failure = 'abort'
                 AND EXISTS (SELECT 1 FROM vms WHERE state = 'failed')"""
        )


def _set_start(db: Database, where: str) -> None:
    """Set the start time, once, rounded up to a whole second: the reference's resolution."""
    db.write(
        f"""UPDATE experiments SET start_at = whole_seconds_up(:now + start_buffer_s)
            WHERE destroyed_at IS NULL AND start_at IS NULL AND {where}""",  # noqa: S608
        now=CLOCK.wall(),
    )


# A VM's values: whether one will do, what it must be, and its default; SQLite would turn a number
# into a text. Without a default it must be given.
_VM_VALUES: dict[str, tuple[Callable[[object], bool], str, Any]] = {
    "server_uuid": (_is_text, "a text", None),
    "server_name": (_is_text, "a text", None),
    "state": (_is_text, "a text", VMState.UNINITIALIZED.value),
    "current_time": (_is_word, "a text", ""),
    "control_ip": (_is_word, "a text", ""),
    "path": (_is_word, "a text", ""),
    "engine": (_is_text, "a text", "QemuVM"),
    "launch_dir": (_is_word, "a text", ""),
    "pool": (_is_word, "a text", ""),
    "agent_timeout_s": (_is_positive, "a positive number of seconds", 300.0),
    "set_time": (_is_switch, "true or false", True),
}
VM_COLUMNS = [*_VM_VALUES][:8]  # what the reference has of a VM


def _checked_time(value: object) -> str:
    with contextlib.suppress(ValueError, TypeError):
        if not isinstance(value, bool | bytes) and not math.isnan(float(cast(Any, value))):
            return str(value)
    raise WrongValue(f"time {value!r} is not a number of seconds")


class _Served(_Rows):
    """What had a server in the reference: here, `hostname` and `port` mean nothing."""

    def __init__(self, hostname: str = "", port: int = 50051, db: _AnyDatabase = None) -> None:
        super().__init__(db)

    def __del__(self) -> None:
        """Close the database connection."""
        with contextlib.suppress(Exception):
            self.close()


class VMMapping(_Served):
    """The VMs of the experiment: uuid, name, state, schedule time, address."""

    @staticmethod
    def prepare_put(entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return a complete entry: server_uuid, server_name, and defaults for what is left out."""
        if not isinstance(entry, Mapping):
            raise WrongValue(f"a VM is a dictionary of its values, and not {entry!r}")
        for key in ("server_uuid", "server_name"):
            if not entry.get(key):
                raise WrongValue(f"a VM needs a {key}: {dict(entry)!r}")
        checked_name("VM", entry["server_name"])
        complete = {key: default for key, (_, _, default) in _VM_VALUES.items()} | dict(entry)
        complete["state"] = checked_word("VM state", complete["state"], VMState).value
        if complete["current_time"] != "":
            complete["current_time"] = _checked_time(complete["current_time"])
        if faults := _sound(complete, _VM_VALUES, f"VM {entry['server_name']!r}")[1]:
            raise WrongValue(faults[0])
        return complete

    def put(
        self,
        server_uuid: str,
        server_name: str,
        state: str = "uninitialized",
        current_time: str = "",
        server_address: str = "",
        *,
        path: str = "",
        engine: str = "QemuVM",
        launch_dir: str = "",
    ) -> None:
        """Add a VM, or replace the one with this uuid.

        Args:
            current_time: The schedule time it has reached; '' if not contacted yet.
            server_address: Its control IP.
            path: The guest agent's address: a socket's path, tcp:HOST:PORT or vsock:CID:PORT.
            launch_dir: Where in the guest our files go; '' for the driver's default.
        """
        given = (server_uuid, server_name, state, current_time, server_address, path)
        self.batch_put([dict(zip(VM_COLUMNS, (*given, engine, launch_dir), strict=True))])

    def batch_put(self, server_list: Iterable[Mapping[str, Any]]) -> None:
        """Add many VMs, as `prepare_put` takes them: all of them or, on any error, none."""
        entries = with_addresses(map(self.prepare_put, server_list))
        with _changing_vms(self.db):
            _insert_vms(self.db, entries)

    def get(self, server_uuid: str | None = None) -> dict[str, Any]:
        """Return one VM as a dictionary; `NotFound` if none has this uuid."""
        if not server_uuid:
            raise WrongValue("server_uuid is required")
        if found := self._rows("WHERE server_uuid = :uuid", uuid=server_uuid):
            return found[0]
        raise NotFound(f"no VM {server_uuid!r}", "See which there are: vmrm status")

    def get_all(
        self,
        filter_time: int | None = None,
        filter_state: str | None = None,
        project_dict: Mapping[str, object] | None = None,
        length: bool = False,
    ) -> list[dict[str, Any]] | int:
        """Return the VMs, in the order they were added.

        Args:
            project_dict: Only these keys of each VM (those whose value is true).
            length: Whether to return the number of VMs instead of the list.
        """
        if filter_state is not None:
            checked_word("VM state", filter_state, VMState)
        for key in project_dict or ():
            if key not in VM_COLUMNS:
                raise WrongValue(unknown_key(key, VM_COLUMNS))
        rows = self._rows("WHERE :state IS NULL OR state = :state", state=filter_state)
        if filter_time is not None:
            at = float(_checked_time(filter_time))
            rows = [row for row in rows if row["current_time"] and float(row["current_time"]) == at]
        if length:
            return len(rows)
        wanted = {key for key in VM_COLUMNS if project_dict is None or project_dict.get(key)}
        return [{key: row[key] for key in row if key in wanted} for row in rows]

    def get_count_vm_not_ready(self) -> int:
        """Return how many VMs are in another state than configured and n/a."""
        sql = "SELECT count(*) FROM vms WHERE state NOT IN ('configured', 'n/a')"
        return cast(int, self.db.value(sql))

    def set_vm_state_by_uuid(self, uuid: str, state: str, *, reason: str = "") -> dict[str, Any]:
        """Move a VM to a state, and return it; the present one again is no move and no error."""
        with _changing_vms(self.db):
            move_vm(self.db, self.get(uuid)["server_name"], state, reason)
            return self.get(uuid)

    def set_vm_time_by_uuid(self, uuid: str, time: str) -> dict[str, Any]:
        """Record the schedule time that a VM has reached; return the VM as `get` does."""
        self.db.update("vms", {"server_uuid": uuid}, current_time=_checked_time(time))
        return self.get(uuid)

    def destroy_one(self, server_uuid: str) -> None:
        """Remove one VM; one that is not there is no error, a live handler is a `Conflict`."""
        _refuse_while_live(self.db, "removing a VM")
        with _changing_vms(self.db):
            self.db.write("DELETE FROM vms WHERE server_uuid = :uuid", uuid=server_uuid)

    def destroy_all(self) -> None:
        """Remove all VMs; a live handler is a `Conflict`."""
        _refuse_while_live(self.db, "removing all VMs")
        self.db.write("DELETE FROM vms", durable=True)

    def _rows(self, where: str, **parameters: object) -> list[Row]:
        columns = ", ".join(f'"{column}"' for column in VM_COLUMNS)
        sql = f"SELECT {columns} FROM vms {where} ORDER BY ordinal"  # noqa: S608 (our own text)
        return self.db.query(sql, **parameters)


def _insert_vms(db: Database, entries: Iterable[Mapping[str, Any]]) -> None:
    for entry in entries:
        _refuse_pool_machine(db, entry)
        try:
            db.upsert("vms", "server_uuid", **entry, state_at=CLOCK.wall(), reason="")
        except sqlite3.IntegrityError as error:
            name = entry["server_name"]
            raise WrongValue(f"VM {name!r} cannot be added, is the name taken? {error}") from error


def move_vm(db: Database, server_name: str, state: str, reason: str) -> None:
    """Move one VM inside the caller's transaction, which `_changing_vms` opened."""
    old = db.value("SELECT state FROM vms WHERE server_name = :name", name=server_name)
    if old is None:
        raise NotFound(f"no VM {server_name!r}")
    target = checked_move(old, state)
    if target != old or reason:  # else it stays, with its reason and the time since when
        now, reason = CLOCK.wall(), printable(reason)
        where = {"server_name": server_name}
        db.update("vms", where, state=target.value, state_at=now, reason=reason)


class ExperimentStart(_Served):
    """When the experiment was launched and when its time 0 is."""

    def add_start_time(self) -> datetime:
        """Set time 0 to now plus the start buffer, unless it is set; return the one that stands."""
        with self.db.transaction(durable=True):
            current_experiment(self.db)
            _set_start(self.db, "TRUE")
        return cast(datetime, self.get_start_time())

    def clear_start_time(self) -> dict[str, Any]:
        """Forget time 0, until one is added or the next launch; a live handler is a `Conflict`."""
        _refuse_while_live(self.db, "clearing the start time")
        with self.db.transaction(durable=True):
            self.db.update("experiments", {"destroyed_at": None}, start_at=None, start_cleared=1)
        return {"start_time": None}

    def get_start_time(self) -> datetime | None:
        """Return time 0 in UTC, or None if it is not set yet."""
        return _utc(self.db.value("SELECT start_at FROM current_experiment"))

    def set_launch_time(self) -> datetime:
        """Set the experiment's launch time to now; return it in UTC, whole seconds."""
        with _changing_vms(self.db):
            now = math.floor(CLOCK.wall())
            self.db.update("experiments", {"destroyed_at": None}, launched_at=now, start_cleared=0)
        return cast(datetime, self.get_launch_time())

    def get_launch_time(self) -> datetime | None:
        """Return when the experiment was launched, in UTC, or None if it was not."""
        return _utc(self.db.value("SELECT launched_at FROM current_experiment"))

    def get_time_since_start(self) -> int | None:
        """Return whole seconds since time 0, or None if time 0 has not come yet."""
        start, now = self.db.value("SELECT start_at FROM current_experiment"), CLOCK.wall()
        return None if start is None or start > now else int(now - start)

    def get_time_to_start(self) -> int | None:
        """Return whole seconds from launch to time 0, or None if time 0 is not set yet."""
        start, launch = self.get_start_time(), self.get_launch_time()
        return int((start - launch).total_seconds()) if start and launch else None


def destroy_experiment(db: Database, *, purge: bool = False) -> None:
    """End the current experiment: VMs, schedules, times and requests go.

    The journal, logs and transfers stay under the old experiment's number, unless they are purged.
    Files go once no row names them, so that `check` finds whatever a kill leaves.
    """
    _refuse_while_live(db, "destroying the experiment")
    tie_up(db)  # what lies where only the schedules say cannot be found afterwards
    old = current_experiment(db)["id"]
    with db.transaction(durable=True):
        give_back(db)
        db.write("DELETE FROM vms")
        db.write("DELETE FROM requests")
        db.write("UPDATE schedules SET text = NULL, generation = generation + 1")
        for table in ("attempts", "holds", "history", "past_schedules") if purge else ():
            db.write(f"DELETE FROM {table} WHERE experiment_id = :id", id=old)  # noqa: S608
        db.update("experiments", {"id": old}, destroyed_at=CLOCK.wall(), purged=purge)
    _crash("destroyed")
    tie_up(db)


def with_addresses(vms: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return VMs of an experiment with the address of each one's own path, as it leads now."""
    return [{**vm, "address": "" if vm["pool"] else machine_address(vm["path"])} for vm in vms]


def handler_config(db: Database, server_name: str) -> dict[str, Any]:
    """Return a VM's row as the configuration that `VMResourceHandler` takes."""
    row = db.row(
        """SELECT server_name AS vm_name, server_uuid AS vm_uuid, ordinal, path, engine, control_ip,
               launch_dir, agent_timeout_s AS agent_timeout, set_time, pool, pool_token
           FROM vms WHERE server_name = :name""",
        name=server_name,
    )
    if row is None:
        raise NotFound(f"no VM {server_name!r}", "See which there are: vmrm status")
    pool, token = row.pop("pool"), row.pop("pool_token")
    if pool and (not token or row["vm_name"] in lost_vms(db)):
        fault = f"VM {server_name!r} has no machine of the pool now"
        raise UsageError(fault, "See the pool: vmrm pool info")
    if not row["path"]:
        fault = f"VM {server_name!r} has no path to a guest agent"
        raise UsageError(fault, "Give it one: path = …, by add_vm")
    return {**row, "db": db}


# === entries and schedules =======================================================================

_SWITCH = (_is_switch, "true or false")
# What an entry may say. Experiment files, ScheduleDb texts and ScheduleEntry all speak this.
ENTRY_KEYS: _Keys = {
    "start_time": (_is_time, "a number of seconds"),
    "executable": (_is_text, "a program's name"),
    "arguments": (_is_arguments, "a list of strings, or one string for the guest's shell"),
    "env": (_is_environment, "a table of NAME = string"),
    "cwd": (_is_text, "a directory in the guest"),
    "user": (_is_user, "a user's name"),
    "timeout": (_is_positive, "a positive number of seconds"),
    "pause": (_is_duration, "a positive number of seconds, or inf"),
    **dict.fromkeys(["wait", "ignore_failure", "rerun", "on_host", "resume"], _SWITCH),
    **dict.fromkeys(["file", "content", "transfer"], (_is_list, "a list of tables")),
}
# What these tables may say.
_PLACED: _Keys = {"location": (_is_text, "a path in the guest"), "executable": _SWITCH}
DATA_KEYS: dict[str, _Keys] = {
    "file": _PLACED
    | {
        "filename": (_is_text, "a file's name"),
        "sha256": (lambda value: isinstance(value, str) and len(value) == 64, "a SHA-256"),
    },
    "content": _PLACED | {"content": (_is_content, "a string")},
    "transfer": {
        "location": (_is_text, "a path in the guest"),
        "interval": (_is_positive, "a positive number of seconds"),
        "destination": (_is_text, "a directory on the host"),
    },
}
# By these keys an item of `ScheduleEntry.data` is known to be of a kind; and what it has if it does
# not say so. In a schedule's text, a transfer without interval is made once.
_MARKS = {"file": "filename", "content": "content", "transfer": "interval", "pause": "pause"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "file": {"executable": False},
    "content": {"executable": False},
    "transfer": {"interval": None, "destination": None},
}


def unknown_key(key: object, known: Iterable[str]) -> str:
    """Return one line about an unknown key, with the nearest known one."""
    import difflib

    near = difflib.get_close_matches(str(key), list(known), 1)
    return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "")


def _sound(
    item: object, keys: Mapping[str, tuple[Any, ...]], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Return what of a table is known and of the right kind, and what is wrong with the rest."""
    if not isinstance(item, dict):
        return {}, [f"{where}: {item!r} is not a table of key = value"]
    sound, faults = {}, []
    for key, value in item.items():
        if key not in keys:
            faults.append(f"{where}: {unknown_key(key, keys)}")
        elif keys[key][0](value):
            sound[key] = value
        else:
            told = repr(value)
            told = told if len(told) <= 200 else f"{told[:200]}…"
            faults.append(f"{where}: {key} is {told}, but must be {keys[key][1]}")
    return sound, faults


def entry_faults(item: object, where: str) -> list[str]:
    """Return all that is wrong with an entry as a table, infinities being floats, a line each."""
    sound, faults = _sound(item, ENTRY_KEYS, where)
    if not isinstance(item, dict):
        return faults
    for kind in DATA_KEYS:
        wrong = [f for part in sound.get(kind, []) for f in _part_faults(kind, part, where)]
        faults += wrong
        if wrong:
            del sound[kind]
    return faults + [f"{where}: {fault}" for fault in _entry_sense(sound, item.keys())]


def _part_faults(kind: str, part: object, where: str) -> list[str]:
    where = f"{where}, {kind}"
    missing = {"location", _MARKS[kind]} - {"interval", *(part if isinstance(part, dict) else ())}
    faults = _sound(part, DATA_KEYS[kind], where)[1]
    return faults + [f"{where}: {key} is missing" for key in sorted(missing)]


# What our script keeps in an entry's directory.
_OUR_OWN = re.compile(
    r"(?i)(call_(arguments|program)\.(sh|bat)|attempt\.[0-9]+(\.[0-9]+-[0-9a-f]{8})?)(/|$)"
)


def _entry_sense(item: Mapping[str, Any], given: Collection[str]) -> Iterator[str]:
    """Yield what makes no sense among the sound keys of an entry, `given` being all its keys."""
    at, pause, resume = item.get("start_time", math.nan), "pause" in given, item.get("resume")
    if "start_time" not in given:
        yield "start_time is missing"
    if math.isinf(at) and not (pause and at < 0):
        yield f"start_time {at} is only for a pause, and only negative"
    if at == 0 and not pause:
        yield "start_time 0 is the barrier itself; use a negative or a positive time"
    if pause and at < 0 and not math.isinf(at):
        yield "a pause in negative time must be at -inf, before the first entry"
    work = [key for key in ("executable", *DATA_KEYS) if key in given and item.get(key, True)]
    if (pause or resume) and work:
        yield f"a pause or resume cannot also have {work[0]!r}"
    if not (work or pause or resume) and item.keys() == given:
        yield "it does nothing: give executable, file, content, transfer, pause or resume"
    if resume and at < 0:
        yield "a resume must be at a positive time; vmrm resume ends a break at -inf"
    for part in [*item.get("file", []), *item.get("content", [])]:
        if _OUR_OWN.match(os.path.normpath(part["location"].replace("\\", "/"))):
            yield f"location {part['location']!r} is that of vmrm's own files"
    if "executable" not in given:
        for key in sorted(item.keys() & {"arguments", "env", "cwd", "user", "timeout"}):
            yield f"{key} needs an executable"
    if item.get("on_host"):
        program = item.get("executable", "")
        for key in sorted(item.keys() & {"user", *DATA_KEYS}):
            yield f"an on_host entry runs a program and cannot have {key!r}"
        if not program.startswith("/") and not NAME_PATTERN.fullmatch(program):
            yield "on_host needs an executable: an absolute path, or the name of a stored file"


def _with_infinities(item: Any) -> Any:
    """Return an entry with start time and pause as numbers; JSON has the infinities as strings."""
    if not isinstance(item, Mapping):
        return item
    texts = {key: str(item.get(key)) for key in ("start_time", "pause")}
    return {**item} | {key: float(text) for key, text in texts.items() if text in ("inf", "-inf")}


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table as JSON has it: callbacks called, infinities as strings, defaults left out."""
    plain = {}
    for key, value in table.items():
        said = value() if callable(value) else value
        if isinstance(said, float) and math.isinf(said):
            said = "inf" if said > 0 else "-inf"
        if said is not None and said is not False:
            plain[key] = said
    return plain


class ScheduleEntry:
    """One item of a VM's schedule: what happens in the VM at one start time.

    Negative seconds configure the VM, positive ones are after the common start; only a pause may be
    at 0 or -inf. With `ignore_failure` the VM goes on if the entry fails.

    Attributes:
        executable: Name of the program to run, or None.
        arguments: A list (each arrives as it is) or a string (goes through the guest's shell).
        data: A list of dictionaries: what to place (`location` with `content` or `filename`,
            and `executable`), transfer (`location`, `interval`, `destination`), or `pause`.
        options: env, cwd, user, timeout, wait, rerun, on_host, resume, where given.
        ordinal: Its place in the schedule, from 1, once it is part of one.
    """

    def __init__(
        self, start_time: float, ignore_failure: bool = False, *, pause: float | None = None
    ) -> None:
        if not _is_number(start_time):
            raise WrongValue(f"start_time {start_time!r} is not a number")
        if start_time == 0 and pause is None:
            raise WrongValue("start_time 0 is the barrier itself; use a negative or positive time")
        self.start_time = start_time
        self.ignore_failure = ignore_failure
        self.executable: str | None = None
        self.arguments: str | list[str] | None = None
        self.data: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {}
        self.ordinal = 0
        # Where its files go in the guest: set by the driver's create_paths.
        self.working_dir: PurePath = PurePosixPath()
        self.call_arguments_filename: PurePath = PurePosixPath()
        self.reboot_filepath: PurePath = PurePosixPath()
        if pause is not None:
            self.add_pause(pause)

    def __str__(self) -> str:
        return f"{self.start_time:g} {self.label}"

    @property
    def label(self) -> str:
        """A few words for people: the program's name, or what the entry does instead."""
        if self.executable:
            return self.executable.replace("\\", "/").rstrip("/").rpartition("/")[2]
        if self.pause is not None:
            return "break" if math.isinf(self.pause) else f"pause {self.pause:g}"
        return next((kind for kind in DATA_KEYS if self.items(kind)), "resume")

    @property
    def pause(self) -> float | None:
        """The pause's seconds, or None if this is no pause."""
        return next((item["pause"] for item in self.data if "pause" in item), None)

    def items(self, kind: str) -> list[dict[str, Any]]:
        """Return what of `data` is of one kind: file, content or transfer."""
        return [item for item in self.data if _MARKS[kind] in item]

    @property
    def on_host(self) -> bool:
        """Whether its program runs on this host instead of in the VM."""
        return bool(self.options.get("on_host"))

    @property
    def is_resume(self) -> bool:
        """Whether it ends a break."""
        return bool(self.options.get("resume"))

    @property
    def runs_script(self) -> bool:
        """Whether our script runs for it: it places files or runs a program."""
        return bool(self.executable or self.items("file") or self.items("content"))

    @property
    def repeats(self) -> bool:
        """Whether it does nothing but transfer again and again, to the experiment's end."""
        return not self.executable and any(item["interval"] for item in self.items("transfer"))

    def set_executable(self, path: str, arguments: str | Sequence[str] | None = None) -> None:
        """Say which program runs: absolute, on the guest's PATH, or a file of this entry."""
        if not isinstance(path, str):
            raise RuntimeError(f"executable {path!r} is not a string")
        self.executable = path
        if arguments is not None:
            self.append_arguments(arguments)

    def append_arguments(self, arguments: str | Sequence[str]) -> None:
        """Append to the program's arguments.

        A list reaches the program as it is; a string is split by the guest's shell. Of a string and
        a list together, the list's items are quoted.
        """
        new: Any = list(arguments) if isinstance(arguments, tuple) else arguments
        if not _is_arguments(new):
            raise TypeError(f"arguments {arguments!r} are neither a string nor a list of strings")
        both = [new] if self.arguments is None else [self.arguments, new]
        if all(isinstance(part, list) for part in both):
            self.arguments = [*itertools.chain(*both)]
        else:
            self.arguments = " ".join(p if isinstance(p, str) else shlex.join(p) for p in both)

    def add_content(
        self, location: str, content: str | Callable[[], str], executable: bool = False
    ) -> None:
        """Place a text in the VM when the entry starts; a function is called for it at storing.

        The location has the file's name, and may be relative to the entry's directory.
        """
        self.data.append({"location": location, "content": content, "executable": executable})

    def add_file(self, location: str, filename: str, executable: bool = False) -> None:
        """Place a file of the `VmResourceStore`, by its name there, as `add_content` a text."""
        self.data.append({"location": location, "filename": filename, "executable": executable})

    def add_file_transfer(
        self, location: str, interval: float | None = 30, destination: str | None = None
    ) -> None:
        """Pull a file, directory or glob out of the VM: once (None), or what changed at intervals.

        Files go to <destination>/<vm_name>/<location>; without one, into the state directory.
        """
        self.data.append({"location": location, "interval": interval, "destination": destination})

    def add_pause(self, duration: float) -> None:
        """Make this entry a pause of so many seconds; `math.inf` is a break, until a resume."""
        if not _is_duration(duration):
            raise WrongValue(f"pause of {duration!r} s is not positive")
        self.data.append({"pause": duration})

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as an experiment file writes it, ready for JSON."""
        for part in self.data:
            marked = sum(mark in part for mark in _MARKS.values())
            if marked != 1 or ("pause" in part and len(part) > 1):
                marks = ", ".join(_MARKS.values())
                raise WrongValue(f"a data item has one of {marks}, and not {part!r:.200}")
        own = ("start_time", "executable", "arguments", "ignore_failure")
        item = {key: getattr(self, key) for key in own}
        item |= {kind: [_plain(part) for part in self.items(kind)] or None for kind in DATA_KEYS}
        return _plain(item | {"pause": self.pause}) | self.options

    @classmethod
    def from_dict(cls, item: Mapping[str, Any], ordinal: int = 0) -> ScheduleEntry:
        """Return the entry that `to_dict`, an experiment file or JSON describes."""
        known = _with_infinities(item)
        if faults := entry_faults(known, f"entry {ordinal}" if ordinal else "entry"):
            raise WrongValue(faults[0])
        take = known.pop
        entry = cls(take("start_time"), take("ignore_failure", False), pause=take("pause", None))
        entry.executable, entry.arguments = take("executable", None), take("arguments", None)
        for kind, defaults in _DEFAULTS.items():
            entry.data += [defaults | part for part in take(kind, [])]
        entry.options, entry.ordinal = known, ordinal
        return entry


def schedule_text(entries: Iterable[ScheduleEntry]) -> str:
    """Return entries as the JSON text that `ScheduleDb.put` takes."""
    return json.dumps([entry.to_dict() for entry in entries], ensure_ascii=False, allow_nan=False)


def parse_schedule(text: str) -> list[ScheduleEntry]:
    """Return the entries of a schedule's JSON text; a ValueError says which is wrong, and how."""
    if not isinstance(text, str):  # JSON may be bytes, but a schedule is kept as a text
        raise WrongValue(f"a schedule must be a text, and is of type {type(text).__name__}")
    try:
        items = json.loads(text, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, TypeError, RecursionError) as error:
        raise WrongValue(f"a schedule must be a JSON list: {error}") from error
    if not isinstance(items, list):
        raise WrongValue("a schedule must be a JSON list of entries")
    return [ScheduleEntry.from_dict(item, ordinal) for ordinal, item in enumerate(items, 1)]


def _refuse_constant(name: str) -> NoReturn:
    raise WrongValue(f'{name} is not JSON; write infinity as "inf" or "-inf"')


def in_order(entries: Iterable[ScheduleEntry]) -> list[ScheduleEntry]:
    """Return entries as they happen: by time, pauses last within a time, then as written."""
    # The reference adds the smallest float to a pause's time; a rank changes no time.
    return sorted(entries, key=lambda entry: (entry.start_time, entry.pause is not None))


class Hold(NamedTuple):
    """A pause, break or resume that a command gave."""

    time: float  # of the experiment; before time 0 it is 0, for a resume of a break at -inf -inf
    duration: float | None  # in seconds; inf is a break, None a resume

    def __str__(self) -> str:
        if self.duration is None:
            return "resume"
        return "break" if math.isinf(self.duration) else f"pause of {self.duration:g} s"


class Timeline:
    """When each entry really happens: its time plus all shifts before it; a pure function.

    A pause shifts what comes after it by its duration; pauses add up. A break holds it until a
    resume, and shifts by (time of the resume - effective time of the break); the break that begins
    in a pause takes effect at its end. A resume ends one break: a given one that which holds then,
    one in the schedule the first break of the schedule before it that nothing else has ended; its
    own time is not shifted by that break. Pauses at -inf delay negative time only and shift nothing
    here; `opening_delay` is about them. What is given never changes what happened before.

    Attributes:
        times: Seconds of experiment time by ordinal; inf for what a break holds.
        breaks: When each break began and ended; it holds still if that is inf.
    """

    def __init__(self, entries: Sequence[ScheduleEntry], holds: Iterable[Hold] = ()) -> None:
        self.times: dict[int, float] = {}
        self.breaks: list[tuple[float, float]] = []
        self._shift = self._free = 0.0  # what follows is shifted by the one, none before the other
        in_time = sorted((hold for hold in holds if hold.time >= 0), key=lambda hold: hold.time)
        self._resumes = [hold.time for hold in in_time if hold.duration is None]
        given = [(hold.time, hold.duration) for hold in in_time if hold.duration is not None]
        self._planned = [entry for entry in in_order(entries) if entry.is_resume]
        for entry in in_order(entries):
            if entry.start_time < 0:
                self.times[entry.ordinal] = entry.start_time
                continue
            while given and given[0][0] <= (at := entry.start_time + self._shift):
                if given[0][0] == at and entry.pause is not None:
                    break  # a pause of the schedule at the same time was there before
                self._hold(*given.pop(0))
            at = entry.start_time + self._shift
            self.times.setdefault(entry.ordinal, at)  # a resume that ended a break has its time
            if entry.pause is not None:
                self._hold(at, entry.pause, entry.start_time)
        for hold in given:
            self._hold(*hold)

    def _hold(self, at: float, duration: float, planned: float = math.inf) -> None:
        """Take one pause or break into account; `planned` is its own time in the schedule."""
        if math.isinf(self._free):
            return
        begin = max(at, self._free)
        end = begin + duration
        if math.isinf(duration):
            resumed = self._resume(at, planned)
            self.breaks.append((at, resumed))
            end = max(begin, resumed)
        self._shift += end - begin
        self._free = end

    def _resume(self, at: float, planned: float) -> float:
        """Use up the resume that ends a break which began at `at`; return its time."""
        while self._resumes and self._resumes[0] < at:
            self._resumes.pop(0)
        given = self._resumes[0] if self._resumes else math.inf
        entry = next((entry for entry in self._planned if entry.start_time >= planned), None)
        if entry and entry.start_time + self._shift <= given:
            self._planned.remove(entry)
            self.times[entry.ordinal] = entry.start_time + self._shift
            return self.times[entry.ordinal]
        del self._resumes[:1]
        return given

    def break_at(self, at: float) -> float | None:
        """Return when the break that holds at a time began, None if there is none."""
        return next((begin for begin, end in self.breaks if begin <= at < end), None)


def opening_delay(entries: Iterable[ScheduleEntry], holds: Iterable[Hold] = ()) -> float:
    """Return by how many seconds pauses at -inf delay the first negative entry; inf: a break."""
    pauses = [entry.pause for entry in entries if entry.pause and entry.start_time == -math.inf]
    resumed = sum(hold.time == -math.inf for hold in holds)
    delay = sum(pause for pause in pauses if not math.isinf(pause))
    return math.inf if sum(map(math.isinf, pauses)) > resumed else delay


class ScheduleDb(_Rows):
    """The schedules of the experiment's VMs, as JSON texts; `cache_name` and `log` do nothing."""

    def __init__(
        self, cache_name: str = "schedules", log: _Logger = None, *, db: _AnyDatabase = None
    ) -> None:
        if not isinstance(cache_name, str) or not cache_name:
            raise RuntimeError(f"cache_name {cache_name!r} is not a name")
        super().__init__(db)

    def put(
        self, server_name: str, text: str, vm_resources_ip: str = "", broadcast: bool = True
    ) -> None:
        """Store a VM's schedule, a JSON list of entries; the VM need not exist yet.

        While nothing of the stored schedule has run, it is replaced. Afterwards the new one must
        begin with the stored entries (compared as JSON) and may only add more. The address and
        `broadcast` have no effect: there is one database.
        """
        if not _is_word(vm_resources_ip):
            raise WrongValue(f"vm_resources_ip {vm_resources_ip!r} is not a text")
        self.batch_put([{"server_name": server_name, "text": text}])

    def batch_put(self, sched_list: Iterable[Mapping[str, str]], broadcast: bool = False) -> None:
        """Store many schedules, dictionaries with `server_name` and `text`: all or none."""
        schedules = {}
        for item in sched_list:
            if not isinstance(item, Mapping) or item.keys() != {"server_name", "text"}:
                raise WrongValue(f"not a dictionary with server_name and text: {item!r:.200}")
            schedules[checked_name("VM", item["server_name"])] = item["text"]
            parse_schedule(item["text"])
        try:
            with self.db.transaction():
                for name, text in schedules.items():
                    _put_schedule(self.db, name, text)
        except Busy as error:
            raise ScheduleDbTimeoutError(str(error), error.hint) from error

    def get(self, server_name: str) -> str | None:
        """Return a VM's schedule as the text that was put, or None if it has none."""
        sql = "SELECT text FROM schedules WHERE server_name = :name"
        return cast(str | None, self.db.value(sql, name=server_name))

    def list_all(self, pattern: str | None = None) -> list[dict[str, str]]:
        """Return server_name and text of the schedules, of VMs whose name matches a pattern."""
        sql = "SELECT server_name, text FROM schedules WHERE text IS NOT NULL ORDER BY server_name"
        rows, wanted = self.db.query(sql), "*" if pattern is None else pattern
        return [dict(row) for row in rows if fnmatch.fnmatchcase(row.server_name, wanted)]

    def destroy_one(self, server_name: str) -> None:
        """Remove one VM's schedule and begin a new generation; one without is no error."""
        self._destroy("server_name = :name", name=server_name)

    def destroy_all(self) -> None:
        """Remove all schedules and begin new generations."""
        self._destroy("TRUE")

    def _destroy(self, where: str, **parameters: object) -> None:
        _refuse_while_live(self.db, "removing a schedule")
        sql = f"UPDATE schedules SET text = NULL, generation = generation + 1 WHERE {where}"  # noqa: S608
        self.db.write(sql, durable=True, **parameters)


def _put_schedule(db: Database, name: str, text: str) -> None:
    """Write one schedule inside the caller's transaction, if it keeps what has begun to run."""
    old = db.row(
        """SELECT text, EXISTS (SELECT 1 FROM attempts AS a WHERE a.generation = s.generation
               AND a.experiment_id = (SELECT id FROM current_experiment)
               AND a.server_name = s.server_name) AS begun
           FROM schedules AS s WHERE server_name = :name AND text IS NOT NULL""",
        name=name,
    )
    stored, new = (json.loads(old.text), json.loads(text)) if old else ([], [])
    pairs = enumerate(itertools.zip_longest(stored, new[: len(stored)]), 1)
    differs = next((ordinal for ordinal, (kept, given) in pairs if kept != given), None)
    if old and old.begun and differs:
        raise WrongValue(
            f"the schedule of VM {name!r} has begun to run, and entry {differs} of "
            "the new one differs; entries can only be added at the end"
        )
    # A handler may hold the old entries: under a new generation they are not taken for these.
    db.write(
        """INSERT INTO schedules (server_name, text) VALUES (:name, :text)
           ON CONFLICT (server_name) DO UPDATE SET text = excluded.text,
               generation = generation + :replaced""",
        name=name,
        text=text,
        replaced=differs is not None,
    )


def read_holds(db: Database, server_name: str) -> list[Hold]:
    """Return the pauses, breaks and resumes that commands gave a VM and that have effect."""
    rows = db.query(
        """SELECT experiment_time, duration_s FROM holds WHERE server_name = :name AND NOT ignored
           AND experiment_id = (SELECT id FROM current_experiment) ORDER BY id""",
        name=server_name,
    )
    return [Hold(row["experiment_time"], row["duration_s"]) for row in rows]


def read_schedule(db: Database, server_name: str) -> tuple[list[ScheduleEntry], list[Hold]]:
    """Return a VM's entries, and what commands gave it."""
    text = db.value("SELECT text FROM schedules WHERE server_name = :name", name=server_name)
    return parse_schedule(text or "[]"), read_holds(db, server_name)


def pause_vms(
    db: Database, server_names: Iterable[str], duration: float = math.inf
) -> list[dict[str, Any]]:
    """Shift what has not started in VMs by so many seconds, from time 0 on; inf is a break.

    Returns, for each VM, its name, the experiment time, and what was done: a break in a break is
    ignored.
    """
    if not _is_duration(duration):
        raise WrongValue(f"pause of {duration!r} s is not positive")
    return _give(db, server_names, duration)


def resume_vms(db: Database, server_names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """End the break of these VMs, or of all that are in one; return what `pause_vms` does."""
    return _give(db, server_names, None)


def _give(
    db: Database, server_names: Iterable[str] | None, duration: float | None
) -> list[dict[str, Any]]:
    given = []
    with db.transaction():
        rows = db.query("SELECT server_name, state FROM vms WHERE state <> 'n/a'")
        vms = {row.server_name.lower(): row for row in rows}
        names = vms if server_names is None else {name.lower(): name for name in server_names}
        for name in names:
            if name not in vms:
                raise NotFound(f"no VM {names[name]!r} that is managed", "See: vmrm status")
            now, begun = _break_of(db, vms[name])
            hold = Hold(-math.inf if duration is None and begun == -math.inf else now, duration)
            ignored, done = False, str(hold)
            if duration is None and begun is None:
                if server_names is None:
                    continue
                ignored, done = True, "ignored: it is in no break"
            elif duration is None:
                done = f"resume: ends the break of {begun:g}"
            elif math.isinf(duration) and begun is not None:
                ignored, done = True, f"ignored: it is in a break since {begun:g}"
            _record_hold(db, vms[name].server_name, hold, ignored)
            given.append({"vm": vms[name].server_name, "time": round(now, 3), "done": done})
    return given


def _break_of(db: Database, vm: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return the experiment time, and when the break that holds the VM now began, if one does."""
    start = db.value("SELECT start_at FROM current_experiment")
    now = 0.0 if start is None else max(0.0, CLOCK.wall() - start)
    entries, holds = read_schedule(db, vm["server_name"])
    waits = vm["state"] in (VMState.UNINITIALIZED, VMState.CONFIGURING)
    if waits and math.isinf(opening_delay(entries, holds)):
        return now, -math.inf
    return now, Timeline(entries, holds).break_at(now)


def _record_hold(db: Database, name: str, hold: Hold, ignored: bool = False) -> None:
    row = {"experiment_time": hold.time, "duration_s": hold.duration, "ignored": ignored}
    of = current_experiment(db).id
    db.insert("holds", experiment_id=of, server_name=name, at=CLOCK.wall(), **row)


# === journal =====================================================================================


class Attempt(Row):
    """One row of the journal: one try at one entry."""

    @property
    def is_open(self) -> bool:
        """Whether its end is still to come."""
        return self["outcome"] in OPEN_OUTCOMES


class Journal:
    """The attempts of one VM's schedule, written by that VM's handler alone."""

    def __init__(self, db: Database, server_name: str) -> None:
        self.db, self.server_name = db, server_name
        experiment = current_experiment(db)
        sql = "SELECT generation FROM schedules WHERE server_name = :name"
        #: Which schedule of the VM these attempts belong to.
        self.generation: int = db.value(sql, name=server_name) or 1
        #: A word for this experiment that no other one has, of this database or another.
        self.experiment = f"{experiment.id}-{experiment.created_at:.6f}"
        #: A word that tells this generation of this experiment from all others.
        self.token = f"{self.experiment}.{self.generation}"
        # The same, short enough for every path.
        self._word = f"{experiment.id}-{_digest(self.token)[:8]}"
        self._key = {"experiment_id": experiment.id, "server_name": server_name}
        self._key["generation"] = self.generation

    def latest(self) -> dict[int, Attempt]:
        """Return the latest attempt of each entry that has one, by ordinal."""
        rows = self.db.query(
            """SELECT * FROM latest_attempts WHERE experiment_id = :experiment_id
               AND server_name = :server_name AND generation = :generation ORDER BY ordinal""",
            **self._key,
        )
        return {row.ordinal: Attempt(row, outcome=Outcome(row.outcome)) for row in rows}

    def arm(
        self, planned: Mapping[int, float | None], boot: str, host: Collection[int] = ()
    ) -> dict[int, Attempt]:
        """Record that these entries are about to be sent, each as a new attempt.

        Args:
            planned: Planned wall time by ordinal; None in negative time.
            boot: The guest's boot id.
            host: Those that run on this host, whose boot id they get.
        """
        with self.db.transaction() as db:
            continued_at = self.check().continued_at or 0
            for ordinal, at in planned.items():
                # Counted over all generations of an experiment: output files are named after it.
                sql = """SELECT max(attempt) FROM attempts WHERE experiment_id = :experiment_id
                         AND server_name = :server_name AND ordinal = :ordinal"""
                number = 1 + (db.value(sql, **self._key, ordinal=ordinal) or 0)
                db.insert(
                    "attempts",
                    **self._key,
                    ordinal=ordinal,
                    attempt=number,
                    outcome=Outcome.ARMED.value,
                    planned_at=at,
                    armed_at=CLOCK.wall(),
                    boot_id=boot_id() if ordinal in host else boot,
                    claim=f"attempt.{number}.{self._word}",
                    overdue=at is not None and at < continued_at,
                )
            latest = self.latest()
        return {ordinal: latest[ordinal] for ordinal in planned}

    def withdraw(self, attempts: Iterable[Attempt]) -> None:
        """Take back armed attempts that were not sent; the next ones have their numbers again."""
        self.db.write(
            """DELETE FROM attempts
               WHERE outcome = 'armed' AND id IN (SELECT value FROM json_each(:ids))""",
            ids=json.dumps([attempt.id for attempt in attempts]),
        )

    def check(self) -> Row:
        """Return the experiment; raise `_Leave` if it was stopped, or the schedule replaced."""
        row = self.db.row(
            """SELECT *, coalesce((SELECT generation FROM schedules
                   WHERE server_name = :name), 1) AS generation FROM current_experiment""",
            name=self.server_name,
        )
        if row is None or row.generation != self.generation:
            raise _Replaced("the schedule was replaced")
        if row.halt in (Halt.STOP, Halt.KILL):
            raise _Leave(f"told to {row.halt}", Halt(row.halt))
        return row

    def started(
        self, attempt: Attempt, sent_at: float, pid: int | None, at: float, planned: float | None
    ) -> None:
        """Record that the guest has started an attempt, by which its VM has reached time `at`."""
        with self.db.transaction() as db:
            db.write(
                """UPDATE attempts SET outcome = 'running', answered_at = :now, pid = :pid,
                       planned_at = iif(sent_at IS NULL, :planned, planned_at),
                       sent_at = coalesce(sent_at, :sent)
                   WHERE id = :id AND ended_at IS NULL""",
                id=attempt.id,
                now=CLOCK.wall(),
                pid=pid,
                planned=planned,
                sent=sent_at,
            )
            db.update("vms", {"server_name": self.server_name}, current_time=_plain_time(at))

    def ended(self, attempt: Attempt, outcome: Outcome, *, error: str = "", **more: Any) -> None:
        """Record how an attempt ended (exit_code, reboot, retried); the first word stands."""
        what = {"outcome": outcome.value, "error": printable(error), **more}
        where = {"id": attempt.id, "ended_at": None}
        self.db.update("attempts", where, ended_at=CLOCK.wall(), **what)


def _plain_time(at: float) -> str:
    # As people write it: 5, not 5.0.
    return str(int(at)) if float(at).is_integer() else str(at)


def retry_failed(db: Database, server_name: str | None = None, ordinal: int | None = None) -> int:
    """Give failed and unknown entries, and failed VMs, another chance; return how many it were."""
    with _changing_vms(db):
        return len(retry_in(db, server_name, ordinal))


def retry_in(
    db: Database,
    server_name: str | None = None,
    ordinal: int | None = None,
    *,
    needed: bool = False,
) -> list[str]:
    """Do so inside the caller's transaction; return whom it concerns.

    With `needed` only those entries without which a VM cannot get to time 0, be it failed or, for
    it was stopped before it noticed, not yet.
    """
    again = db.write(
        """UPDATE attempts SET retried = 1
           WHERE id IN (SELECT attempt_id FROM entry_status
               WHERE outcome IN ('failed', 'unknown') AND NOT ignore_failure
                 AND (:name IS NULL OR server_name = :name COLLATE NOCASE)
                 AND (:ordinal IS NULL OR ordinal = :ordinal)
                 AND (NOT :needed OR start_time < 0 AND server_name IN (
                     SELECT server_name FROM vms
                     WHERE state IN ('uninitialized', 'configuring', 'failed'))))
             AND NOT retried
           RETURNING server_name, ordinal""",
        name=server_name,
        ordinal=ordinal,
        needed=needed,
    )
    failed = db.query(
        """SELECT server_name, (SELECT start_at FROM current_experiment) AS start_at FROM vms
           WHERE state = 'failed' AND (:name IS NULL OR server_name = :name)""",
        name=server_name,
    )
    for vm in failed:
        target = VMState.CONFIGURING if vm.start_at is None else VMState.CONFIGURED
        move_vm(db, vm.server_name, target, "")
    entries = [f"{row.server_name}, entry {row.ordinal}" for row in again]
    return sorted(entries) + [vm.server_name for vm in failed]


# === file store ==================================================================================

MAX_UNPACKED_BYTES, MAX_MEMBERS = 64 << 30, 100_000  # of one archive
MAX_HEADER_BYTES = 1 << 18  # before one member of a tar archive: its names and attributes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma", b"]\0\0": "lzma"}
_ARCHIVE_NAME = re.compile(r"(?i).*(\.tar(\.gz|\.bz2|\.xz)?|\.tgz|\.tbz2?|\.txz|\.zip)")
_OUR_TEMPORARY = re.compile(r"\.vmrm-[0-9a-f]{16}")


def temporary_name() -> str:
    """Return a name for a file that is not complete yet, by which `check` knows it after a kill."""
    return f".vmrm-{os.urandom(8).hex()}"


@contextlib.contextmanager
def written_aside(folder: Path, mode: int = 0o600) -> Iterator[tuple[Path, BinaryIO]]:
    """Make a file to be filled and then renamed to its place; if it is not, it is removed."""
    temporary = folder / temporary_name()
    try:
        with temporary.open("xb") as file:
            os.fchmod(file.fileno(), mode)
            yield temporary, file
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Write a file that replaces another, if there is one, once it is complete."""
    with written_aside(path.parent, mode) as (temporary, file):
        yield file
        file.flush()
        temporary.rename(path)


def refuse_full(fd: int, size: int) -> None:
    """Raise an `OSError` if a file of this size would leave too little room on its disk."""
    free = os.fstatvfs(fd)
    kept = min(MIN_FREE_BYTES, free.f_blocks * free.f_frsize // 16)
    full = size > free.f_bavail * free.f_frsize - kept
    if full or (free.f_files and free.f_favail < MIN_FREE_FILES):
        raise OSError(errno.ENOSPC, f"no space on the host for {size} bytes")


def remove_tree(top: Path) -> None:
    """Remove a directory, however deep: what lies below is moved up first."""
    with contextlib.suppress(FileNotFoundError):
        while paths := list(top.iterdir()):
            for path in paths:
                if path.is_symlink() or not path.is_dir():
                    path.unlink()
                    continue
                for below in list(path.iterdir()):
                    below.rename(top / f".{os.urandom(8).hex()}")
                path.rmdir()
        top.rmdir()


def put_content(db: Database, source: BinaryIO) -> tuple[str, int]:
    """Copy a stream into the store under its SHA-256; return that and its size in bytes.

    The file is complete under its final name before any row names it: a crash may leave a file
    without a row (`check` finds it), never a row without its file.
    """
    folder, digest, size = db.directory("store"), hashlib.sha256(), 0
    with written_aside(folder) as (temporary, target):
        while chunk := source.read(1 << 20):
            refuse_full(target.fileno(), len(chunk))  # what it unpacks to, nobody knows before
            digest.update(chunk)
            size += target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
        _crash("store-before-rename")
        temporary.rename(folder / digest.hexdigest())
    return digest.hexdigest(), size


def remove_unused(db: Database) -> None:
    """Remove what purged experiments left and, unless somebody adds some, unnamed contents."""
    for path in purged_directories(db):
        remove_tree(path)
    # Whoever adds some shares this lock until rows name them.
    with contextlib.suppress(Conflict), db.lock("store").held("somebody adds contents"):
        _unlink(unnamed_contents(db))


def unnamed_contents(db: Database) -> list[Path]:
    """Return the contents that nothing names, half-written ones too."""
    listed = sorted(db.directory("store").iterdir())
    named = {row.sha256 for row in db.query("SELECT sha256 FROM named_contents")}
    return [path for path in listed if path.name not in named]


def purged_directories(db: Database) -> list[Path]:
    """Return the directories of experiments that were purged."""
    purged = {row.id for row in db.query("SELECT id FROM experiments WHERE purged")}
    return [path for path, number in run_directories(db.state_dir) if number in purged]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_path(db: Database, sha256: str) -> Path:
    """Return where the store keeps the content with this SHA-256."""
    return db.state_dir / "store" / sha256


class VmResourceStore(_Rows):
    """Files for VMs, by name: each content is kept once, whatever its names.

    Several stores share one database. With `decompress`, archives are replaced by the files in
    them, and compressed files by their contents.
    """

    def __init__(
        self, store: str = "vm_resources", decompress: bool = False, *, db: _AnyDatabase = None
    ) -> None:
        super().__init__(db)
        self.store = checked_name("store", store)
        self.decompress = decompress

    def add_file(self, path: str | os.PathLike[str], force: bool = True) -> None:
        """Add a file under its own name, or what it unpacks to, unless `force` must replace one.

        What is there without `force` is a FileExistsError; an unusable name, and an archive that
        is damaged, too large, or holds more than plain files, a ValueError.
        """
        source = Path(path)
        if source.is_dir():
            raise WrongValue(f"{str(source)!r} is a directory; add its files, or an archive of it")
        try:
            with source.open("rb") as stream:
                files = _unpacked(source, stream) if self.decompress else [(source.name, stream)]
                self._add_all(files, force)
        except _damages() as error:
            if getattr(error, "errno", None) is not None:  # it is about this host
                raise
            raise WrongValue(f"archive {source.name!r} cannot be unpacked: {error}") from error

    def add_file_from_content(
        self, content: str | bytes, filename: str, force: bool = True
    ) -> None:
        """Add a file with the given content, text as UTF-8."""
        data = content.encode() if isinstance(content, str) else content
        self._add_all([(filename, io.BytesIO(data))], force)

    def _add_all(self, files: Iterable[tuple[str, BinaryIO]], force: bool) -> None:
        with self.db.lock("store").shared():
            stored: dict[str, tuple[str, tuple[str, int]]] = {}
            for name, stream in files:
                if checked_name("file", name).lower() in stored:
                    raise WrongValue(f"the archive holds two files named {name!r}")
                self._refuse_taken(name, force)
                stored[name.lower()] = (name, put_content(self.db, stream))
            _crash("store-before-rows")
            with self.db.transaction():
                for name, (sha256, size) in stored.values():
                    self._refuse_taken(name, force)  # somebody may have been faster
                    row = {"store": self.store, "name": name, "sha256": sha256, "size_bytes": size}
                    self.db.upsert("files", "store", "name", **row, uploaded_at=CLOCK.wall())

    def _refuse_taken(self, name: str, force: bool) -> None:
        if not force and self.check_path(name):
            raise FileExistsError(errno.EEXIST, "the store has such a file", name)

    def remove_file(self, pattern: str) -> int:
        """Remove the files whose name matches a shell pattern; return how many there were.

        The rows go first, then the contents that neither a file nor a schedule names any more.
        """
        names = self.list_distinct_contents(pattern)
        with self.db.transaction():
            for name in names:
                sql = "DELETE FROM files WHERE store = :store AND name = :name"
                self.db.write(sql, store=self.store, name=name)
        _crash("store-removed")
        remove_unused(self.db)
        return len(names)

    def list_contents(self, pattern: str = "*") -> list[tuple[int, str, datetime]]:
        """Return (size in bytes, name, upload time in UTC) of the files that match a pattern."""
        sql = "SELECT * FROM files WHERE store = :store ORDER BY name"
        return [
            (row.size_bytes, row.name, datetime.fromtimestamp(row.uploaded_at, UTC))
            for row in self.db.query(sql, store=self.store)
            if fnmatch.fnmatchcase(row.name, pattern)
        ]

    def list_distinct_contents(self, pattern: str = "*") -> list[str]:
        """Return the names that match a shell pattern, each once."""
        return [name for _, name, _ in self.list_contents(pattern)]

    def check_path(self, filename: str) -> bool:
        """Return whether the store has a file of this name."""
        return self._row(filename) is not None

    def get_path(self, filename: str) -> str:
        """Return the host's path of a file's content; FileNotFoundError if there is none."""
        row = self._row(filename)
        if row is None:
            raise FileNotFoundError(errno.ENOENT, "the store has no such file", filename)
        path = content_path(self.db, row.sha256)
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "the store has lost its content", filename)
        return str(path)

    def get_file(self, filename: str) -> BinaryIO:
        """Return a file's content opened for reading; FileNotFoundError if there is none."""
        return Path(self.get_path(filename)).open("rb")

    def get_file_size(self, filename: str) -> int:
        """Return a file's size in bytes; FileNotFoundError if there is none."""
        return Path(self.get_path(filename)).stat().st_size

    def get_file_hash(self, filename: str) -> str:
        """Return a file's SHA-256 in hexadecimal, '' if the store has none of that name."""
        return row.sha256 if (row := self._row(filename)) else ""

    def get_file_upload_date(self, filename: str) -> datetime | None:
        """Return when a file was added, in UTC; None if the store has none of that name."""
        row = self._row(filename)
        return datetime.fromtimestamp(row.uploaded_at, UTC) if row else None

    def _row(self, name: str) -> Row | None:
        sql = "SELECT * FROM files WHERE store = :store AND name = :name"
        return self.db.row(sql, store=self.store, name=name)


def _unpacked(source: Path, stream: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the plain files of an archive, or the content of a compressed file.

    Only names and contents are taken, so links, devices and paths that leave the archive have
    nowhere to lead; an archive that holds them is refused all the same.
    """
    import importlib
    import zipfile

    head = stream.read(8)
    stream.seek(0)
    kind = next((kind for begin, kind in _COMPRESSED.items() if head.startswith(begin)), None)
    unpacker = importlib.import_module(kind).open if kind else lambda stream: stream
    too_long = "a member has over {} bytes of names and attributes"
    headers = _Bounded(unpacker(stream), MAX_HEADER_BYTES, too_long)
    members: Iterator[tuple[str, IO[bytes] | None]]
    if (tar := _tar(headers)) is not None:
        members = _tar_members(tar, headers)
    elif zipfile.is_zipfile(stream):
        members = _zip_members(zipfile.ZipFile(stream))
    elif _ARCHIVE_NAME.fullmatch(source.name) or head.startswith(b"PK\3\4"):
        raise WrongValue(f"archive {source.name!r} is empty, damaged or cut short")
    elif source.suffix not in (".gz", ".bz2", ".xz"):
        stream.seek(0)
        yield source.name, stream
        return
    elif kind:
        stream.seek(0)
        members = iter([(source.stem, unpacker(stream))])
    else:
        raise WrongValue(f"archive {source.name!r} is damaged: it is not compressed")
    contents = _Bounded(stream, MAX_UNPACKED_BYTES, "it unpacks to over {} bytes")
    for count, (name, opened) in enumerate(members):
        parts = PurePosixPath(name).parts
        if opened is None or not parts or ".." in parts or name.startswith("/"):
            told = printable(repr(name), 200)
            raise WrongValue(f"archive {source.name!r}: {told} is not a plain file inside it")
        if count >= MAX_MEMBERS:
            raise WrongValue(f"archive {source.name!r} holds over {MAX_MEMBERS} files")
        with opened:
            contents.stream = opened
            yield parts[-1], cast(BinaryIO, contents)


class _Bounded:
    """A stream, or several in turn, of which so many bytes may be read.

    Counted is what really comes: the sizes that an archive states are whatever its maker liked.
    """

    def __init__(self, stream: IO[bytes], limit: int, told: str) -> None:
        self.stream, self.left, self.last = stream, limit, b""
        self.seek, self.tell = stream.seek, stream.tell
        self._told = told.format(limit)

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes."""
        self.last = self.stream.read(min(size, self.left + 1))
        self.left -= len(self.last)
        if self.left < 0:
            raise RuntimeError(self._told)
        return self.last


def _tar(headers: _Bounded) -> tarfile.TarFile | None:
    """Return the archive that a stream is, if there is something in it.

    To tarfile 512 zeros are an empty archive; an image of an ext4 file system begins like that.
    """
    import tarfile

    try:
        tar = tarfile.TarFile(fileobj=cast(BinaryIO, headers))
    except _damages(ValueError) as error:
        if isinstance(error, RuntimeError) or getattr(error, "errno", None) is not None:
            raise  # it is too long, or about this host
        return None
    return tar if tar.firstmember else None  # type: ignore[attr-defined]


def _tar_members(tar: tarfile.TarFile, headers: _Bounded) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Yield each member that is no directory: its name, and its content if it is a plain file."""
    while (member := tar.next()) is not None:
        # A negative size would lead the reader back to a header it has read.
        plain = member.isreg() and member.size >= 0
        if not member.isdir():
            headers.left = sys.maxsize - 1  # contents have a bound of their own
            yield member.name, tar.extractfile(member) if plain else None
        cast(Any, tar).members.clear()  # else it keeps them all
        cast(Any, tar).pax_headers.clear()
        headers.left = MAX_HEADER_BYTES
    if headers.last != bytes(512):
        raise EOFError("it ends without its end mark")


def _zip_members(archive: zipfile.ZipFile) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Yield each member that is no directory: its name, and its content if it is a plain file."""
    for info in archive.infolist():
        # Other methods unpack a piece of any size at once.
        if info.compress_type not in (0, 8):
            raise RuntimeError("its files are neither stored nor deflated")
        if not info.is_dir():
            kind = stat.S_IFMT(info.external_attr >> 16)
            yield info.filename, archive.open(info) if kind in (0, stat.S_IFREG) else None


def _damages(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what readers raise for a damaged or encrypted archive."""
    import lzma
    import tarfile
    import zipfile
    import zlib

    broken = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
    return (*broken, EOFError, OSError, RuntimeError, *more)


# === experiment files ============================================================================

EXPERIMENT_KEYS: _Keys = {
    "start_buffer": (lambda v: v == 0 or _is_positive(v), "seconds, 0 or more"),
    "on_failure": (lambda v: v in list(OnFailure), "abort, drop or wait"),
}
VM_KEYS: _Keys = {
    "name": (_is_text, "a name"),
    "path": (_is_text, "an agent's address"),
    "pool": (_is_text, "a group of the pool"),
    "engine": (_is_text, "a driver's engine"),
    "uuid": (_is_text, "a uuid"),
    "control_ip": (_is_word, "an address"),
    "use_vm_manager": _SWITCH,
    "launch_dir": (_is_text, "a directory in the guest"),
    "agent_timeout": (_is_positive, "a positive number of seconds"),
    "set_time": _SWITCH,
    "count": (lambda v: type(v) is int and 0 < v <= MAX_VMS, f"a whole number up to {MAX_VMS}"),
    "schedule": (_is_list, "a list of entries"),
}


class Experiment(NamedTuple):
    """A checked experiment file: everything that `load` would write."""

    source: Path
    settings: dict[str, Any]
    vms: list[dict[str, Any]]  # as VMMapping.prepare_put returns them
    schedules: dict[str, str]  # JSON text by VM
    files: dict[str, Path]  # what goes into the store: host path by SHA-256

    @property
    def content_hash(self) -> str:
        """SHA-256 over all of it, the contents of files included."""
        parts = [self.settings, self.vms, self.schedules]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def read_experiment(path: str | os.PathLike[str]) -> Experiment:
    """Read and check an experiment file, TOML or JSON of the same structure; write nothing.

    A UsageError tells all faults of it, a line each.
    """
    reader = _ExperimentReader(Path(path))
    experiment = reader.read(_parse_file(reader.source))
    reader.refuse_faults()
    return experiment


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)  # as TOML, refuse a key that comes twice
    if len(table) < len(pairs):
        (double, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise WrongValue(f"key {double!r} comes twice in one object")
    return table


def _parse_file(source: Path) -> Any:
    import tomllib

    try:
        text = source.read_bytes().decode("utf-8-sig")  # some editors begin a file with a mark
    except OSError as error:
        raise UsageError(f"cannot read {str(source)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{str(source)!r} is not UTF-8 text (byte {error.start})") from error
    kind = "JSON" if source.suffix == ".json" else "TOML"
    try:
        if kind == "TOML":
            return tomllib.loads(text)
        hook = _without_doubles
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{str(source)!r} is not {kind}: {error}") from error


class _ExperimentReader:
    """Turns a parsed experiment file into an `Experiment`, collecting faults instead of raising."""

    def __init__(self, source: Path) -> None:
        self.source, self.base = source, source.absolute().parent
        self.faults, self.files = list[str](), dict[str, Path]()
        self.vms, self.schedules = list[dict[str, Any]](), dict[str, str]()
        self._sha256 = functools.cache(file_sha256)

    def refuse_faults(self) -> None:
        """Raise `UsageError` if there are faults."""
        if self.faults:
            head = f"{self.source}: {counted(len(self.faults), 'fault')}"
            raise UsageError("\n  ".join([head, *self.faults]))

    def read(self, document: Any) -> Experiment:
        """Return the experiment; it is usable only if there are no faults."""
        if not isinstance(document, dict):
            document = {}
            self.faults.append("the file must be a table with [experiment] and [[vm]]")
        known = ("experiment", "vm")
        self.faults += [unknown_key(key, known) for key in document if key not in known]
        settings, tables = document.get("experiment", {}), document.get("vm", [])
        self.faults += _sound(settings, EXPERIMENT_KEYS, "[experiment]")[1]
        if not isinstance(tables, list) or not tables:
            self.faults.append("there is no [[vm]]")
            tables = []
        for number, table in enumerate(tables, 1):
            self._read_vm(table, f"vm {number}")
        self._check_unique()
        return Experiment(self.source, settings, self.vms, self.schedules, self.files)

    def _read_vm(self, table: Any, where: str) -> None:
        if isinstance(table, dict) and isinstance(table.get("name"), str):
            where = f"vm {table['name']!r}"
        sound, faults = _sound(table, VM_KEYS, where)
        self.faults += faults
        if not isinstance(table, dict):
            return
        text = self.read_schedule(sound.get("schedule", []), where)
        if "name" not in table:
            self.faults.append(f"{where}: name is missing")
        vms, count = list[dict[str, Any]](), sound.get("count")
        if count and "{n}" not in sound.get("name", "{n}"):
            self.faults.append(f"{where}: with count, the name needs {{n}}")
        elif "name" in sound:
            vms = self._expanded(sound, table.keys(), count, where)
        self.vms += vms
        self.schedules |= {vm["server_name"]: text for vm in vms if text}
        try:
            driver_of(sound.get("engine", "QemuVM"))
        except UsageError as error:
            self.faults.append(f"{where}: {error}")

    def _expanded(
        self, table: dict[str, Any], given: Collection[str], count: int | None, where: str
    ) -> list[dict[str, Any]]:
        """Return the VMs of one table: one, or `count` with {n} in its texts."""
        import uuid

        vms = []
        for n in range(1, (count or 1) + 1):
            vm = {
                key: value.replace("{n}", str(n)) if count and isinstance(value, str) else value
                for key, value in table.items()
            }
            if faults := list(_vm_table_faults(vm, given)):
                self.faults += [f"{where}: {fault}" for fault in faults]
                break
            name, managed = vm["name"], vm.get("use_vm_manager", True)
            entry = {key: vm[key] for key in _VM_VALUES if key in vm} | {
                "server_uuid": vm.get("uuid") or str(uuid.uuid5(uuid.NAMESPACE_OID, name)),
                "server_name": name,
                "state": (VMState.UNINITIALIZED if managed else VMState.NOT_APPLICABLE).value,
            }
            if not vm.get("path", "tcp:").startswith(("tcp:", "vsock:")):
                entry["path"] = str(self.base / vm["path"].removeprefix("unix:"))
            if "agent_timeout" in vm:
                entry["agent_timeout_s"] = float(vm["agent_timeout"])
            vms.append(VMMapping.prepare_put(entry))
        return vms

    def read_schedule(self, items: list[Any], where: str) -> str:
        """Return the JSON text of a list of entries, '' if there is none or it has faults."""
        entries = []
        for number, item in enumerate(map(_with_infinities, items), 1):
            place = f"{where}, entry {number}"
            faults = entry_faults(item, place)
            self.faults += faults
            parts = item.get("file") if isinstance(item, dict) else ()
            for part in parts if isinstance(parts, list) else ():
                if not _part_faults("file", part, place):  # where others are wrong, too
                    self._pin(part, place)
            if not faults:
                self._resolve(item, place)
                entries.append(ScheduleEntry.from_dict(item, number))
        return schedule_text(entries) if len(entries) == len(items) and items else ""

    def _resolve(self, item: Mapping[str, Any], place: str) -> None:
        """Make this host's paths in a sound entry absolute."""
        import shutil

        program = item.get("executable", "")
        if item.get("on_host") and program.startswith("/") and not shutil.which(program):
            self.faults.append(f"{place}: this host has no program {program!r}")
        for part in item.get("transfer", ()):
            if "destination" in part:
                part["destination"] = str(self.base / part["destination"])

    def _pin(self, part: dict[str, Any], place: str) -> None:
        """Add to what a file is called here what its content is."""
        path = self.base / part["filename"]
        try:
            if not path.is_file():
                raise FileNotFoundError(errno.ENOENT, "there is no such file")
            part["sha256"] = self._sha256(path)
            self.files[part["sha256"]] = path
        except OSError as error:
            self.faults.append(f"{place}, file {part['filename']!r}: {error.strerror}")

    def _check_unique(self) -> None:
        spellings: dict[str, Callable[[str], str]] = {
            "server_name": str.lower,
            "server_uuid": str,
            "path": machine_address,
        }
        for key, spelt in spellings.items():
            seen: dict[str, str] = {}
            for vm in self.vms:
                value = vm[key] and spelt(vm[key])
                if value and value in seen:
                    what, whose = key.removeprefix("server_"), f"that of vm {seen[value]!r}"
                    name = vm["server_name"]
                    self.faults.append(f"vm {name!r}: {what} {vm[key]!r} is already {whose}")
                seen.setdefault(value, vm["server_name"])


def _vm_table_faults(table: Mapping[str, Any], given: Collection[str]) -> Iterator[str]:
    """Yield what makes no sense among the sound keys of a VM's table; `given` are all its keys."""
    for check in (
        lambda: checked_name("VM", table["name"]),
        lambda: drivers.parse_address(table.get("path", "/")),
        lambda: checked_name("group", table.get("pool", "g")),
    ):
        try:
            check()
        except ValueError as error:
            yield str(error)
    agents = {"path", "pool"} & {*given}
    if len(agents) > 1:
        yield "it has a path and a pool; one of them"
    misspelt = any(key not in VM_KEYS for key in given)
    if not agents and not misspelt and table.get("use_vm_manager", True):
        yield "path to the guest agent is missing"


def load_experiment(db: Database, experiment: Experiment) -> bool:
    """Write a checked experiment, all or nothing; return whether it is new.

    The same content again changes nothing, so that `run FILE` continues.
    """
    if _is_same(db, experiment):
        return False
    vms = with_addresses(experiment.vms)
    for vm in vms:  # once more when they are written, but then the files are here
        _refuse_pool_machine(db, vm)
    with db.lock("store").shared():
        _store_files(db, experiment.files)
        with _changing_vms(db):
            if _is_same(db, experiment):  # somebody was faster
                return False
            db.update(
                "experiments",
                {"destroyed_at": None},
                source=str(experiment.source),
                content_hash=experiment.content_hash,
                start_buffer_s=experiment.settings.get("start_buffer", 60),
                on_failure=experiment.settings.get("on_failure", OnFailure.ABORT),
            )
            _insert_vms(db, vms)
            for name, text in experiment.schedules.items():
                _put_schedule(db, name, text)
    return True


def _store_files(db: Database, files: Mapping[str, Path]) -> None:
    for sha256, path in files.items():
        with path.open("rb") as stream:
            if put_content(db, stream)[0] != sha256:
                raise UsageError(f"{str(path)!r} changed while it was being read")


def _is_same(db: Database, experiment: Experiment) -> bool:
    """Whether the database holds this very experiment; false if it holds none."""
    row = db.row("SELECT * FROM current_experiment")
    if row is None or row.content_hash == experiment.content_hash:
        return row is not None
    if row.content_hash or db.value("SELECT count(*) FROM vms"):
        name = row.source or "one made by hand"
        raise Conflict(
            f"the database holds another experiment ({name}), or this file has changed since",
            "End the old one: vmrm destroy --yes, or add to it: vmrm schedule add VM FILE",
        )
    return False


def append_entries(db: Database, server_name: str, file: Path) -> dict[str, int]:
    """Append the entries of a file to a VM's schedule; return how many that is."""
    reader = _ExperimentReader(file)
    document = _parse_file(file)
    items = document.get("schedule") if isinstance(document, dict) else document
    if not isinstance(items, list) or not items:
        raise UsageError(f"{str(file)!r} has no [[schedule]] tables")
    text = reader.read_schedule(items, f"vm {server_name!r}")
    reader.refuse_faults()
    with db.lock("store").shared():
        _store_files(db, reader.files)
        with db.transaction():
            sql = "SELECT text FROM schedules WHERE server_name = :name"
            present = json.loads(db.value(sql, name=server_name) or "[]")
            both = json.dumps(present + json.loads(text), ensure_ascii=False)
            _put_schedule(db, server_name, both)
    return {"added": len(items)}


# === guests ======================================================================================

Driver = type[drivers.AbstractDriver]

_OURS: dict[str, Driver] = {item.get_engine(): item for item in (drivers.QemuGuestAgentDriver,)}


def driver_of(engine: str) -> Driver:
    """Return the driver class for an engine; plug-ins are read only if it is none of ours."""
    if not (found := _OURS.get(engine) or (known := plug_ins()).get(engine)):
        there_are = ", ".join(sorted(known))
        fault = f"unknown engine {engine!r}; one of {there_are}"
        raise UsageError(fault, "Name its file in $VMRM_DRIVERS")
    return found


def plug_ins() -> dict[str, Driver]:
    """Return the usable driver classes by engine: ours, and those of the files in $VMRM_DRIVERS."""
    known = dict(_OURS)
    for path in filter(None, os.environ.get("VMRM_DRIVERS", "").split(":")):
        try:
            for driver in _driver_file(Path(path)):
                engine = _engine_of(driver)
                if known.setdefault(engine, driver) is not driver:
                    raise ValueError(f"another driver has the engine {engine!r} already")
        except (Exception, SystemExit) as error:  # it is anybody's code
            fault = f"driver file {path!r}: {type(error).__name__}: {_one_line(error)}"
            raise UsageError(fault) from error
    return known


def _engine_of(driver: Driver) -> str:
    """Return a driver's engine. Raises TypeError for a method missing, ValueError for its name."""
    known = vars(drivers.AbstractDriver)
    missing = {n for n in known if callable(known[n]) and not callable(getattr(driver, n, None))}
    missing |= driver.__abstractmethods__
    if missing:
        raise TypeError(f"{driver.__name__} lacks {', '.join(sorted(missing))}")
    if not _is_text(engine := driver.get_engine()):
        raise ValueError(f"{driver.__name__}.get_engine() gives {engine!r}, no name")
    return engine


def _driver_file(path: Path) -> list[Driver]:
    """Run a driver file; return the driver classes that it defines and does not call private."""
    if not path.is_absolute():
        raise ValueError("its path is not absolute")
    with path.open("rb") as stream:  # which nobody can exchange after it was checked
        for info in (os.fstat(stream.fileno()), path.parent.stat()):
            sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
            if info.st_uid not in (0, os.geteuid()) or (info.st_mode & 0o022 and not sticky):
                raise PermissionError("others can write it or its directory: chmod go-w")
        source = stream.read()
    module = types.ModuleType(f"vmrm_driver_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(source, path, "exec"), module.__dict__)  # noqa: S102 - this is what it is for
    own = [i for i in vars(module).values() if getattr(i, "__module__", "") == module.__name__]
    found = [i for i in own if isinstance(i, type) and issubclass(i, drivers.AbstractDriver)]
    if public := [item for item in found if not item.__name__.startswith("_")]:
        return public
    raise ValueError("it has no subclass of AbstractDriver")


# --- one client per agent
#
# An agent lets a second client hang, so a lock of this host admits one. Its file lies beside the
# agent's UNIX socket (by its real path), or in one of SHARED_LOCKS where that cannot be written.
# It names pid and database of its holder. Who may use the socket may lock it, and nobody else.

SHARED_LOCKS = (Path("/run/lock/vmrm"), Path("/tmp/vmrm-locks"))  # noqa: S108


def _is_link_trouble(error: BaseException) -> bool:  # not trouble with what was asked of the agent
    return isinstance(error, drivers.DriverError) and not isinstance(error, drivers.AgentError)


@contextlib.contextmanager
def agent_lock(
    path: str, database: Path, wait: Callable[[float], object], seconds: float
) -> Iterator[None]:
    """Hold the lock of an agent's address, or raise Conflict after so many seconds."""
    file = _agent_lock_path(path)[0]
    lock = FileLock(file, lambda: _open_agent_lock(path))
    if not lock.take(seconds, wait):
        pid, _, base = file.read_text(errors="replace").strip().partition(" ")
        raise Conflict(
            f"agent {path!r} is held by process {pid} of database {base!r}",
            "One client at a time can talk to a guest agent; stop that one first",
        )
    try:
        with contextlib.suppress(OSError):  # on a full disk it is held without a name
            os.ftruncate(lock.fd, 0)
            os.pwrite(lock.fd, f"{os.getpid()} {database}\n".encode(), 0)
        yield
    finally:
        lock.release()


def refuse_others_locks(rows: Iterable[Mapping[str, Any]]) -> None:
    faults: dict[str, Conflict] = {}
    for row in rows:
        try:
            if row["path"]:
                os.close(_open_agent_lock(row["path"]))
        except Conflict as error:
            faults[row["server_name"]] = error
    for name, first in faults.items():
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise Conflict(f"VM {name!r}{more}: {first}", first.hint)


def _open_agent_lock(path: str) -> int:
    """Return a descriptor of an agent's lock file. Raises Conflict if it cannot be had."""
    lock, socket_path = _agent_lock_path(path)
    # Those of the socket, or of where it will be; any user of this host can reach a port.
    owner, group, mode = os.geteuid(), os.getegid(), 0o600 if socket_path else 0o666
    for place in (socket_path.parent, socket_path) if socket_path else ():
        with contextlib.suppress(OSError):
            info = place.stat()
            write = info.st_mode & 0o222
            owner, group, mode = info.st_uid, info.st_gid, write | write << 1
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:  # not with O_CREAT at once: another's file in a sticky directory would be refused
            fd = os.open(lock, flags)
        except FileNotFoundError:
            fd = os.open(lock, flags | os.O_CREAT, 0o600)
    except OSError as error:
        whose = f"which belongs to {_owner_of(lock)}, " if os.path.lexists(lock) else ""
        what = f"its lock {str(lock)!r}, {whose}cannot be opened: {error.strerror}"
        hint = f"As root: chown {owner}:{group} {shlex.quote(str(lock))}"
        raise Conflict(f"agent {path!r}: {what}", hint) from error
    info = os.fstat(fd)
    # Nobody must make us hand over, or overwrite, anything else under that name.
    content = os.pread(fd, 8192, 0)
    if not (stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and re.match(rb"\d+ |$", content)):
        os.close(fd)
        raise Conflict(f"agent {path!r}: {str(lock)!r} is no lock of vmrm", "Remove that file")
    if (me := os.geteuid()) in (0, info.st_uid):
        os.fchmod(fd, mode)
        with contextlib.suppress(PermissionError):  # only root gives to anybody
            os.fchown(fd, -1 if me else owner, group)
    return fd


def _owner_of(path: Path) -> str:
    import pwd

    uid = path.lstat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _agent_lock_path(path: str) -> tuple[Path, Path | None]:
    """Return the lock file of an agent's address, and its socket's real path, if it has one."""
    address = path.removeprefix("unix:")
    if address.startswith(("tcp:", "vsock:")):
        return _shared_locks(path) / _digest(address), None
    real = Path(os.path.realpath(address))
    beside, name = real.with_name(real.name + ".vmrm-lock"), _digest(str(real))
    shared = [directory / name for directory in SHARED_LOCKS if _is_trusted(directory)]
    for lock in (beside, *shared):  # whichever exists is the one
        if os.path.lexists(lock):
            return lock, real
    return (beside if os.access(real.parent, os.W_OK) else _shared_locks(path) / name), real


def _is_trusted(directory: Path) -> bool:  # root's or ours, and nobody else can remove our files
    with contextlib.suppress(OSError):
        info = directory.lstat()
        sticky = stat.S_ISDIR(info.st_mode) and bool(info.st_mode & stat.S_ISVTX)
        return sticky and info.st_uid in (0, os.geteuid()) and os.access(directory, os.W_OK)
    return False


def _shared_locks(path: str) -> Path:
    """Return a directory for locks that lie beside no socket. Raises Conflict if it is others'."""
    for directory in SHARED_LOCKS:
        with contextlib.suppress(OSError):
            directory.mkdir()
            directory.chmod(0o1777)  # which the umask would cut
        if os.geteuid() == 0 and not _is_trusted(directory):  # root takes it over
            with contextlib.suppress(OSError):
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                os.fchown(fd, 0, 0)
                os.fchmod(fd, 0o1777)
                os.close(fd)
        if _is_trusted(directory):
            return directory
    there = [directory for directory in SHARED_LOCKS if os.path.lexists(directory)]
    those = " and ".join(f"{str(directory)!r} of {_owner_of(directory)}" for directory in there)
    raise Conflict(
        f"agent {path!r}: no directory for its lock is root's, sticky and for all: {those}",
        f"As root: install -d -o root -m 1777 {SHARED_LOCKS[0]}",
    )


# --- the scripts that run in the guest
#
# POSIX sh only (busybox is enough); below, PowerShell for Windows, and batch files for what starts
# programs there. All data reaches them quoted or as arguments. In an attempt's directory: pid (and
# its start time; POSIX), out, err, exit (exit code, and 1 if it asks for a reboot).

CLAIM_FAILED = 125  # the script's own exit code when it could not or must not begin
PLACE_FAILED = 126  # a file could not be put in its place
KILLED = "killed by stop --kill"

# The agent makes files that everybody may open, and who has one open keeps it. So what is ours lies
# where nobody else comes: below a directory that only root or the agent's user can change. A file
# for a place where others may write is completed in a directory of our own there, seen from
# inside; so nobody can open it before it has its mode, or lead it elsewhere by a link. We go to a
# place step by step: whatever another user swaps meanwhile, we stand where the path says, or stop.

_TRUSTED_SH = """\
trusted() (
    at=$1 sticky=$2 me=$(id -u)
    while :; do
        loose=; set -f; set -- $(ls -ldn "${at:-/}"); set +f
        case $1 in
            l*) ;;
            ????????w[tT]* | ?????w???[tT]*) [ -n "$sticky" ] || loose=yes ;;
            ????????w* | ?????w????+*) loose=yes ;;
            ?????w*)
                [ "$4" = 0 ] || {
                    [ "$4" = "$(id -g)" ] && [ "$(id -un)" = "$(id -gn)" ]
                } || loose=yes ;;
        esac
        [ "$3" = 0 ] || [ "$3" = "${me:-0}" ] || loose=yes
        if [ -n "$loose" ]; then
            echo "other users of the VM can change ${at:-/} ($1 $3 $4)" >&2; exit 1
        fi
        [ -n "$at" ] || exit 0
        at=${at%/*} sticky=yes
    done
)
enter() {  # a directory, made with umask $2; through no link that another user can change
    at= left=$1/ links=
    cd / || return 1
    while [ -n "$left" ]; do
        part=${left%%/*} left=${left#*/}
        case $part in
            '' | .) continue ;;
            ..) at=${at%/*} ;;
            *) at=$at/$part ;;
        esac
        if [ -L "./$part" ]; then
            links=x$links
            [ ${#links} -lt 40 ] && trusted "$at" sticky || return 1
            left=$(readlink "./$part")/$left at=${at%/*}
            case $left in /*) at=; cd / ;; esac
            continue
        fi
        if [ ! -d "./$part" ] && ! (umask "$2"; mkdir -p "./$part"); then
            echo "$at cannot be made" >&2; return 1
        fi
        cd -P "./$part" || return 1
        if [ "$PWD" != "${at:-/}" ]; then
            echo "other users of the VM can change $at" >&2; return 1
        fi
    done
}
"""

_PLACE_SH = f"""\
{_TRUSTED_SH}
place() (
    name=${{2##*/}}
    enter "${{2%/*}}" 022 || exit 1
    if [ -d "./$name" ]; then echo "$2 is a directory" >&2; exit 1; fi
    umask 077
    own=$(mktemp -d .vmrm-XXXXXX) && cd -P "./$own" && [ -O . ] || exit 1
    case $(pwd -P) in */"$own") ;; *) exit 1 ;; esac
    only=; case $(mv --help 2>&1) in *-T,* | *T]*) only=T ;; esac
    $4 "$1" file && chmod "$3" file &&
        {{ [ -n "$only" ] || [ ! -d "../$name" ]; }} && mv -f$only file "../$name"
    code=$?
    rm -f file; cd -P .. && rmdir "./$own"
    exit $code
)
"""

_CALL_SCRIPT = """\
#!/bin/sh
# vmrm: {title}
umask 077
if [ "$2" != {token} ]; then
    echo "this launch directory is used by another VM or experiment" >&2
    exit {claim_failed}
fi
here=$1 session=$3  # below the directory that this script stays in, wherever that is moved
[ -r /proc/$$/stat ] && read -r line < /proc/$$/stat
set -f; set -- ${{line##*) }}; set +f
group=$3 started=${{20}}
if [ "$session" != own ] && [ "$group" != "$$" ] && command -v setsid >/dev/null 2>&1; then
    exec setsid /bin/sh {script} "$here" {token} own
fi
cd {folder} || exit {claim_failed}
mkdir "$here" || exit {claim_failed}
{{ echo "$$ $started" > "$here/pid"; }} 2>/dev/null
if (true > "$here/out" && true > "$here/err") 2>/dev/null; then
    exec > "$here/out" 2> "$here/err" < /dev/null
else
    exec > /dev/null 2>&1 < /dev/null
fi
{owning}
code=0
{placing}
if [ "$code" = 0 ]; then
    {running}
    code=$?
fi
reboot=0; [ -e {reboot} ] && reboot=1
{{ echo "$code $reboot" > "$here/exit.new" && mv -f "$here/exit.new" "$here/exit"; }} 2>/dev/null
exit "$code"
"""

# What a guest is asked, or has to do, by verb, for sh and for PowerShell. The parameters:
# - lay-out: the stage, experiment and VM that own it, a word for what is old, folders to move
#   aside; by stdin (Windows: in a file, words between tabs) lines that call the functions. `script`
#   makes a script, for the agent's own user or another, who gets the directory named third; root
#   runs and writes nothing that such a user could have put there. Tells what lies in the stage.
#   A link is made with its content in one step: two VMs that share a directory cannot both own it.
#   Windows: any user may change what is made on a drive, hence icacls.
# - probe, forbid: directories of attempts. `probe` looks for life before the exit code: what is
#   gone by then has written its code. `forbid` takes the place of those that have not begun.
#   Windows: a batch file cannot tell its pid, its command line has its path and the attempt.
# - signal: a signal's name and a pid, without "--", which dash's kill does not know; the group, or
#   where there is no setsid the process. Windows: all that it started ends, whatever the signal.
# - list: a path or glob. Windows: a directory's entry lags behind a file that is open, hence
#   Refresh; a link is listed by nobody, but the place that was asked for may be one.
# - receive, deliver, discard: a file that is pushed, and a token; it arrives where it belongs if
#   nobody else can change that, else in a directory of ours.
_SCRIPTS = {
    "lay-out": (
        f"""\
{_TRUSTED_SH}
umask 077
stage=$1 experiment=$2 vm=$3 old=$4; shift 4
enter "${{stage%/*}}" 066 && trusted "$(pwd -P)" || exit 1
chmod a+x . 2>/dev/null  # for the users of entries
private() {{ [ -O "$stage" ] && case $(ls -ld "$stage") in drwx------*) ;; *) false ;; esac; }}
if [ -e "$stage" ] || [ -L "$stage" ]; then
    private || rm -rf "$stage"  # what lay in an open one may still be open
fi
[ -d "$stage" ] || mkdir "$stage" 2>/dev/null  # another VM that shares it may be faster
private || {{ echo "$stage cannot be made" >&2; exit 1; }}
[ -L "$stage/of.$experiment" ] || ln -s "$vm" "$stage/of.$experiment" 2>/dev/null
if [ "$(readlink "$stage/of.$experiment")" != "$vm" ]; then
    echo "this launch directory is used by another VM of this experiment" >&2; exit 1
fi
for folder; do
    [ -e "./$folder" ] || continue
    mkdir -p ".previous/$old" && mv "./$folder" ".previous/$old/" || exit 1
done
keep() {{
    if command -v sha256sum >/dev/null 2>&1; then sum=$(sha256sum < "$1.part"); else sum=$1; fi
    if [ "${{sum%% *}}" != "$1" ] || [ "$(($(wc -c < "$1.part")))" != "$2" ]; then
        echo "$1 arrived damaged" >&2; rm -f "$1.part"; exit 1
    fi
    chmod 600 "$1.part" && mv -f "$1.part" "$1" || exit 1
}}
text() {{ printf %s "$2" > "$1.part" && mv -f "$1.part" "$1" || exit 1; }}
script() {{
    folder=${{1%/*}} new=$1.new-$$ mode=711
    for made in "${{folder%/*}}" "$folder"; do
        [ -d "$made" ] || mkdir -m $mode "$made" || exit 1
        if [ ! -O "$made" ] || [ -L "$made" ]; then echo "$made is another user's" >&2; exit 1; fi
        mode=755
    done
    umask 277; printf %s "$4" > "$new" || exit 1; umask 077
    if [ -n "$2" ]; then
        [ -d "$3" ] || mkdir -m 755 "$3" || exit 1
        chown "$2" "$3" "$new" || exit 1
    fi
    mv -f "$new" "$1" || exit 1
}}
cd "$stage" && eval "$(cat)" || exit 1
for some in *; do [ ! -f "$some" ] || {{ wc -c * 2>/dev/null; break; }}; done
exit 0
""",
        drivers.STOP_PS
        + r"""
$stage, $experiment, $vm, $old, $aside = $w; $lines = "lines.$old"
function fail($why) { [Console]::Error.WriteLine($why); exit 1 }
function folder($path) { [void](New-Item -ItemType Directory -Force -Path $path) }
function replace($to, $from) { Move-Item -Force -LiteralPath $from -Destination $to }
folder $stage
icacls.exe (Split-Path -Parent $stage) /inheritance:r /grant:r '*S-1-5-18:(OI)(CI)F' `
    '*S-1-5-32-544:(OI)(CI)F' | Out-Null
if ($LASTEXITCODE) { fail 'icacls fails' }
Set-Location -LiteralPath $stage; [Environment]::CurrentDirectory = $stage
[IO.File]::WriteAllText("new.$old", $vm)
try { [IO.File]::Move("new.$old", "of.$experiment") }  # which replaces nothing
catch { Remove-Item -LiteralPath "new.$old" }
if ([IO.File]::ReadAllText("of.$experiment") -ne $vm) {
    fail 'this launch directory is used by another VM of this experiment'
}
foreach ($name in $aside) {
    if (Test-Path -LiteralPath "..\$name") {
        folder "..\.previous\$old"
        replace "..\.previous\$old" "..\$name"
    }
}
foreach ($line in Get-Content -Encoding UTF8 -LiteralPath $lines -ErrorAction Ignore) {
    $verb, $content, $word = $line.Split([char]9)
    if ($verb -eq 'script') {
        folder (Split-Path -Parent $word)
        Copy-Item -LiteralPath $content -Destination "$word.new"
        replace $word "$word.new"
    } else {
        $size = (Get-Item -LiteralPath "$content.part").Length
        if ($size -ne $word) { fail "$content arrived damaged" }
        replace $content "$content.part"
    }
}
Remove-Item -LiteralPath $lines -ErrorAction Ignore
Get-ChildItem -File | ForEach-Object { '{0} {1}' -f $_.Length, $_.Name }
""",
    ),
    "probe": (
        """\
for here; do
    if [ ! -d "$here" ]; then echo none; continue; fi
    code= pid= life=gone
    [ -f "$here/pid" ] && { read -r pid < "$here/pid" || pid=; }  # half a line is none
    if [ -n "$pid" ]; then
        line=$(cat "/proc/${pid% *}/stat" 2>/dev/null); set -f; set -- ${line##*) }; set +f
        if [ -e /proc/self/stat ]; then
            [ "${20}" = "${pid#* }" ] && [ "$1" != Z ] && life=alive
        else
            kill -0 "${pid% *}" 2>/dev/null && life=alive
        fi
    fi
    [ -f "$here/exit" ] && read -r code < "$here/exit"
    echo "claim:$code:$pid:$life"
done
""",
        r"""
$all = @(Get-CimInstance Win32_Process -Filter "Name='cmd.exe'")
foreach ($here in $w) {
    if (-not (Test-Path -LiteralPath $here -PathType Container)) { 'none'; continue }
    $code = ''; $file = Join-Path $here 'exit'
    if (Test-Path -LiteralPath $file) {
        $code = [IO.File]::ReadAllText($file).Trim() -replace '\s+', ' '
    }
    $script = Join-Path (Split-Path $here) 'call_arguments.bat'
    $number = (Split-Path -Leaf $here).Substring('attempt.'.Length)
    $pattern = [regex]::Escape($script) + '"? (attempt[.])?' + [regex]::Escape($number) + ' '
    $p = $all | Where-Object { $_.CommandLine -match $pattern } | Select-Object -First 1
    $life = if ($p) { 'alive' } else { 'gone' }
    'claim:{0}:{1}:{2}' -f $code, $p.ProcessId, $life
}
""",
    ),
    "forbid": (
        f"""\
umask 077
for here; do
    mkdir "$here" 2>/dev/null && echo "{CLAIM_FAILED} 0" > "$here/exit"
done
exit 0
""",
        f"""
foreach ($here in $w) {{
    cmd.exe /d /c mkdir $here 2>$null
    if (-not $LASTEXITCODE) {{ [IO.File]::WriteAllText("$here\\exit", '{CLAIM_FAILED} 0') }}
}}
""",
    ),
    "signal": (
        'kill -"$1" "-$2" 2>/dev/null || kill -"$1" "$2" 2>/dev/null',
        "taskkill.exe /T /F /PID $w[1] | Out-Null; exit 1",
    ),
    "has-program": (
        'set -f; case $1 in */*) [ -e "$1" ]; exit;; esac; '
        'IFS=:; for d in $PATH; do [ -e "$d/$1" ] && exit 0; done; exit 1',
        "exit [int](-not (Test-Path -LiteralPath $w[0]))",
    ),
    "list": (
        """\
IFS=
now=$(date +%s)
quick=; find -H / -maxdepth 0 -printf '' >/dev/null 2>&1 && quick=yes  # no process per file
for top in $1; do
    [ -e "$top" ] || continue
    if [ -n "$quick" ]; then
        find -H "$top" '(' -type f -o -type d ')' -printf "%y %m %s %T@ $now %p\\0"
        continue
    fi
    find -H "$top" '(' -type f -o -type d ')' -exec /bin/sh -c '
        now=$1; shift
        for path; do
            kind=f; [ -d "$path" ] && kind=d
            facts=$(stat -L -c "%a %s %Y" "$path" 2>/dev/null) || continue  # it is gone again
            printf "%s %s %s %s\\0" "$kind" "$facts" "$now" "$path"
        done' sh "$now" {} +
done
""",
        f"""{drivers.TELL_PS}
$now = seconds ([datetime]::UtcNow); $todo = New-Object Collections.Stack
Get-Item -Force -Path $w[0] -ErrorAction SilentlyContinue | ForEach-Object {{ $todo.Push($_) }}
while ($todo.Count) {{
    $f = $todo.Pop(); $f.Refresh()
    if (-not $f.Exists) {{ continue }}
    $kind, $size = 'f', $f.Length
    if ($f.PSIsContainer) {{
        $kind, $size = 'd', 0
        Get-ChildItem -Force -LiteralPath $f.FullName -ErrorAction SilentlyContinue |
            Where-Object {{ -not ($_.Attributes -band [IO.FileAttributes]::ReparsePoint) }} |
            ForEach-Object {{ $todo.Push($_) }}
    }}
    $time = seconds $f.LastWriteTimeUtc
    tell ('{{0}} 600 {{1}} {{2}} {{3}} {{4}}' -f $kind, $size, $time, $now, $f.FullName)
}}
""",
    ),
    "hash": (
        'head -c "$2" < "$1" | sha256sum',
        drivers.STOP_PS
        + """
$h = [Security.Cryptography.SHA256]::Create(); $b = New-Object byte[] 1048576
$left = [int64]$w[1]
$s = New-Object IO.FileStream($w[0], 'Open', 'Read', 'ReadWrite, Delete')
while ($left -gt 0) {
    $n = $s.Read($b, 0, [int][Math]::Min($left, $b.Length))
    if (-not $n) { exit 1 }
    [void]$h.TransformBlock($b, 0, $n, $b, 0); $left -= $n
}
[void]$h.TransformFinalBlock($b, 0, 0)
-join ($h.Hash | ForEach-Object { $_.ToString('x2') })
""",
    ),
    "facts": (
        'ls -ldnL "$1"',
        drivers.STOP_PS
        + """
$f = Get-Item -Force -LiteralPath $w[0]; $kind = if ($f.PSIsContainer) { 'd' } else { '-' }
'{0}rw------- 1 0 0 {1} ' -f $kind, $f.Length
""",
    ),
    "receive": (
        f"""\
{_TRUSTED_SH}
kib=$((($2 + 1023) / 1024))
if [ -d "$1" ]; then echo "it is a directory" >&2; exit 1; fi
folder=$(enter "${{1%/*}}" 022 && pwd -P) || exit 1
full() {{
    set -f; set -- "$2" "$1" $(df -Pk "$1" 2>/dev/null | tail -n 1)
    case $6 in '' | *[!0-9]*) return 1 ;; esac
    [ "$6" -lt "$1" ] && echo "no space in the VM for $1 KiB at $2" >&2
}}
full "$folder" "$kib" && exit 1
for place in "$folder" /var/tmp /tmp /run; do
    [ -d "$place" ] && place=$(enter "$place" 022 && pwd -P) || continue
    trusted "$place" sticky 2>/dev/null || continue
    full "$place" "$kib" && exit 1
    place=${{place%/}}/.vmrm-$3
    umask 077; mkdir "$place" && echo "$place/data"
    exit
done
echo "other users can change $folder, and there is no /var/tmp or /tmp" >&2; exit 1
""",
        drivers.STOP_PS
        + """
$folder = [IO.Path]::GetDirectoryName($w[0])
New-Item -ItemType Directory -Force -Path $folder | Out-Null
$free = (Get-Item -LiteralPath $folder).PSDrive.Free
if ($free -and $free -lt [int64]$w[1]) { [Console]::Error.WriteLine('no space in the VM'); exit 1 }
"$($w[0]).vmrm-$($w[2])"
""",
    ),
    "deliver": (
        _PLACE_SH + 'place "$1" "$2" "$3" mv || exit 1; rmdir "${1%/*}"',
        drivers.STOP_PS
        + """
if (Test-Path -LiteralPath $w[1] -PathType Container) {
    Remove-Item -LiteralPath $w[0]; [Console]::Error.WriteLine('it is a directory'); exit 1
}
Move-Item -Force -LiteralPath $w[0] -Destination $w[1]
""",
    ),
    "discard": (
        """\
for place in "${1%/*}" /var/tmp /tmp /run; do
    rm -f "$place/.vmrm-$2/data"; rmdir "$place/.vmrm-$2"
done 2>/dev/null
exit 0
""",
        drivers.STOP_PS + 'Remove-Item -Force -LiteralPath "$($w[0]).vmrm-$($w[1])"',
    ),
    "copy": ("", drivers.STOP_PS + "[IO.File]::Copy($w[0], $w[1], $true)"),
}

_STAGED = re.compile(r"^ *(\d{1,18}) ([0-9a-f]{64})\r?$", re.MULTILINE | re.ASCII)
_LINES_AT_ONCE = 32  # while an agent reads them, nothing else begins
_TEXT_BYTES = 1 << 12  # a content that is no longer costs less as a line than as a file
_NOT_PLAIN = re.compile(r"[^ -~]")


class Staged(NamedTuple):  # a content that must lie in the stage before the first entry runs
    sha256: str
    size: int
    source: Callable[[], BinaryIO]
    text: str = ""  # if it is one


class Found(NamedTuple):  # what an attempt has left in the guest
    claimed: bool
    exit_code: int | None = None
    reboot: bool = False
    pid: int | None = None
    alive: bool = False


class Script(NamedTuple):
    text: str
    path: str
    user: str = ""  # whose it is; '': the agent's


def text_content(text: str) -> Staged:
    data = text.encode()
    return Staged(hashlib.sha256(data).hexdigest(), len(data), lambda: io.BytesIO(data), text)


def is_guest_path(path: str) -> bool:
    """Whether a path means the same wherever a program of the guest stands, whatever its system."""
    return PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def entry_files(entry: ScheduleEntry) -> list[dict[str, Any]]:
    return entry.items("file") + entry.items("content")


def parse_found(line: str) -> Found:
    """Return what one line of the probe, which the guest wrote, says. Raises ValueError."""
    if line == "none":
        return Found(claimed=False)
    match = re.fullmatch(r"claim:(.*):(?:([1-9][0-9]{0,9})(?: [0-9]+)?)?:(alive|gone)", line)
    if match is None:
        raise ValueError(f"unexpected answer of the probe: {line[:80]!r}")
    exit_code, reboot = None, False
    with contextlib.suppress(ValueError):  # the doubt of one entry, not of the VM
        exit_code, reboot = parse_exit(match[1])
    pid = int(match[2]) if match[2] else None
    return Found(True, exit_code, reboot, pid, match[3] == "alive")


def parse_exit(text: str) -> tuple[int, bool]:
    """Return exit code and reboot wish from an attempt's `exit` file. Raises ValueError."""
    match = re.fullmatch(r"(-?[0-9]{1,10}) ([01])\r?\n?", text)  # Windows has 32 bits
    if match is None:
        raise ValueError(f"unexpected exit file in the guest: {text[:80]!r}")
    return int(match[1]), match[2] == "1"


# --- Windows
#
# cmd.exe reads a batch file line by line: first %NAME% is replaced, then quotes and ^ decide which
# of & | < > ( ) mean something; what is left reaches a program as one string, which the program
# takes apart by the rules of CommandLineToArgvW. Not every cmd.exe knows "||" and "&&".

_CALL_BATCH = """\
@echo off
rem vmrm: {title}
setlocal EnableExtensions DisableDelayedExpansion
if "%~2"=="{token}" goto ours
echo this launch directory is used by another VM or experiment>&2
exit /b {claim_failed}
:ours
cd /d {working_dir}
if errorlevel 1 exit /b {claim_failed}
mkdir "%~1"
if errorlevel 1 exit /b {claim_failed}
set "here=%~1"
cmd.exe /d /e:on /v:off /c .\\call_program.bat >"%here%\\out" 2>"%here%\\err" <nul
set code=%errorlevel%
set reboot=0
if exist {reboot} set reboot=1
>"%here%\\exit.new" echo %code% %reboot%
move /y "%here%\\exit.new" "%here%\\exit" >nul
exit /b %code%
"""

# One file of the entry: a directory in its place is not replaced.
_PLACE_BATCH = """\
if exist {as_folder} echo {location} is a directory>&2
if exist {as_folder} exit /b {place_failed}
if not exist {folder_as_folder} mkdir {folder}
copy /b /y {content} {temporary} >nul
if errorlevel 1 exit /b {place_failed}
move /y {temporary} {location} >nul
if errorlevel 1 exit /b {place_failed}"""


_BATCH_LINE = 8000  # cmd.exe takes 8191 characters
_PLAIN_LAUNCH = re.compile(r"[A-Za-z]:\\[A-Za-z0-9 ._~\\-]*")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_./\\:@+-]+")
_NO_WINDOWS_PATH = re.compile(r"[\x00-\x1f\"<>|?*]")
_NO_BATCH_TEXT = re.compile(r"[\x00-\x08\x0a-\x1f]")


def batch_text(text: str) -> str:
    """Return a text for a line of a batch file that cmd.exe passes on unchanged."""
    # Quotes are escaped, too, so that there is no quoted part in which `^` would escape nothing.
    return re.sub(r'[()!^"<>&|]', r"^\g<0>", text).replace("%", "%%")


def _is_batch(program: str) -> bool:
    return PureWindowsPath(program).suffix.lower() in (".bat", ".cmd")


def batch_command(program: str, arguments: Sequence[str]) -> str:
    if odd := [word for word in (program, *arguments) if _NO_BATCH_TEXT.search(word)]:
        what = f"a line break or control character: {odd[0][:40]!r}"
        raise WrongValue(f"cmd.exe cannot carry {what}; pass it in a file")
    is_batch, quoted = _is_batch(program), [word for word in arguments if '"' in word]
    if is_batch and quoted:
        what = f'an argument with ": {quoted[0][:40]!r}'
        where = "pass it in a file, or in the environment"
        raise WrongValue(f"a batch file cannot be given {what}; {where}")
    if quoted and PureWindowsPath(program).suffix.lower() not in (".exe", ".com"):
        program += ".exe"  # what has another suffix on the PATH might be a batch file
    told = []
    for word in arguments:  # `a,b` is one word to a program, two to a batch file
        # Backslashes before a quote or the end are doubled, as the C run time reads them back.
        run_time = re.sub(r'\\*(?="|\Z)', lambda match: match[0] * 2, word).replace('"', r"\"")
        inner = word if is_batch else run_time
        told.append(word if _PLAIN_WORD.fullmatch(word) else f'"{inner}"')
    return f"{_batch_path(program)} {batch_text(' '.join(told))}".rstrip(" ")


def _batch_path(path: str, inside: str = "") -> str:
    if _NO_WINDOWS_PATH.search(path):
        raise WrongValue(f"no path of Windows: {path!r}")
    return '"' + path.replace("%", "%%") + inside + '"'


def _batch_folder(path: str) -> str:  # for `if exist`: a directory, an empty one too
    return _batch_path(path.rstrip("\\"), "\\*")


def batch_file(text: str) -> str:
    """Return a batch file as cmd.exe wants it: lines end with CR LF, and UTF-8 is announced."""
    lines = re.split(r"\r?\n", text)
    if not text.isascii():  # without a console it fails, and only a program sets ERRORLEVEL back
        lines[1:1] = ["chcp 65001 >nul 2>nul", "cmd.exe /d /c exit 0"]
    longest = max(len(line.encode("utf-16-le")) // 2 for line in lines)
    if longest > _BATCH_LINE:
        raise WrongValue(f"cmd.exe takes no line of {longest} characters; use a file")
    return "\r\n".join(lines)


class Guest:
    """Where programs of a VM run: its driver, its system's paths and scripts, its present boot."""

    name = "guest"
    is_windows = False
    launch = "/var/launch"
    always_tells_boot = False  # unless it cannot run programs yet
    reboots = True  # if an entry asks for it
    has_date = True  # to set a clock that the agent cannot
    captures = True  # what a script says before its claim is kept for the error's message
    flavour: type[PurePath] = PurePosixPath

    def __init__(
        self,
        driver: drivers.AbstractDriver,
        launch_dir: str = "",  # the system's own
        seconds: float = 30,  # for one of our scripts that everything waits for
        patience: float = 300,  # for one that holds up nothing else
    ) -> None:
        self.driver, self.seconds, self.patience = driver, seconds, max(seconds, patience)
        self.launch = launch_dir or self.launch
        self.stage = self.join(self.launch, ".stage")
        self.boot = ""  # as its id was when we connected

    def check_boot(self) -> None:
        """Notice a reboot that nobody asked for; it does not break the link to the agent."""
        if self.driver.boot_id() != self.boot:
            raise drivers.LinkLost("the guest was rebooted")

    # --- places

    def runs(self, entry: ScheduleEntry) -> bool:
        return not entry.on_host

    def name_places(self, entries: Iterable[ScheduleEntry]) -> None:
        """Give all entries that run here their places, which follow from the whole schedule."""
        self.driver.used_agent_paths.clear()
        for entry in entries:
            self.driver.create_paths(entry)

    def join(self, *parts: str) -> str:
        return str(self.flavour(*parts))

    def path(self, entry: ScheduleEntry, location: str) -> str:
        return str(self.flavour(entry.working_dir) / location)

    def folder(self, entry: ScheduleEntry) -> PurePath:
        """Return where an entry's script and attempts lie; it is never the entry's user's."""
        return self.flavour(entry.call_arguments_filename).parent

    def attempt_dir(self, entry: ScheduleEntry, attempt: Attempt) -> str:
        return self.join(str(self.folder(entry)), attempt.claim)

    # --- our scripts

    def argv(self, verb: str, *words: str) -> list[str]:
        return drivers.script_argv(_SCRIPTS[verb], self.is_windows, *words)

    def command(self, script: str, *words: str) -> list[str]:
        return ["/bin/sh", script, *words]

    def unfit(self, argv: Sequence[str]) -> list[str]:
        """Return the arguments that the agent cannot hand to a program as they are."""
        return []

    def ask(self, verb: str, *words: str) -> drivers.ExecStatus:
        """Ask the guest something; an agent that cannot is no verdict on what was asked about."""
        try:
            return self.driver.run(self.argv(verb, *words), timeout=self.seconds)
        except drivers.AgentError as error:
            raise drivers.LinkLost(f"the agent cannot look: {error}") from error

    def finish(self, argv: Sequence[str], more: float = 0.0, lines: str = "") -> Steps:
        """Run a program of ours within our patience and `more`; return its status."""
        pid = self.driver.start(argv, input_data=lines or None, capture=True)
        try:
            status = yield from self.await_end(pid, self.patience + more)
            if not status.exited:
                what = printable(" ".join(argv[3:] or argv[1:])[:200])  # without a script
                raise VMFailed(f"a program of ours does not end in the guest: {what}")
        except (_EntryFailed, VMFailed):
            with contextlib.suppress(drivers.DriverError):
                self.signal("KILL", pid)
            raise
        return status

    def await_end(self, pid: int, seconds: float = math.inf) -> Steps:
        interval, deadline = 0.002, CLOCK.monotonic() + seconds
        while not (status := self.driver.status(pid)).exited and CLOCK.monotonic() < deadline:
            yield interval
            interval = min(interval * 1.5, 0.5)
        return status

    # --- what entries need

    def content(self, location: str, text: str) -> str:  # as the file there must have it
        return text

    def scripts(
        self, entry: ScheduleEntry, title: str, token: str, placed: Sequence[tuple[str, str]]
    ) -> list[Script]:
        """Return the scripts of an entry, which refuse to run for a caller with another token.

        `placed` is (SHA-256, file mode) of each file of `entry_files`, in that order.
        """
        folder, user, own, running = self.folder(entry), entry.options.get("user", ""), [], ":"
        if entry.executable:
            running = f"(\n{run_commands(entry)}\n)"
            if user:
                path = str(folder / "call_program.sh")
                own = [Script(run_commands(entry) + "\n", path, user)]
                running = f"su -s /bin/sh {shlex.join([user, path])}"
        locations = [self.path(entry, item["location"]) for item in entry_files(entry)]
        words = [
            shlex.join([f"{self.stage}/{sha256}", path, mode])
            for path, (sha256, mode) in zip(locations, placed, strict=True)
        ]
        placing = [f"[ $code = 0 ] && {{ place {w} cp || code={PLACE_FAILED}; }}" for w in words]
        script = _CALL_SCRIPT.format(
            title=_NOT_PLAIN.sub("?", title),
            token=token,
            claim_failed=CLAIM_FAILED,
            script=shlex.quote(str(entry.call_arguments_filename)),
            folder=shlex.quote(str(folder)),
            # Else the user's program could not open /dev/stdout.
            owning=f'chown {shlex.quote(user)} "$here/out" "$here/err" 2>/dev/null'
            if user
            else ":",
            placing="\n".join([_PLACE_SH, *placing] if placing else []),
            running=running,
            reboot=PurePosixPath(entry.reboot_filepath).relative_to(folder),
        )
        return [Script(script, str(entry.call_arguments_filename)), *own]

    def stage_steps(
        self,
        owner: tuple[str, str],
        aside: Iterable[str],
        scripts: Iterable[Script],
        contents: Iterable[Staged],
        progress: Callable[..., None],
    ) -> Steps:
        """Make the stage, bring scripts to their places and contents, each once, to the stage.

        It is its owner's alone: an experiment's VM. Folders that an older one left go aside.
        """
        lines, contents, after = self._carried(scripts, contents)
        present = yield from self._lay_out_steps(owner, aside, lines)
        for staged in contents:
            if (staged.sha256, staged.size) not in present:
                # In full: a reset may cut short what was not synced.
                yield from self._push_steps(staged, f"{staged.sha256}.part", progress)
                present.add((staged.sha256, staged.size))
                after.insert(0, self._line("keep", staged.sha256, str(staged.size)))
        if after:
            yield from self._lay_out_steps(owner, (), after)

    def _line(self, *words: str) -> str:
        return shlex.join(words)

    def _carried(
        self, scripts: Iterable[Script], contents: Iterable[Staged]
    ) -> tuple[list[str], list[Staged], list[str]]:  # lines, what must be pushed, lines after that
        lines, files = ['for old in ./*.part; do [ ! -e "$old" ] || rm -f "$old"; done'], []
        for staged in contents:
            if 0 < len(staged.text) < _TEXT_BYTES and "\0" not in staged.text:
                lines.append(self._line("text", staged.sha256, staged.text))
            else:
                files.append(staged)
        for script in scripts:
            mine = str(self.flavour(script.path).with_name(drivers.USER_FOLDER))
            lines.append(self._line("script", script.path, script.user, mine, script.text))
        return lines, files, []

    def _lay_out_steps(
        self, owner: tuple[str, str], aside: Iterable[str], lines: Sequence[str]
    ) -> Steps:
        """Do what lines say, some at a time; return names and sizes of what lies in the stage."""
        old = f"{CLOCK.wall():.0f}-{os.urandom(4).hex()}"
        for at in range(0, len(lines), _LINES_AT_ONCE):
            # What is cut short in a brace is no command, so nothing of it is done.
            told = "\n".join(["{", *lines[at : at + _LINES_AT_ONCE], "}\n"])
            words = self.stage, *owner, old, *(() if at else aside)
            status = yield from self.finish(self.argv("lay-out", *words), lines=told)
            present = self._in_stage(status)
        return present

    def _in_stage(self, status: drivers.ExecStatus) -> set[tuple[str, int]]:
        if status.exitcode != 0:
            raise VMFailed(f"cannot prepare {self.stage!r}: {printable(status.err)}")
        listed = _STAGED.findall(status.out.decode(errors="replace"))
        return {(sha256, int(size)) for size, sha256 in listed}

    def _push_steps(self, staged: Staged, name: str, progress: Callable[..., None]) -> Steps:
        path = self.join(self.stage, name)
        with staged.source() as source:
            try:
                for sent in self.driver.push(source, path):
                    progress("staged", staged.sha256, sent >> 20)
                    yield 0
            except drivers.AgentError:  # a full disk, for example
                self.driver.delete_file(path)
                raise

    # --- attempts

    def start(self, entry: ScheduleEntry, attempt: Attempt, token: str) -> int:
        """Start an entry's script, which claims the attempt first; return its pid."""
        words = str(entry.call_arguments_filename), attempt.claim, token
        return self.driver.start(self.command(*words), capture=self.captures)

    def refused(self, status: drivers.ExecStatus) -> bool:
        """Whether a script that has ended did not begin: with a claim it has nothing to tell."""
        return bool(status.err)

    def look(self, directories: Sequence[str]) -> list[Found]:
        """Ask what attempts have left, once all earlier requests have run: an agent is serial."""
        if not directories:
            return []
        told = self.ask("probe", *directories).out.decode(errors="replace").split("\n")
        try:
            return [parse_found(told[n].removesuffix("\r")) for n in range(len(directories))]
        except (ValueError, IndexError) as error:
            raise VMFailed(f"cannot determine what has run in the {self.name}: {error}") from error

    def look_at(self, directory: str) -> Found:
        """Ask what one attempt has left, at first for its end alone, which costs no process."""
        with contextlib.suppress(drivers.AgentError, ValueError):
            left = self.driver.read_bytes(self.join(directory, "exit"), limit=64)
            return Found(True, *parse_exit(left.decode()))
        return self.look([directory])[0]

    def signal(self, name: str, pid: int) -> bool:
        return self.ask("signal", name, str(pid)).exitcode == 0

    def read(self, path: str, limit: int, offset: int, last: bool) -> bytes:
        """Return a piece of a file; `last` says that there will not be another chance."""
        return self.driver.read_bytes(path, limit=limit, offset=offset)

    def pull(
        self, path: str, sink: BinaryIO, *, offset: int = 0, limit: int | None = None
    ) -> Iterator[int]:
        return self.driver.pull(path, sink, offset=offset, limit=limit)


def run_commands(entry: ScheduleEntry) -> str:
    assert entry.executable is not None
    here = PurePosixPath(entry.working_dir)
    own = {str(here / item["location"]) for item in entry_files(entry)}
    placed = str(here / entry.executable)
    program = placed if placed in own else entry.executable
    cwd = shlex.quote(str(here / entry.options.get("cwd", ".")))
    lines = ["umask 022", f"cd {cwd} || exit {PLACE_FAILED}"]
    for key, value in entry.options.get("env", {}).items():
        lines.append(f"export {key}={shlex.quote(value)}")
    if isinstance(entry.arguments, str):
        command = f"{shlex.quote(program)} {entry.arguments}"
        lines.append(f"exec /bin/sh -c {shlex.quote(command)}")
    else:
        lines.append(f"exec {shlex.join([program, *(entry.arguments or [])])}")
    return "\n".join(lines)


class WindowsGuest(Guest):
    """A Windows guest: batch files for what starts programs, PowerShell for all else."""

    is_windows, has_date = True, False
    launch = "C:\\launch"
    always_tells_boot = True
    # Every process inherits every pipe: with a daemon left behind, a program would never end.
    captures = False
    flavour = PureWindowsPath

    def command(self, script: str, *words: str) -> list[str]:
        # The agent quotes a path with blanks; cmd.exe understands, for nothing else needs quotes.
        return ["cmd.exe", "/d", "/c", script, *words]

    def unfit(self, argv: Sequence[str]) -> list[str]:
        # The agent quotes for programs; cmd.exe would take more than one of these for its own.
        return [word for word in argv[1:] if _is_batch(argv[0]) and not _PLAIN_WORD.fullmatch(word)]

    def content(self, location: str, text: str) -> str:
        return re.sub(r"\r?\n", "\r\n", text) if _is_batch(location) else text

    def scripts(
        self, entry: ScheduleEntry, title: str, token: str, placed: Sequence[tuple[str, str]]
    ) -> list[Script]:
        if "user" in entry.options:
            raise WrongValue("user is for POSIX guests; Windows lets nobody become another so")
        script = _CALL_BATCH.format(
            title=re.sub(r"[^A-Za-z0-9 ,.:()_-]", "?", title),
            token=token,
            claim_failed=CLAIM_FAILED,
            working_dir=_batch_path(str(entry.working_dir)),
            reboot=_batch_path(str(entry.reboot_filepath)),
        )
        program = "\n".join(self._program(entry, [sha256 for sha256, _ in placed])) + "\n"
        return [
            Script(batch_file(program), self.path(entry, "call_program.bat")),
            Script(batch_file(script), str(entry.call_arguments_filename)),
        ]

    def _program(self, entry: ScheduleEntry, placed: Sequence[str]) -> Iterator[str]:
        yield "@echo off"
        yield "setlocal EnableExtensions DisableDelayedExpansion"
        own: dict[str, str] = {}
        for number, (item, sha256) in enumerate(zip(entry_files(entry), placed, strict=True)):
            path = self.path(entry, item["location"])
            if not PureWindowsPath(path).is_absolute():
                raise WrongValue(f"location {item['location']!r} has a drive but no root")
            own[path.casefold()] = path
            folder = str(PureWindowsPath(path).parent)
            yield _PLACE_BATCH.format(
                as_folder=_batch_folder(path),
                location=_batch_path(path),
                place_failed=PLACE_FAILED,
                folder_as_folder=_batch_folder(folder),
                folder=_batch_path(folder),
                content=_batch_path(self.join(self.stage, sha256)),
                temporary=_batch_path(self.join(folder, f".vmrm-{entry.ordinal}-{number}")),
            )
        if not entry.executable:
            yield "exit /b 0"
            return
        yield f"cd /d {_batch_path(self.path(entry, entry.options.get('cwd', '.')))}"
        yield f"if errorlevel 1 exit /b {PLACE_FAILED}"
        for key, value in entry.options.get("env", {}).items():
            if _NO_BATCH_TEXT.search(value):
                raise WrongValue(f"cmd.exe cannot carry a line break or control character in {key}")
            yield f"set {key}={batch_text(value)}"
        placed_program = self.path(entry, entry.executable).casefold()
        program = own.get(placed_program, str(PureWindowsPath(entry.executable)))
        if isinstance(entry.arguments, str):
            yield f"{_batch_path(program)} {entry.arguments}"
        else:
            yield batch_command(program, entry.arguments or [])

    def _carried(
        self, scripts: Iterable[Script], contents: Iterable[Staged]
    ) -> tuple[list[str], list[Staged], list[str]]:
        texts = [(text_content(script.text), script.path) for script in scripts]
        lines = [self._line("script", staged.sha256, path) for staged, path in texts]
        return [], [*contents, *(staged for staged, _ in texts)], lines

    def _line(self, *words: str) -> str:
        return "\t".join(words)

    def _lay_out_steps(
        self, owner: tuple[str, str], aside: Iterable[str], lines: Sequence[str]
    ) -> Steps:
        if not _PLAIN_LAUNCH.fullmatch(self.launch):
            raise VMFailed(
                f"launch_dir {self.launch!r} is not plain, like C:\\lab (letters, digits, ._-~)"
            )
        old = f"{CLOCK.wall():.0f}-{os.urandom(4).hex()}"
        if lines:
            text = text_content("\n".join(lines))
            yield from self._push_steps(text, f"lines.{old}", lambda *_: None)
        words = self.stage, *owner, old, *aside
        return self._in_stage((yield from self.finish(self.argv("lay-out", *words))))

    def refused(self, status: drivers.ExecStatus) -> bool:
        return status.exitcode == CLAIM_FAILED

    def read(self, path: str, limit: int, offset: int, last: bool) -> bytes:
        if not last:  # else of a copy, if a program still holds it
            return self.driver.read_bytes(path, limit=limit, offset=offset)
        sink = io.BytesIO()
        for _ in self.pull(path, sink, offset=offset, limit=limit):
            pass
        return sink.getvalue()

    def pull(
        self, path: str, sink: BinaryIO, *, offset: int = 0, limit: int | None = None
    ) -> Iterator[int]:
        # The agent opens no file that somebody else has open for writing; other programs do.
        begin = sink.tell()
        try:
            yield from self.driver.pull(path, sink, offset=offset, limit=limit)
        except drivers.AgentError:
            copy = self.join(self.stage, f"copy.{os.urandom(8).hex()}")
            status = self.driver.run(self.argv("copy", path, copy), timeout=self.seconds)
            if status.exitcode != 0 or sink.tell() != begin:
                raise
            try:
                yield from self.driver.pull(copy, sink, offset=offset, limit=limit)
            finally:
                with contextlib.suppress(drivers.DriverError):
                    self.driver.delete_file(copy)


class HostPrograms:
    """Runs programs on this very host, under the calls that are made to a guest's driver."""

    def __init__(self) -> None:
        self._programs: dict[int, tuple[subprocess.Popen[bytes], BinaryIO]] = {}

    def start(self, argv: Sequence[str], *, capture: bool = False) -> int:
        null, errors = subprocess.DEVNULL, os.fdopen(os.memfd_create("errors"), "rb")
        try:
            # In a session of its own, so that it outlives us.
            program = subprocess.Popen(
                argv, stdin=null, stdout=null, stderr=errors, cwd="/", start_new_session=True
            )
        except OSError as error:
            raise drivers.AgentError("GenericError", str(error), "start") from error
        self._programs[program.pid] = program, errors
        return program.pid

    def status(self, pid: int) -> drivers.ExecStatus:
        if pid not in self._programs:
            raise drivers.UnknownPid("GenericError", f"process {pid} is not ours", "status")
        program, errors = self._programs[pid]
        if (code := program.poll()) is None:
            return drivers.ExecStatus(exited=False)
        del self._programs[pid]
        with errors:
            said = os.pread(errors.fileno(), 65536, 0)
        exitcode, killed_by = (code, None) if code >= 0 else (None, -code)
        return drivers.ExecStatus(True, exitcode, killed_by, err=said)

    def run(self, argv: Sequence[str], *, timeout: float) -> drivers.ExecStatus:
        how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True}
        try:
            done = subprocess.run(argv, timeout=timeout, check=False, **how)
        except subprocess.TimeoutExpired as error:
            raise drivers.DriverTimeout(f"program {argv[0]!r}", timeout) from error
        return drivers.ExecStatus(True, done.returncode, None, done.stdout, done.stderr)

    def read_bytes(self, path: str, *, limit: int, offset: int = 0) -> bytes:
        try:
            with Path(path).open("rb") as source:
                source.seek(offset)
                return source.read(limit)
        except OSError as error:
            raise drivers.AgentError("GenericError", str(error), "read") from error


class HostGuest(Guest):
    """This host, where entries with `on_host` run by the same scripts, beside the database."""

    name = "host"
    reboots = False

    def __init__(self, db: Database, vm_name: str, run: str) -> None:
        programs = cast(drivers.AbstractDriver, HostPrograms())
        super().__init__(programs, seconds=db.timeouts.call)
        self.db, self.vm_name, self.run = db, vm_name, run
        self.boot = boot_id()

    def check_boot(self) -> None:
        pass  # this process would not have outlived it

    def runs(self, entry: ScheduleEntry) -> bool:
        return entry.on_host

    def name_places(self, entries: Iterable[ScheduleEntry]) -> None:
        folder = PurePosixPath(self.db.state_dir) / "host" / self.run / self.vm_name
        for entry in entries:
            entry.working_dir = folder / str(entry.ordinal)
            entry.call_arguments_filename = entry.working_dir / "call_arguments.sh"
            entry.reboot_filepath = entry.working_dir / "reboot"

    def install(self, entry: ScheduleEntry, title: str, token: str) -> None:
        local, program = copy.copy(entry), entry.executable or ""
        parts = PurePosixPath(entry.working_dir).relative_to(self.db.state_dir).parts
        folder = self.db.directory(*parts)
        if not program.startswith("/"):
            local.executable = str(folder / "program" / program)
            stored = Path(VmResourceStore(db=self.db).get_path(program))
            _write_program(Path(local.executable), stored)
        ours = {"VMRM_VM": self.vm_name, "VMRM_DB": str(self.db.path)}
        local.options = entry.options | {"env": ours | entry.options.get("env", {})}
        script = self.scripts(local, title, token, [])[0]
        _write_program(Path(script.path), io.BytesIO(script.text.encode()))


def _digest(text: str) -> str:  # no character of it means something
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def guest_of(driver: drivers.AbstractDriver, *options: Any) -> Guest:
    return (WindowsGuest if driver.is_windows else Guest)(driver, *options)


def _write_program(path: Path, source: Path | BinaryIO) -> None:
    """Put an executable file in its place; one that runs is replaced, not written to."""
    import shutil

    path.parent.mkdir(exist_ok=True, mode=0o700)
    opened = source.open("rb") if isinstance(source, Path) else source
    with opened as stream, replacing(path, 0o700) as target:
        shutil.copyfileobj(stream, target)
        _crash("program-before-rename")


# --- files out of a guest: what it lists, and where that may go

SMALL_BYTES = 1 << 16  # below, fetching a file again costs less than asking for its hash


class Listed(NamedTuple):
    """One file or directory as a guest lists it."""

    is_dir: bool
    size: int  # bytes
    mtime: int  # seconds since the epoch
    path: str
    settled: bool = True  # a later write gives it another mtime
    mode: int = 0o600

    @property
    def copy_mtime_ns(self) -> int:
        """The modification time of the host's copy, by which it is recognised, in nanoseconds."""
        # Half a second more if the file may change again within that very second.
        return self.mtime * 10**9 + (0 if self.settled else 5 * 10**8)


def parse_listed(record: bytes) -> Listed:
    """Return one record of the guest's list. Raises ValueError: it is none, or its path no text."""
    if len(record) > MAX_PATH_BYTES + 100:
        raise ValueError(f"its path has over {MAX_PATH_BYTES} bytes")
    kind = rb"([fd]) ([0-7]{1,5}) (\d{1,18}) "
    pattern = kind + rb"(-?\d{1,11})(?:\.\d+)? (-?\d{1,11}) (/.*|[A-Za-z]:\\.*)"
    match = re.fullmatch(pattern, record, re.DOTALL)
    if match is None:
        raise ValueError("the VM lists it in an unexpected form")
    kind, mode, size, mtime, now, path = match.groups()
    # The clock of file times is coarse, hence two seconds; a time to come is a time set by hand.
    settled = abs(int(now) - int(mtime)) >= 2
    private = int(mode, 8) & 0o755  # never writable by others
    return Listed(kind == b"d", int(size), int(mtime), path.decode(), settled, private)


_FACTS = re.compile(r"-((?:[r-][w-][xsStT-]){3})\S* +\d+ +\d+ +\d+ +(\d{1,18}) ")


def parse_facts(text: str) -> tuple[int, int]:
    """Return mode and size of a file as the guest tells them. Raises VmrmError if it is none."""
    if text[:1] in tuple("dbcpls"):
        raise VmrmError("it is not a file")
    match = _FACTS.match(text)
    if match is None:
        raise VmrmError("the VM does not tell its size")
    mode = sum(1 << (8 - bit) for bit, char in enumerate(match[1]) if char not in "-ST")
    return mode, int(match[2])


def safe_parts(path: str) -> list[str]:
    """Return a guest's absolute path as components, of `C:\\logs\\a` C, logs and a.

    Raises ValueError if one of them leads elsewhere, or they are too many.
    """
    if drive := re.match(r"([A-Za-z]):\\", path):
        parts = [drive[1].upper(), *path[3:].split("\\")]
        odd = [part for part in parts if "/" in part]
    else:
        parts, odd = path.split("/"), []
    parts = [part for part in parts if part]
    if not parts or odd or any(part in (".", "..") or "\0" in part for part in parts):
        raise ValueError("its path leads out of the destination")
    if len(parts) > MAX_PATH_PARTS:
        raise ValueError(f"it lies over {MAX_PATH_PARTS} directories deep")
    return parts


def broken_copies(top: Path) -> Iterator[Path | None]:
    """Yield each temporary file of a copy below a directory, and for each directory None."""
    folders = [(os.fspath(top), 0)]  # no copy lies deeper than MAX_PATH_PARTS
    while folders:
        folder, depth = folders.pop()
        yield None
        with contextlib.suppress(OSError), os.scandir(folder) as listed:
            for item in listed:
                if item.is_dir(follow_symlinks=False):
                    if depth < MAX_PATH_PARTS:
                        folders.append((item.path, depth + 1))
                elif _OUR_TEMPORARY.fullmatch(item.name):
                    yield Path(item.path)


@contextlib.contextmanager
def _opened_below(root: Path, parts: Iterable[str]) -> Iterator[int]:
    """Open a directory below `root`, making what is missing and following no link on the way."""
    if not root.exists():
        for folder in (*reversed(root.absolute().parents), root):
            folder.mkdir(0o755, exist_ok=True)  # whatever our umask
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = os.open(root, flags)
    try:
        for part in parts:
            try:
                below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=fd)
            except FileNotFoundError:
                refuse_full(fd, 0)
                os.mkdir(part, 0o755, dir_fd=fd)
                below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _copy_of(folder: int, name: str) -> os.stat_result | None:
    """Return what the host's copy of a file is like, if there is one."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


class Transfers:
    """Copies files of a guest to this host, into `<destination>/<vm_name>`."""

    def __init__(self, vm: HandledVM) -> None:
        self.guest, self.vm_name, self.log = vm.guest, vm.name, vm.log
        self.default = run_directory(vm.db, "transfers")
        self.ending = False  # repeating transfers make their last pass
        self._copying: set[str] = set()  # temporary names of copies under way
        self._swept: set[Path] = set()  # destinations without those of a handler that was killed

    def steps(
        self, name: str, location: str, interval: float | None, destination: str | None
    ) -> Steps:
        """Pull a path or glob once, or every `interval` seconds until the transfers are ending.

        What fails repeatedly is logged once; return what the last pass found and could not bring.
        """
        root = Path(destination) if destination else self.default
        told: set[str] = set()
        left = MAX_FAULTS  # a guest can make up new ones at every pass
        while True:
            last = self.ending or not interval
            faults = yield from self.pass_steps(location, root)
            if faults and not interval:
                raise RuntimeError("; ".join(faults[:5]))
            for fault in (news := [fault for fault in faults if fault not in told])[:left]:
                self.log.warning("transfer of %s: %s", name, fault)
            if len(news) >= left > 0:
                self.log.warning("transfer of %s: no more faults of it are told", name)
            told, left = set(faults), max(0, left - len(news))
            if last:  # to look for what never came is no failure
                return [fault for fault in faults if not fault.startswith(NOTHING_THERE)]
            if not self.ending:
                yield cast(float, interval)

    def item_steps(self, entry: ScheduleEntry, item: Mapping[str, Any]) -> Steps:
        location = self.guest.path(entry, item["location"])
        return self.steps(str(entry), location, item["interval"], item["destination"])

    def pass_steps(self, location: str, root: Path) -> Steps:
        """Bring what changed at a guest's path or glob to the host; return what went wrong."""
        faults, gone = list[str](), 0
        if root not in self._swept:  # a handler that was killed left what it was copying
            self._swept.add(root)
            for broken in broken_copies(root / self.vm_name):
                if broken is not None and broken.name not in self._copying:
                    broken.unlink(missing_ok=True)
                yield 0
        try:
            status = yield from self.guest.finish(self.guest.argv("list", location))
        except drivers.AgentError as error:
            return [printable(str(error))]
        records = status.out.split(b"\0", MAX_LISTED)
        if status.out_truncated or (len(records) > MAX_LISTED and records[-1]):
            return [printable(f"too many files at {location!r} to list")]
        if not any(records):
            return [printable(f"{NOTHING_THERE} {location!r} {printable(status.err)}".rstrip())]
        for record in filter(None, records):
            yield 0
            try:
                gone += not (yield from self._pull_steps(parse_listed(record), root, location))
            except (OSError, ValueError) as error:
                if _is_link_trouble(error):
                    raise
                path = record.split(b" ", 5)[-1]  # without the time, which makes every fault new
                told = printable(repr(os.fsdecode(path)), 300)
                if len(faults) < MAX_FAULTS:
                    faults.append(printable(f"{told}: {error}"))
        if gone:
            self.log.info("transfer of %s: gone again: %d files", location, gone)
        return faults

    def _pull_steps(self, listed: Listed, root: Path, location: str) -> Steps:
        """Bring one listed file or directory under <root>/<vm>; return whether it was still there.

        Only at `location` itself must it be.
        """
        parts = (self.vm_name, *safe_parts(listed.path))
        with _opened_below(root, parts if listed.is_dir else parts[:-1]) as folder:
            if listed.is_dir:
                os.fchmod(folder, listed.mode | 0o700)
                return True
            old = _copy_of(folder, parts[-1])
            known = (listed.size, listed.copy_mtime_ns)
            if old and listed.settled and (old.st_size, old.st_mtime_ns) == known:
                if old.st_mode & 0o777 & ~listed.mode:
                    os.chmod(parts[-1], old.st_mode & listed.mode, dir_fd=folder)
                return True
            try:
                yield from self._copy_steps(listed, folder, parts[-1], old)
            except drivers.AgentError:
                if listed.path == location or self.guest.driver.file_exists(listed.path):
                    raise
                return False
            return True

    def _copy_steps(
        self, listed: Listed, folder: int, name: str, old: os.stat_result | None
    ) -> Steps:
        """Make the host's copy of a file; of one that has only grown, fetch what is new."""
        # What was written while it was read comes with the next pass. The copy takes the guest's
        # time, by which the next pass, also that of another handler, knows it.
        temporary = temporary_name()
        self._copying.add(temporary)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=folder), "w+b") as sink:
                kept = 0
                if old and SMALL_BYTES < old.st_size <= listed.size:
                    kept = yield from self._keep_steps(listed, folder, name, old.st_size, sink)
                left = listed.size - kept
                refuse_full(folder, left)
                for _ in self.guest.pull(listed.path, sink, offset=kept, limit=left):
                    yield 0
                os.fchmod(sink.fileno(), listed.mode)
            times = (listed.copy_mtime_ns, listed.copy_mtime_ns)
            os.utime(temporary, ns=times, dir_fd=folder)
            _crash("transfer-before-rename")
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise
        finally:
            self._copying.discard(temporary)

    def _keep_steps(
        self, listed: Listed, folder: int, name: str, size: int, sink: BinaryIO
    ) -> Steps:
        """Copy the present copy to `sink` if the guest's file still begins so; return its size."""
        digest = hashlib.sha256()
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as present:
            while data := present.read(1 << 20):
                digest.update(data)
                sink.write(data)
                yield 0
        status = yield from self.guest.finish(
            self.guest.argv("hash", listed.path, str(size)), size / 1e7
        )
        if status.out[:64] == digest.hexdigest().encode() and sink.tell() == size:
            return size
        sink.seek(0)
        sink.truncate()
        return 0


# === agenda, logs, output of programs ============================================================

Steps = Generator["float | Sequence[Task]", None, Any]


@dataclasses.dataclass(eq=False)
class Task:
    """A generator on the agenda: it yields seconds to sleep (inf: until woken), or who to await."""

    steps: Steps
    when: float = math.inf
    begun: bool = False
    done: bool = False
    result: Any = None  # what its generator returned
    awaited: int = 0  # how many others this one awaits
    waiting: list[Task] = dataclasses.field(default_factory=list, repr=False)  # who awaits this one


class Agenda:
    """A heap of due tasks. Moved ones are left in the heap and skipped when they surface."""

    def __init__(self, clock: Clock = CLOCK) -> None:
        self.clock = clock
        self._heap: list[tuple[float, int, Task]] = []
        self._count = itertools.count()
        self._open: dict[Task, None] = {}  # in order; not done

    def close(self) -> None:
        """End all tasks, where they are: none of them ever goes on."""
        tasks, self._open = self._open, {}
        self._heap.clear()
        for task in tasks:
            task.done = True
            task.steps.close()

    def spawn(self, steps: Steps, at: float | None = None) -> Task:
        """Put a generator on the agenda, due at monotonic time `at` (None: now)."""
        task = Task(steps)
        self._open[task] = None
        self._push(task, at)
        return task

    def wake(self, task: Task) -> None:
        """Make a task due now, if it sleeps; one that awaits others goes on awaiting them."""
        if not task.done and not task.awaited:
            self._push(task)

    def cancel(self, task: Task) -> None:
        """End a task that has not begun."""
        task.steps.close()
        self._end(task)

    def next_due(self) -> float:
        """Return the monotonic time at which something is due, inf if nothing ever is."""
        while self._heap and (self._heap[0][2].done or self._heap[0][0] != self._heap[0][2].when):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def run_next(self) -> None:
        """Run the task that is due first, for a step or, alone, a moment; let its errors out."""
        if self.next_due() > self.clock.monotonic():
            return
        task, until = heapq.heappop(self._heap)[2], self.clock.monotonic() + SLICE_S
        task.begun = True
        try:
            while (wish := next(task.steps)) == 0:  # it goes on while nothing else is due
                if not self.clock.monotonic() < min(until, self.next_due()):
                    break
        except StopIteration as end:
            task.result = end.value
            self._end(task)
            return
        if isinstance(wish, int | float):
            self._push(task, self.clock.monotonic() + wish)
        elif others := [other for other in wish if not other.done]:
            task.when, task.awaited = math.nan, len(others)  # neither due nor to be woken
            for other in others:
                other.waiting.append(task)
        else:
            self._push(task)

    def finish(self, task: Task, wait: Callable[[float], object]) -> Any:
        """Run what is due, waiting in between, until a task is done; return what it returns."""
        while not task.done:
            if (pause := self.next_due() - self.clock.monotonic()) > 0:
                wait(pause)
            self.run_next()
        return task.result

    def _end(self, task: Task) -> None:
        task.done = True
        self._open.pop(task, None)
        for waiting in task.waiting:
            waiting.awaited -= 1
            if not waiting.awaited:
                self._push(waiting)

    def _push(self, task: Task, when: float | None = None) -> None:
        task.when = self.clock.monotonic() if when is None else when
        heapq.heappush(self._heap, (task.when, next(self._count), task))


# --- logs, and output of programs


class OutputLog:
    """A VM's logs: raw output per attempt, all of it as text, and JSON lines on their own.

    A full disk loses output, never an outcome. Of an attempt, raw output and what both logs say
    of it, fifty bytes for a line of one, have at most `MAX_OUTPUT_BYTES` each."""

    def __init__(self, folder: Path, vm_name: str, log: logging.Logger) -> None:
        self.folder, self.vm_name, self.log = folder, vm_name, log
        self._rest: dict[tuple[int, str], bytes] = {}  # by attempt and stream: a line without end
        self._lost: dict[int, str] = {}  # by attempt: why no more of it is kept
        self._logged: dict[int, int] = {}  # by attempt: bytes; after a restart those of the output

    def _path(self, attempt: Attempt, stream: str) -> Path:
        return self.folder / self.vm_name / f"{attempt.ordinal}.{attempt.attempt}.{stream}"

    def size(self, attempt: Attempt, stream: str) -> int:  # where to go on from
        path = self._path(attempt, stream)
        return path.stat().st_size if path.exists() else 0

    def room(self, entry: ScheduleEntry, attempt: Attempt) -> int:
        """Return how many more bytes may be fetched of an attempt."""
        if attempt.id in self._lost:
            return 0
        used = sum(self.size(attempt, stream) for stream in ("out", "err"))
        self._logged.setdefault(attempt.id, used)
        if used >= MAX_OUTPUT_BYTES:
            self._lose(entry, attempt, f"it wrote over {MAX_OUTPUT_BYTES} bytes")
        return MAX_OUTPUT_BYTES - used

    def loss(self, attempt: Attempt) -> str:
        why = self._lost.get(attempt.id)
        return f"its output is incomplete: {why}" if why else ""

    def _lose(self, entry: ScheduleEntry, attempt: Attempt, why: str) -> None:
        self._lost[attempt.id] = why
        self.log.warning("output of entry %d (%s) is no longer kept: %s", entry.ordinal, entry, why)

    def append(self, entry: ScheduleEntry, attempt: Attempt, stream: str, data: bytes) -> bool:
        path = self._path(attempt, stream)
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            with path.open("ab") as target:
                target.write(data)
        except OSError as error:
            self._lose(entry, attempt, error.strerror or str(error))
            return False
        self._log_output(entry, attempt, stream, data)
        return True

    def end(self, entry: ScheduleEntry, attempt: Attempt) -> None:
        for stream in ("out", "err"):
            self._log_output(entry, attempt, stream, b"", final=True)

    def _log_output(
        self, entry: ScheduleEntry, attempt: Attempt, stream: str, data: bytes, final: bool = False
    ) -> None:
        *whole, rest = (self._rest.pop((attempt.id, stream), b"") + data).split(b"\n")
        lines = [line.decode(errors="replace") for line in whole]
        if rest and (final or len(rest) >= 1 << 16):
            text, used = codecs.utf_8_decode(rest, "replace", final)
            lines, rest = [*lines, text], rest[used:]
        if rest:
            self._rest[attempt.id, stream] = rest
        if self._logged.get(attempt.id, 0) >= MAX_OUTPUT_BYTES:
            return
        told = self._log_bytes()
        self.lines(str(entry), stream, [line.removesuffix("\r") for line in lines])
        self._logged[attempt.id] = self._logged.get(attempt.id, 0) + self._log_bytes() - told
        if self._logged[attempt.id] >= MAX_OUTPUT_BYTES:
            said = "the output of entry %d (%s) is longer than is logged; all of it: %s"
            self.log.warning(said, entry.ordinal, entry, self._path(attempt, stream))

    def _log_bytes(self) -> int:
        logs = (self.folder / f"{self.vm_name}.{kind}" for kind in ("log", "json"))
        return sum(log.stat().st_size for log in logs if log.exists())

    def lines(self, entry: str, stream: str, lines: Sequence[str]) -> None:
        if lines:
            self.log.info("", extra={"lines": [f"[{entry} {stream}] {line}" for line in lines]})
            self.json_lines("\n".join(line for line in lines if line.lstrip().startswith("{")))

    def json_lines(self, content: str | Mapping[str, Any]) -> None:
        """Write every line that is a JSON object to <vm>.json as it is, with time and VM."""
        text = content if isinstance(content, str) else json.dumps(dict(content), default=str)
        head = json.dumps({"time": _iso(CLOCK.wall()), "vm": self.vm_name})[:-1]
        records = []
        for line in text.split("\n"):
            with contextlib.suppress(ValueError, RecursionError):  # no JSON, or too deep
                # NaN, which Python would take for a number, makes it no JSON.
                if isinstance(json.loads(line, parse_constant=_refuse_constant), dict):
                    told = printable(line.strip(), None, "\t\r")
                    records.append(f'{head}, "output": {told}}}\n')
        if records:
            path = self.folder / f"{self.vm_name}.json"
            with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as target:
                target.writelines(records)


class LogFormatter(logging.Formatter):
    """Time in UTC, level, message; control characters of guests are shown, never obeyed."""

    def format(self, record: logging.LogRecord) -> str:
        lines = getattr(record, "lines", None) or [printable(record.getMessage(), 4000, "\t")]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        head = f"{_iso(record.created)} {record.levelname.lower():7}"
        return "\n".join(f"{head} {_as_logged(line)}" for line in lines)


def _as_logged(line: str) -> str:
    return printable(line, None, "\t")


class LogFile(logging.Handler):
    """A log that a full disk cannot break: it counts the lost records, and says so later."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self._lost = path, 0
        self.setFormatter(LogFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        lines = f"{self.format(record)}\n"
        if self._lost:
            lines = f"{_iso(record.created)} error   {self._lost} records lost here\n{lines}"
        try:
            with self.path.open("ab", buffering=0) as file:
                whole = file.write(data := lines.encode(errors="backslashreplace")) == len(data)
        except OSError:
            whole = False
        self._lost = 0 if whole else self._lost + 1


def log_to(logger: logging.Logger, path: Path) -> None:
    logger.handlers[:] = [LogFile(path)]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _iso(seconds: float) -> str:
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _one_line(error: BaseException) -> str:
    return printable(str(error)) or type(error).__name__


# === handler =====================================================================================
#
# One process for one VM. `Plan` is what rows want of the VM, `HandledVM` the VM with its agent and
# its guest. `Staging` brings files in, `EntryRun` takes an attempt from armed to its end,
# `Transfers` brings files out. A `Life` has them all on one agenda, and is thrown away with the
# link to the agent; `VMResourceHandler` only lives, waits and leaves. What may run again is decided
# by `next_step` and `recovered` alone.


class _Leave(Exception):
    """The handler must end now; guest programs go on, unless it says kill."""

    def __init__(self, why: str, halt: Halt | None = None) -> None:
        super().__init__(why)
        self.halt = halt


class _Replaced(_Leave):
    """The handler's entries are no longer the VM's schedule."""


class VMFailed(VmrmError):
    """The VM cannot go on: it becomes `failed` with this reason."""


class _EntryFailed(Exception):
    """This attempt failed; the message goes to the journal."""


class _Unknown(Exception):
    """This attempt may or may not have run to its end; nobody can tell any more."""


# What an entry needs next. WATCH: an attempt is open; REBOOT: it ran, and asks to run again after.
NextStep = Enum("NextStep", "RUN WATCH REBOOT NOTHING FAILED")


def next_step(entry: ScheduleEntry, latest: Attempt | None, boot: str) -> NextStep:
    """Return what an entry needs next; the one place that decides whether something runs again."""
    if latest is None or latest.retried:
        return NextStep.RUN
    if latest.is_open:
        return NextStep.WATCH
    if latest.outcome is Outcome.DONE and latest.reboot:
        return NextStep.REBOOT if latest.boot_id == boot else NextStep.RUN
    if latest.outcome in (Outcome.DONE, Outcome.SKIPPED):
        return NextStep.NOTHING
    if latest.outcome is Outcome.UNKNOWN and entry.options.get("rerun"):
        return NextStep.RUN if latest.attempt <= MAX_REBOOTS else NextStep.FAILED
    return NextStep.NOTHING if entry.ignore_failure else NextStep.FAILED


def recovered(found: Found, *, same_boot: bool, due: bool) -> NextStep:
    """Return what becomes of an open attempt that somebody else began: RUN, WATCH or FAILED."""
    if not found.claimed:  # what a reboot may have erased was perhaps there
        return NextStep.RUN if same_boot or not due else NextStep.FAILED
    return NextStep.WATCH if same_boot or found.exit_code is not None else NextStep.FAILED


_OUTPUT_PIECE = 1 << 17  # in short lines, logging it takes a tenth of a second
NOTHING_THERE = "the VM has no file at"
SKIPPED = "it was overdue when the experiment was continued"
LOST = {"unknown": "it may have run: the connection was lost"}  # answer to a request


class Plan(Row):
    """What rows say that a VM is to do. Taking the same plan twice changes nothing."""

    holds: list[Hold]
    entries: list[ScheduleEntry]
    times: dict[int, float]  # when each entry really happens, by ordinal

    @classmethod
    def read(cls, db: Database, server_name: str, known: Plan | None = None) -> Plan:
        """Read the plan of a VM; what is known of its entries already is taken over."""
        # The revision is read with the rest or before it: what comes later has a higher one.
        row = db.row(
            """SELECT v.revision, coalesce(s.generation, 1) AS generation,
                   coalesce(s.text, '[]') AS text, e.start_at, e.halt
               FROM vms AS v JOIN current_experiment AS e
               LEFT JOIN schedules AS s ON s.server_name = v.server_name
               WHERE v.server_name = :name""",
            name=server_name,
        )
        if row is None:
            raise _Leave("the VM was taken out")
        entries = known.entries if known else []
        if known is None or row.text != known.text:  # in a generation, entries are only added
            entries = entries + parse_schedule(row.text)[len(entries) :]
        halt, holds = Halt(row.halt) if row.halt else None, read_holds(db, server_name)
        times = Timeline(entries, holds).times
        return cls(row, halt=halt, holds=holds, entries=entries, times=times)


class StartTime:
    """Time 0 on both clocks, converted once: the plan stands whatever is done to the wall clock."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.wall: float | None = None
        self.monotonic = math.inf

    def plan(self, start_at: float | None) -> None:
        """Take the common start, which never changes once it is set."""
        if start_at is not None and self.wall is None:
            self.wall = float(int(start_at))
            self.monotonic = CLOCK.monotonic() + (self.wall - CLOCK.wall())
            self.log.info("the experiment starts at %s", _iso(self.wall))

    def check(self) -> None:
        """Notice a step of the wall clock, and say so once."""
        if self.wall is not None:
            step = (CLOCK.wall() - self.wall) - (CLOCK.monotonic() - self.monotonic)
            if abs(step) > 1:
                self.log.warning("the host's clock was set by %+.1f s; the plan is kept", step)
                self.wall += step

    def at(self, due: float | None) -> float | None:
        """Return an experiment time by the wall clock as it is now."""
        self.check()
        return None if due is None else cast(float, self.wall) + due


class Patience:
    """How long a VM may be in trouble without getting on, before that is its end."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.calm = 0.0  # seconds since the last trouble in which nothing was asked of the agent
        self._since: float | None = None
        self._count = 0
        self._refused = ""  # the last thing that the agent did not do
        self._reached: set[Hashable] = set()  # how far the VM ever came

    def progress(self, *point: Hashable) -> None:
        """Forgive past trouble, as the VM gets on."""
        # A guest that reboots for ever always comes to the same points.
        if not point or point not in self._reached:
            self._reached.add(point)
            self._since, self._refused, self._count = None, "", 0

    def trouble(self, error: drivers.DriverError) -> float:
        """Return after how many seconds to connect anew. Raises VMFailed if that is no use."""
        refused, self._refused = self._refused, str(error)
        final = (drivers.ConnectError, drivers.CommandDisabled, drivers.CommandMissing)
        # An agent that was restarted knows neither our files nor our programs; one that is frozen
        # will be thawed.
        passing = (drivers.UnknownPid, drivers.Frozen)
        again = isinstance(error, drivers.AgentError) and refused == str(error)
        if isinstance(error, final) or (again and not isinstance(error, passing)):
            raise VMFailed(str(error)) from error
        now = CLOCK.monotonic()
        if self._since is None or self.calm > self.limit:
            self._since = now
        self.calm = 0.0
        if now - self._since > self.limit:
            what = f"no progress through the agent for {self.limit:g} s"
            raise VMFailed(f"{what}: {error}") from error
        self._count += 1
        return float(0.05 * 1.5 ** min(self._count - 1, 50))


class HandledVM:
    """One VM, as long as a process deals with it: its rows and logs, its agent, its guest."""

    def __init__(self, config: Mapping[str, Any], wait: drivers.WaitHook) -> None:
        self.config, self.wait = config, wait
        self.name: str = config["vm_name"]
        self.db = _database(config.get("db"))
        self.timeouts = self.db.timeouts
        self.log = logging.getLogger(f"vmrm.{self.name}")
        self.limit = float(config.get("agent_timeout") or 300)
        self.driver: drivers.AbstractDriver = cast(Any, None)
        self.guest: Guest = cast(Any, None)  # once it was connected to
        self.start = StartTime(self.log)
        self.patience = Patience(self.limit)
        self._told: str | None = None  # in the VM's row, once this is its handler
        self.open_output()

    @functools.cached_property
    def journal(self) -> Journal:
        return Journal(self.db, self.name)

    @functools.cached_property
    def host(self) -> HostGuest:
        return HostGuest(self.db, self.name, self.journal.token)

    @property
    def token(self) -> str:
        """What a script of ours must be told before it begins."""
        return _digest(f"{self.config['vm_uuid']}.{self.journal.token}")

    def nap(self, seconds: float) -> None:
        self.wait(-1, 0, seconds)

    def open_output(self) -> None:
        """Begin to write logs; anew, where there may be room again."""
        self.output = OutputLog(run_directory(self.db, "logs"), self.name, self.log)

    def set_state(self, state: str, reason: str = "") -> None:
        """Move the VM to a state; the last one to be configured sets the start time by this."""
        with _changing_vms(self.db):
            move_vm(self.db, self.name, state, reason)
        self.log.info("the VM is %s", state)

    def check_in(self) -> None:
        """Say that this process is the VM's handler now, and what became of the last one's work."""
        with self.db.transaction() as db:
            db.write(
                """UPDATE vms SET handler = :me,
                       reason = CASE state WHEN 'failed' THEN reason ELSE '' END
                   WHERE server_name = :name""",
                me=str(Process.of()),
                name=self.name,
            )
            answer_requests(self, LOST)
        self._told = ""

    def tell(self, reason: str) -> None:
        """Have `status` say what the VM waits for, as long as it does; not for lone commands."""
        if self._told not in (None, reason):
            sql = "UPDATE vms SET reason = :reason WHERE server_name = :name AND state <> 'failed'"
            self.db.write(sql, reason=reason, name=self.name)
            self._told = reason

    # --- its agent

    def driver_class(self) -> Driver:
        try:
            return driver_of(self.config.get("engine") or "QemuVM")
        except UsageError as error:
            raise VMFailed(f"{error} ({error.hint})" if error.hint else str(error)) from error

    def _make_driver(self) -> drivers.AbstractDriver:
        chosen = self.driver_class()
        settings = {**self.config, "name": self.name, "timeout": self.timeouts.call}
        try:
            driver = chosen(settings, self.log)
        except Exception as error:  # a plug-in is anybody's code
            raise VMFailed(f"{chosen.__name__} cannot be made: {_one_line(error)}") from error
        driver.wait = self.wait
        return driver

    def connect(self, seconds: float | None = None) -> None:
        """Reach the agent within so many seconds (its time-out), and learn the guest's boot."""
        self.driver = self.driver or self._make_driver()
        limit = seconds or self.limit
        deadline, soon = CLOCK.monotonic() + limit, min(limit, self.timeouts.reconnect)
        no_answer = (drivers.NoSocket, drivers.NoAnswer, drivers.LinkLost, drivers.DriverTimeout)
        self.driver.connect_timeout = soon
        try:
            self.driver.connect()
        except no_answer as error:
            if soon == limit:
                raise
            self.tell(f"{WAITS}{error}")
            self.driver.connect_timeout = limit - soon
            self.driver.connect()
        if self.guest is None:
            launch_dir = str(self.config.get("launch_dir") or "")
            self.guest = guest_of(self.driver, launch_dir, self.timeouts.call, self.limit)
        while not (boot := self.driver.boot_id()) and self.guest.always_tells_boot:
            if CLOCK.monotonic() > deadline:  # it runs no programs yet
                raise VMFailed(f"its agent answers, but no program ran in {limit:g} s")
            self.nap(1)
        if not boot and any(attempt.boot_id for attempt in self.journal.latest().values()):
            raise drivers.LinkLost("the guest does not tell its boot now; is it frozen?")
        self.guest.boot = boot

    def close(self) -> None:
        if self.driver is not None:
            self.driver.close()

    def reboot_steps(self) -> Steps:
        """Reboot the guest; nothing else goes on until its agent answers again."""
        guest, driver = self.guest, self.driver
        self.log.info("rebooting the VM")
        driver.reboot()
        _crash("rebooted")
        deadline = CLOCK.monotonic() + self.limit
        going_down = CLOCK.monotonic() + min(self.limit, self.timeouts.reboot_start)
        while True:
            try:
                driver.connect_timeout = max(0.1, deadline - CLOCK.monotonic())
                driver.connect()
                boot = driver.boot_id()
            except drivers.ConnectError as error:
                raise VMFailed(f"the VM did not come back from its reboot: {error}") from error
            except drivers.DriverError as error:  # it went down while we were asking
                self.log.debug("still going down: %s", error)
                boot = guest.boot
            booting = guest.always_tells_boot and not boot
            if boot != guest.boot and not booting:
                break
            if CLOCK.monotonic() > (deadline if booting else going_down):
                what = "does not come back" if booting else "does not go down"
                raise VMFailed(f"the VM accepted a reboot but {what}")
            driver.close()
            self.nap(0.2)
        guest.boot = boot
        self.log.info("the VM is back (boot %s)", boot)
        yield 0

    def clock_steps(self) -> Steps:
        """Set the guest's clock, in negative time only, then be configuring; return the state."""
        may_set, refused = self.start.wall is None and self.config.get("set_time", True), ""
        skew: float | None = None
        try:
            if may_set:
                try:
                    self.driver.set_time()
                except drivers.AgentError as error:
                    refused = f"; the agent could not set it: {error}"
            skew = self._skew()
            if may_set and abs(skew) > 1 and self.guest.has_date:
                # An agent needs hwclock for it. `date` takes whole seconds, so one is waited for.
                at = math.floor(CLOCK.wall()) + 1
                yield at - CLOCK.wall()
                with contextlib.suppress(drivers.AgentError):
                    yield from self.guest.finish(["date", "-u", "-s", f"@{at}"])
                skew = self._skew()
        except drivers.AgentError as error:
            self.log.warning("the guest's clock cannot be read: %s", error)
            skew = None
        if abs(skew or 0) > 1:
            self.log.warning("the guest's clock is off by %+.1f s%s", skew, refused)
        yield 0
        with _changing_vms(self.db):
            if skew is not None:
                self.db.update("vms", {"server_name": self.name}, skew_s=skew)
            sql = "SELECT state FROM vms WHERE server_name = :name"
            state: str = self.db.value(sql, name=self.name)
            if begins := state == VMState.UNINITIALIZED:
                move_vm(self.db, self.name, state := VMState.CONFIGURING, "")
        if begins:
            self.log.info("the VM is %s", state)
        return state

    def _skew(self) -> float:
        before = CLOCK.wall()
        guest, after = self.driver.get_time() / 1e9, CLOCK.wall()
        # What the answer's way may have taken is no fault of the clock.
        return min(guest - before, 0.0) or max(guest - after, 0.0)


class Staging:
    """Brings contents and scripts to where entries run, once for each boot of the guest."""

    def __init__(self, vm: HandledVM) -> None:
        self.vm = vm
        self._boot = ""
        self.ready: set[int] = set()  # ordinals of what was prepared, be it in vain
        self._faulty: set[int] = set()  # of these, what could not be loaded

    def missing(self, entries: Iterable[ScheduleEntry]) -> list[ScheduleEntry]:
        """Return the entries that must be prepared in the present boot of the guest."""
        if self._boot != self.vm.guest.boot:
            self.ready, self._boot = set(), self.vm.guest.boot
        return [entry for entry in entries if entry.ordinal not in self.ready]

    def forgive(self) -> None:
        """Have what could not be loaded tried again: its file may have come since, or a retry."""
        self.ready -= self._faulty
        self._faulty.clear()

    def steps(self, schedule: Sequence[ScheduleEntry]) -> Steps:
        """Prepare what is missing of a schedule, or fail the VM if it needs what it cannot have."""
        entries = self.missing(schedule)
        for guest in (self.vm.host, self.vm.guest):
            guest.name_places(entry for entry in schedule if guest.runs(entry))
        for entry in (entry for entry in entries if entry.on_host):
            try:
                if not self.vm.db.value("SELECT allow_host FROM current_experiment"):
                    raise ValueError("it runs on the host: run --allow-host")
                title = f"{self._title(entry)}, on the host"
                self.vm.host.install(entry, title, self.vm.token)
            except (OSError, ValueError) as error:
                self._not_loadable(entry, error)
            yield 0
        if staged := [entry for entry in entries if entry.runs_script and not entry.on_host]:
            yield from self._stage_steps(staged)
        self.ready.update(entry.ordinal for entry in entries)
        self.vm.patience.progress("ready", len(self.ready))

    def _title(self, entry: ScheduleEntry) -> str:
        return f"VM {self.vm.name}, entry {entry.ordinal} ({entry})"

    def _not_loadable(self, entry: ScheduleEntry, error: Exception) -> None:
        vm = self.vm
        why = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else error
        if entry.start_time < 0 and not entry.ignore_failure:
            raise VMFailed(f"entry {entry.ordinal} ({entry}) cannot be loaded: {why}")
        latest = vm.journal.latest().get(entry.ordinal)
        if next_step(entry, latest, vm.guest.boot) is NextStep.RUN:
            attempt = vm.journal.arm({entry.ordinal: None}, vm.guest.boot)[entry.ordinal]
            vm.journal.ended(attempt, Outcome.FAILED, error=f"cannot be loaded: {why}")
        self._faulty.add(entry.ordinal)

    def _stage_steps(self, entries: Sequence[ScheduleEntry]) -> Steps:
        vm, guest, scripts, contents = self.vm, self.vm.guest, list[Script](), dict[str, Staged]()
        for entry in entries:
            try:
                placed = self._contents(entry)
                modes = [(staged.sha256, mode) for staged, mode in placed]
                scripts += guest.scripts(entry, self._title(entry), vm.token, modes)
                contents |= {staged.sha256: staged for staged, _ in placed}
            except (FileNotFoundError, ValueError) as error:
                self._not_loadable(entry, error)
            _crash("files-loaded")
            yield 0  # what is due goes first
        fresh = not (self.ready or vm.journal.latest())
        older = sorted({guest.folder(entry).parent.name for entry in entries}) if fresh else ()
        owner, tell = (vm.journal.experiment, vm.config["vm_uuid"]), vm.patience.progress
        yield from guest.stage_steps(owner, older, scripts, contents.values(), tell)

    def _contents(self, entry: ScheduleEntry) -> list[tuple[Staged, str]]:
        db, guest, placed = self.vm.db, self.vm.guest, []
        own_program = guest.path(entry, entry.executable or "")
        for item in entry_files(entry):
            location = guest.path(entry, item["location"])
            if "content" in item:
                staged = text_content(guest.content(location, item["content"]))
            else:
                name = item["filename"]
                sha256 = item.get("sha256") or VmResourceStore(db=db).get_file_hash(name)
                if not (path := content_path(db, sha256)).is_file():
                    why = "the file store has no such file"
                    raise FileNotFoundError(errno.ENOENT, why, name)
                source = cast("Callable[[], BinaryIO]", functools.partial(path.open, "rb"))
                staged = Staged(path.name, path.stat().st_size, source)
            is_program = item.get("executable") or location == own_program
            placed.append((staged, "755" if is_program else "644"))
        return placed


Limit = tuple[float, str]  # until when an attempt may last, by monotonic time; what is said then
_KILL: Limit = (-math.inf, KILLED)


class EntryRun:
    """One entry in one life: its attempt, on the way from being armed to its end; its transfers."""

    attempt: Attempt  # once it has one

    def __init__(
        self, vm: HandledVM, entry: ScheduleEntry, transfers: Transfers | None = None
    ) -> None:
        self.vm, self.entry, self.transfers = vm, entry, transfers
        self.guest = vm.host if entry.on_host else vm.guest
        self.lead = 1 + int.from_bytes(os.urandom(2)) / 16384  # seconds between arming and due
        self.due: float | None = None  # the effective time that the attempt was armed for, if any
        self.task: Task | None = None  # takes the attempt to its end
        self.limit = _KILL
        self.repeating: list[Task] | None = None  # transfers that come again

    @property
    def folder(self) -> str:
        return self.guest.attempt_dir(self.entry, self.attempt)

    def _own_limit(self) -> Limit:
        seconds = self.entry.options.get("timeout") or (
            self.vm.timeouts.negative_entry if self.entry.start_time < 0 else math.inf
        )
        at = CLOCK.monotonic() + seconds
        if self.attempt.sent_at is not None:  # by the wall clock, which may have been set back
            at -= max(0.0, CLOCK.wall() - self.attempt.sent_at)
        return at, f"timed out after {seconds:g} s"

    def steps(self, found: Found | None = None, limit: Limit | None = None) -> Steps:
        """Take the attempt to its end: send it, if nothing was found of it, watch, transfer."""
        entry, exit_code, reboot, outcome = self.entry, None, False, Outcome.FAILED
        may_reboot = entry.start_time < 0 and self.guest.reboots
        self.limit = limit or self._own_limit()
        try:
            if entry.runs_script:
                found = yield from self._watch_steps(found or (yield from self._send_steps()))
                exit_code, reboot = found.exit_code, found.reboot
            else:
                planned = self.vm.start.at(self.due)
                self.vm.journal.started(self.attempt, CLOCK.wall(), None, entry.start_time, planned)
            yield from self._transfer_steps()
            if limit is _KILL and exit_code == CLAIM_FAILED:
                raise _EntryFailed(KILLED)
            failed = exit_code and not (may_reboot and exit_code == REBOOT_EXIT_CODE)
            error = f"exit code {exit_code}" if failed else ""
            outcome = Outcome.FAILED if failed else Outcome.DONE
        except drivers.Frozen:  # for a backup's moment; it is no verdict on the entry
            raise
        except (_EntryFailed, RuntimeError, drivers.AgentError) as failure:
            error = str(failure)
        except _Unknown as unknown:
            error, outcome = f"it may have run: {unknown}", Outcome.UNKNOWN
        asks = may_reboot and (reboot or exit_code == REBOOT_EXIT_CODE)
        self.vm.output.end(entry, self.attempt)
        _crash("before-journal")
        self.end(
            outcome,
            error or self.vm.output.loss(self.attempt),
            exit_code=exit_code,
            reboot=asks and outcome is Outcome.DONE,
        )
        _crash("journal-closed")

    def end(self, outcome: Outcome, error: str, **more: Any) -> None:
        self.vm.journal.ended(self.attempt, outcome, error=error, **more)
        self.vm.log.info("entry %d (%s) %s %s", self.entry.ordinal, self.entry, outcome, error)
        self.vm.patience.progress("ended", self.attempt.id)

    def _send_steps(self) -> Steps:
        """Start the entry's script. Nothing is committed between here and guest-exec."""
        self.vm.journal.check()  # a read: whatever kept the word from us, nothing starts after it
        # Where the host's clock was set since the arming, so is the plan.
        sent, planned, entry = CLOCK.wall(), self.vm.start.at(self.due), self.entry
        pid = self.guest.start(entry, self.attempt, self.vm.token)
        _crash("exec-answered")
        yield 0  # what else is due goes first
        self.vm.journal.started(self.attempt, sent, pid, entry.start_time, planned)
        _crash("running-recorded")
        self.vm.log.info("entry %d (%s) started, pid %d", entry.ordinal, entry, pid)
        self.vm.patience.progress("sent", self.attempt.id)
        return Found(claimed=True, pid=pid)

    def _within(self, limit: Limit, steps: Steps) -> Steps:
        """Take steps up to a limit, at which they meet _EntryFailed."""
        resume, (at, why) = functools.partial(next, steps), limit
        while True:
            try:
                wish = resume()
            except StopIteration as end:
                return end.value
            if isinstance(wish, int | float):
                wish = min(wish, max(0.0, at - CLOCK.monotonic()))
            yield wish
            if CLOCK.monotonic() >= at:
                resume = functools.partial(steps.throw, _EntryFailed(why))

    def _transfer_steps(self) -> Steps:
        """Bring out of the guest what comes once; of an entry that only transfers, all."""
        for item in self.entry.items("transfer"):
            if not item["interval"]:
                if self.transfers is None:
                    raise _EntryFailed(self.limit[1])
                yield from self._within(self.limit, self.transfers.item_steps(self.entry, item))
        if not self.entry.runs_script and self.entry.start_time > 0:  # else it never ended
            yield self.repeating or []
            missed = [fault for task in self.repeating or () for fault in task.result]
            if missed:
                raise _EntryFailed("; ".join(missed[:5]))

    def _watch_steps(self, found: Found) -> Steps:
        """Follow a started program to its end, and kill it at the limit; return what it left."""
        interval, fetch_at, (at, why) = self.vm.timeouts.poll_first, 0.0, self.limit
        while True:
            yield min(interval, max(0.0, at - CLOCK.monotonic()))
            interval = min(interval * 1.5, self.vm.timeouts.poll_last)
            found = yield from self._look_steps(found)
            if found.exit_code is not None or CLOCK.monotonic() >= at:
                break
            if CLOCK.monotonic() >= fetch_at:
                with contextlib.suppress(_EntryFailed):
                    yield from self._within(self.limit, self._fetch_steps())
                fetch_at = CLOCK.monotonic() + self.vm.timeouts.poll_last / 2
        if found.exit_code is None:
            yield from self._kill_steps(found.pid)
        # What a program wrote before its end, in time or not, gets a moment in any case.
        grace = max(at, CLOCK.monotonic() + self.vm.timeouts.term_grace), why
        try:
            yield from self._within(grace, self._fetch_steps(last=True))
        except _EntryFailed:
            if found.exit_code is not None:
                raise
        if found.exit_code is None:
            raise _EntryFailed(why if self.limit is _KILL else f"{why} and was killed")
        return found

    def _look_steps(self, found: Found) -> Steps:
        """Look once how the attempt is; return it as found now, with an exit code if it has ended.

        The agent says whether it has; the guest's files say how, or the agent on a full disk.
        """
        guest, status = self.guest, None
        if found.exit_code is not None:
            return found
        with contextlib.suppress(drivers.UnknownPid):  # the agent was restarted
            if found.pid is not None:
                status = guest.driver.status(found.pid)
                self.vm.patience.progress()
                if not status.exited:
                    return found
        deadline = CLOCK.monotonic() + self.vm.timeouts.claim_grace
        while True:
            left = guest.look_at(self.folder)
            if left.exit_code is not None:
                return left
            guest.check_boot()  # after a reboot, another program may have this pid
            if left.alive:
                return left
            if status and not (left.claimed and guest.refused(status)):
                break
            if not left.claimed:  # what to do, recovery knows
                raise drivers.LinkLost("the agent was restarted")
            # Perhaps another start of this attempt was faster, and is about to say who it is.
            if left.pid is not None or CLOCK.monotonic() >= deadline:
                raise _Unknown("it ended without leaving an exit code")
            yield self.vm.timeouts.claim_grace / 10
        if not left.claimed and (status.err or status.exitcode in (CLAIM_FAILED, None)):
            why = printable(status.err) or "no reason given"
            raise _EntryFailed(f"the {guest.name} did not begin it: {why}")
        if status.exitcode is None:
            raise _EntryFailed(f"killed by signal {status.signal}")
        reboot = guest.reboots and bool(guest.driver.file_exists(str(self.entry.reboot_filepath)))
        return found._replace(exit_code=status.exitcode, reboot=reboot)

    def _kill_steps(self, pid: int | None) -> Steps:
        """End a program and what it started: TERM, and KILL if anything is left after the grace."""
        timeouts = self.vm.timeouts
        if pid is None or not self.guest.signal("TERM", pid):
            return
        pause, deadline = timeouts.poll_first, CLOCK.monotonic() + timeouts.term_grace
        while CLOCK.monotonic() < deadline:
            yield pause
            if not self.guest.signal("0", pid):
                return
            pause = min(2 * pause, timeouts.poll_last)
        self.guest.signal("KILL", pid)

    def _fetch_steps(self, last: bool = False) -> Steps:
        guest, output, attempt = self.guest, self.vm.output, self.attempt
        for stream in ("out", "err"):
            while (room := output.room(self.entry, attempt)) > 0:
                offset, limit = output.size(attempt, stream), min(room, _OUTPUT_PIECE)
                try:
                    data = guest.read(guest.join(self.folder, stream), limit, offset, last)
                except drivers.AgentError:  # there is no output file, on a full disk for example
                    break
                if not data or not output.append(self.entry, attempt, stream, data):
                    break
                if len(data) < limit:
                    break
                yield 0  # what is due goes first

    def recover(self, found: Found, due: bool) -> NextStep:
        """Return what becomes of the attempt, which somebody else began; FAILED closes it."""
        same_boot = self.attempt.boot_id == self.guest.boot
        step = recovered(found, same_boot=same_boot, due=due)
        if step is NextStep.FAILED:
            why = "nobody saw its end" if same_boot else f"the {self.guest.name} was rebooted"
            self.end(Outcome.UNKNOWN, f"it may have run: {why}")
        return step


def look_at(guest: Guest, runs: Sequence[EntryRun]) -> Iterator[tuple[EntryRun, Found]]:
    """Ask a guest what open attempts have left in it."""
    for run, found in zip(runs, guest.look([run.folder for run in runs]), strict=True):
        pid = found.pid if found.pid is not None else run.attempt.pid  # on a full disk
        yield run, found._replace(pid=pid)


def kill_open(vm: HandledVM, guest: Guest, entries: Iterable[ScheduleEntry]) -> None:
    """End the programs of all open attempts in a guest; what has not begun there never will."""
    entries = [entry for entry in entries if guest.runs(entry)]
    guest.name_places(entries)
    opened = {n: attempt for n, attempt in vm.journal.latest().items() if attempt.is_open}
    runs = [
        EntryRun(vm, entry) for entry in entries if entry.runs_script and entry.ordinal in opened
    ]
    for run in runs:
        run.attempt = opened[run.entry.ordinal]
    if not runs:
        return
    guest.ask("forbid", *(run.folder for run in runs))
    tasks = []
    with contextlib.closing(Agenda()) as agenda:
        for run, found in look_at(guest, runs):
            forbidden = found.exit_code == CLAIM_FAILED and found.pid is None
            if forbidden and run.attempt.outcome is Outcome.ARMED:  # another run may begin it
                why = f"{KILLED}: it did not begin"
                run.end(Outcome.FAILED, why, exit_code=CLAIM_FAILED, retried=True)
            elif run.recover(found, due=True) is NextStep.WATCH:
                tasks.append(agenda.spawn(run.steps(found, _KILL)))
        for task in tasks:
            agenda.finish(task, vm.nap)


def arming_meanwhile(steps: Steps, arm: Callable[[], float]) -> Steps:
    """Take steps, and call `arm` at the monotonic times that it returns: what is due goes on."""
    arming = -math.inf
    for wish in steps:
        if CLOCK.monotonic() >= arming:
            arming = arm()
        yield wish


class Life:
    """A VM's way through its schedule, from connecting to its end or to trouble with the link.

    The next life finds all of it again, by rows and what the guest's own files say.
    """

    def __init__(self, vm: HandledVM, staging: Staging) -> None:
        self.vm, self.staging, self.journal = vm, staging, vm.journal
        self.agenda = Agenda()
        self.transfers = Transfers(vm)
        self.plan: Plan = cast(Any, None)  # taken before anything begins
        self.runs: dict[int, EntryRun] = {}  # by ordinal
        self.way = self.agenda.spawn(self._steps(), math.inf)  # begins with the first plan

    def close(self) -> None:
        """End all that this life has begun: nothing of it goes on in the next one."""
        self.agenda.close()

    def take(self, plan: Plan) -> None:
        """Take what rows say now."""
        if plan.generation != self.journal.generation:
            raise _Replaced("the schedule was replaced")
        self.plan = plan
        self.vm.start.plan(plan.start_at)
        self.staging.forgive()
        for entry in plan.entries[len(self.runs) :]:
            self.runs[entry.ordinal] = EntryRun(self.vm, entry, self.transfers)
        armed = [r for r in self.runs.values() if r.task and r.due is not None and not r.task.begun]
        if moved := [run for run in armed if run.due != plan.times[run.entry.ordinal]]:
            self.journal.withdraw(run.attempt for run in moved)
        for run in moved:  # by a pause, or an entry that holds
            self.agenda.cancel(cast(Task, run.task))
            run.task = run.due = None
        self.agenda.wake(self.way)  # and nobody else: an armed entry sleeps until it is due

    def _steps(self) -> Steps:
        vm = self.vm
        yield from self._prepare_steps()
        self._recover()
        yield from _discard_all_steps(vm.db, vm.name, vm.driver)
        if (yield from vm.clock_steps()) == VMState.CONFIGURING:
            yield from self._delay_steps()
            yield from self._negative_steps()
            if self.plan.halt is not Halt.ABORT:
                _crash("before-configured")
                vm.set_state(VMState.CONFIGURED)
                _crash("configured")
        while vm.start.wall is None and self.plan.halt is not Halt.ABORT:
            yield from self._negative_steps()
            if vm.start.wall is None:
                yield math.inf
            if self.plan.halt is Halt.END:
                return
        if self.plan.halt is not Halt.ABORT:
            yield from self._positive_steps()

    def _prepare_steps(self) -> Steps:
        while self.staging.missing(self.plan.entries):
            yield from self.staging.steps(self.plan.entries)

    # --- one entry

    def _needs(self, sign: int) -> dict[NextStep, list[EntryRun]]:
        """Return what entries of one sign need: all but pauses, as far as they are prepared."""
        latest, needs = self.journal.latest(), {step: list[EntryRun]() for step in NextStep}
        for ordinal in sorted(self.staging.ready):
            entry = self.runs[ordinal].entry
            if entry.start_time * sign > 0 and entry.pause is None:
                step = next_step(entry, latest.get(ordinal), self.vm.guest.boot)
                needs[step].append(self.runs[ordinal])
        return needs

    def _arm(self, runs: Sequence[EntryRun]) -> None:
        """Arm entries and put them on the agenda, for when they are due or for now."""
        self.vm.guest.check_boot()
        planned = {run.entry.ordinal: self.vm.start.at(run.due) for run in runs}
        host = {run.entry.ordinal for run in runs if run.entry.on_host}
        armed = self.journal.arm(planned, self.vm.guest.boot, host)
        _crash("armed")
        for run in runs:
            run.attempt = armed[run.entry.ordinal]
            self._spawn(run)

    def _spawn(self, run: EntryRun, found: Found | None = None) -> None:
        at = None if run.due is None else self.vm.start.monotonic + run.due
        run.task = self.agenda.spawn(self._attempt_steps(run, found), at)

    def _attempt_steps(self, run: EntryRun, found: Found | None) -> Steps:
        self._repeat(run)
        yield from run.steps(found)
        self.agenda.wake(self.way)

    def run_once(self, entry: ScheduleEntry) -> Attempt:
        """Arm one attempt of an entry, take it to its end, and return it."""
        run = self.runs[entry.ordinal] = EntryRun(self.vm, entry, self.transfers)
        self._arm([run])
        self.agenda.finish(cast(Task, run.task), self.vm.nap)
        return self.journal.latest()[entry.ordinal]

    def _repeat(self, run: EntryRun) -> None:
        """Start an entry's repeating transfers, once."""
        if run.repeating is None:
            items = [item for item in run.entry.items("transfer") if item["interval"]]
            steps = [self.transfers.item_steps(run.entry, item) for item in items]
            run.repeating = [self.agenda.spawn(each) for each in steps]

    # --- negative time

    def _delay_steps(self) -> Steps:
        """Pauses at -inf delay the first negative entry in wall time, counted from the launch."""
        negative = {entry.ordinal for entry in self.plan.entries if entry.start_time < 0}
        while delay := opening_delay(self.plan.entries, self.plan.holds):
            launched = current_experiment(self.vm.db).launched_at or CLOCK.wall()
            left = launched + delay - CLOCK.wall()
            if left <= 0 or self.plan.halt or negative & self.journal.latest().keys():
                return
            yield left

    def _negative_steps(self) -> Steps:
        """Negative times in order: start all entries of one, go on when the last has ended."""
        # Later ones come by retry or addition. After an abort, the time that has begun goes on.
        begun: float | None = None
        while self.plan.halt is not Halt.ABORT or begun is not None:
            yield from self._prepare_steps()
            needs = self._needs(-1)
            del needs[NextStep.NOTHING]
            todo = (run.entry.start_time for runs in needs.values() for run in runs)
            at = min(todo, default=None)
            if at is None or (self.plan.halt is Halt.ABORT and at != begun):
                return
            begun = at
            for step, runs in needs.items():
                needs[step] = [run for run in runs if run.entry.start_time == at]
            if ready := needs[NextStep.RUN]:
                self._arm(ready)
            if tasks := [cast(Task, run.task) for run in ready + needs[NextStep.WATCH]]:
                yield tasks
            elif failed := needs[NextStep.FAILED]:
                entry = failed[0].entry
                attempt = self.journal.latest()[entry.ordinal]
                why = attempt.error or attempt.outcome
                raise VMFailed(f"entry {entry.ordinal} ({entry}): {why}")
            else:
                yield from self._rerun_steps([run.entry for run in needs[NextStep.REBOOT]])

    def _rerun_steps(self, entries: Sequence[ScheduleEntry]) -> Steps:
        """Reboot once for all entries that asked for it; they run again afterwards."""
        latest, driver = self.journal.latest(), self.vm.driver
        for entry in entries:
            if latest[entry.ordinal].attempt > MAX_REBOOTS:
                what = f"entry {entry.ordinal} ({entry})"
                raise VMFailed(f"{what} asks for over {MAX_REBOOTS} reboots")
            if driver.file_exists(str(entry.reboot_filepath)):
                driver.delete_file(str(entry.reboot_filepath))
        _crash("before-reboot")
        yield from self.vm.reboot_steps()
        yield from self.vm.clock_steps()

    # --- recovery

    def _recover(self) -> None:
        """Find every open attempt again: by rows, then by what the guest's files say."""
        latest = self.journal.latest()
        begun = [run for ordinal, run in self.runs.items() if ordinal in latest]
        for run in begun:
            run.attempt = latest[run.entry.ordinal]
        opened = [run for run in begun if run.attempt.is_open]
        for guest in (self.vm.guest, self.vm.host):
            runs = [run for run in opened if run.entry.runs_script and guest.runs(run.entry)]
            for run, found in look_at(guest, runs):
                planned = (run.attempt.planned_at or 0) <= CLOCK.wall()
                step = run.recover(found, planned or self._due(run.entry) <= CLOCK.monotonic())
                if step is NextStep.RUN:
                    self.vm.log.info("entry %d (%s) did not run yet", run.entry.ordinal, run.entry)
                    self._again(run)
                elif step is NextStep.WATCH:
                    self._spawn(run, found)
        for run in begun:
            if not run.attempt.is_open:
                self._repeat(run)
            elif not run.entry.runs_script:  # a transfer: pulling again does no harm
                self._again(run)
        _crash("recovered")

    def _again(self, run: EntryRun) -> None:
        """Go on with an open attempt that has not begun; one of positive time is armed anew."""
        entry, attempt = run.entry, run.attempt
        if attempt.outcome is not Outcome.ARMED or entry.start_time < 0:
            self._spawn(run)
            return
        row = current_experiment(self.vm.db)
        skips = row["late"] == Late.SKIP and attempt.armed_at < (row["continued_at"] or 0)
        if skips and self._due(entry) < CLOCK.monotonic() and not entry.repeats:
            self.journal.ended(attempt, Outcome.SKIPPED, error=SKIPPED)
        else:
            self.journal.withdraw([attempt])

    def _due(self, entry: ScheduleEntry) -> float:
        """Return the monotonic time at which an entry is due, by the plan whatever the clock."""
        return self.vm.start.monotonic + self.plan.times[entry.ordinal]

    # --- positive time

    def _positive_steps(self) -> Steps:
        """Arm entries shortly before they are due, and see the VM to the end of its work."""
        _crash("start-seen")
        while True:
            yield from arming_meanwhile(self._prepare_steps(), self._arm_due)
            yield from self._negative_steps()
            if self.staging.missing(self.plan.entries):  # added meanwhile
                continue
            next_arming = self._arm_due()
            if not (math.isinf(next_arming) and self._is_finished()):
                yield max(0.0, next_arming - CLOCK.monotonic())
            elif (yield from self._end_steps()):
                return

    def _arm_due(self) -> float:
        """Arm and spawn what is due soon; return when the next arming is (inf: never)."""
        now, soon, later = CLOCK.monotonic() - self.vm.start.monotonic, [], math.inf
        for run in self._needs(1)[NextStep.RUN]:
            at = self.plan.times[run.entry.ordinal]
            if at - run.lead <= now:
                run.due = at
                soon.append(run)
            else:
                later = min(later, at - run.lead)
        if soon:
            self._arm(sorted(soon, key=lambda run: (run.due, run.entry.ordinal)))
        return self.vm.start.monotonic + later

    def _is_finished(self) -> bool:
        """Whether nothing finite is left; what repeats or need not be waited for is not."""
        for run in self.runs.values():
            entry, running = run.entry, run.task and not run.task.done
            if running and entry.options.get("wait", True) and not entry.repeats:
                return False
        held = (e for e in self.plan.entries if math.isinf(self.plan.times[e.ordinal]))
        return all(e.pause is not None or e.repeats or e.start_time < 0 for e in held)

    def _end_steps(self) -> Steps:
        """Wait for all others, then see transfers to their end; return false for new work."""
        unfinished = {"finished_at": None, "revision": self.plan.revision}
        now = CLOCK.wall()
        self.vm.db.update("vms", {"server_name": self.vm.name, **unfinished}, finished_at=now)
        _crash("finished")
        if not self.vm.config.get("alone"):  # else nobody will say when all is done
            if self.plan.halt is not Halt.END:
                yield math.inf
            if self.plan.halt is not Halt.END:
                return False
        self.transfers.ending = True
        repeating = [task for run in self.runs.values() for task in run.repeating or ()]
        for task in repeating:
            self.agenda.wake(task)
        yield [*repeating, *(r.task for r in self.runs.values() if r.task and r.entry.repeats)]
        return True


class VMResourceHandler:
    """Takes one VM through its schedule: one process, one thread, one wait.

    Everything that takes time is a generator on the agenda of its life; all waiting, also inside
    driver calls, is in `_poll`. After any trouble with the link that life ends, another begins.

    The configuration is that of `handler_config`, and has `lifeline`, a descriptor whose end of
    file means to leave, or `alone`, if no supervisor will say when all is done.
    """

    def __init__(self, config: Mapping[str, Any], check_interval: float = 10) -> None:
        self.config = dict(config)
        self.check_interval = check_interval
        self.vm = HandledVM(self.config, self._wait)
        self.db, self.log, self.vm_name = self.vm.db, self.vm.log, self.vm.name
        self.mapping = VMMapping(db=self.db)
        self.replaced = False  # it left because its entries are no longer the VM's schedule
        self._staging = Staging(self.vm)
        self._plan: Plan | None = None  # the one read last
        self._seen = -1  # its revision, once it was taken
        self._wake: WakeSocket | None = None
        self._woken = True
        self._obeyed: Halt | None = None
        self._look_at = 0.0
        # Drawn once: a look's price is the cold memory it touches.
        self._look_interval = self.db.timeouts.look * (0.75 + os.urandom(1)[0] / 512)

    # --- life

    def run(self) -> int:
        """Take the VM through its schedule; return 0 once rows say how far it came."""
        lock = handler_lock(self.db, self.config["ordinal"])
        if not lock.take():
            raise Conflict(f"VM {self.vm_name!r} has a handler already: {lock.holder_name}")
        self._wake = WakeSocket(self.db, self.config["ordinal"])
        try:
            self.vm.check_in()
            forget_abandoned(self.db)
            patience = self.db.timeouts.lock
            with agent_lock(self.config["path"], self.db.path, self.vm.nap, patience):
                self._run_until_told()
        except _Leave as leave:  # while it waited for the agent
            self.log.info("leaving: %s", leave)
        finally:
            self.vm.close()
            self._wake.close()
            lock.release()
        return 0

    def _run_until_told(self) -> None:
        try:
            self._leave_if_told()
            while True:
                try:
                    self._run()
                    return
                except Unavailable as error:
                    self._await_database(error)
        except _Leave as leave:
            self.log.info("leaving: %s", leave)
            self.replaced = isinstance(leave, _Replaced)
            self._obeyed = leave.halt
            if leave.halt is Halt.KILL:
                self._kill_all()

    def _await_database(self, error: Unavailable) -> None:
        """Wait until rows can be written again; what happens meanwhile stays in the guest."""
        self.log.error("%s; waiting, the programs in the VM go on", error)
        self.vm.close()
        while True:
            with contextlib.suppress(Unavailable):
                self.vm.nap(self.db.timeouts.reconnect)
                self.vm.check_in()
                break
        self.vm.open_output()
        self.log.warning("the database can be used again")

    def _run(self) -> None:
        """Connect and work until done; after trouble with the link, forget all and begin anew."""
        try:
            while True:
                try:
                    self.vm.connect()
                    self._live()
                    return
                except drivers.DriverError as error:
                    pause = self.vm.patience.trouble(error)
                    self.log.warning("trouble with the agent, connecting anew: %s", error)
                    self.vm.close()
                    answer_requests(self.vm, LOST)
                    self.vm.tell(f"{WAITS}{error}")
                    self.vm.nap(min(self.db.timeouts.reconnect, pause))
        except VMFailed as failed:
            self.log.error("the VM failed: %s", failed)
            self.vm.set_state(VMState.FAILED, str(failed))
            _crash("vm-failed")

    def _live(self) -> None:
        """Do what is due and wait for what is next, until the VM's work is over."""
        self._woken, self._seen = True, -1
        with contextlib.closing(Life(self.vm, self._staging)) as life:
            while not life.way.done:
                self._refresh(life)
                pause = life.agenda.next_due() - CLOCK.monotonic()
                if pause > 0:
                    self._idle(pause)
                elif not self._woken:
                    self._poll(-1, 0, 0)
                if not self._woken:  # a pause that was given before an entry is due holds it
                    life.agenda.run_next()

    def _refresh(self, life: Life) -> None:
        """Look at the database if woken, or by and by anyway; read more only if something moved."""
        now = CLOCK.monotonic()
        if not self._woken and now < self._look_at:
            return
        self._look_at = now + self._look_interval
        self.vm.start.check()
        self._woken = False
        sql = "SELECT revision FROM vms WHERE server_name = :name"
        if self.db.value(sql, name=self.vm_name) == self._seen:
            return
        known, plan = self._plan, Plan.read(self.db, self.vm_name, self._plan)
        self._leave_if_told()
        for hold in plan.holds[len(known.holds) if known else 0 :]:
            self.log.info("%s at %.3f", hold, hold.time)
        self._plan = plan
        life.take(plan)
        for request in claim_requests(self.vm):
            life.agenda.spawn(request_steps(self.vm, request))
        self._seen = plan.revision  # last: what an error kept from being taken is news still

    # --- waiting

    def _idle(self, seconds: float) -> None:
        """Wait for the next due step, a wake or the look; the agent must not speak now."""
        now = CLOCK.monotonic()
        seconds = min(seconds, self._look_at - now)
        if self._woken or seconds <= 0:
            return
        self.vm.tell("")
        fd = self.vm.driver.fileno()
        spoke = self._poll(fd, select.POLLIN, seconds)
        self.vm.patience.calm += CLOCK.monotonic() - now
        if spoke:
            raise drivers.LinkLost("the agent hung up, or spoke without being asked")

    def _wait(self, fd: int, events: int, seconds: float) -> bool:
        """Wait, in driver calls too, for a descriptor (-1: none); return whether it is ready."""
        deadline = CLOCK.monotonic() + seconds
        while True:
            if self._poll(fd, events, deadline - CLOCK.monotonic()):
                return True
            if CLOCK.monotonic() >= deadline:
                return False

    def _poll(self, fd: int, events: int, seconds: float) -> bool:
        """The one place where a handler waits; return whether a descriptor is ready."""
        poll = select.poll()
        lifeline = self.config.get("lifeline", -1)
        own = self._wake.fileno() if self._wake else -1
        for descriptor, mask in ((fd, events), (lifeline, select.POLLIN), (own, select.POLLIN)):
            if descriptor >= 0:
                poll.register(descriptor, mask)
        timeout = None if math.isinf(seconds) else math.ceil(max(0.0, seconds) * 1000)
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        if lifeline in ready:
            raise _Leave("the supervisor is gone")
        if own in ready and self._wake:
            self._wake.drain()
            self._woken = True
            self._leave_if_told()
        return fd in ready

    def _leave_if_told(self) -> None:
        halt = self.db.value("SELECT halt FROM current_experiment")
        if halt in (Halt.STOP, Halt.KILL) and self._obeyed is None:
            raise _Leave(f"told to {halt}", Halt(halt))

    def _kill_all(self) -> None:
        """End the programs of all open attempts, on the way out; those on this host first."""
        for on_host in (True, False):
            try:
                if not on_host:
                    self.vm.connect(self.db.timeouts.lock)
                entries = Plan.read(self.db, self.vm_name, self._plan).entries
                kill_open(self.vm, self.vm.host if on_host else self.vm.guest, entries)
            except (drivers.DriverError, VMFailed, _Leave) as error:
                self.log.error("could not kill everything: %s", error)

    # --- the reference's methods, for scripts

    @property
    def driver(self) -> drivers.AbstractDriver:
        """The VM's driver, once it was connected."""
        return self.vm.driver

    @staticmethod
    def _check_driver(obj: object) -> bool:
        is_driver = isinstance(obj, type) and issubclass(obj, drivers.AbstractDriver)
        return is_driver and not getattr(obj, "__abstractmethods__", None)

    def _import_drivers(self) -> set[Driver]:
        return set(plug_ins().values())

    def import_driver(self) -> Driver:
        """Return the driver class whose engine is this VM's; VMFailed if there is none."""
        return self.vm.driver_class()

    def connect_to_driver(self) -> bool:
        """Try for `agent_timeout` seconds to reach the VM's agent; return whether it worked."""
        return self._quietly(self.vm.connect)

    def _quietly(self, action: Callable[..., object], *arguments: Any) -> bool:
        try:
            action(*arguments)
        except (drivers.DriverError, VMFailed, _EntryFailed, OSError) as error:
            self.log.error("%s", error)
            return False
        return True

    def load_files_in_target(self, schedule_entry: ScheduleEntry) -> bool:
        """Bring what one entry needs into the guest's stage; return whether that worked."""
        return self._quietly(run_steps, Staging(self.vm).steps([schedule_entry]), self.vm.nap)

    def preload_files(self) -> bool:
        """Bring what all entries need into the guest's stage; return whether that worked."""
        entries = Plan.read(self.db, self.vm_name).entries
        return self._quietly(run_steps, Staging(self.vm).steps(entries), self.vm.nap)

    def run_vm_resource(
        self, schedule_entry: ScheduleEntry, queue: Queue[Any] | None = None
    ) -> None:
        """Run a stored entry to its end, or log why not; the queue gets it if it asks to reboot."""
        self._quietly(self._run_vm_resource, schedule_entry, queue)

    def _run_vm_resource(
        self, schedule_entry: ScheduleEntry, queue: Queue[Any] | None = None
    ) -> None:
        with contextlib.closing(Life(self.vm, self._staging)) as life:
            if life.run_once(schedule_entry).reboot and queue is not None:
                queue.put(schedule_entry)

    def check_for_reboot(self, reboot_filepath: str) -> bool:
        """Return whether the guest has a reboot file at this path, which asks for a reboot."""
        return bool(self.driver.file_exists(reboot_filepath))

    def reboot(self) -> None:
        """Reboot the VM; return when its agent answers again. VMFailed if that takes too long."""
        run_steps(self.vm.reboot_steps(), self.vm.nap)

    def print_output(self, schedule_entry: ScheduleEntry, pid: int) -> None:
        """Write the output of the guest's process `pid`, as the agent has it, to the VM's log."""
        self._print_stream(self.driver.get_stdout(pid), str(schedule_entry), "out")
        self._print_stream(self.driver.get_stderr(pid), str(schedule_entry), "err")

    def _print_stream(self, output: str | None, stream: str, stream_name: str) -> None:
        self.vm.output.lines(stream, stream_name, (output or "").splitlines())

    def log_json(self, content: str | Mapping[str, Any]) -> None:
        """Write every line of a text that is a JSON object (or a dictionary) to the JSON log."""
        self.vm.output.json_lines(content)

    def transfer_data(
        self,
        name: str,
        location: str,
        interval: float | None = None,
        destination: str | None = None,
    ) -> None:
        """Pull a file, directory or glob out of the VM, once or every `interval` seconds.

        It goes to a directory of this host, by default `transfers` in the state directory.
        RuntimeError if the location is not absolute, or cannot be pulled.
        """
        if not is_guest_path(location):
            raise RuntimeError(f"transfer path {location!r} is not absolute")
        steps = Transfers(self.vm).steps(name, location, interval, destination)
        run_steps(steps, self.vm.nap)

    _transfer_data = transfer_data

    def set_current_time(self, cur_time: float) -> None:
        """Record the schedule time, in seconds, that the VM has reached."""
        self.mapping.set_vm_time_by_uuid(self.config["vm_uuid"], _plain_time(cur_time))

    def set_state(self, state: str) -> None:
        """Record a `VMState`; the last VM to be configured sets the start time by this."""
        self.vm.set_state(state)

    def stop(self, exitcode: int) -> NoReturn:
        """End this process at once, with this exit code; guest programs go on."""
        self.vm.close()
        sys.exit(exitcode)

    @functools.cached_property
    def updater(self) -> ScheduleUpdater:
        """Tells a script what is new, as events; the handler itself reads rows."""
        from queue import PriorityQueue

        where = self.config, PriorityQueue[Any](), threading.Condition(), None
        schedules, seconds = ScheduleDb(db=self.db), self.check_interval
        return ScheduleUpdater(*where, schedules, None, self.log, None, interval_time=seconds)

    def get_events(self) -> list[ScheduleEvent]:
        """Take all events off the updater's queue, in the order of their times."""
        queue = self.updater.priority_queue
        with self.updater.condition:
            return [queue.get_nowait()[1] for _ in range(queue.qsize())]


# === commands on a VM at once ====================================================================
#
# A command has a directory requests/<id>, which it keeps locked while it lives. In it are: `vm`,
# the VM's name; `source`, a link to what is pushed; `sink`, a link to the incomplete file that it
# makes on this host; `out` and `err` of a program; `progress` of a copy; and `broken-off` while a
# push may have a temporary file in the guest, with what it takes to find that.

MAX_UNSIZED_BYTES = 64 << 20  # of a file that is said to be empty
COPY_REPORT_BYTES = 1 << 20  # how often a copy tells how far it is
_BROKEN_OFF = "broken-off"


def operation_steps(
    vm: HandledVM, operation: str, arguments: Mapping[str, Any], folder: Path
) -> Steps:
    """Do what a command asks of a VM, by its handler or without one; return the answer."""
    if operation == "reboot":
        yield from vm.reboot_steps()
        return {"boot": vm.guest.boot}
    known: dict[str, Callable[..., Steps]] = {"exec": _exec_steps, "info": _info_steps}
    known |= {"push": _push_steps, "pull": _pull_steps}
    return (yield from known[operation](_guest_at_once(vm.driver), folder, **arguments))


def _guest_at_once(driver: drivers.AbstractDriver) -> Guest:
    return guest_of(driver, "", driver.timeout, driver.timeout)


def _exec_steps(guest: Guest, folder: Path, argv: Sequence[str]) -> Steps:
    if unfit := guest.unfit(argv):
        what = f"a batch file cannot be given the argument {unfit[0][:40]!r} by the agent"
        return {"error": f"{what}; push it in a file", "code": 2}
    try:
        pid = guest.driver.start(argv, capture=True)
    except drivers.Frozen as error:
        return {"error": str(error), "code": 255}
    except drivers.AgentError as error:  # 126 and 127 as a shell means them
        is_there = isinstance(error, drivers.CommandDisabled | drivers.CommandMissing)
        is_there = is_there or guest.ask("has-program", argv[0]).exitcode == 0
        return {"error": str(error), "code": 126 if is_there else 127}
    try:
        status = yield from guest.await_end(pid)
    except drivers.UnknownPid:
        return {"unknown": "it may have run: the agent was restarted, or the guest rebooted"}
    except drivers.AgentError as error:
        return {"unknown": f"it may have run: {error}"}
    (folder / "out").write_bytes(status.out)
    (folder / "err").write_bytes(status.err)
    cut = [name for name in ("out", "err") if getattr(status, f"{name}_truncated")]
    return {"exit_code": status.exitcode, "signal": status.signal, "truncated": cut}


def _push_steps(guest: Guest, folder: Path, remote: str, size: int, mode: str) -> Steps:
    note, token = folder / _BROKEN_OFF, os.urandom(8).hex()
    note.write_text(json.dumps([remote, token]))
    _crash("push-begun")
    try:
        argv = guest.argv("receive", remote, str(size), token)
        path = yield from _told_steps(guest, argv, f"no place for {remote!r}")
        with (folder / "source").open("rb") as source:
            copy = guest.driver.push(cast(BinaryIO, _First(source, size)), path)
            yield from _report_steps(copy, folder)
        _crash("push-arrived")
        argv = guest.argv("deliver", path, remote, mode)
        yield from _told_steps(guest, argv, f"cannot put {remote!r} in its place")
    except (VmrmError, OSError) as error:
        if not _is_link_trouble(error):
            yield from _discard_steps(guest.driver, folder)
        raise
    note.unlink()
    return {"bytes": size}


class _First:  # bytes of a file that may be growing
    def __init__(self, source: BinaryIO, size: int) -> None:
        self.source, self.left = source, size

    def read(self, size: int) -> bytes:
        data = self.source.read(min(size, self.left))
        self.left -= len(data)
        return data


def _pull_steps(guest: Guest, folder: Path, remote: str) -> Steps:
    mode, size, what = 0o600, None, f"cannot read {remote!r}"
    with contextlib.suppress(drivers.CommandDisabled, drivers.CommandMissing):
        told = yield from _told_steps(guest, guest.argv("facts", remote), what)
        try:
            mode, size = parse_facts(told)
        except VmrmError as error:
            raise VmrmError(f"{what}: {error}") from None
    limit = size or MAX_UNSIZED_BYTES  # what the kernel writes has no size, as in /proc
    with (folder / "sink").open("r+b") as sink:
        try:
            refuse_full(sink.fileno(), size or 0)
        except OSError as error:
            raise VmrmError(f"{what}: {error.strerror}") from None
        yield from _report_steps(guest.pull(remote, sink, limit=limit), folder)
        if not size and sink.tell() >= limit:
            raise VmrmError(f"{remote!r} has no size, and does not end")
        return {"bytes": sink.tell(), "mode": mode}


def _told_steps(guest: Guest, argv: Sequence[str], what: str) -> Steps:
    status = yield from guest.finish(argv)
    if status.exitcode != 0:
        raise VmrmError(f"{what}: {printable(status.err) or 'no reason given'}")
    return status.out.decode(errors="replace").rstrip("\r\n")


def _report_steps(copy: Iterable[int], folder: Path) -> Steps:
    told, looked_at = 0, CLOCK.monotonic()
    for moved in copy:
        if CLOCK.monotonic() > looked_at + 0.5:
            if not FileLock(folder).is_held:
                raise VmrmError("the command has ended")
            looked_at = CLOCK.monotonic()
        if moved - told >= COPY_REPORT_BYTES:
            told = moved
            (folder / "progress").write_text(str(moved))
        yield 0


def _info_steps(guest: Guest, folder: Path) -> Steps:
    yield 0
    driver = guest.driver
    info = driver.info()
    facts: dict[str, Any] = {"agent": "", "health": driver.health()}
    asked: dict[str, Callable[[], Any]] = {
        "agent": lambda: _guest_text(info.get("version", "")),
        "os": driver.get_os,
        "host_name": lambda: _guest_text(driver.call("guest-get-host-name")["host-name"]),
        "boot_id": driver.boot_id,
        "time": lambda: _iso(driver.get_time() / 1e9),
        "addresses": lambda: list(itertools.islice(_addresses(driver), MAX_FAULTS)),
    }
    for name, ask in asked.items():
        try:
            facts[name] = ask()
        except (drivers.AgentError, OSError, ValueError, KeyError, TypeError) as error:
            if _is_link_trouble(error):
                raise
            facts[name] = f"unknown: {_one_line(error)}"
    commands = info.get("supported_commands", [])
    return {**facts, "disabled": [printable(c["name"]) for c in commands if not c["enabled"]]}


def _guest_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("the guest tells no text")
    return printable(value)


def _addresses(driver: drivers.AbstractDriver) -> Iterator[str]:
    for interface in driver.network_get_interfaces():
        for address in interface.get("ip-addresses", []):
            yield printable(f"{interface['name']} {address['ip-address']}/{address['prefix']}")


# --- a command's directory


@contextlib.contextmanager
def workplace(db: Database, vm_name: str = "") -> Iterator[Path]:
    with db.lock("requests").shared():
        folder = db.directory("requests", os.urandom(16).hex())
        lock = FileLock(folder, lambda: os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
        lock.take()
    try:
        (folder / "vm").write_text(vm_name)
        yield folder
    finally:
        lock.release()
        if not _is_needed(db, folder):  # else its handler will do it
            forget_request(db, folder)


def _is_needed(db: Database, folder: Path) -> bool:
    if FileLock(folder).is_held:
        return True
    sql = "SELECT claimed_by FROM requests WHERE id = :id AND answered_at IS NULL"
    with contextlib.suppress(Unavailable):
        handler = db.value(sql, id=folder.name)
        return handler is not None and Process.parse(handler).is_alive()
    return False


def forget_request(db: Database, folder: Path) -> None:
    """Remove what a request has left on this host, but not the note of what it left in a guest."""
    import shutil

    _unlink(_sinks(folder))
    if not (folder / _BROKEN_OFF).exists():
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # a client that was killed leaves its socket, too
        (db.state_dir / "wake" / f"c-{folder.name}").unlink(missing_ok=True)
    with contextlib.suppress(Unavailable):  # "it may have run" must not become "try again"
        if db.value("SELECT 1 FROM requests WHERE id = :id", id=folder.name):
            db.write("DELETE FROM requests WHERE id = :id", id=folder.name)


def _sinks(folder: Path) -> list[Path]:
    """Return what a command has made elsewhere that is not complete, SQLite's files included."""
    with contextlib.suppress(OSError):
        sink = (folder / "sink").readlink()
        if _OUR_TEMPORARY.fullmatch(sink.name):
            return sorted(sink.parent.glob(f"{sink.name}*"))
    return []


def make_sink(folder: Path, target: Path) -> Path:
    """Make and return the file, beside `target`, that is to take its place once complete."""
    temporary = target.absolute().with_name(temporary_name())
    (folder / "sink").symlink_to(temporary)
    try:
        temporary.touch(0o600, exist_ok=False)
    except OSError as error:  # told of the file that was named
        raise OSError(error.errno, error.strerror, str(target)) from error
    return temporary


@contextlib.contextmanager
def new_file(db: Database, path: Path) -> Iterator[Path]:
    """Make a file for its user alone, filled by the caller; it appears when it is complete."""
    exists = UsageError(f"{str(path)!r} exists already")
    if os.path.lexists(path):
        raise exists
    with workplace(db) as folder:
        temporary = make_sink(folder, path)
        yield temporary
        _crash("file-before-rename")
        try:
            path.touch(0o600, exist_ok=False)
        except FileExistsError:  # somebody was faster
            raise exists from None
        temporary.rename(path)


def abandoned_requests(db: Database) -> list[tuple[Path, str]]:
    """Return the directories of dead commands, each with its VM's name, '' if there is none."""
    lock, found = db.lock("requests"), []
    alone = lock.take()  # while none is made, each has its lock
    try:
        paths = sorted(db.directory("requests").iterdir())
        dead = [path for path in paths if not _is_needed(db, path)]
    finally:
        lock.release()
    for folder in dead:
        try:
            found.append((folder, (folder / "vm").read_text()))
        except FileNotFoundError:
            if alone and folder.exists():
                found.append((folder, ""))
    return found


def _discard_steps(driver: drivers.AbstractDriver, folder: Path) -> Steps:
    guest, note = _guest_at_once(driver), folder / _BROKEN_OFF
    with contextlib.suppress(drivers.AgentError, VmrmError, ValueError, FileNotFoundError):
        yield from guest.finish(guest.argv("discard", *json.loads(note.read_text())))
        note.unlink()
    yield 0


def _discard_all_steps(db: Database, vm_name: str, driver: drivers.AbstractDriver) -> Steps:
    for folder, name in abandoned_requests(db):
        if name == vm_name:
            yield from _discard_steps(driver, folder)
            forget_request(db, folder)
    yield 0


# --- a command's way to a VM


def run_steps(steps: Steps, wait: Callable[[float], object]) -> Any:
    """Run steps to their end, here and now; return what they return."""
    agenda = Agenda()
    try:
        return agenda.finish(agenda.spawn(steps), wait)
    finally:
        agenda.close()


class _Handled(Exception):
    pass


class Remote(NamedTuple):
    """Does things on one VM at once: through its handler if one lives, else by itself."""

    db: Database
    config: Mapping[str, Any]
    folder: Path
    timeout: float  # seconds within which the VM, or its handler, must begin to answer

    @property
    def name(self) -> str:
        return cast(str, self.config["vm_name"])

    def do(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Have an operation done; return its answer. Raises VmrmError: 255 if nobody knows."""
        for way in (self._directly, self._by_handler) * 2:  # handlers come and go
            if (answer := way(operation, arguments)) is not None:
                break
        else:
            raise Unavailable(f"VM {self.name!r}: its handlers come and go", "Try again later")
        if "unknown" in answer:
            answer |= {"error": answer["unknown"], "code": 255}
        if "error" in answer:
            hint, code = answer.get("hint", ""), answer.get("code")
            raise VmrmError(f"VM {self.name!r}: {answer['error']}", hint, code=code)
        return answer

    @property
    def _is_handled(self) -> bool:
        return handler_lock(self.db, self.config["ordinal"]).is_held

    def _nap(self, seconds: float) -> None:
        """Wait for others that use the agent, but not for a handler, which has it for long."""
        time_to_wait(seconds)
        if self._is_handled:
            raise _Handled

    def _directly(self, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """Do it here; None if a handler has the agent."""
        if self._is_handled:
            return None
        vm = HandledVM({**self.config, "agent_timeout": self.timeout}, drivers.plain_wait)
        begun, deadline = False, drivers.Deadline(self.timeout)
        try:
            with agent_lock(self.config["path"], self.db.path, self._nap, self.timeout):
                vm.connect(max(0.1, deadline.remaining()))
                run_steps(_discard_all_steps(self.db, self.name, vm.driver), vm.nap)
                begun = True
                try:
                    steps = operation_steps(vm, operation, arguments, self.folder)
                    return cast("dict[str, Any]", run_steps(steps, vm.nap))
                finally:
                    if (self.folder / _BROKEN_OFF).exists():
                        with contextlib.suppress(drivers.DriverError, VMFailed):
                            vm.connect(min(self.timeout, 5))
                            run_steps(_discard_steps(vm.driver, self.folder), vm.nap)
        except _Handled:
            return None
        except drivers.AgentError as error:
            return {"error": str(error)}
        except (Conflict, drivers.DriverError) as error:
            what = "it may have run: " if begun and operation == "exec" else ""
            return {"error": f"{what}{error}", "hint": error.hint, "code": 255}
        except VmrmError as error:
            code = 255 if isinstance(error, VMFailed) and not begun else error.code
            return {"error": str(error), "hint": error.hint, "code": code}
        finally:
            vm.close()

    def _by_handler(self, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """Ask the handler; None if it has left without taking the request."""
        with contextlib.closing(WakeSocket(self.db, f"c-{self.folder.name}")) as answered:
            self.db.write(
                """INSERT OR REPLACE INTO requests (id, server_name, operation, arguments,
                       deadline_at) VALUES (:id, :name, :operation, :arguments, :deadline)""",
                id=self.folder.name,
                name=self.name,
                operation=operation,
                arguments=json.dumps(arguments),
                deadline=CLOCK.wall() + self.timeout,
            )
            return self._await_answer(answered)

    def _await_answer(self, answered: WakeSocket) -> dict[str, Any] | None:
        poll, deadline = select.poll(), CLOCK.monotonic() + self.timeout
        poll.register(answered.fileno(), select.POLLIN)
        while True:
            row = self.db.row("SELECT * FROM requests WHERE id = :id", id=self.folder.name)
            assert row is not None
            if row["answer"] is not None:
                return cast("dict[str, Any]", json.loads(row["answer"]))
            if row["claimed_by"] is not None:
                if not Process.parse(row["claimed_by"]).is_alive():
                    return {"unknown": "it may have run: the handler died"}
            elif CLOCK.monotonic() >= deadline and self._withdraw():
                what = f"its handler did not take the request in {self.timeout:g} s"
                hint = f"See what it does: vmrm logs {self.name}"
                return {"error": what, "hint": hint, "code": 255}
            elif not self._is_handled and self._withdraw():
                if self.db.value("SELECT halt FROM current_experiment") in (Halt.STOP, Halt.KILL):
                    what = "its handler was stopped before it took the request"
                    raise Unavailable(f"VM {self.name!r}: {what}", "Nothing was done: try again")
                return None
            poll.poll(500)
            answered.drain()

    def _withdraw(self) -> bool:
        sql = "UPDATE requests SET withdrawn = 1 WHERE id = :id AND claimed_by IS NULL RETURNING id"
        return bool(self.db.write(sql, id=self.folder.name))


def _pool_config(db: Database, vm_name: str) -> dict[str, Any] | None:
    sql = """SELECT vm_name, path, 'pool.' || vm_name AS ordinal FROM pool_vms
             WHERE vm_name = :name AND NOT EXISTS (SELECT 1 FROM vms WHERE server_name = :name)"""
    row = db.row(sql, name=vm_name)
    if row and not row["path"]:
        raise UsageError(f"VM {row['vm_name']!r} of the pool has no path to a guest agent")
    common = {"vm_uuid": "", "engine": "QemuVM", "db": db, "launch_dir": "", "set_time": False}
    return {**row, **common} if row else None


def claim_requests(vm: HandledVM) -> Iterator[Row]:
    """Claim what commands ask of a handler, each by one UPDATE: after a stop nothing begins."""
    sql = "SELECT id FROM requests WHERE server_name = :name AND claimed_by IS NULL"
    for row in vm.db.query(sql, name=vm.name):
        if not FileLock(vm.db.state_dir / "requests" / row.id).is_held:
            continue  # its client is gone
        yield from vm.db.write(
            """UPDATE requests SET claimed_by = :me WHERE id = :id AND claimed_by IS NULL
               AND NOT withdrawn AND deadline_at > :now AND NOT EXISTS (
                   SELECT 1 FROM current_experiment WHERE halt IN ('stop', 'kill'))
               RETURNING *""",
            me=str(Process.of()),
            id=row.id,
            now=CLOCK.wall(),
        )


def request_steps(vm: HandledVM, row: Row) -> Steps:
    """Do what a claimed request asks for, and answer it."""
    _crash("request-claimed")
    folder = vm.db.directory("requests", row.id)
    try:
        answer = yield from operation_steps(vm, row.operation, json.loads(row.arguments), folder)
    except (drivers.AgentError, VmrmError, OSError) as error:
        if _is_link_trouble(error):
            raise
        answer = {"error": _one_line(error)}
    answer_requests(vm, answer, row.id)
    if not FileLock(folder).is_held:
        forget_request(vm.db, folder)


def answer_requests(vm: HandledVM, answer: Mapping[str, Any], request: str | None = None) -> None:
    """Answer a request; without one, all that a dead handler or a lost link left claimed."""
    vm.db.write(
        """UPDATE requests SET answered_at = :now, answer = :answer
           WHERE answered_at IS NULL AND (id = :id
               OR :id IS NULL AND server_name = :name AND claimed_by IS NOT NULL)""",
        id=request,
        name=vm.name,
        now=CLOCK.wall(),
        answer=json.dumps(answer),
    )


# === supervisor ==================================================================================


@dataclasses.dataclass
class _Charge:
    """What the supervisor knows of the handlers of one VM."""

    pid: int = 0  # of the live one
    deaths: int = 0  # in a row, without progress
    progress: object = None  # at the last of them
    not_before: float = -math.inf  # when another one may be started
    last_rites: bool = False  # one was started only to end the VM's programs


class Supervisor:
    """Forks one handler per VM, starts those that died again, and decides when all is done.

    It runs in a fresh interpreter with one thread, so that a fork is safe and a thousand handlers
    share its memory. It alone holds the write end of the lifeline. With `stay` it keeps running
    when all work is done, so that entries can still be added.
    """

    def __init__(self, db: Database, stay: bool = False) -> None:
        self.db, self.stay, self.timeouts = db, stay, db.timeouts
        self.log = logging.getLogger("vmrm")
        self._began = CLOCK.wall(), CLOCK.monotonic()
        self._charges = collections.defaultdict[str, _Charge](_Charge)  # by VM
        self._leave_by = math.inf
        self._hurrying: Halt | None = None
        self._trouble = False  # with the database, and told so
        self._loan = Loan(db)

    def run(self) -> int:
        """Supervise until the experiment is over; return 0."""
        import gc
        import resource

        what = "the experiment is being run already"
        hint = "Watch it: vmrm run, or end it: vmrm stop"
        with Seat(self.db, SUPERVISOR, what, hint, signal.SIGTERM) as self._seat:
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            enough = hard if 0 <= hard < MAX_FILES else MAX_FILES
            resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
            self._lifeline, self._held = os.pipe()
            self.db.close()  # no connection crosses a fork
            gc.collect()
            gc.freeze()
            while not self._ended():
                now = CLOCK.monotonic()
                dues = [self._leave_by, *(charge.not_before for charge in self._charges.values())]
                later = [due - now for due in dues if due > now]  # what is past had its turn
                wait = min([self.timeouts.watch, *later])
                self._seat.wait(wait, *self._loan.descriptors())
        return 0

    def _ended(self) -> bool:
        """Do what is to be done now; return whether the experiment is over, or we must leave.

        While the database cannot be used nothing is decided; handlers wait for it as we do.
        """
        try:
            if over := self._step():
                self._end()
            self._trouble = False
        except Unavailable as error:
            if not self._trouble:
                self.log.error("%s; waiting", error)
            self._trouble = True
            return self._seat.told_to_stop  # which no row can say now: the lifeline does
        return over

    def _step(self) -> bool:
        """Look at everything once; return whether the experiment is over."""
        self._reap()
        if self._seat.told_to_stop:
            halt_experiment(self.db, Halt.STOP)
            self._seat.told_to_stop = False
        halt = self.db.value("SELECT halt FROM current_experiment")
        if halt is None and self._end_if_over():
            halt = Halt.END
            _crash("end-set")
        if halt is None:
            self._start_handlers()
        elif halt == Halt.KILL:  # where no handler is left to end a program, one more, once
            for name in vms_with_programs(self.db):
                if not self._charges[name].last_rites:
                    self._charges[name].last_rites = self._fork(name)
        if halt is not None and not any(charge.pid for charge in self._charges.values()):
            return True
        if halt in (Halt.STOP, Halt.KILL):
            self._hurry(Halt(halt))
        checkpoint_wal(self.db)
        return False

    def _start_handlers(self) -> None:
        """Start handlers once all VMs of the pool are here; give up those that were taken away."""
        lost, why = [], "its machine of the pool was taken back"
        try:
            if not self._loan.obtain():
                return
            lost = lost_vms(self.db)
        except UsageError as error:
            lost, why = [row["server_name"] for row in self._loan.vms()], str(error)
        for name in lost:
            sql = "SELECT 1 FROM vms WHERE server_name = :name AND state <> 'failed'"
            if self.db.value(sql, name=name):
                self._give_up(name, why)
            self._kill(name)
        sql = """SELECT server_name FROM vms
                 WHERE state IN ('uninitialized', 'configuring', 'configured') ORDER BY ordinal"""
        for row in self.db.query(sql):
            if self._charges[row.server_name].not_before <= CLOCK.monotonic():
                self._fork(row.server_name)

    def _end_if_over(self) -> bool:
        """Tell everybody if all work is done; looking again and telling are one decision."""
        sql = "SELECT has_work FROM barrier"
        if self.stay or self.db.value(sql):
            return False
        with self.db.transaction():
            if self.db.value(sql):  # an entry was added meanwhile
                return False
            _set_halt(self.db, Halt.END)
        return True

    def _fork(self, name: str) -> bool:
        """Start the handler of a VM unless it has one; return whether one was started."""
        charge = self._charges[name]
        if charge.pid:
            return False
        self.db.close()  # no connection crosses a fork
        _crash("before-fork")
        try:
            charge.pid = os.fork()
        except OSError as error:  # too many processes, or too little memory, for the moment
            self.log.error("cannot start the handler of %s: %s", name, error)
            charge.not_before = CLOCK.monotonic() + 1
            return False
        if charge.pid == 0:
            handler_process(self.db.path, name, self._lifeline)
        return True

    def _reap(self) -> None:
        """Take note of the handlers that have ended, and when the next may be started."""
        while any(charge.pid for charge in self._charges.values()):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            for name, charge in self._charges.items():
                if charge.pid == pid:
                    charge.pid = 0
                    pause = self._died(name, charge, os.waitstatus_to_exitcode(status))
                    charge.not_before = CLOCK.monotonic() + pause

    def _died(self, name: str, charge: _Charge, code: int) -> float:
        """Return for how long to wait after a handler's end; give its VM up if that is no use."""
        if code == 0:
            charge.deaths = 0
            return 0.5  # another one comes if the VM still has work
        if code == Unavailable.code:  # it can do nothing without the database, nor can we
            return self.timeouts.reconnect
        if code == SchemaError.code:
            raise SchemaError(f"the handler of {name} found the database unusable", RESTORE)
        how = _signal_name(-code) if code < 0 else f"exit code {code}"
        sql = """SELECT count(*) AS attempts, count(sent_at) AS sent, count(ended_at) AS ended,
                     (SELECT state FROM vms WHERE server_name = :name) AS state
                 FROM attempts WHERE server_name = :name"""
        before, charge.progress = charge.progress, self.db.row(sql, name=name)
        charge.deaths = charge.deaths + 1 if charge.progress == before else 1
        if charge.deaths >= MAX_DEATHS:
            sql = "SELECT reason FROM vms WHERE server_name = :name"
            last = self.db.value(sql, name=name) or how
            self._give_up(name, f"its handler died {charge.deaths} times in a row: {last}")
            return 0.0
        pause = backoff(charge.deaths, 0.1, self.timeouts.restart)
        self.log.warning("the handler of %s died (%s); again in %.1f s", name, how, pause)
        return pause

    def _give_up(self, name: str, reason: str) -> None:
        self.log.error("%s: %s", name, reason)
        with contextlib.suppress(NotFound, ValueError), _changing_vms(self.db):
            move_vm(self.db, name, VMState.FAILED, reason)  # unless it was taken out meanwhile

    def _kill(self, name: str) -> None:
        if pid := self._charges[name].pid:
            os.kill(pid, signal.SIGKILL)

    def _hurry(self, halt: Halt) -> None:
        """Give handlers a while to leave, then kill them."""
        now, grace = CLOCK.monotonic(), self.timeouts.leave
        if halt is Halt.KILL:  # they connect anew, and end programs in two steps, here and there
            grace += self.timeouts.lock + 2 * (self.timeouts.claim_grace + self.timeouts.term_grace)
        if halt is not self._hurrying:
            self._hurrying, self._leave_by = halt, now + grace
        if now >= self._leave_by:
            for name in self._charges:
                self._kill(name)

    def _end(self) -> None:
        now, (began, since) = CLOCK.wall(), self._began
        unset = began + CLOCK.monotonic() - since  # what the clock would say had nobody set it
        tie_up(self.db)  # handlers may have died that needed no successor
        end_experiment(self.db, now if abs(now - unset) < 1 else unset)
        halt = self.db.value("SELECT halt FROM current_experiment")
        self._loan.end(over=halt == Halt.END)
        self.log.info("the experiment has ended")
        self.db.checkpoint(truncate=True)
        self.db.close()


def handler_process(path: Path, name: str, lifeline: int) -> NoReturn:
    """Be the handler of one VM, in a process just forked; never returns."""
    code, logger = 1, logging.getLogger(f"vmrm.{name}")
    try:
        logging.getLogger("vmrm").handlers.clear()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(lifeline, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        with Database(path, checkpoint=False, create=False) as db:
            try:
                code = handle(db, name, lifeline=3)
            except Conflict as conflict:
                sql = "UPDATE vms SET reason = :reason WHERE server_name = :name"
                db.write(sql, reason=str(conflict), name=name)
                raise
    except VmrmError as error:
        code = error.code
        logger.error("%s", error)
    except BaseException:
        logger.exception("the handler broke")
    finally:
        os._exit(code)


def handle(db: Database, name: str, **more: Any) -> int:
    """Run one VM's handler in this process; a VM that cannot be run becomes `failed`.

    `Conflict`: the VM has a handler already, or its agent another client.
    """
    logger = logging.getLogger(f"vmrm.{name}")
    log_to(logger, run_directory(db, "logs") / f"{name}.log")
    try:
        config = handler_config(db, name)
        while True:
            handler = VMResourceHandler({**config, **more}, check_interval=db.timeouts.look)
            code = handler.run()
            if not (handler.replaced and more.get("alone")):  # no supervisor starts it again
                return code
    except (Conflict, Unavailable, WrongValue):  # the last for a move that a person forestalled
        raise
    except VmrmError as error:
        logger.error("%s", error)
        with _changing_vms(db):
            move_vm(db, name, VMState.FAILED, str(error))
        return 0


def halt_experiment(db: Database, halt: Halt) -> None:
    """Tell the supervisor and all handlers what to do now; the first word stands, but for kill."""
    try:
        with db.transaction():
            _set_halt(db, halt)
    except Unavailable:
        pid = supervisor_pid(db)
        if halt is not Halt.STOP or pid in (None, os.getpid()):
            raise
        os.kill(pid, signal.SIGTERM)  # its end is the end of all handlers


def end_experiment(db: Database, now: float | None = None) -> None:
    """Note that nobody runs the experiment any more, if it was told to come to its end."""
    sql = """UPDATE experiments SET ended_at = :now
             WHERE destroyed_at IS NULL AND halt IS NOT NULL AND ended_at IS NULL"""
    db.write(sql, now=CLOCK.wall() if now is None else now)


def is_being_killed(db: Database) -> bool:
    """Whether `stop --kill` was told, and is not through."""
    sql = "SELECT 1 FROM current_experiment WHERE halt = 'kill' AND ended_at IS NULL"
    return db.value(sql) is not None


def vms_with_programs(db: Database) -> list[str]:
    """Return the VMs in which programs of ours run, as far as rows know."""
    sql = """SELECT DISTINCT server_name FROM entry_status JOIN vms USING (server_name)
             WHERE executable IS NOT NULL AND outcome IN ('armed', 'running')"""
    return [row.server_name for row in db.query(sql)]


def _set_halt(db: Database, halt: Halt) -> None:
    sql = """UPDATE experiments SET halt = :halt WHERE destroyed_at IS NULL
             AND (halt IS NULL OR halt IN ('end', 'abort') AND :halt IN ('stop', 'kill')
                  OR halt = 'stop' AND :halt = 'kill')"""
    db.write(sql, halt=halt.value)


def launch(
    db: Database,
    *,
    start_buffer: float | None = None,
    on_failure: str | None = None,
    late: str = Late.START,
    allow_host: bool = False,
    retry: bool = False,
) -> list[str]:
    """Make the experiment ready to be supervised; None leaves a setting as it is.

    Returns the entries that are repeated (with `retry`, all that failed or are unknown), and the
    failed VMs that get another chance.
    """
    refuse_damaged(db.connection)
    rows = db.query("SELECT * FROM vms WHERE state <> 'n/a' ORDER BY ordinal")
    if not rows:
        raise UsageError("there is no VM to run", "Load an experiment: vmrm load FILE")
    for row in rows:
        if not row.path and not row.pool:
            what = f"VM {row.server_name!r} has no path to a guest agent"
            raise UsageError(what, "Give it one: path = …, by add_vm")
    tie_up(db)
    refuse_others_locks(rows)
    addressed = with_addresses(rows)  # links may have been set anew
    _check_loan(db, addressed)
    texts = ScheduleDb(db=db).list_all()
    check_host_entries({row["server_name"]: row["text"] for row in texts}, allow_host)
    with _changing_vms(db):
        if is_being_killed(db):
            raise Unavailable(
                "the experiment's programs are still being ended",
                "Run it again once vmrm stop --kill has returned; if that was killed, repeat it",
            )
        for vm in addressed:
            _refuse_pool_machine(db, vm)
            db.update("vms", {"ordinal": vm["ordinal"]}, address=vm["address"])
        _settle_late(db, late)
        sql = """UPDATE experiments SET halt = NULL, ended_at = NULL, continued_at = :now,
                     late = :late, allow_host = :allow_host, start_cleared = 0,
                     launched_at = coalesce(launched_at, :now),
                     start_buffer_s = coalesce(:buffer, start_buffer_s),
                     on_failure = coalesce(:policy, on_failure)
                 WHERE destroyed_at IS NULL"""
        given: dict[str, Any] = {
            "buffer": start_buffer,
            "policy": on_failure,
            "allow_host": allow_host,
        }
        db.write(sql, now=CLOCK.wall(), late=str(late), **given)
        db.write("UPDATE vms SET finished_at = NULL")
        # Failed VMs get another chance before the barrier looks, else it would abort at once.
        return retry_in(db, needed=not retry)


def _check_loan(db: Database, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to go on with other machines of the pool than those on which work was done."""
    pooled = [row for row in rows if row["pool"]]
    for row in pooled:
        VmManager(db=db).group(row["pool"])
    gone = [row for row in pooled if not row["pool_token"]] or lost_vms(db)
    begun = "SELECT 1 FROM attempts WHERE experiment_id = (SELECT id FROM current_experiment)"
    if gone and db.value(begun):
        raise Conflict(
            f"{len(gone)} of the experiment's {counted(len(pooled), 'VM')} of the pool went back "
            "to it, and with them what was done there",
            "Begin anew: vmrm destroy --yes, then run it again",
        )
    if gone:
        with db.transaction(durable=True):
            give_back(db)


def check_host_entries(schedules: Mapping[str, str], allowed: bool) -> None:
    """Refuse schedules (JSON texts by VM) with entries that run on this host and may not."""
    found = [
        f"VM {name}, entry {entry.ordinal} ({entry})"
        for name, text in schedules.items()
        if not allowed and ("on_host" in text or "\\u" in text)  # most are not worth parsing
        for entry in parse_schedule(text)
        if entry.on_host
    ]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UsageError(
            f"programs would run on this host: {'; '.join(found[:5])}{more}",
            "Look at them, then say so: vmrm run --allow-host",
        )


def _settle_late(db: Database, late: str) -> None:
    """Skip what is overdue, or record pauses for it, inside the caller's transaction.

    All VMs get the same pause, from when the first overdue entry should have started until now, so
    that they stay together; but one that had failed gets its own, and one in a break none.
    Attempts that are armed may have begun: with these, the handler does as the guest says.
    """
    experiment, now = current_experiment(db), CLOCK.wall()
    since = now - experiment["start_at"] if experiment["start_at"] is not None else -math.inf
    if late == Late.START or since <= 0:
        return
    vms = []
    for vm in db.query("SELECT server_name, state FROM vms WHERE state <> 'n/a'"):
        name, first = vm.server_name, math.inf
        rows = db.query("SELECT * FROM entry_status WHERE server_name = :name", name=name)
        entries = [ScheduleEntry.from_dict(json.loads(row.entry), row.ordinal) for row in rows]
        line = Timeline(entries, read_holds(db, name))
        for entry, row in zip(entries, rows, strict=True):
            at = line.times[entry.ordinal]
            if row.outcome not in (None, Outcome.ARMED) or not 0 < at < since:
                continue
            if entry.pause is not None or entry.is_resume or entry.repeats:
                continue
            first = min(first, at)
            if late == Late.SKIP and row.attempt is None:
                of = {"experiment_id": experiment["id"], "server_name": name, "attempt": 1}
                of |= {"generation": row.generation, "ordinal": row.ordinal}
                times = {"planned_at": experiment["start_at"] + at, "armed_at": now}
                how = {"outcome": Outcome.SKIPPED.value, "error": SKIPPED, "ended_at": now}
                db.insert("attempts", **of, **times, **how)
        vms.append((vm, line, first))
    together = min((at for vm, _, at in vms if vm.state != VMState.FAILED), default=math.inf)
    for vm, line, first in vms if late == Late.SHIFT else ():
        begin = first if vm.state == VMState.FAILED else together
        if begin < since and line.break_at(begin) is None:
            _record_hold(db, vm.server_name, Hold(begin, since - begin))


def supervisor_pid(db: Database) -> int | None:
    """Return the pid of the live supervisor, or None."""
    return db.lock(SUPERVISOR).holder


def spawn_supervisor(db: Database, stay: bool = False) -> Any:
    """Start the supervisor in a session of its own; return the process."""
    words = ["_supervise", str(db.path), *(["--stay"] if stay else [])]
    with (run_directory(db, "logs") / "supervisor.log").open("ab") as log:
        null = subprocess.DEVNULL
        return subprocess.Popen(
            own_command(*words), stdin=null, stdout=log, stderr=log, start_new_session=True
        )


def _supervise(words: Sequence[str]) -> int:
    """The supervisor's main: `_supervise DATABASE [--stay]`."""
    with Database(words[0], create=False) as db:
        log_to(logging.getLogger("vmrm"), run_directory(db, "logs") / "supervisor.log")
        return Supervisor(db, stay="--stay" in words).run()


# === pool ========================================================================================
#
# Rows say what there is: VMs with their leases (pool_list), what the keeper has to do about them
# (pool_dues), and who waits (pool_waiters). `allot` says who gets what of it.


@functools.lru_cache(maxsize=1)
def _who(pid: int) -> str:
    """Return this process, `pid`, in words for the pool's history."""
    return f"{_user()}, process {pid}"


def _user() -> str:
    import getpass

    with contextlib.suppress(KeyError, OSError):  # a user without a name
        return getpass.getuser()
    return f"user {os.getuid()}"


def _group_id(name: str) -> int | str:
    """Return a group's name as the reference has it: those of digits only are numbers."""
    return int(name) if name.isdecimal() and str(int(name)) == name else name


class VmDescriptor(Row):
    """A VM of the pool as its row of pool_list was when it was read: each column an attribute."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row, group=_group_id(row["group"]))
        self.__dict__["_set"] = {}  # what was set here and not stored yet

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = self._set[name] = value

    @property
    def holder_pid(self) -> int | None:
        """The pid of the process that holds the lease, if one does."""
        return Process.parse(self.holder).pid if self.holder else None

    def __str__(self) -> str:
        """Return name, state and what a person wants to know, in one line."""
        leased = self.state == VmStates.IN_USE
        words = (
            f"{self.vm_name}  {self.state}",
            self.vm_ip,
            self.bound_to_user and f"bound to {self.bound_to_user}/{self.bound_sandbox}",
            leased and self.holder_pid and f"process {self.holder_pid}",
            leased and self.lease_end_at and f"until {_iso(self.lease_end_at)}",
            self.task_id and f"task {self.task_id}",
            self.check_fails and f"{self.check_fails} failed checks",
            self.reason and not leased and f"({self.reason})",
        )
        return "  ".join(word for word in words if word)

    @classmethod
    def load(cls, db: Database, vm_name: str) -> VmDescriptor:
        """Read a VM's row, or raise `VmDescriptorNotFound`."""
        if row := db.row("SELECT * FROM pool_list WHERE vm_name = :name", name=vm_name):
            return cls(row)
        hint = "See which there are: vmrm pool list"
        raise VmDescriptorNotFound(f"the pool has no VM {vm_name!r}", hint)

    def store(self, db: Database) -> None:
        """Write what was set here; a `VmError` refuses what does not go together."""
        new = self._set
        if moved := new.keys() & {"vm_ip", "path"}:
            new |= _pool_machine(self.vm_ip, self.path)
        with db.transaction(durable=True):
            row = VmDescriptor.load(db, self.vm_name)
            if moved or "group" in new:
                _refuse_twin(db, row | new)
            try:
                move_pool_vm(db, self.vm_name, **{"state": row.state, **new})
            except (sqlite3.IntegrityError, sqlite3.OperationalError) as error:
                raise VmError(f"VM {self.vm_name!r} cannot be stored so: {error}") from error
        self.update(new)
        new.clear()

    def store_field(self, db: Database, field: str, value: Any) -> None:
        """Set one field, here and in the row."""
        one = VmDescriptor.load(db, self.vm_name)
        setattr(one, field, value)
        one.store(db)
        self[field] = value


def add_pool_vm(db: Database, vm_name: str, group: str, state: VmStates, **columns: Any) -> None:
    """Add a row inside the caller's transaction."""
    now = CLOCK.wall()
    base = {"vm_name": vm_name, "group": group, "state": state.value, "state_at": now}
    db.insert("pool_vms", **base, spawned_at=now, who=_who(os.getpid()), **columns)


def move_pool_vm(
    db: Database, vm_name: str, state: str, reason: str = "", old: str = "", **columns: object
) -> None:
    """Move one VM as `POOL_MOVES` allows, inside the caller's transaction; set columns of it."""
    old = old or VmDescriptor.load(db, vm_name).state
    if state != old:
        try:
            target = checked_pool_move(old, state)
        except ValueError as error:
            raise VmError(f"VM {vm_name!r}: {error}") from None
        columns |= {"state": target.value, "state_at": CLOCK.wall(), "who": _who(os.getpid())}
    if state != old or reason:
        columns["reason"] = reason
    if columns:
        sets = ", ".join(f'"{column}" = :{column}' for column in columns)
        sql = f"UPDATE pool_vms SET {sets} WHERE vm_name = :vm_name"  # noqa: S608 (our own names)
        db.connection.execute(sql, {**columns, "vm_name": vm_name})


def group_settings(db: Database) -> dict[str, str]:
    """Return the settings of a group: each name with its column, which has a unit at its end."""
    columns = [row["name"] for row in db.query("PRAGMA table_info(pool_groups)")]
    skipped = ("name", "position", "last_spawn_at")
    return {column.removesuffix("_s"): column for column in columns if column not in skipped}


def put_group(db: Database, name: str, settings: Mapping[str, object]) -> None:
    """Add a group, or change settings of it, by the names of `group_settings`; None is no limit."""
    checked_name("group", name)
    known = group_settings(db)
    for key in settings.keys() - known.keys():
        raise WrongValue(f"group {name!r}: {unknown_key(key, known)}")
    row = db.row("SELECT * FROM pool_groups WHERE name = :name", name=name)
    if row is not None and all(row[known[key]] == value for key, value in settings.items()):
        return
    with db.transaction(durable=True):
        db.write("INSERT INTO pool_groups (name) VALUES (:n) ON CONFLICT DO NOTHING", n=name)
        for key, value in settings.items():
            try:
                db.update("pool_groups", {"name": name}, **{known[key]: value})
            except (sqlite3.Error, OverflowError) as error:
                raise WrongValue(f"group {name!r}: {key} cannot be {value!r}") from error


# --- who gets what


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody wants of the pool: all of it, or nothing."""

    wants: tuple[tuple[str, ...], ...]  # per VM, the groups it may come from, in order
    owner: str
    sandbox: str
    holder: Process | None  # None: only the end of the lease decides
    lease_s: float | None = None
    task_id: str | None = None
    build_id: str | None = None
    chroot: str | None = None
    priority: int = 0  # in the queue: higher ones first
    # Called with the leased VMs, inside the transaction that leases them.
    within: Callable[[list[VmDescriptor]], object] | None = None
    token: str = dataclasses.field(default_factory=lambda: os.urandom(16).hex())

    @property
    def lasts(self) -> bool:
        """Whether its leases go on after a power cut, which ends every process."""
        return self.holder is None or self.lease_s is not None

    @property
    def groups(self) -> list[str]:
        """The groups that are named."""
        return [*dict.fromkeys(itertools.chain(*self.wants))]


@dataclasses.dataclass
class Share:
    """What there is for one request: VMs that are kept for it, and the wants without one."""

    request: Request
    vm_names: list[str] = dataclasses.field(default_factory=list)
    missing: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    binds: bool = False  # some VM of them to its owner


def allot(
    queue: Iterable[Request],
    free: Callable[[str, str | None, str], list[str]],
    room: Callable[[str, str], float],
) -> list[Share]:
    """Return who in the queue, the first one first, gets which VMs.

    Each VM of a request comes from the first of its groups that has one: one that the owner used
    for the sandbox before, or a fresh one if the owner may bind more. While some are missing, the
    others are kept for the request; but not while its owner is at a limit, so that it holds up
    nobody.

    Args:
        queue: All requests.
        free: Returns the VMs of a group that may be lent and are bound to this owner and sandbox,
            or to None and "", the best last.
        room: Returns how many more VMs of a group an owner may bind, as things are before.
    """
    free, bound, shares = functools.cache(free), collections.Counter[tuple[str, str]](), []
    for request in queue:
        share, taken, hopeless = Share(request), [], False
        for groups in request.wants:
            at_limit = True
            for group in map(str.lower, groups):
                key, fresh = (group, request.owner), False
                vms = free(*key, request.sandbox)
                if not vms and bound[key] < room(*key):
                    vms, fresh, at_limit = free(group, None, ""), True, False
                if vms:
                    share.vm_names.append(vms.pop())
                    taken.append((vms, key, fresh))
                    bound[key] += fresh
                    share.binds |= fresh
                    break
            else:
                share.missing.append(groups)
                hopeless = hopeless or at_limit
        for vms, key, fresh in reversed(taken) if hopeless else ():
            vms.append(share.vm_names.pop())
            bound[key] -= fresh
        shares.append(share)
    return shares


class Waiting:
    """A place in the queue: wait for its descriptor, but no longer than `Timeouts.look`, try again.

    It is readable when there may be something for us, also since the holder of a VM has ended. Its
    row is there before its socket and goes after it, so that who is killed leaves nothing unknown.
    """

    def __init__(self, pool: Leases, request: Request) -> None:
        self.pool, self.request = pool, request
        self._holders: dict[int, str] = {}  # of VMs that we could have, by a descriptor of each
        self._socket: WakeSocket | None = None
        self._poll = select.epoll()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the queue; who came after may have what was kept for us."""
        self._forget_holders()
        self._poll.close()
        if self._socket:
            self._socket.close()
        self.pool.db.write(_LEAVE, token=self.request.token)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._poll.fileno()

    def try_again(self) -> list[VmDescriptor]:
        """Return all VMs that are wanted, now leased; or none, and go on waiting."""
        db, request = self.pool.db, self.request
        if self._socket:
            self._socket.drain()
        ended = [self._holders[fd] for fd, _ in self._poll.poll(0) if fd in self._holders]
        self._forget_holders()
        wants = {"wants": json.dumps(request.wants), "priority": request.priority}
        who = {"owner": request.owner, "sandbox": request.sandbox, "holder": str(Process.of())}
        alive = {"token": request.token, "heartbeat_at": CLOCK.wall()}
        db.upsert("pool_waiters", "token", **alive, **wants, **who)
        if not self._socket:
            self._socket = WakeSocket(db, f"wait-{request.token}")
            self._poll.register(self._socket.fileno(), select.EPOLLIN)
        if ended:
            self.pool.reap(_LEASES_BY, holders=json.dumps(ended))
        if vms := self.pool.lend(request):
            return vms
        for row in db.query(_HOLDERS, groups=json.dumps(request.groups)):
            with contextlib.suppress(OSError):  # it has ended, or is in another pid namespace
                fd = os.pidfd_open(Process.parse(row.holder).pid)
                self._holders[fd] = row.holder
                self._poll.register(fd, select.EPOLLIN)
        return []

    def _forget_holders(self) -> None:
        while self._holders:
            os.close(self._holders.popitem()[0])

    def reason(self) -> str:
        """Return the place in the queue, and why there is nothing yet."""
        place = len(self.pool.ahead(self.request)) + 1
        return f"number {place} in the queue; {self.pool.why_none(self.request)}"


# --- which machine a VM is


def machine_address(path: str) -> str:
    """Return an agent's address in the one spelling by which machines are told apart."""
    try:
        address = drivers.parse_address(path)
    except ValueError:  # only a plug-in takes it for one
        return path
    if isinstance(address.target, str):
        return os.path.realpath(address.target)
    host, port = address.target
    if isinstance(host, str):  # a name is not looked up
        address = address._replace(target=(_host(host.lower().rstrip(".")), port))
    return str(address)


def _host(text: str) -> str:
    """Return an IP address in its usual spelling, and any other text as it is."""
    with contextlib.suppress(OSError, ValueError):  # bytes: a str would be read as IDNA
        found = socket.getaddrinfo(os.fsencode(text), None, flags=socket.AI_NUMERICHOST)
        return str(found[0][4][0]).removeprefix("::ffff:")
    return text


def _pool_machine(vm_ip: str, path: str) -> dict[str, str]:
    """Return the columns that say which machine a VM is, or raise `ValueError` for the path."""
    address, wrong = machine_address(path), ""
    if path and (target := drivers.parse_address(path).target) and isinstance(target, str):
        try:
            if not stat.S_ISSOCK(os.stat(address).st_mode):  # noqa: PTH116
                wrong = f"{address!r} is no socket"
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # of a guest that is off
            if "/" not in path and not path.startswith("unix:"):
                wrong = "a path has a slash, or there is a socket of that name"
        except OSError as error:
            wrong = f"{error.strerror}"
        if wrong:
            raise WrongValue(f"address {path!r} is none: {wrong}")
        path = str(Path.cwd() / target)
    return {"vm_ip": _host(vm_ip), "path": path, "address": address}


def _refuse_pool_machine(db: Database, vm: Mapping[str, Any]) -> None:
    """Refuse an experiment's VM that is a machine of the pool, inside the caller's transaction."""
    sql = "SELECT vm_name, \"group\" FROM pool_vms WHERE address <> '' AND address = :address"
    if twin := db.row(sql, address=vm["address"]):
        raise Conflict(
            f"VM {vm['server_name']!r}: its path {vm['path']!r} is VM {twin['vm_name']!r} of "
            "the pool, which lends it to others",
            f'Say pool = "{twin["group"]}" instead of a path, or remove it from the pool',
        )


def _refuse_twin(db: Database, vm: Mapping[str, Any]) -> None:
    """Refuse a VM, by its vm_name, group, vm_ip and address, that is the machine of another."""
    twin = db.row(
        """SELECT vm_name, state FROM pool_vms AS p WHERE vm_name <> :vm_name AND (
               (address <> '' AND address = :address) OR (vm_ip <> '' AND vm_ip = :vm_ip
               AND EXISTS (SELECT 1 FROM pool_groups
                           WHERE unique_ip AND name IN (p."group", :group))))""",
        **vm,
    )
    if twin:
        raise VmError(
            f"VM {vm['vm_name']!r} is the machine that the pool has as {twin.vm_name!r} "
            f"({twin.state}): {vm['address'] or vm['vm_ip']}",
            f"See it: vmrm pool info {twin.vm_name}",
        )
    sql = "SELECT server_name FROM vms WHERE address <> '' AND address = :address"
    if own := db.value(sql, **vm):
        raise VmError(
            f"{vm['address']!r} is the path of the experiment's VM {own!r}",
            "One machine serves the pool or an experiment: destroy that one first",
        )


def _find_twins(connection: sqlite3.Connection) -> None:
    """Note which machine each VM of the pool is; of those that are one, only the first is lent."""
    known: dict[str, str] = {}
    rows = """SELECT vm_name, path FROM pool_list WHERE path <> ''
              ORDER BY token IS NULL, state <> 'held', spawned_at, vm_name"""
    for vm_name, path in connection.execute(rows).fetchall():
        address = machine_address(path)
        first = known.setdefault(address, vm_name)
        sql = "UPDATE pool_vms SET address = ? WHERE vm_name = ?"
        values = [address, vm_name]
        if first != vm_name:  # only a person can tell what it was meant to be
            sql = """UPDATE pool_vms SET state = 'held', held_until = 9e9, releasing_at = NULL,
                     reason = ?, who = ?, state_at = ?
                     WHERE vm_name = ? AND state <> 'terminating'"""
            values = [f"it is the machine of VM {first}", _who(os.getpid()), CLOCK.wall(), vm_name]
        connection.execute(sql, values)


def pool_log(db: Database, vm_name: str) -> Path:
    """Return the file that holds what a VM's hooks printed."""
    return db.directory("pool", "logs") / f"{checked_name('VM', vm_name)}.log"


# --- leases and the queue

# What an acquire looks at first: where the pool's processes see each other, and whether some wait.
_SERVER = """
SELECT boot, namespace, EXISTS (SELECT 1 FROM pool_waiters) FROM (SELECT 1) LEFT JOIN pool_server"""

# The VMs of a group that may be lent to an owner for a sandbox, or that are nobody's, the best
# first. What is worn is the keeper's to end, and nobody's until then.
_FREE = """
SELECT vm_name FROM pool_vms
WHERE "group" = ? AND state = 'ready' AND check_fails = 0 AND bound_to_user IS ?
  AND bound_sandbox = ?
  AND last_health_check > coalesce((SELECT started_at FROM pool_server WHERE id = 1), 0)
  AND NOT EXISTS (SELECT 1 FROM pool_worn AS w
                  WHERE w.vm_name = pool_vms.vm_name AND w.due_at <= ?)
ORDER BY last_health_check DESC LIMIT ?"""

# How many more VMs of a group an owner may bind.
_ROOM = """
SELECT iif(max_vm_per_user IS NULL, 9e999, max_vm_per_user - (
    SELECT count(*) FROM pool_vms INDEXED BY pool_bound
    WHERE "group" = g.name AND bound_to_user = :owner AND state <> 'terminating'))
FROM pool_groups AS g WHERE name = :group"""

_QUEUE = """
SELECT wants, owner, sandbox, token FROM pool_waiters
WHERE heartbeat_at > :alive AND wants <> '[]' ORDER BY priority DESC, id"""
_LEAVE = "DELETE FROM pool_waiters WHERE token = :token"

_LEASE = """
INSERT INTO leases (vm_name, token, holder, acquired_at, lease_end_at, task_id, build_id, chroot)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
# What matters of a VM at the end of its lease.
_RELEASED = """
SELECT vm_name, state, check_fails, builds_count, bound_to_user, token, holder, release
FROM pool_list LEFT JOIN pool_groups AS g ON g.name = "group" WHERE vm_name = ?"""
_LEASES = "SELECT vm_name FROM leases"
_SOME_LEASES = f"{_LEASES} ORDER BY random() LIMIT 32"
_LEASES_BY = "SELECT vm_name FROM leases WHERE holder IN (SELECT value FROM json_each(:holders))"
_LEASES_OF = """
SELECT vm_name FROM pool_vms INDEXED BY pool_bound
WHERE bound_to_user = :owner AND state <> 'terminating' AND state = 'in_use'"""

_HOLDERS = """
SELECT DISTINCT holder FROM pool_list
WHERE state = 'in_use' AND holder IS NOT NULL AND "group" IN (SELECT value FROM json_each(:groups))
LIMIT 100"""

# What there is in a group for an owner and sandbox, in figures.
_COUNTS = """
SELECT max_vm_per_user AS most, spawn, count(vm_name) AS vms, sum(state = 'in_use') AS in_use,
       sum(state = 'check_health_failed') AS ill, sum(state = 'spawning') AS spawning,
       sum(state = 'held') AS held, sum(state = 'terminating') AS terminating,
       sum(bound_to_user IS :owner AND state <> 'terminating') AS bound,
       sum(state = 'ready' AND coalesce(bound_to_user, :owner) <> :owner) AS others,
       sum(state = 'ready' AND bound_to_user IS :owner AND bound_sandbox <> :sandbox) AS idle,
       sum(state IN ('got_ip', 'check_health')
           OR (state = 'ready' AND coalesce(last_health_check, 0) <= coalesce(
               (SELECT started_at FROM pool_server), 0))) AS unchecked
FROM pool_groups AS g LEFT JOIN pool_vms ON "group" = g.name WHERE g.name = :group"""


class Leases(_Rows):
    """Who has which VM of the pool, who waits for one, and whose lease is over."""

    def __init__(self, db: _AnyDatabase = None) -> None:
        super().__init__(db)
        self.log = _log
        self._mine: dict[str, Request] = {}  # of the leases this object has obtained, by VM
        self._known: set[str] = set()  # groups, which are never removed

    def _select(self, where: str, **parameters: object) -> list[VmDescriptor]:
        sql = f"SELECT * FROM pool_list WHERE {where} ORDER BY spawned_at, vm_name"  # noqa: S608
        return [VmDescriptor(row) for row in self.db.query(sql, **parameters)]

    def group(self, group: int | str) -> Row:
        """Return a group with its settings."""
        row = self.db.row("SELECT * FROM pool_groups WHERE name = :name", name=str(group))
        if row is None:
            raise NotFound(f"the pool has no group {group!r}", f"Make it: vmrm pool group {group}")
        return row

    # --- who gets which ---

    def acquire(
        self,
        request: Request,
        wait: float | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> list[VmDescriptor]:
        """Lease all VMs that are asked for at once, or none.

        Wait in the queue for `wait` seconds, if at all; `tell` is called with the place there, and
        the reason, whenever they change.
        """
        if not request.owner:
            raise UsageError("a VM needs an owner whom it is lent to")
        if request.lease_s is not None:
            _lease_end(request.lease_s)
        elif request.holder is None:
            raise UsageError("a lease without a process needs an end", "Name one or the other")
        if not all(request.wants):
            raise UsageError("no group is named, so there is no VM to choose from")
        vms = self.lend(request)
        if not vms:
            if wait is None:
                raise NoVmAvailable(self.why_none(request))
            told, deadline, poll = "", CLOCK.monotonic() + wait, select.poll()
            with Waiting(self, request) as place:
                poll.register(place.fileno(), select.POLLIN)
                while not (vms := place.try_again()):
                    if (left := deadline - CLOCK.monotonic()) <= 0:
                        raise TimedOut(f"after {wait:g} s {self.why_none(request)}")
                    if (now := place.reason()) != told:
                        (tell or self.log.info)(told := now)
                    poll.poll(1000 * min(left, self.db.timeouts.look))
        self._mine |= {vm.vm_name.lower(): request for vm in vms}
        return vms

    def lend(self, request: Request) -> list[VmDescriptor]:
        """Lease what is asked for, or return none."""
        with self.db.transaction(durable=request.lasts):
            vms, share = self._lend(request, binding=False)
        if not vms:  # before anybody is refused, or has another VM bound, the dead are looked for
            again = bool(self.reap(_LEASES_OF, owner=request.owner)) or share.binds
            if share.missing:
                again |= bool(self.reap(_SOME_LEASES)) | self.drop_dead_waiters()
            if again:
                with self.db.transaction(durable=True):
                    vms, _ = self._lend(request, binding=True)
        _crash("pool-acquired")
        return vms

    def _lend(self, request: Request, *, binding: bool) -> tuple[list[VmDescriptor], Share]:
        """Choose VMs inside the caller's transaction; lease them if it is all and may be done."""
        waiting, db, now = self._see_server(request), self.db, CLOCK.wall()
        share = self._allot([*(self.ahead(request) if waiting else ()), request])[-1]
        if share.missing or (share.binds and not binding):
            return [], share
        holder = request.holder and str(request.holder)
        end = None if request.lease_s is None else now + request.lease_s
        job = (request.token, holder, now, end, request.task_id, request.build_id, request.chroot)
        reason = f"task {request.task_id}" if request.task_id else ""
        bound = {"bound_to_user": request.owner, "bound_sandbox": request.sandbox}
        for name in share.vm_names:
            db.connection.execute(_LEASE, (name, *job))
            move_pool_vm(db, name, VmStates.IN_USE, reason, VmStates.READY, **bound)
        vms = [VmDescriptor.load(db, name) for name in share.vm_names]
        if waiting:
            db.update("pool_waiters", {"token": request.token}, wants="[]")  # until it leaves
        if request.within:
            request.within(vms)
        _crash("pool-acquiring")
        return vms, share

    def _see_server(self, request: Request) -> bool:
        """Return whether there is a queue; refuse a holder whom the pool's others cannot see."""
        boot, namespace, waiting = self.db.connection.execute(_SERVER).fetchone()
        for group in set(request.groups) - self._known:
            self.group(group)  # which says so if there is none
            self._known.add(group)
        holder = request.holder
        if holder and boot != holder.boot:
            here = {"boot": holder.boot, "namespace": holder.namespace}
            self.db.upsert("pool_server", "id", id=1, **here)
        elif holder and holder.namespace != namespace and request.lease_s is None:
            raise UsageError(
                "the pool's processes cannot see this one, which is in another pid namespace",
                "Acquire without a COMMAND, and renew the lease: --lease SECONDS",
            )
        return bool(waiting)

    def _allot(self, queue: Sequence[Request]) -> list[Share]:
        execute, now = self.db.connection.execute, CLOCK.wall()
        most = sum(len(request.wants) for request in queue)

        def free(group: str, owner: str | None, sandbox: str) -> list[str]:
            found = execute(_FREE, (group, owner, sandbox, now, most))
            return [row[0] for row in found.fetchall()][::-1]

        def room(group: str, owner: str) -> float:
            return cast(float, self.db.value(_ROOM, group=group, owner=owner) or 0.0)

        with _TellingTrouble():
            return allot(queue, free, room)

    def why_none(self, request: Request) -> str:
        """Return in words why there is no VM for a request, per group."""
        reasons = [self._why(group, request) for group in request.groups]
        if ahead := len(self.ahead(request)):
            reasons.append(f"{ahead} waiting")
        return f"no VM is available: {'; '.join(reasons)}"

    def _why(self, group: str, request: Request) -> str:
        owner, wanted = request.owner, max(1, request.wants.count((group,)))
        [row] = self.db.query(_COUNTS, group=group, owner=owner, sandbox=request.sandbox)
        idle = f"{row.idle} of them idle in other sandboxes"
        unkept = "" if self.db.lock(KEEPER).is_held else ", for no keeper runs (vmrm pool serve)"
        if not row.vms:
            why = f"group {group} has no VMs{unkept if row.spawn else ''}"
        elif row.most is not None and row.bound + wanted > row.most:
            more = f"; {wanted} more are wanted" if wanted > 1 else ""
            bound = f"{row.bound} of {row.most} bound to {owner}"
            why = f"group {group}: limit reached ({bound}, {idle}{more})"
        elif row.unchecked:
            why = f"group {group}: {row.unchecked} of {row.vms} not checked yet{unkept}"
        else:
            others = ("spawning", "held", "terminating")
            more = "".join(f", {row[state]} {state}" for state in others if row[state])
            why = (
                f"group {group}: none ready ({counted(row.vms, 'VM')}: {row.in_use} in use, "
                f"{row.others} ready for others, {row.ill} failed their check{more}; "
                f"{row.bound} bound to {owner}, {idle})"
            )
        return "; ".join(filter(None, (why, self.spawn_failure(group))))

    def read_vm_pool_info(self, group: int | str, key: str) -> str | None:
        """Return what was remembered about a group, or None."""
        sql = 'SELECT value FROM pool_info WHERE "group" = :group AND key = :key'
        return cast("str | None", self.db.value(sql, group=str(group), key=key))

    def keeper_info(self, group: int | str, key: str) -> dict[str, Any]:
        """Return what the keeper has noted about a group, by keys that no script uses."""
        text = self.read_vm_pool_info(group, f"{KEEPER}.{key}")
        return cast("dict[str, Any]", json.loads(text or "{}"))

    def spawn_failure(self, group: int | str) -> str:
        """Return how the last spawn hook of a group failed, if none has succeeded since."""
        failed = self.keeper_info(group, "failed")
        if not failed:
            return ""
        times = "" if failed["times"] == 1 else f", {failed['times']} times in a row"
        why = failed.get("why", "no reason kept")
        return f"spawn hook failed {_iso(failed['at'])}{times}: {why}"

    # --- the queue ---

    def queue(self) -> list[Request]:
        """Return what those want who wait and live, the first one first."""
        alive = CLOCK.wall() - self.db.timeouts.heartbeat
        return [
            Request(tuple(map(tuple, json.loads(w.wants))), w.owner, w.sandbox, None, token=w.token)
            for w in self.db.query(_QUEUE, alive=alive)
        ]

    def ahead(self, request: Request) -> list[Request]:
        """Return those in the queue before a request."""
        return [*itertools.takewhile(lambda other: other.token != request.token, self.queue())]

    def shares(self) -> list[Share]:
        """Return what there is for each of those who wait, the first one first."""
        return self._allot(self.queue())

    def next_in_queue(self) -> list[str]:
        """Return the tokens of the waiters who would be given all they want now."""
        return [share.request.token for share in self.shares() if not share.missing]

    # --- the end of a lease ---

    def release_vm(self, vm_name: str, *, token: str | None = None, force: bool = False) -> bool:
        """Return a VM to the pool, bound to its owner and sandbox; return False if nobody has it.

        Without its token, this object, this process or an ancestor must have the lease, or `force`.
        """
        mine = self._mine.get(vm_name.lower())
        with self.db.transaction(durable=mine is None or mine.lasts) as db:
            vm = db.connection.execute(_RELEASED, (vm_name,)).fetchone()
            vm = vm or VmDescriptor.load(db, vm_name)  # which says that there is none
            if vm["token"] is None and not (token or mine or force):
                return False
            if not force or vm["token"] is None:
                self.own(vm, token)
            self.end_lease(vm_name, "released by force" if force else "released", vm)
            _crash("pool-releasing")
        _crash("pool-released")
        self._mine.pop(vm_name.lower(), None)
        return True

    def end_lease(self, vm_name: str, reason: str, vm: Any = None) -> None:
        """End a lease, inside the caller's transaction."""
        vm = vm or self.db.connection.execute(_RELEASED, (vm_name,)).fetchone()
        state, now, hook = vm["state"], CLOCK.wall(), vm["release"]
        if state == VmStates.HELD:  # the lease ends, the VM stays
            self.db.write("DELETE FROM leases WHERE vm_name = :name", name=vm_name)
            return
        target = VmStates.CHECK_HEALTH if hook else VmStates.READY
        target = VmStates.CHECK_HEALTH_FAILED if vm["check_fails"] else target
        used = {"last_release": now, "builds_count": vm["builds_count"] + 1}
        used["releasing_at"] = now if hook else None
        move_pool_vm(self.db, vm_name, target, reason, state, **used)

    def own(self, vm: sqlite3.Row | VmDescriptor, token: str | None) -> None:
        """Refuse whoever does not have the lease of a VM."""
        name, state, holder = vm["vm_name"], vm["state"], vm["holder"]
        mine = self._mine.get(name.lower())
        token = token or (mine.token if mine else None)
        if vm["token"] is None and token is None:
            raise VmError(f"VM {name!r} is {state}: nobody has a lease of it")
        if token is None and not (holder and _descends_from(Process.parse(holder))):
            message = f"the lease of VM {name!r} is not yours; {vm['bound_to_user']} has it"
            raise VmError(message, "Name its token (--token), or use --force")
        if token not in (None, vm["token"]):
            raise VmError(f"the lease of VM {name!r} was lost; the VM is {state}")

    def over(self, which: str = _LEASES, **parameters: object) -> list[tuple[VmDescriptor, str]]:
        """Return the VMs whose lease is over, and why: it has ended, or its holder is dead."""
        found, now = [], CLOCK.wall()
        for vm in self._select(f"token IS NOT NULL AND vm_name IN ({which})", **parameters):
            holder = Process.parse(vm.holder) if vm.holder else None
            if vm.lease_end_at and vm.lease_end_at + self.db.timeouts.lease_grace < now:
                found.append((vm, f"its lease ended {_iso(vm.lease_end_at)}"))
            elif holder and not holder.is_alive():
                found.append((vm, f"its holder, process {holder.pid}, is dead"))
        return found

    def reap(self, which: str = _LEASES, **parameters: object) -> list[str]:
        """End leases that are over, of these VMs; return the names of those that had one."""
        names = []
        same = """vm_name = :vm_name AND token = :token AND holder IS :holder
                  AND lease_end_at IS :lease_end_at"""
        for vm, why in self.over(which, **parameters):
            with self.db.transaction(durable=True):
                if self._select(same, **vm):
                    self.end_lease(vm.vm_name, f"taken back: {why}")
                    names.append(vm.vm_name)
        return names

    def dead_waiters(self) -> dict[str, int]:
        """Return those in the queue who are dead or long silent: the pid of each by its token."""
        silent = CLOCK.wall() - 10 * self.db.timeouts.heartbeat
        found = [(w, Process.parse(w.holder)) for w in self.db.query("SELECT * FROM pool_waiters")]
        return {w.token: p.pid for w, p in found if w.heartbeat_at < silent or not p.is_alive()}

    def drop_dead_waiters(self) -> bool:
        """Remove the dead from the queue; return whether there were any."""
        dead = self.dead_waiters()
        for token in dead:
            self.db.write(_LEAVE, token=token)
            (self.db.state_dir / "wake" / f"wait-{token}").unlink(missing_ok=True)
        return bool(dead)


class VmManager(Leases):
    """The pool of VMs that are lent to jobs.

    `opts` is a mapping, or an object with attributes, whose `build_groups` maps group ids to their
    settings: these groups are written to the database, and only they are listed. Without it, the
    groups are those of the database.
    """

    def __init__(self, opts: Any = None, logger: _Logger = None, db: _AnyDatabase = None) -> None:
        super().__init__(db)
        self.log = logger or self.log
        groups = opts.get("build_groups") if isinstance(opts, Mapping) else None
        groups = groups or getattr(opts, "build_groups", None) or {}
        self._groups = [str(group) for group in groups]
        for group, given in groups.items():
            settings = dict(given if isinstance(given, Mapping) else vars(given))
            known = group_settings(self.db)
            if ignored := sorted(settings.keys() - known.keys() - {"id", "name"}):
                self.log.info("group %s: %s mean nothing here", group, ", ".join(ignored))
            put_group(self.db, str(group), {k: settings[k] for k in settings if k in known})

    def set_logger(self, logger: logging.Logger) -> None:
        """Report to another logger from now on."""
        self.log = logger

    # --- what there is ---

    @property
    def vm_groups(self) -> list[int | str]:
        """The ids of the groups, in order; those made of digits only are ints."""
        sql = "SELECT name FROM pool_groups ORDER BY position"
        return list(map(_group_id, self._groups or [row["name"] for row in self.db.query(sql)]))

    def get_vm_by_name(self, vm_name: str) -> VmDescriptor:
        """Return a VM, or raise `VmDescriptorNotFound`."""
        return VmDescriptor.load(self.db, vm_name)

    def get_vm_by_task_id(self, task_id: object) -> VmDescriptor | None:
        """Return the VM that a task has leased, or None if it has none."""
        return next(iter(self._select("task_id = :task", task=str(task_id))), None)

    def lookup_vms_by_ip(self, vm_ip: str) -> list[VmDescriptor]:
        """Return the VMs with this address."""
        return self._select("vm_ip = :ip", ip=vm_ip)

    def _load_multi_safe(self, vm_name_list: Iterable[str]) -> list[VmDescriptor]:
        """Return those of the named VMs that there are."""
        names = json.dumps(list(vm_name_list))
        return self._select("vm_name IN (SELECT value FROM json_each(:names))", names=names)

    def get_all_vm_in_group(self, group: int | str) -> list[VmDescriptor]:
        """Return all VMs of a group."""
        return self._select('"group" = :group', group=str(group))

    def get_all_vm(self) -> list[VmDescriptor]:
        """Return all VMs of all groups."""
        return [vm for group in self.vm_groups for vm in self.get_all_vm_in_group(group)]

    def get_ready_vms(self, group: int | str) -> list[VmDescriptor]:
        """Return the VMs of a group that are in state ready."""
        return self.get_vm_by_group_and_state_list(group, [VmStates.READY])

    def get_vm_by_group_and_state_list(
        self, group: int | str | None, state_list: Iterable[str]
    ) -> list[VmDescriptor]:
        """Return the VMs of a group, or with None of all groups, that are in one of the states."""
        states = {checked_word("pool VM state", state, VmStates) for state in state_list}
        vms = self.get_all_vm() if group is None else self.get_all_vm_in_group(group)
        return [vm for vm in vms if vm.state in states]

    def info(self) -> str:
        """Return all groups and VMs in a form for people."""
        lines = []
        for group in self.vm_groups:
            vms = self.get_all_vm_in_group(group)
            found = collections.Counter(vm.state for vm in vms)
            states = ", ".join(f"{found[state]} {state}" for state in VmStates if found[state])
            lines.append(f"group {group}: {counted(len(vms), 'VM')}")
            lines[-1] += f" ({states})" if vms else ""
            lines += [_cell(f"  {line}") for line in (self.spawn_failure(group), *vms) if line]
        if queue := self.queue():
            lines.append(f"{len(queue)} waiting, the first for {_cell(queue[0].owner)}")
        return "\n".join(lines)

    def metrics(self) -> str:
        """Return the pool's figures as Prometheus text."""
        label = '{{group="{}",state="{}"}}'.format
        found = collections.Counter((vm.group, vm.state) for vm in self.get_all_vm())
        pairs = itertools.product(self.vm_groups, VmStates)
        present = [(label(*pair), found[pair]) for pair in pairs]
        rows = self.db.query('SELECT * FROM pool_counts ORDER BY "group", state')
        moves = [(label(row.group, row.state), row.times) for row in rows]
        lines = []
        for name, kind, words, figures in (
            ("vms", "gauge", "VMs of the pool.", present),
            ("waiters", "gauge", "Requests in the queue.", [("", len(self.queue()))]),
            ("moves_total", "counter", "How often VMs came to a state.", moves),
        ):
            lines += [f"# HELP vmrm_pool_{name} {words}", f"# TYPE vmrm_pool_{name} {kind}"]
            lines += [f"vmrm_pool_{name}{labels} {figure}" for labels, figure in figures]
        return "\n".join(lines) + "\n"

    def write_vm_pool_info(self, group: int | str, key: str, value: object) -> None:
        """Remember a value, as text, about a group."""
        self.db.upsert("pool_info", "group", "key", group=str(group), key=key, value=str(value))

    def check(self) -> list[str]:
        """Return what is wrong with the pool's rows, which only a person can put right."""
        loose = self._select('"group" NOT IN (SELECT name FROM pool_groups)')
        faults = [f"VM {vm.vm_name}: no group {vm.group}" for vm in loose]
        machines: dict[str, str] = {}
        for vm in self._select("path <> ''"):  # links may have been set anew
            other = machines.setdefault(machine_address(vm.path), vm.vm_name)
            if other != vm.vm_name:
                faults.append(f"VM {vm.vm_name}: it is the machine of VM {other}, {vm.path}")
        return faults

    # --- moves ---

    def add_vm_to_pool(
        self, vm_ip: str, vm_name: str, group: int | str, *, path: str = ""
    ) -> VmDescriptor:
        """Add an existing VM with its agent's address; it is lent once a health check is passed."""
        checked_name("VM", vm_name)
        name, machine = self.group(group)["name"], _pool_machine(vm_ip, path)
        with self.db.transaction(durable=True) as db:
            if db.value("SELECT 1 FROM pool_vms WHERE vm_name = :name", name=vm_name):
                raise VmError(f"the pool has a VM {vm_name!r} already")
            _refuse_twin(db, {"vm_name": vm_name, "group": name, **machine})
            add_pool_vm(db, vm_name, name, VmStates.GOT_IP, **machine)
        return self.get_vm_by_name(vm_name)

    @contextlib.contextmanager
    def _changing(
        self, vm_name: str, token: str | None = None, force: bool = True
    ) -> Iterator[VmDescriptor]:
        """Yield a VM in a transaction that changes it; unforced only to whoever leased it."""
        with self.db.transaction(durable=True) as db:
            vm = VmDescriptor.load(db, vm_name)
            if vm.token is not None and not force:
                self.own(vm, token)
            yield vm

    def mark_server_start(self) -> None:
        """Distrust all health checks until now: VMs are lent after their next one."""
        boot, namespace = Process.of()[2:]
        with self.db.transaction(durable=True) as db:
            start = {"started_at": CLOCK.wall(), "boot": boot, "namespace": namespace}
            db.upsert("pool_server", "id", id=1, **start)

    def mark_vm_check_failed(self, vm_name: str, reason: str = "its health check failed") -> None:
        """Count a failed health check; whoever has leased the VM keeps it."""
        self.mark_vm_checked(vm_name, reason)

    def mark_vm_checked(self, vm_name: str, fault: str = "") -> None:
        """Record how a VM's health check ended; a leased VM stays leased."""
        with self._changing(vm_name) as vm:
            state = vm.state
            if fault and state not in (VmStates.IN_USE, VmStates.HELD, VmStates.TERMINATING):
                state = VmStates.CHECK_HEALTH_FAILED
            elif not fault and state == VmStates.CHECK_HEALTH and vm.releasing_at is None:
                state = VmStates.READY  # else its release hook is to come
            found = {"last_health_check": CLOCK.wall(), "check_started_at": None}
            fails = vm.check_fails + 1 if fault else 0
            move_pool_vm(self.db, vm_name, state, fault, vm.state, check_fails=fails, **found)

    def mark_vm_released(self, vm_name: str, failure: str = "") -> None:
        """Record how the release hook of a VM ended, before which it is given to nobody."""
        with self._changing(vm_name) as vm:
            if vm.releasing_at is None:
                return
            group, state = self.group(vm.group), vm.state
            columns: dict[str, Any] = {"releasing_at": None}
            if failure and not group.terminate:  # it stays, unlent, until it is clean
                state = VmStates.CHECK_HEALTH_FAILED
                columns = {"releasing_at": CLOCK.wall(), "check_fails": vm.check_fails + 1}
            elif failure:
                state = VmStates.TERMINATING
            elif state == VmStates.CHECK_HEALTH and not vm.check_fails:
                state = VmStates.READY  # else the next check decides
            if not failure and group.release_cleans:
                columns |= {"bound_to_user": None, "bound_sandbox": ""}
            move_pool_vm(self.db, vm_name, state, failure, vm.state, **columns)

    def start_vm_termination(
        self,
        vm_name: str,
        allowed_pre_state: str | None = None,
        reason: str = "",
        *,
        token: str | None = None,
        force: bool = True,
    ) -> None:
        """Have the keeper terminate a VM; its lease, if there is one, ends.

        It must be in `allowed_pre_state`; None, or the reference's word "None", allows all. Without
        `force`, one that is leased is terminated only for whom `release_vm` would release it.
        """
        with self._changing(vm_name, token, force) as vm:
            if allowed_pre_state not in (None, "None", vm.state):
                raise VmError(f"VM {vm_name!r} is {vm.state}, not {allowed_pre_state}")
            ending = VmStates.TERMINATING
            move_pool_vm(self.db, vm_name, ending, reason, vm.state, releasing_at=None)

    def remove_vm_from_pool(self, vm_name: str) -> None:
        """Forget a VM; a `VmError` refuses one that is not in state terminating."""
        with self._changing(vm_name) as vm:
            if vm.state != VmStates.TERMINATING:
                raise VmError(
                    f"VM {vm_name!r} is {vm.state}, and only a terminating one can be removed",
                    f"Terminate it first: vmrm pool terminate {vm_name}",
                )
            here = {"state_at": CLOCK.wall(), "who": _who(os.getpid()), "reason": ""}
            self.db.update("pool_vms", {"vm_name": vm_name}, **here)  # for the history
            self.db.write("DELETE FROM pool_vms WHERE vm_name = :name", name=vm_name)

    # --- leases ---

    def can_user_acquire_more_vm(self, username: str, group: int | str) -> bool:
        """Return True if an owner has fewer VMs of a group, in use or not, than it allows."""
        return bool(self.db.value(_ROOM, owner=username, group=self.group(group).name) > 0)

    def acquire_vm(
        self,
        groups: Iterable[int | str],
        ownername: str,
        sandbox: str | None,
        pid: int | None,
        task_id: object = None,
        build_id: object = None,
        chroot: str | None = None,
        *,
        lease: float | None = None,
        wait: float | None = None,
        priority: int = 0,
    ) -> VmDescriptor:
        """Lease a VM that is ready: one this owner used for this sandbox before, else a fresh one.

        It comes from the first of the groups that has one. If there is none now, or within `wait`
        seconds in the queue, where a higher `priority` comes first, `NoVmAvailable` or `TimedOut`
        says why. The VM is taken back when the process `pid` is dead, or `lease` seconds after the
        last renewal; one of them is needed. The rest is for people and `get_vm_by_task_id`.
        """
        jobs = (task_id, build_id, chroot)
        task, build, root = (None if job in (None, "None") else str(job) for job in jobs)
        holder = None if pid is None else Process.of(pid)
        party = (tuple(map(str, groups)),), ownername, sandbox or "", holder
        request = Request(*party, lease, task, build, root, priority)
        return self.acquire(request, wait, self.log.info)[0]

    def renew_vm(self, vm_name: str, lease: float, *, token: str | None = None) -> float:
        """Have a lease end so many seconds from now; return when, in seconds since the epoch."""
        with self._changing(vm_name) as vm:
            self.own(vm, token)
            end = _lease_end(lease)
            self.db.update("leases", {"vm_name": vm_name}, lease_end_at=end)
        return end

    def hold_vm(
        self, vm_name: str, until: float, *, token: str | None = None, force: bool = False
    ) -> None:
        """Keep a VM for a person until a time since the epoch, when the keeper terminates it."""
        words = f"until {_iso(_listable(until))}"
        with self._changing(vm_name, token, force) as vm:
            held = {"held_until": until, "releasing_at": None}
            move_pool_vm(self.db, vm_name, VmStates.HELD, words, vm.state, **held)

    def hand_over(self, vm: VmDescriptor, holder: Process | None) -> None:
        """Make another process the holder of a leased VM, or nobody if the lease has an end."""
        with self._changing(vm.vm_name) as now:
            self.own(now, vm.token)
            self.db.update("leases", {"vm_name": vm.vm_name}, holder=holder and str(holder))

    @contextlib.contextmanager
    def lease(
        self,
        groups: Iterable[int | str],
        ownername: str,
        sandbox: str | None = None,
        *,
        lease: float | None = None,
        **more: Any,
    ) -> Iterator[VmDescriptor]:
        """Lease a VM for the block, as `acquire_vm` does with this process as the holder.

        A lease with an end is renewed. If it is lost, the log says so at once, a `VmError` then.
        """
        vm = self.acquire_vm(groups, ownername, sandbox, os.getpid(), lease=lease, **more)
        over = threading.Event()
        renewing = threading.Thread(target=self._keep, args=(vm, lease, over), daemon=True)
        renewing.start()
        try:
            yield vm
        except BaseException:
            with contextlib.suppress(VmError):
                self.release_vm(vm.vm_name, token=vm.token)
            raise
        finally:
            over.set()
            renewing.join()
        self.release_vm(vm.vm_name, token=vm.token)

    def _keep(self, vm: VmDescriptor, lease: float | None, over: threading.Event) -> None:
        """Renew a lease until it is over or lost."""
        while not over.wait(min(self.db.timeouts.look, math.inf if lease is None else lease / 3)):
            try:
                if lease is None:
                    self.own(self.get_vm_by_name(vm.vm_name), vm.token)
                else:
                    self.renew_vm(vm.vm_name, lease, token=vm.token)
            except Unavailable as error:
                self.log.warning("lease of VM %s: %s", vm.vm_name, error)
            except VmError as error:
                self.log.error("%s", error)
                return


def _lease_end(seconds: float) -> float:
    if seconds <= 0:
        raise UsageError("a lease of no time is none", "Leave --lease out, or name more")
    return _listable(CLOCK.wall() + seconds)


def _listable(at: float) -> float:
    """Return a time that any listing can show; a `UsageError` refuses all others."""
    try:
        _iso(at)
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"{at:g} s after 1970 is no date", "Name less time") from None
    return at


def _descends_from(holder: Process) -> bool:
    """Whether this process is that one, or a descendant of it."""
    here = Process.of()
    if not here.namespace or holder[2:] != here[2:]:
        return False
    pid = here.pid
    while pid and pid != holder.pid:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except OSError:  # it is gone, or hidden from us
            return False
    return bool(pid) and holder.is_alive()


LOAN_S = 3600.0  # for which an experiment that was interrupted keeps its VMs of the pool


class Loan:
    """The experiment's VMs of the pool, leased by the supervisor: all at once, or none.

    They are given back when all work is done, or with the experiment's end by `destroy`. One that
    was interrupted keeps them for `LOAN_S`, since what was done on them was done on these machines
    only; from a supervisor that was killed anybody may take them back at once.
    """

    def __init__(self, db: Database) -> None:
        self.db, self._have, self._told = db, False, ""
        self._waiting: Waiting | None = None

    def vms(self) -> list[Row]:
        sql = "SELECT * FROM vms WHERE pool <> '' AND state <> 'n/a' ORDER BY ordinal"
        return self.db.query(sql)

    def descriptors(self) -> list[int]:
        return [self._waiting.fileno()] if self._waiting else []

    def obtain(self) -> bool:
        """Return whether all VMs are here; while they are not, stand in the queue."""
        if not self._have:
            rows = self.vms()
            if any(row.pool_token for row in rows):  # of an earlier supervisor, as far as it stands
                self._hold(str(Process.of()), None)
            self._have = not rows or bool(rows[0].pool_token) or self._borrow(rows)
        return self._have

    def _hold(self, holder: str | None, end: float | None) -> None:
        sql = """UPDATE leases SET holder = :holder, lease_end_at = :end
                 WHERE vm_name IN (SELECT vm_name FROM loans)"""
        self.db.write(sql, durable=True, holder=holder, end=end)

    def _borrow(self, rows: Sequence[Row]) -> bool:
        if self._waiting is None:
            experiment = current_experiment(self.db)
            request = Request(
                tuple((row.pool,) for row in rows),
                _user(),
                str(Path(experiment["source"]).absolute()),  # which may use its VMs again
                Process.of(),
                task_id=f"experiment {experiment['id']}",
                within=functools.partial(self._assign, rows),
            )
            self._waiting = Waiting(VmManager(db=self.db), request)
        if self._waiting.try_again():
            self._leave_queue()
            return True
        self._tell(self._waiting.reason())
        return False

    def _assign(self, rows: Sequence[Row], leased: Sequence[Mapping[str, Any]]) -> None:
        for row, vm in zip(rows, leased, strict=True):
            of_pool = {"pool_vm": vm["vm_name"], "pool_token": vm["token"]}
            machine = {"path": vm["path"], "control_ip": vm["vm_ip"], "reason": ""}
            self.db.update("vms", {"ordinal": row.ordinal}, **of_pool, **machine)

    def _tell(self, reason: str) -> None:
        if reason != self._told:
            sql = "UPDATE vms SET reason = :reason WHERE pool <> '' AND state = 'uninitialized'"
            self.db.write(sql, reason=reason)
            self._told = reason

    def _leave_queue(self) -> None:
        if self._waiting:
            self._waiting.__exit__()
            self._waiting = None
            self._tell("")

    def end(self, *, over: bool) -> None:
        """Release all VMs if all work is done, else keep them for a while, for `run` again."""
        self._leave_queue()
        if not over:
            self._hold(None, CLOCK.wall() + LOAN_S)
            return
        with self.db.transaction(durable=True) as db:
            give_back(db)


def lost_vms(db: Database) -> list[str]:
    """Return the VMs of the experiment whose machine of the pool is no longer theirs."""
    return [row.server_name for row in db.query("SELECT * FROM loans WHERE vm_name IS NULL")]


def give_back(db: Database) -> None:
    """Release the experiment's VMs of the pool, inside the caller's transaction."""
    pool = VmManager(db=db)
    for row in db.query("SELECT vm_name FROM loans WHERE vm_name IS NOT NULL"):
        pool.end_lease(row.vm_name, "the experiment has ended")
    db.write("UPDATE vms SET path = '', pool_token = '' WHERE pool_token <> ''")


# === hooks of the pool, VMs by QEMU ==============================================================

HOOK_KEPT_BYTES = 1 << 20  # of each stream of a hook, the last ones
HOOK_LOG_BYTES = 16 << 20  # then the log of a VM's hooks begins anew; the last one is kept
EX_TEMPFAIL = 75  # of a check: nobody can tell now, so it counts neither way

# What a hook is for; also the name of its column of a group.
HookKind = StrEnum("HookKind", "SPAWN CHECK RELEASE TERMINATE LIST")


class _Output:
    """What a hook prints: its last `HOOK_KEPT_BYTES`, and how many there were before.

    A pipe, for to a file a VM's process that is left behind could write until the disk is full.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.data, self.dropped = pipe, bytearray(), 0
        os.set_blocking(pipe.fileno(), False)

    def read(self) -> None:  # at most 1 MiB at once
        for _ in range(16):
            if not (data := self.pipe.read(1 << 16)):
                if data is not None:
                    self.pipe.close()
                break
            self.data += data
        excess = max(0, len(self.data) - HOOK_KEPT_BYTES)
        del self.data[:excess]
        self.dropped += excess

    def lines(self) -> list[str]:
        return self.data.decode(errors="replace").split("\n")


class Hook:
    """One running hook: a command line in a session of its own, killed with all that is in it.

    It has ended when its main process has, whoever else keeps its pipes open.
    """

    def __init__(
        self,
        kind: HookKind,
        group: str,
        vm_name: str,  # '' for `list`
        command: str,
        environment: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        self.kind, self.group, self.vm_name = kind, group, vm_name
        self.began_at, self.timeout_s = CLOCK.monotonic(), timeout_s
        self.deadline = self.began_at + timeout_s
        self.verdict = ""  # what is wrong with it, or why it was killed
        self.killed = False  # by us, and for no fault of its own
        self._signals = [signal.SIGTERM, signal.SIGKILL]  # still to be tried
        self.exit_code: int | None = None  # negative for a signal; None until `end`
        self.seconds = 0.0
        self.spawned, self.machine = "", dict[str, str]()  # by a spawn hook that succeeded
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = gated(["/bin/sh", "-c", command], env=environment, **pipes)
        self.pid = self.process.pid
        self.identity = Process.of()._replace(pid=self.pid, started=process_started(self.pid) or 0)
        self.pidfd = os.pidfd_open(self.pid)
        self.out, self.err = _Output(self.process.stdout), _Output(self.process.stderr)

    def descriptors(self) -> dict[int, _Output | None]:
        """Return what to wait on: its end, and what it prints."""
        outputs = [output for output in (self.out, self.err) if not output.pipe.closed]
        return {self.pidfd: None} | {output.pipe.fileno(): output for output in outputs}

    def abandon(self) -> None:
        """Leave it behind its gate, where it ends without having run."""
        self._close()
        self.process.wait()

    def _close(self) -> None:
        for pipe in (cast(IO[bytes], self.process.stdin), self.out.pipe, self.err.pipe):
            pipe.close()
        os.close(self.pidfd)

    def kill(self, verdict: str) -> None:
        """Have `enforce` kill it for no fault of its own; the first reason stands."""
        if not self.verdict:
            self.verdict, self.killed, self.deadline = verdict, True, -math.inf

    def enforce(self, grace_s: float) -> bool:
        """Kill it if its deadline has passed, politely first; return whether that was in vain."""
        now = CLOCK.monotonic()
        if now < self.deadline:
            return False
        self.verdict = self.verdict or f"took longer than {self.timeout_s:g} s"
        if not self._signals:
            self.verdict += " and could not be killed"
            return True
        signal_session(self.pid, self.identity.started, self._signals.pop(0))
        self.deadline = now + grace_s
        return False

    def end(self) -> None:
        """Take in the rest of its output and how it ended; end what it may not leave behind."""
        for output in filter(None, self.descriptors().values()):
            output.read()
        status = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is not None:
            exited = status.si_code == os.CLD_EXITED
            self.exit_code = status.si_status if exited else -status.si_status
        self.seconds = CLOCK.monotonic() - self.began_at
        if self.kind == HookKind.SPAWN and not self.fault:
            try:
                name, ip, path = parse_spawned("\n".join(self.out.lines()), self.vm_name)
                self.machine, self.spawned = _pool_machine(ip, path), name
            except ValueError as error:
                self.verdict = _one_line(error)
        if not self.spawned:
            signal_session(self.pid, self.identity.started, signal.SIGKILL)
        self._close()
        # Reaped last: a zombie keeps its pid, which is its session's name, from all others.
        self.process.poll()

    @property
    def tells_nothing(self) -> bool:
        """Whether it is a check that does not count either way."""
        return self.kind == HookKind.CHECK and (self.killed or self.exit_code == EX_TEMPFAIL)

    @property
    def fault(self) -> str:
        """What is wrong with how it ended, as a few words; '' if nothing is."""
        code = self.exit_code
        if self.verdict or code == 0:
            return self.verdict
        ended = "did not end" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            ended = f"killed by {_signal_name(-code)}"
        told = [*self.err.lines(), *self.out.lines()]
        told = [line for line in told if line.strip() and not line.startswith("hint: ")]
        return f"{ended}: {printable(told[-1])}" if told else ended


def parse_spawned(text: str, name: str) -> tuple[str, str, str]:
    """Return name, ip and path as a spawn hook has printed them; `name` if it prints none.

    That is one JSON object with any of ip, name and path: the whole text, or its last line that
    is one. Otherwise the last `IP=…` and the last `vm_name=…` anywhere in it. Else `ValueError`.
    """
    import ipaddress

    said: dict[str, Any] | None = None
    for part in [text, *reversed(text.splitlines())]:
        if said is None and part.strip().startswith("{") and part.strip().endswith("}"):
            with contextlib.suppress(ValueError, RecursionError):
                said = json.loads(part)
    if said is None:
        words = re.findall(r"\b(IP|vm_name)=([^\s\"'{}\\,]+)", text)
        said = {{"IP": "ip", "vm_name": "name"}[key]: value for key, value in words}
    known = {key: said.get(key) or "" for key in ("name", "ip", "path")}
    for key, value in known.items():
        if not (isinstance(value, str) and value.isprintable()):
            raise ValueError(f"it printed a {key} that is no text: {value!r:.80}")
    if not known["ip"] and not known["path"]:
        raise ValueError("it printed neither IP=… nor a JSON object with ip or path")
    if known["ip"]:
        try:
            ipaddress.ip_address(known["ip"])
        except ValueError:
            raise ValueError(f"it printed {known['ip']!r:.80}, which is no IP address") from None
    if known["path"]:
        drivers.parse_address(known["path"])
    return checked_name("VM", known["name"] or name), known["ip"], known["path"]


def log_hook(path: Path, hook: Hook) -> None:
    """Append what a hook did and printed to a log; a full disk loses the log, nothing else."""
    head, lines = f"{_iso(CLOCK.wall())} {{}} {hook.kind}", []
    for name, output in (("out", hook.out), ("err", hook.err)):
        if output.dropped:
            lines.append(f" [{name}] … {output.dropped} bytes before this are dropped")
        lines += [f" [{name}] {_as_logged(line)}" for line in output.lines() if line]
    lines = [head.format("info   ") + line for line in lines]
    how = f": {hook.fault or 'done'}, {hook.seconds:.1f} s"
    lines.append(head.format("warning" if hook.fault else "info   ") + how)
    with contextlib.suppress(OSError):
        if path.exists() and path.stat().st_size > HOOK_LOG_BYTES:
            path.rename(path.with_name(path.name + ".1"))
        with path.open("a", encoding="utf-8", errors="replace") as log:
            log.writelines(f"{line}\n" for line in lines)


def _check_agent(words: Sequence[str]) -> int:
    """The default check's main, `_check_agent PATH DATABASE SECONDS`: print how an agent is.

    That is ok, frozen, no-exec or no-answer; in-use, which tells nothing, if others have it.
    """
    path, database, seconds = words
    if not path:
        print("the VM has no path")
        return 1
    driver = drivers.QemuGuestAgentDriver({"path": path, "name": "vm"}, logging.getLogger("vmrm"))
    try:
        with agent_lock(path, Path(database), time_to_wait, 0):
            driver.connect(float(seconds))
            health = driver.health()
    except (Conflict, drivers.DriverError) as error:
        health = f"{'in-use' if isinstance(error, Conflict) else 'no-answer'}: {error}"
    finally:
        driver.close()
    print(health)
    return {"ok": 0, "in-use": EX_TEMPFAIL}.get(health.partition(":")[0], 1)


# --- VMs by QEMU

QEMU = "qemu-system-x86_64"
QEMU_START_S = 30.0  # for QEMU to answer on its control socket
QEMU_GRACE_S = 5.0  # to leave when it is asked to, and again when it is told to
GUEST_AGENT_PORT = "org.qemu.guest_agent.0"

TRIAL_S = 30.0  # for QEMU's emulation to boot the trial guest
TRIAL_EXIT_CODE = 85
# A boot sector that goes to 64-bit mode and there ends QEMU, by its debug port, with that code.
_TRIAL_GUEST = bytes.fromhex(
    "fa31c08ed88ed0bc007c0f0116a87c0f20c06683c8010f22c0ea1e7c080066b8"
    "10008ed88ec08ed0bf001000000f22df31c0b9000c0000f3abc7050010000003"
    "200000c7050020000003300000c70500300000830000000f20e083c8200f22e0"
    "b9800000c00f320d000100000f300f20c00d000000800f22c0ea807c00001800"
    "b02ae6f4f4ebfd900000000000000000ffff0000009acf00ffff00000092cf00"
    "ffff0000009aaf001f00887c0000"
)


def kvm_fault(program: str) -> str:
    """Return why KVM is of no use to QEMU, `program`, on this host; '' if it is.

    QEMU may die under it, or its guests hang or crawl. So a tiny guest is booted once, which must
    not take much longer than without KVM. The outcome is kept in the user's cache for this boot of
    the host and this QEMU.
    """
    device, outcome = Path("/dev/kvm"), None
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} cannot be opened" if device.exists() else f"there is no {device}"
    found = Path(program).stat()
    this = f"{boot_id()} {os.path.realpath(program)} {found.st_mtime_ns} {found.st_size}\n"
    with contextlib.suppress(OSError, RuntimeError):  # it cannot be kept, or there is no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmrm"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "kvm").open("a+", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # who comes meanwhile waits for the outcome
            file.seek(0)
            if (kept := file.read(1 << 16)).startswith(this):
                return kept.removeprefix(this)
            outcome = _try_kvm(program)
            file.truncate(0)
            file.write(this + outcome)
    return _try_kvm(program) if outcome is None else outcome


def _try_kvm(program: str) -> str:
    emulated, fault = _boot_trial(program, "tcg", TRIAL_S)
    patience = TRIAL_S if fault else max(5.0, 5 * emulated)  # the host may be busy
    return _boot_trial(program, "kvm", patience)[1]


def _boot_trial(program: str, accel: str, patience: float) -> tuple[float, str]:
    """Boot the trial guest; return how many seconds that took, and what was wrong with it."""
    import tempfile

    with tempfile.TemporaryFile() as disk:  # which has no name that could stay behind
        disk.write(_TRIAL_GUEST.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
        disk.flush()
        words = "-nodefaults -no-user-config -display none -no-reboot -machine q35 -cpu max -m 32 "
        words += f"-device isa-debug-exit,iobase=0xf4,iosize=4 -accel {accel} "
        words += f"-drive format=raw,file=/proc/self/fd/{disk.fileno()}"
        null, began = subprocess.DEVNULL, CLOCK.monotonic()
        try:
            done = subprocess.run(
                [program, *words.split()],
                stdin=null,
                stdout=null,
                stderr=subprocess.PIPE,
                timeout=patience,
                pass_fds=[disk.fileno()],
                check=False,
            )
        except subprocess.TimeoutExpired:
            return patience, f"a guest hangs under it, or takes over {patience:.1f} s to boot"
    if done.returncode == TRIAL_EXIT_CODE:
        return CLOCK.monotonic() - began, ""
    return 0.0, printable(done.stderr) or f"QEMU ends under it with exit code {done.returncode}"


class QemuVm:
    """A VM in a directory of its own: sockets, log, and a file `pid` locked for as long as it runs.

    QEMU inherits the lock from whoever starts it, so the lock says whether it runs, whenever that
    one dies. Before it runs, its pid and start time are in the file.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.folder = root / checked_name("VM", name)
        self.name, self._pid = name, self.folder / "pid"

    def _lock(self, seconds: float = LOOK_S) -> FileLock | None:
        """Return the lock, or None if it stays taken. Who removes the directory holds it, too."""
        lock = FileLock(self._pid)
        while lock.take(seconds):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fd), self._pid.stat()):
                    return lock
            lock.release()
            self.folder.mkdir(mode=0o700, exist_ok=True)
        return None

    def spawn(self, words: Sequence[str]) -> dict[str, str]:
        """Start QEMU, which outlives us; return name, ip (not known: '') and the agent's path.

        If it does not start, its words are told, and nothing is left.
        """
        import shutil

        if (program := shutil.which(QEMU)) is None:
            raise UsageError(f"{QEMU} is not installed")
        self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if not self._pid.exists() and any(self.folder.iterdir()):
            what = f"{str(self.folder)!r} is not a VM directory of vmrm"
            raise UsageError(what, "Name another --dir")
        if (lock := self._lock()) is None:
            raise Conflict(f"VM {self.name!r} runs already", "Terminate it first")
        with contextlib.ExitStack() as stack:  # in the end it is QEMU alone that has these open
            stack.callback(lock.leave)
            log = stack.enter_context((self.folder / "qemu.log").open("wb"))
            agent, control = (stack.enter_context(self._listen(name)) for name in ("agent", "qmp"))
            own = f"-name {self.name} -nodefaults -no-user-config -display none"
            for name, listening in (("agent", agent), ("control", control)):
                own += f" -chardev socket,id={name},fd={listening.fileno()},server=on,wait=off"
            own += " -mon chardev=control,mode=control -device virtio-serial-pci"
            own += f" -device virtserialport,chardev=agent,name={GUEST_AGENT_PORT}"
            process = gated(
                [program, *own.split(), *words],
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": str(self.folder)},  # where overlays go
                pass_fds=(lock.fd, agent.fileno(), control.fileno()),
            )
            os.ftruncate(lock.fd, 0)
            os.pwrite(lock.fd, f"{process.pid} {process_started(process.pid)}\n".encode(), 0)
            open_gate(process)
        _crash("qemu-started")
        try:
            self.control("query-status", QEMU_START_S)
        except (OSError, ValueError) as error:
            said = printable((self.folder / "qemu.log").read_bytes()) or _one_line(error)
            process.kill()
            process.wait()
            self.terminate()
            raise VmrmError(f"QEMU did not start VM {self.name!r}: {said}") from error
        return {"name": self.name, "ip": "", "path": str(self.folder / "agent.sock")}

    def _listen(self, name: str) -> socket.socket:
        path = self.folder / f"{name}.sock"
        path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        with drivers.short_path(path) as target:
            listening.bind(target)
        listening.listen(1)
        return listening

    def control(self, command: str, timeout: float) -> None:
        """Have QEMU carry out a command on its control socket (QMP).

        `OSError`: it does not answer in time, or is gone. `ValueError`: it refuses.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            with drivers.short_path(self.folder / "qmp.sock") as target:
                connection.connect(target)
            with connection.makefile("rwb", buffering=0) as stream:
                lines = iter(lambda: stream.readline(1 << 20), b"")  # events among them
                for words in ("", "qmp_capabilities", command):
                    if words:
                        stream.write(json.dumps({"execute": words}).encode())
                    for said in map(json.loads, itertools.islice(lines, 1000)):
                        if "error" in said:
                            raise ValueError(said["error"].get("desc"))
                        if ("return" if words else "QMP") in said:
                            break
                    else:
                        raise ConnectionError("it does not answer on its control socket")

    def terminate(self) -> None:
        """Terminate QEMU and delete the directory; what is gone already is no error."""
        import shutil

        ends, patience = [None, signal.SIGTERM, signal.SIGKILL], LOOK_S
        with contextlib.suppress(FileNotFoundError):  # somebody else does the same
            while self._pid.exists():  # without that file it is not one of our directories
                if (lock := self._lock(patience)) is not None:
                    _crash("qemu-ended")
                    for path in [path for path in self.folder.iterdir() if path != self._pid]:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                    self._pid.unlink()
                    lock.release()
                elif ends:
                    patience = QEMU_GRACE_S
                    if (number := ends.pop(0)) is None:
                        with contextlib.suppress(OSError, ValueError):
                            self.control("quit", QEMU_GRACE_S)
                    elif signed := self._pid.read_text().split():
                        signal_session(int(signed[0]), int(signed[1]), number)
                else:
                    raise VmrmError(f"VM {self.name!r} cannot be ended", f"See {self._pid}")
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def qemu_words(
    memory: int, cpus: int, disk: str | None, kernel: str | None, **more: str | None
) -> list[str]:
    """Return the part of QEMU's command line that says what machine it is and what it boots.

    The disk image, qcow2 or raw, is only read: what the VM writes goes to an overlay, which QEMU
    removes at its end. `more` has QEMU's own words: initrd, append, accel.
    """
    if not disk and not kernel:
        raise UsageError("there is nothing to boot", "Name --disk IMAGE, or --kernel FILE")
    for file in (disk, kernel, more["initrd"]):
        if file and not Path(file).is_file():
            raise UsageError(f"there is no file {file!r}")
    words = ["-machine", "q35", "-cpu", "max", "-m", str(memory), "-smp", str(cpus)]
    for option, value in {"kernel": kernel, **more}.items():
        words += [f"-{option}", value] if value else []
    if disk:
        with Path(disk).open("rb") as image:  # not left to QEMU: a guest could write a header
            kind = "qcow2" if image.read(4) == b"QFI\xfb" else "raw"
        file = disk.replace(",", ",,")
        words += ["-drive", f"if=virtio,format={kind},snapshot=on,file={file}"]
    return words


def qemu_running(root: Path) -> list[str]:
    """Return the names of the VMs below a directory that run."""
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [
        f.name for f in folders if NAME_PATTERN.fullmatch(f.name) and FileLock(f / "pid").is_held
    ]


# === the keeper ==================================================================================
#
# keeper_plan says what is to be done at some instant: what the view pool_dues has of single VMs,
# and what the pool as a whole lacks. An action is a row: of a group, and of its VM if it is about
# one (else vm_name is ''), with `what` is to be done and, for the log, `why`. The keeper does
# it: it starts a hook behind its gate, claims the row for it in one transaction (a move, and the
# hook's pid), opens the gate, and writes down its end in another one. So a machine never exists
# without its row, and who comes after a killed keeper finds every hook.

MAX_HOOKS = 8  # of one kind at once; spawns have limits of their own
KEPT_S = 30 * 86400.0  # the history, and the hooks' logs of VMs that are gone
SPAWN_BACKOFF_S = 300.0  # the longest pause after spawn hooks that failed, doubled from 1 s
_URGENCY = ["kill", "end", "terminate", "spawn", "release", "list", "check"]


class _Dues:
    """Tells which of many times have passed, and remembers the first of those that have not."""

    def __init__(self, now: float) -> None:
        self.now, self.next_at = now, math.inf

    def again(self, last_at: float | None, pause: float) -> bool:
        """Whether a pause since the last time is over; a last time to come is another clock's."""
        last_at = last_at or 0.0
        if last_at + pause <= self.now or last_at > self.now + 1:
            return True
        self.next_at = min(self.next_at, last_at + pause)
        return False


def keeper_plan(db: Database, now: float) -> tuple[list[Row], float]:
    """Return what is to be done now, most urgent first, and when to look again at the latest."""
    dues, pool = _Dues(now), VmManager(db=db)
    actions = _plan_vms(db, dues)
    for supply in _supplies(pool):
        group = supply.group
        actions += [Row(group, what="spawn", vm_name="")] * supply.spawns_now(dues)
        actions += supply.recycled
        listed = pool.keeper_info(group.name, "listed")
        doubtful = listed.get("missing") or listed.get("strangers")
        period = db.timeouts.young if doubtful else group.vm_health_check_period_s
        wanted = group.list and group.terminate  # without the one, the other ends nothing
        if wanted and not listed.get("hook") and dues.again(listed.get("at"), period):
            actions.append(Row(group, what="list", vm_name=""))
    return sorted(actions, key=lambda action: _URGENCY.index(action.what)), dues.next_at


def _plan_vms(db: Database, dues: _Dues) -> list[Row]:
    """Return the most urgent of what is due for each VM; a check is not begun at once again."""
    actions: dict[str, Row] = {}
    sql = """WITH due AS MATERIALIZED (
                 SELECT * FROM pool_dues WHERE due_at <= :now OR since > :now + 1)
             SELECT g.*, p.*, what, due.reason AS why
             FROM due JOIN pool_list AS p USING (vm_name)
             JOIN pool_groups AS g ON g.name = p."group" ORDER BY state_at, vm_name"""
    for row in sorted(db.query(sql, now=dues.now), key=lambda row: _URGENCY.index(row.what)):
        if row.vm_name in actions:
            continue
        if row.what != "check" or dues.again(row.check_started_at, db.timeouts.recheck):
            actions[row.vm_name] = row
    sql = """SELECT min(due_at) FROM pool_dues WHERE due_at > :now
             AND vm_name NOT IN (SELECT value FROM json_each(:names))"""
    later = db.value(sql, now=dues.now, names=json.dumps(list(actions)))
    dues.next_at = min(dues.next_at, later or math.inf)
    return list(actions.values())


class _Supply:
    """What a group can come up with for those whom `allot` leaves without a VM."""

    def __init__(self, pool: VmManager, group: Row, vms: Sequence[Row], kept: set[str]) -> None:
        self.group, self.wanted = group, 0
        self.failed = pool.keeper_info(group.name, "failed")
        hopes = collections.defaultdict[str, list[Row]](list)
        for vm in vms:
            if vm["vm_name"] not in kept:  # of a thousand, a subscript is the cheaper look
                hopes[vm["prospect"]].append(vm)
        self.spawning = sum(vm["state"] == VmStates.SPAWNING for vm in vms)
        self.unbound = self.coming = len(hopes["coming"])
        self.room, self.leaving = group.max_vm_total - len(vms), len(hopes["leaving"])
        # While spawns fail, room for one is enough to see whether they still do.
        self.in_vain = bool(self.failed) and max(self.room, self.leaving, self.spawning) > 0
        self.idle = sorted(hopes["idle"], key=lambda vm: vm.last_release or vm.spawned_at)
        ends = VmStates.TERMINATING
        self.bound = collections.Counter(vm["bound_to_user"] for vm in vms if vm["state"] != ends)
        back = [(vm.bound_to_user, vm.bound_sandbox) for vm in hopes["returning"]]
        self.returning = collections.Counter(back)
        self.recycled: list[Row] = []

    def serves(self, request: Request) -> bool:
        """Whether it can come up with a VM for a request; then that is no one else's."""
        own = (request.owner, request.sandbox)
        if self.returning[own]:
            self.returning[own] -= 1
            return True
        limit = self.group.max_vm_per_user
        if limit is not None and self.bound[request.owner] >= limit:  # one of its own has to go
            return self._recycle(request, own=True)
        if self.coming:
            self.coming -= 1
        elif not self.group.spawn:
            return False
        elif self.room > 0:
            self.room -= 1
            self.wanted += 1
        elif self.leaving:
            self.leaving -= 1
        elif not self._recycle(request, own=False):
            return False
        self.bound[request.owner] += 1
        return True

    def _recycle(self, request: Request, *, own: bool) -> bool:
        """End the VM that is idle for the longest time: of all of them, or of the owner's own."""
        idle = [vm for vm in self.idle if not own or vm.bound_to_user == request.owner]
        can = self.group.spawn and self.group.terminate and (own or not self.in_vain)
        if not (can and idle):
            return False
        self.idle.remove(idle[0])
        self.in_vain = bool(self.failed)
        why = f"{request.owner} waits for one, and there is no room"
        self.recycled.append(Row(self.group | idle[0], what="end", why=why))
        return True

    def spawns_now(self, dues: _Dues) -> int:
        """Return how many VMs to spawn: up to `min_ready`, or for all who wait, within limits."""
        group, failed = self.group, self.failed
        room = min(self.room + self.wanted, group.max_spawn_processes - self.spawning)
        count = min(max(group.min_ready - self.unbound, self.wanted), room)
        if count <= 0 or not group.spawn:
            return 0
        interval = group.vm_spawn_min_interval_s
        pause = backoff(failed["times"], 1.0, SPAWN_BACKOFF_S) if failed else 0.0
        rested = dues.again(group.last_spawn_at, interval)
        if not rested or (failed and not dues.again(failed["at"], pause)):
            return 0
        return 1 if interval else count


def _supplies(pool: VmManager) -> Collection[_Supply]:
    """Charge each want that nobody serves now to the first group that can; those that fail last."""
    shares, supplies = pool.shares(), {}
    kept = {name for share in shares for name in share.vm_names}
    mine = collections.defaultdict[str, list[Row]](list)
    for vm in pool.db.query("SELECT * FROM pool_prospects"):
        mine[vm["group"].lower()].append(vm)
    for group in pool.db.query("SELECT * FROM pool_groups ORDER BY position"):
        key = group.name.lower()
        supplies[key] = _Supply(pool, group, mine[key], kept)
    for share in shares:
        for wanted in share.missing:
            named = [supplies[g.lower()] for g in map(str, wanted) if g.lower() in supplies]
            for supply in sorted(named, key=lambda supply: bool(supply.failed)):
                if supply.serves(share.request):
                    break
    return supplies.values()


NO_HOOK: dict[str, Any] = {"hook": "", "hook_process": None}


class _Book:
    """What the rows say of hooks: how they are put on record, and what follows from their end."""

    def __init__(self, db: Database, log: logging.Logger) -> None:
        self.db, self.log, self.timeouts = db, log, db.timeouts
        self.pool = VmManager(logger=log, db=db)

    def note(self, group: str, key: str, value: Mapping[str, Any]) -> None:
        self.pool.write_vm_pool_info(group, f"{KEEPER}.{key}", json.dumps(value))

    def row(self, vm_name: str) -> Row | None:
        return self.db.row("SELECT * FROM pool_list WHERE vm_name = :name", name=vm_name)

    def is_as_planned(self, action: Row) -> Row | None:
        """Return a VM's row if it is still as it was when something was planned for it."""
        columns = ("state", "hook", "token", "releasing_at", "last_release", "held_until")
        row = self.row(action.vm_name)
        return row if row and all(row[c] == action[c] for c in columns) else None

    # --- beginning ---

    def claim(self, hook: Hook, action: Row) -> bool:
        """Put a hook on record, and move its VM; return whether it may run, as things are now."""
        now, noted = CLOCK.wall(), str(hook.identity)
        if hook.kind == HookKind.LIST:
            found = self.pool.keeper_info(hook.group, "listed") | {"at": now, "hook": noted}
            self.note(hook.group, "listed", found)
            return True
        columns: dict[str, Any] = {"hook": hook.kind.value, "hook_process": noted}
        with self.db.transaction(durable=hook.kind == HookKind.SPAWN) as db:
            if hook.kind == HookKind.SPAWN:
                sql = 'SELECT count(*) FROM pool_vms WHERE "group" = :g'
                if db.value(sql, g=hook.group) >= action.max_vm_total:
                    return False
                add_pool_vm(db, hook.vm_name, hook.group, VmStates.SPAWNING, **columns)
                db.update("pool_groups", {"name": hook.group}, last_spawn_at=now)
                return True
            if (row := self.is_as_planned(action)) is None:
                return False
            state = row["state"]
            if hook.kind == HookKind.CHECK:
                columns["check_started_at"] = now
                state = state if state == VmStates.IN_USE else VmStates.CHECK_HEALTH
            elif hook.kind == HookKind.TERMINATE:
                columns |= {"terminating_at": now, "terminate_tries": row["terminate_tries"] + 1}
            move_pool_vm(db, hook.vm_name, state, **columns)
        return True

    def end_vm(self, action: Row) -> None:
        """Have a VM terminated, unless somebody has acquired it meanwhile, perhaps."""
        with self.db.transaction(durable=True) as db:
            if self.is_as_planned(action) is None:
                return
            state = VmStates.TERMINATING
            move_pool_vm(db, action.vm_name, state, action.why, releasing_at=None)
        self.log.info("%s is terminated: %s", action.vm_name, action.why)

    # --- ending ---

    def ended(self, hook: Hook) -> None:
        """Write down how a hook ended."""
        name = hook.vm_name or hook.group
        if hook.fault and not hook.tells_nothing:
            self.log.warning("%s: %s hook: %s", name, hook.kind, hook.fault)
        elif hook.kind not in (HookKind.CHECK, HookKind.LIST):
            self.log.info("%s: %s hook done in %.1f s", name, hook.kind, hook.seconds)
        if hook.kind == HookKind.LIST:
            self._listed(hook)
            return
        _crash("hook-ended")
        row, process = self.row(hook.vm_name), str(hook.identity)
        if row is None or row["hook_process"] == process:  # else removed by hand, and added again
            with contextlib.suppress(VmDescriptorNotFound):  # removed by hand meanwhile
                getattr(self, f"_end_{hook.kind}")(hook)
        self.forget(hook.vm_name, process)
        log_hook(pool_log(self.db, hook.vm_name), hook)

    def forget(self, vm_name: str, process: str, *, again: bool = False) -> None:
        """Take a hook off the record; `again` if what it was to do has to begin anew."""
        with self.db.transaction() as db:
            row = self.row(vm_name)
            if row is None or row["hook_process"] != process:
                return
            anew: dict[str, Any] = {"terminate_tries": 0, "check_started_at": None} if again else {}
            lost = again and row["state"] == VmStates.SPAWNING
            state = VmStates.TERMINATING if lost else row["state"]
            reason = "the keeper died while it was spawned" if lost else ""
            move_pool_vm(db, vm_name, state, reason, **anew, **NO_HOOK)

    def _end_spawn(self, hook: Hook) -> None:
        with self.db.transaction(durable=True) as db:
            row, name = self.row(hook.vm_name), hook.vm_name
            if row is None:  # a machine may be there
                reason = "it was removed while it was spawned"
                add_pool_vm(db, name, hook.group, VmStates.TERMINATING, reason=reason)
            elif row["state"] == VmStates.SPAWNING:
                if hook.spawned:
                    name = self._settle(hook)
                if hook.fault:
                    move_pool_vm(db, name, VmStates.TERMINATING, f"spawn hook: {hook.fault}")
        hook.vm_name = name
        failed = self.pool.keeper_info(hook.group, "failed")
        if not hook.fault and failed:
            self.note(hook.group, "failed", {})
        elif hook.fault and not hook.killed:
            failed = {"times": failed.get("times", 0) + 1, "at": CLOCK.wall(), "why": hook.fault}
            self.note(hook.group, "failed", failed)

    def _settle(self, hook: Hook) -> str:
        """Give a spawned VM's row its name and machine, if they are no other's; return its name."""
        name = hook.spawned
        if name.lower() != hook.vm_name.lower():
            if self.row(name):
                hook.verdict = f"it says its VM is {name!r}, which the pool has already"
                return hook.vm_name
            self.db.update("pool_vms", {"vm_name": hook.vm_name}, vm_name=name)
        try:
            _refuse_twin(self.db, {"vm_name": name, **hook.machine, "group": hook.group})
        except VmError as error:  # by its name alone it may be terminated: the machine is another's
            hook.verdict = str(error)
            return name
        # Off the record at once: the VM may be in the hook's session, which nobody may kill now.
        settled: dict[str, Any] = {**hook.machine, "spawned_at": CLOCK.wall(), **NO_HOOK}
        move_pool_vm(self.db, name, VmStates.GOT_IP, **settled)
        return name

    def _end_check(self, hook: Hook) -> None:
        row = VmDescriptor.load(self.db, hook.vm_name)
        if hook.tells_nothing or (hook.fault and self._may_boot(row)):
            with self.db.transaction() as db:  # what the check before it told goes on to hold
                row = VmDescriptor.load(db, hook.vm_name)
                well = row["last_health_check"] is not None and not row["check_fails"]
                if well and row["state"] == VmStates.CHECK_HEALTH and row["releasing_at"] is None:
                    move_pool_vm(db, hook.vm_name, VmStates.READY, "health check inconclusive")
        else:
            wrong = hook.fault or self._twin(row)
            self.pool.mark_vm_checked(hook.vm_name, wrong and f"check: {wrong}")

    def _may_boot(self, row: Mapping[str, Any]) -> bool:
        """Whether a spawned VM has never answered, and still has time to do so."""
        group = self.pool.group(row["group"])
        young = CLOCK.wall() < row["spawned_at"] + group["spawn_timeout_s"]
        return bool(group["spawn"] and row["last_health_check"] is None and young)

    def _twin(self, row: Mapping[str, Any]) -> str:
        """Note where a VM's path leads to by now; return whose machine that is, '' if its own."""
        address = machine_address(row["path"])
        if address == row["address"]:
            return ""
        others = self.pool._select("address = :address", address=address)
        # Of those that have moved, too, the next check says where to.
        moved = [(vm.vm_name, vm.path) for vm in others if machine_address(vm.path) != address]
        sql = "UPDATE pool_vms SET address = ? WHERE vm_name = ? AND path = ?"
        with self.db.transaction(durable=True) as db:
            db.connection.executemany(sql, [("", *other) for other in moved])
            try:
                _refuse_twin(db, {**row, "address": address})
            except VmError as error:
                return _one_line(error)
            db.connection.execute(sql, (address, row["vm_name"], row["path"]))
        return ""

    def _end_release(self, hook: Hook) -> None:
        if not hook.killed:
            failure = hook.fault and f"release hook: {hook.fault}"
            self.pool.mark_vm_released(hook.vm_name, failure)

    def _end_terminate(self, hook: Hook) -> None:
        if not hook.fault:
            self.pool.remove_vm_from_pool(hook.vm_name)
            return
        tries: dict[str, Any] = {"terminate_tries": 0} if hook.killed else {}
        reason = f"terminate hook: {hook.fault}"
        with self.db.transaction() as db:
            move_pool_vm(db, hook.vm_name, VmStates.TERMINATING, reason, **tries)

    def _listed(self, hook: Hook) -> None:
        """Compare the machines there are with the rows: what misses its other half twice is ended.

        Young VMs are spared: a listing may be older than they are.
        """
        found, now = self.pool.keeper_info(hook.group, "listed"), CLOCK.wall()
        found.pop("hook", None)
        names = " ".join(hook.out.lines()).split()
        wrong = hook.fault or ("it printed too much" if hook.out.dropped else "")
        for name in itertools.filterfalse(NAME_PATTERN.fullmatch, names):
            wrong = wrong or f"it printed {name!r:.80}, which is no VM's name"
        if wrong:
            self.note(hook.group, "listed", found)
            self.log.warning("ignoring the list hook's output for group %s: %s", hook.group, wrong)
            return
        began, old = now - hook.seconds, now - self.timeouts.young
        doubts = {
            "missing": """SELECT vm_name FROM pool_vms WHERE "group" = :group AND spawned_at < :old
                AND state NOT IN ('spawning', 'terminating')
                AND vm_name NOT IN (SELECT value FROM json_each(:names))""",
            "strangers": """SELECT value AS vm_name FROM json_each(:names)
                WHERE value COLLATE NOCASE NOT IN (SELECT vm_name FROM pool_vms)""",
        }
        for kind, sql in doubts.items():
            rows = self.db.query(sql, group=hook.group, old=old, names=json.dumps(names))
            since = {row.vm_name: found.get(kind, {}).get(row.vm_name, began) for row in rows}
            found[kind] = {name: at for name, at in since.items() if at >= old}
            for name in since.keys() - found[kind].keys():
                with self.db.transaction(durable=True) as db:
                    row, ends = self.row(name), VmStates.TERMINATING
                    if kind == "missing" and row:
                        reason = "its machine is gone"
                        move_pool_vm(db, name, ends, reason, releasing_at=None)
                    elif kind == "strangers" and row is None:
                        reason = "a machine that the pool did not know"
                        add_pool_vm(db, name, hook.group, ends, reason=reason)
                    else:
                        continue
                self.log.warning("%s is terminated: %s", name, reason)
        self.note(hook.group, "listed", found)


class Keeper:
    """Keeps the pool: spawns, checks, releases, terminates and counts its VMs, by hooks.

    One process, one thread, one wait; several hooks at once. It may be killed at any instruction.
    With `once` it does what is due and what follows from it, then leaves: for cron.
    """

    def __init__(self, db: Database, once: bool = False) -> None:
        self.db, self.once, self.timeouts = db, once, db.timeouts
        self.log = logging.getLogger("vmrm.keeper")
        self.book = _Book(db, self.log)
        self.hooks: dict[int, Hook] = {}  # by pid
        self._untold: list[Hook] = []  # that have ended, and whose rows do not say so yet
        self._buried = self._trouble = False
        self._reap_at = self._checkpoint_at = self._sweep_at = self._rest_until = -math.inf
        self._not_before = -math.inf  # when to fork again, after the system refused
        self._again_at = -math.inf  # when something is due next, in wall time
        self._seen = -1  # PRAGMA data_version
        self._done = set[tuple[str, ...]]()  # what `once` does not do twice

    def run(self) -> int:
        """Keep the pool until SIGTERM or SIGINT, or once; return 0."""
        what, hint = "the pool is being kept already", "Let it, or stop it first"
        stops = signal.SIGTERM, signal.SIGINT
        with Seat(self.db, KEEPER, what, hint, *stops) as self._seat:
            tool = self.db.directory("bin") / "vmrm"  # so that a hook's `vmrm` is this very one
            with replacing(tool, 0o700) as file:
                file.write(os.fsencode(f'#!/bin/sh\nexec {shlex.join(own_command())} "$@"\n'))
            booted_at = CLOCK.wall() - time.clock_gettime(time.CLOCK_BOOTTIME)
            started_at = self.db.value("SELECT started_at FROM pool_server") or 0.0
            if not self.once or booted_at > started_at:
                self.book.pool.mark_server_start()
            while self._goes_on():
                pass
            self.db.checkpoint(truncate=True)
        return 0

    def _goes_on(self) -> bool:
        """Look once, and wait; return whether there is more to do.

        What could not be read or written is tried again: until then the machines stay as they are.
        """
        try:
            if not self._buried:
                self._bury()
                self._buried = True
            self._tell_ended()
            begun = self._step()
            going = begun or bool(self.hooks) or not (self.once or self._seat.told_to_stop)
            if going and not begun:
                self._wait()
            self._trouble = False
        except Unavailable as error:
            if self.once or self._seat.told_to_stop:
                raise
            if not self._trouble:
                self.log.error("%s; waiting", error)
            # A commit that failed may be there: of a hook that we do not have, for example.
            self._trouble, self._buried = True, False
            self._seat.wait(self.timeouts.reconnect)
            return True
        return going

    def _bury(self) -> None:
        """End the hooks on record that are not ours, and begin again where they stopped."""
        ours = {str(hook.identity) for hook in (*self.hooks.values(), *self._untold)}
        sql = """SELECT vm_name AS name, hook_process AS process, NULL AS listed
                 FROM pool_vms WHERE hook <> ''
                 UNION ALL SELECT "group", json_extract(value, '$.hook'), value
                 FROM pool_info WHERE key = :key"""
        rows = self.db.query(sql, key=f"{KEEPER}.listed")
        left = [row for row in rows if row.process not in (None, *ours)]
        deadline = CLOCK.monotonic() + self.timeouts.term_grace
        for pid, started, boot, _ in (Process.parse(row.process) for row in left):
            while boot == boot_id() and any(map(_is_of_hook, session_members(pid, started))):
                signal_session(pid, started, signal.SIGKILL)
                if CLOCK.monotonic() >= deadline:
                    self.log.warning("process %d of a dead keeper's hook cannot be killed", pid)
                    break
                time_to_wait(0.02)
        for row in left:
            if row.listed:
                self.book.note(row.name, "listed", json.loads(row.listed) | {"hook": None})
            else:
                self.book.forget(row.name, row.process, again=True)

    # --- the loop ---

    def _step(self) -> bool:
        """Look at everything once and begin what is due; return whether something was."""
        self._seat.drain()  # our own commits woke us, too
        began = CLOCK.monotonic()
        if self._seat.told_to_stop:
            for hook in self.hooks.values():
                hook.kill("the keeper was stopped")
            self._again_at = self._reap_at = math.inf
            return False
        if began >= self._sweep_at:
            self._sweep_at = began + 86400
            self._sweep()
        if began >= self._reap_at:
            self._reap_at = began + self.timeouts.look
            for name in self.book.pool.reap():
                self.log.info("%s was taken back: its lease was over", name)
        self.book.pool.drop_dead_waiters()  # no machine is ended for them
        actions, self._again_at = keeper_plan(self.db, CLOCK.wall())
        begun = [self._do(action) for action in actions]
        # However big the pool, and however busy its users: looking takes a fifth of the time.
        self._rest_until = CLOCK.monotonic() + 4 * (CLOCK.monotonic() - began)
        return any(begun)

    def _sweep(self) -> None:
        """Forget what has been history for long, and the logs of VMs long gone."""
        before = CLOCK.wall() - KEPT_S
        self.db.write("DELETE FROM pool_history WHERE at < :before", before=before)
        for path in self.db.directory("pool", "logs").iterdir():
            name = path.name.removesuffix(".1").removesuffix(".log")
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before and self.book.row(name) is None:
                    path.unlink()

    def _wait(self) -> None:
        """Attend to hooks until one ends, we are woken, the database changed or a time has come."""
        due = False
        while not due or CLOCK.monotonic() < self._rest_until:
            hooks = [hook.descriptors() for hook in self.hooks.values()]
            waited = {fd: output for descriptors in hooks for fd, output in descriptors.items()}
            now = CLOCK.monotonic()
            dues = [hook.deadline for hook in self.hooks.values()]
            dues += [self._reap_at, now + self._again_at - CLOCK.wall(), now + self.timeouts.watch]
            ready = self._seat.wait((self._rest_until if due else min(dues)) - now, *waited)
            if (now := CLOCK.monotonic()) >= self._checkpoint_at:
                self._checkpoint_at = now + 1.0
                checkpoint_wal(self.db)
            for output in filter(None, map(waited.get, ready)):
                output.read()
            before, self._seen = self._seen, self.db.data_version()
            late = now >= self._reap_at or CLOCK.wall() >= self._again_at
            woken = late or self._seen != before or not ready <= waited.keys()
            for hook in list(self.hooks.values()):
                if hook.pidfd in ready or hook.enforce(self.timeouts.term_grace):
                    del self.hooks[hook.pid]
                    hook.end()
                    self._untold.append(hook)
            due = self._tell_ended() or woken or due

    def _tell_ended(self) -> bool:
        """Write down how hooks ended; one stays in the list until that is done."""
        ended = bool(self._untold)
        while self._untold:
            self.book.ended(self._untold[0])
            del self._untold[0]
        return ended

    # --- beginning ---

    def _do(self, action: Row) -> bool:
        """Begin an action; return whether the rows are no longer those that were planned with."""
        if action.what == "kill":
            for hook in self.hooks.values():
                if hook.vm_name == action.vm_name:
                    hook.kill(action.why)
            return False
        if action.what == "end":
            self.book.end_vm(action)
            return True
        if action.what == HookKind.TERMINATE and not action.terminate:
            with contextlib.suppress(VmError):  # it came by hand, and goes by hand
                self.book.pool.remove_vm_from_pool(action.vm_name)
            return True
        busy = sum(hook.kind == action.what for hook in self.hooks.values())
        full = busy >= MAX_HOOKS and action.what != HookKind.SPAWN
        this = action.what, action.name, action.vm_name
        if full or CLOCK.monotonic() < self._not_before or this in self._done:
            return False
        try:
            hook = self._hook(action)
        except OSError as error:
            if self.once:
                raise Unavailable(f"no hook can be started: {error}") from error
            self.log.error("no hook can be started: %s", error)
            self._not_before = CLOCK.monotonic() + self.timeouts.recheck
            return False
        claimed = False
        try:
            claimed = self.book.claim(hook, action)
        finally:
            if not claimed:  # its VM was moved meanwhile
                hook.abandon()
        if not claimed:
            return True
        self.hooks[hook.pid] = hook
        if self.once and hook.kind != HookKind.SPAWN:
            self._done.add(this)
        _crash("hook-claimed")
        open_gate(hook.process)
        _crash("hook-begun")
        return True

    def _hook(self, row: Row) -> Hook:
        """Start a hook of a group behind its gate."""
        kind, name = HookKind(row.what), row.vm_name
        if kind == HookKind.SPAWN:
            name = f"{row.name[:57]}-{os.urandom(3).hex()}"
        limit = row["vm_health_check_max_time_s" if kind == "check" else f"{kind}_timeout_s"]
        command = row[kind]
        if not command:
            # It may be booting; one that was spawned is looked at again soon, if there is a soon.
            fresh = row.last_health_check is None and (self.once or not row.spawn)
            patience = 0.75 * limit if fresh else min(0.5 * limit, 10.0)
            words = shlex.join(own_command("_check_agent"))
            command = f'exec {words} "$VMRM_PATH" "$VMRM_DB" {patience}'
        told = {"HOOK": kind.value, "VM": name, "GROUP": row.name}
        told |= {"DB": str(self.db.path), "STATE_DIR": str(self.db.state_dir)}
        columns = ("vm_ip", "path", "state", "bound_to_user", "bound_sandbox")
        keys = ("IP", "PATH", "STATE", "OWNER", "SANDBOX")
        told |= {key: row.get(column) or "" for key, column in zip(keys, columns, strict=True)}
        # Owners and sandboxes are anybody's words: they must not keep a hook from being started.
        plain = {key: value.replace("\0", "")[:4096] for key, value in told.items()}
        environment = os.environ | {f"VMRM_{key}": value for key, value in plain.items()}
        environment["PATH"] = f"{self.db.state_dir}/bin:{os.environ.get('PATH', os.defpath)}"
        return Hook(kind, row.name, name, command, environment, limit)


def _is_of_hook(pid: int) -> bool:
    """Whether a process has a hook's environment: long after, a pid may be another's."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return b"VMRM_HOOK=" in words or not words  # it has none while it becomes another program


# === left-overs ==================================================================================


def check(db: Database, fix: bool = False) -> list[str]:
    """Return what is wrong with the database, the store and the processes; repair what is safe.

    That is to remove what is unused or left over, and to take back VMs of the pool from the dead.
    """
    refuse_damaged(db.connection)
    faults, pool = [], VmManager(db=db)
    for row in db.query("SELECT * FROM named_contents"):
        path = content_path(db, row.sha256)
        if not path.is_file() or file_sha256(path) != row.sha256:
            how = "damaged" if path.is_file() else "missing"
            faults.append(f"{row.named_by}: its content is {how}")
    faults += pool.check()
    loose = loose_ends(db)
    if fix and loose:
        pool.reap()
        tie_up(db)
    return faults + loose


def loose_ends(db: Database) -> list[str]:
    """Return what is left of processes that died; `check --fix` puts it right."""
    left = [name for names, _ in _left_overs(db) for name in names]
    return left + [f"VM {vm.vm_name}: {why}" for vm, why in VmManager(db=db).over()]


def tie_up(db: Database) -> None:
    """Remove from this host what processes have left that were killed, as far as it lets us."""
    for names, remove in _left_overs(db):
        if names:
            with contextlib.suppress(OSError):
                remove()


def _left_overs(db: Database) -> Iterator[tuple[list[str], Callable[[], object]]]:
    """Yield each kind of what killed processes leave on this host: names, and what removes it."""
    commands = abandoned_requests(db)
    names = [
        f"left-over of a command{f' on VM {vm!r}' if vm else ''}: {path}"
        for folder, vm in commands
        for path in (folder, *_sinks(folder))
    ]
    yield names, lambda: _forget_for_good(db, commands)
    made, sql = [row.id for row in db.query("SELECT id FROM requests")], "DELETE FROM requests"
    dead = [name for name in made if not _is_needed(db, db.state_dir / "requests" / name)]
    names = [f"request {name}: its client is gone" for name in dead]
    yield names, lambda: [db.write(f"{sql} WHERE id = :id", id=name) for name in dead]
    pool = VmManager(db=db)
    dead_pids = pool.dead_waiters().values()
    yield [f"queue: process {pid} is dead" for pid in dead_pids], pool.drop_dead_waiters
    sockets = [f"socket of a process that died: {path}" for path in dead_sockets(db)]
    yield sockets, lambda: remove_dead_sockets(db)
    broken = _broken_files(db)
    yield [f"left-over of a transfer: {path}" for path in broken], lambda: _unlink(broken)
    unused = [f"store: nothing names {path.name}" for path in unnamed_contents(db)]
    purged = [f"{path.name}: its experiment was purged" for path in purged_directories(db)]
    yield unused + purged, lambda: remove_unused(db)


def _forget_for_good(db: Database, commands: Iterable[tuple[Path, str]]) -> None:
    """Forget abandoned commands, and what a push left in a VM that we do not know any more."""
    for folder, name in commands:
        known = """SELECT 1 FROM vms WHERE server_name = :name
                   UNION SELECT 1 FROM pool_vms WHERE vm_name = :name"""
        if not db.value(known, name=name):
            with contextlib.suppress(OSError, ValueError):
                remote, token = json.loads((folder / _BROKEN_OFF).read_text())
                _log.warning("VM %s may have .vmrm-%s, of a push of %r", name, token, remote)
            (folder / _BROKEN_OFF).unlink(missing_ok=True)
        forget_request(db, folder)


def _broken_files(db: Database) -> list[Path]:
    """Return what handlers and keepers that were killed have left of files they were making."""
    tops = {*db.state_dir.glob("transfers.*/*"), *db.state_dir.glob("host/*/*")}
    for row in db.query(
        """SELECT v.server_name, json_extract(t.value, '$.destination') AS folder
           FROM vms AS v JOIN schedules AS s ON s.server_name = v.server_name,
                json_each(s.text) AS j, json_each(j.value, '$.transfer') AS t
           WHERE folder IS NOT NULL"""
    ):
        tops.add(Path(row.folder) / row.server_name)
    live = live_handlers(db)
    tops = {top for top in tops if top.name not in live}
    if not db.lock(KEEPER).is_held:
        tops.add(db.state_dir / "bin")
    return sorted(path for top in tops for path in broken_copies(top) if path is not None)


def forget_abandoned(db: Database) -> None:
    for folder, _ in abandoned_requests(db):
        forget_request(db, folder)


# === the reference's functions and classes kept for scripts ======================================

_log = logging.getLogger("vmrm")
_Opened = TypeVar("_Opened", bound=_Rows)
_Answer = TypeVar("_Answer")
_Mapping = VMMapping | None  # None: that of the default database
_Store = VmResourceStore | None


@contextlib.contextmanager
def _default(given: _Opened | None, cls: Callable[[], _Opened]) -> Iterator[_Opened]:
    """Yield what the caller gave, or a fresh one on the default database, closed afterwards."""
    opened = cls() if given is None else given
    try:
        yield opened
    finally:
        if given is None:
            opened.close()


def add_vm(
    server_uuid: str,
    server_name: str,
    control_ip: str,
    use_vm_manager: bool = True,
    mapping: _Mapping = None,
    log: _Logger = None,
    *,
    path: str = "",
    engine: str = "QemuVM",
    launch_dir: str = "",
) -> None:
    """Add a VM to the experiment, as `VMMapping.put` does, in state uninitialized.

    Without `use_vm_manager` it is in state n/a, and ignored for the start time; with it, it cannot
    be run without a path.
    """
    state = VMState.UNINITIALIZED if use_vm_manager else VMState.NOT_APPLICABLE
    more = {"path": path, "engine": engine, "launch_dir": launch_dir}
    with _default(mapping, VMMapping) as target:
        target.put(server_uuid, server_name, state, server_address=control_ip, **more)
    (log or _log).debug("added VM %s (%s)", server_name, state)


def add_vm_resource_file(filename: str, store: _Store = None, log: _Logger = None) -> None:
    """Add a file of this host to the file store."""
    with _default(store, VmResourceStore) as target:
        target.add_file(filename)
    (log or _log).debug("stored %s", filename)


def vm_resource_list(store: _Store = None, log: _Logger = None) -> list[str]:
    """Return the names in the file store, each once."""
    with _default(store, VmResourceStore) as target:
        return target.list_distinct_contents()


def get_vm_states(
    filter_state: str | None = None, mapping: _Mapping = None, log: _Logger = None
) -> dict[str, str]:
    """Return the state of each VM by name; with `filter_state`, of those in that state."""
    return _by_name(mapping, "state", filter_state=filter_state)


def get_vm_times(
    filter_time: int | None = None, mapping: _Mapping = None, log: _Logger = None
) -> dict[str, str]:
    """Return the schedule time of each VM by name; with `filter_time`, of those at that time."""
    return _by_name(mapping, "current_time", filter_time=filter_time)


def _by_name(mapping: _Mapping, column: str, **wanted: Any) -> dict[str, str]:
    with _default(mapping, VMMapping) as source:
        rows: Any = source.get_all(**wanted)
    return {row["server_name"]: row[column] for row in rows}


def get_vm_count_not_ready(mapping: _Mapping = None, log: _Logger = None) -> int:
    """Return how many VMs are neither configured nor n/a."""
    with _default(mapping, VMMapping) as source:
        return source.get_count_vm_not_ready()


def set_vm_state(
    vm_uuid: str, new_state: str, mapping: _Mapping = None, log: _Logger = None
) -> None:
    """Move a VM to a state; RuntimeError if the database cannot be opened."""
    with _mapping_or_runtime_error(mapping) as target:
        target.set_vm_state_by_uuid(vm_uuid, new_state)


def set_vm_time(vm_uuid: str, new_time: str, mapping: _Mapping = None, log: _Logger = None) -> None:
    """Record the schedule time a VM has reached; RuntimeError if the database cannot be opened."""
    with _mapping_or_runtime_error(mapping) as target:
        target.set_vm_time_by_uuid(vm_uuid, new_time)


@contextlib.contextmanager
def _mapping_or_runtime_error(mapping: VMMapping | None) -> Iterator[VMMapping]:
    with _default(mapping, VMMapping) as target:
        try:
            _ = target.db.connection
        except VmrmError as error:
            raise RuntimeError(str(error)) from error
        yield target


def _of_times(method: Callable[[ExperimentStart], _Answer]) -> Callable[..., _Answer]:
    def function(start: ExperimentStart | None = None) -> _Answer:
        with _default(start, ExperimentStart) as times:
            return method(times)

    function.__doc__ = method.__doc__
    return function


add_experiment_start_time = _of_times(ExperimentStart.add_start_time)
get_experiment_start_time = _of_times(ExperimentStart.get_start_time)
set_experiment_launch_time = _of_times(ExperimentStart.set_launch_time)
get_experiment_launch_time = _of_times(ExperimentStart.get_launch_time)
get_experiment_time_since_start = _of_times(ExperimentStart.get_time_since_start)
get_experiment_time_to_start = _of_times(ExperimentStart.get_time_to_start)


def destroy_all(
    mapping: _Mapping = None,
    schedule: ScheduleDb | None = None,
    start: ExperimentStart | None = None,
    log: _Logger = None,
    ignore_grpc_connection_errors: bool = False,
) -> None:
    """Clear the VMs, schedules and times of the default database, or of that of a given object.

    One that cannot be opened is a ConnectionError, unless these are to be ignored.
    """
    given: _Rows | None = next(filter(None, (mapping, schedule, start)), None)
    with _default(given, lambda: _Rows(None)) as target:
        try:
            destroy_experiment(target.db)
        except Conflict:
            raise
        except VmrmError as error:
            if not ignore_grpc_connection_errors:
                raise ConnectionError(str(error)) from error
            (log or _log).warning("nothing destroyed: %s", error)


# --- schedule updater
#
# The reference's way for a script to hear of changes. Our handler reads rows and needs none of it.


ScheduleEventType = Enum(
    "ScheduleEventType",
    "EXPERIMENT_START_TIME_SET EMPTY_SCHEDULE NEW_ITEM TRANSFER EXIT PAUSE RESUME UNKNOWN",
    start=0,
)


class ScheduleEvent:
    """One piece of news: its type, and the entry, hold or start time that it is about."""

    def __init__(self, event_type: ScheduleEventType, data: object) -> None:
        self.event_type, self.data = event_type, data

    def __lt__(self, other: object) -> bool:
        """Return True: events of one priority may come in any order."""
        return True

    def get_data(self) -> Any:
        """Return what the event is about."""
        return self.data

    def get_type(self) -> ScheduleEventType:
        """Return the kind of event."""
        return self.event_type


class ScheduleUpdater(threading.Thread):
    """Looks for changes of one VM's schedule, and queues them as (schedule time, `ScheduleEvent`).

    Of config only `vm_name` is used. The condition guards the queue and is notified of every event.
    vm_resource_store, repository_db, log_filename and load_balance_factor have no effect.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        priority_queue: Queue[tuple[float, ScheduleEvent]],
        condition: threading.Condition,
        vm_resource_store: VmResourceStore | None,
        schedule_db: ScheduleDb,
        repository_db: object,
        log: logging.Logger,
        log_filename: str | os.PathLike[str] | None,
        load_balance_factor: float = 1.0,
        interval_time: float = 5,
    ) -> None:
        super().__init__(daemon=True)
        self.vm_name, self.schedule_db, self.log = config["vm_name"], schedule_db, log
        self.priority_queue, self.condition = priority_queue, condition
        self.interval_time = interval_time
        self._stop_asked = threading.Event()
        self._told = collections.Counter[str]()  # how much of each source

    def run(self) -> None:
        """Look for changes until `stop_thread`; an error is logged and the next look comes."""
        given = self.schedule_db.db
        with Database(given.path, timeouts=given.timeouts) as own:
            # A SQLite connection serves only the thread that opened it.
            self.schedule_db = ScheduleDb(db=own, log=self.log)
            while not self._stop_asked.is_set():
                try:
                    self._run()
                except (RuntimeError, VmrmError, sqlite3.Error) as error:
                    self.log.error("cannot look at the schedule: %s", error)
                self._stop_asked.wait(self.interval_time)

    def _run(self) -> None:
        """Look once, and enqueue what is new."""
        kind, start = ScheduleEventType, self.get_start_time()
        entries = self.get_schedule(self.vm_name)
        holds = read_holds(self.schedule_db.db, self.vm_name)
        sources: dict[str, list[tuple[float, ScheduleEventType, object]]] = {
            "empty": [] if entries else [(-math.inf, kind.EMPTY_SCHEDULE, None)],
            "entries": [(entry.start_time, _event_type(entry), entry) for entry in entries],
            "start": [] if start is None else [(0, kind.EXPERIMENT_START_TIME_SET, start)],
            "holds": [(h.time, kind.PAUSE if h.duration else kind.RESUME, h) for h in holds],
        }
        for source, news in sources.items():
            for priority, event_type, data in news[self._told[source] :]:
                self.enqueue_event(priority, ScheduleEvent(event_type, data))
            self._told[source] = max(self._told[source], len(news))

    def enqueue_event(self, priority: float, event: ScheduleEvent) -> None:
        """Put an event on the queue, ordered by its schedule time, and notify who waits for it."""
        with self.condition:
            self.priority_queue.put((priority, event))
            self.condition.notify_all()

    def get_schedule(self, name: str) -> list[ScheduleEntry]:
        """Return a VM's entries, if it has any; RuntimeError if they cannot be read."""
        try:
            return parse_schedule(self.schedule_db.get(name) or "[]")
        except (ValueError, sqlite3.Error) as error:
            raise RuntimeError(f"the schedule of VM {name!r} cannot be read: {error}") from error

    def get_start_time(self) -> int | None:
        """Return time 0 in whole seconds since the epoch, or None if it is not set yet."""
        start = ExperimentStart(db=self.schedule_db.db).get_start_time()
        return None if start is None else int(start.timestamp())

    def stop_thread(self) -> None:
        """Make the thread end at once."""
        self._stop_asked.set()


def _event_type(entry: ScheduleEntry) -> ScheduleEventType:
    if entry.pause is not None:
        return ScheduleEventType.PAUSE
    if entry.is_resume:
        return ScheduleEventType.RESUME
    return ScheduleEventType.NEW_ITEM if entry.runs_script else ScheduleEventType.TRANSFER


# === what there is to see ========================================================================

HELD = "in a break since "
WAITS = "waits for its agent: "


def vm_rows(db: Database) -> list[Row]:
    """Return one row per VM for `status`: name, state, time, counts of entries, reason."""
    held = _held(db)
    rows = db.query(
        """SELECT server_name AS vm, state, "current_time" AS time, entries, done, failed, unknown,
                  running, reason, skew_s
           FROM vm_status"""
    )
    for row in rows:
        skew = row.pop("skew_s") or 0
        off = f"its clock is off by {skew:+.0f} s" if abs(skew) > 1 else ""
        row["reason"] = row["reason"] or held.get(row["vm"]) or off
    return rows


def _held(db: Database) -> dict[str, str]:
    """Return what is to be said of each VM that a break holds now."""
    rows = db.query(
        """SELECT server_name, state FROM vms WHERE state NOT IN ('n/a', 'failed')
           AND server_name IN (
               SELECT server_name FROM schedules WHERE instr(text, '"inf"')
               UNION SELECT server_name FROM holds WHERE duration_s = 9e999 AND NOT ignored
               AND experiment_id = (SELECT id FROM current_experiment))"""
    )
    began = {row["server_name"]: _break_of(db, row)[1] for row in rows}
    return {name: HELD + _plain_time(round(at, 3)) for name, at in began.items() if at is not None}


def entry_rows(db: Database, server_name: str) -> list[dict[str, Any]]:
    """Return one row per entry of a VM: what was planned, and what happened."""
    start = db.value("SELECT start_at FROM current_experiment")
    entries, holds = read_schedule(db, server_name)
    times, rows = Timeline(entries, holds).times, []
    sql = "SELECT * FROM entry_status WHERE server_name = :name"
    status = {row.ordinal: row for row in db.query(sql, name=server_name)}
    for entry in in_order(entries):
        row, at = status[entry.ordinal], times[entry.ordinal]
        if row.planned_at is None and start is not None and 0 < at < math.inf:
            row["planned_at"] = start + at
        happened = {"outcome": row.outcome or "", "attempt": row.attempt}
        happened |= {"exit_code": row.exit_code, **_instants(row)}
        happened |= {"late_s": row.late_s, "error": row.error or ""}
        rows.append(_planned(entry, at) | happened)
    return rows


def _planned(entry: ScheduleEntry, at: float) -> dict[str, Any]:
    effective = "held" if at == math.inf else _plain_time(round(at, 3))
    time = _plain_time(entry.start_time)
    return {"entry": entry.ordinal, "time": time, "at": effective, "what": entry.label}


def _instants(attempt: Mapping[str, Any]) -> dict[str, str | None]:
    times = {key: attempt[f"{key}_at"] for key in ("planned", "sent", "ended")}
    return {key: _iso(at) if at else None for key, at in times.items()}


def plan_rows(experiment: Experiment) -> list[dict[str, Any]]:
    """Return what a run would do, one row per entry, in the order of each VM; touch nothing.

    A file counts once per entry that places it, though each content is sent once per VM.
    """
    parsed = functools.cache(parse_schedule)  # `count` gives many VMs one text
    rows = []
    for vm in experiment.vms:
        name, managed = vm["server_name"], vm["state"] != VMState.NOT_APPLICABLE
        entries = in_order(parsed(experiment.schedules.get(name, "[]")))
        times = Timeline(entries).times
        for entry in entries:
            row = _planned(entry, times[entry.ordinal]) | _plan_row(entry, experiment.files)
            rows.append({"vm": name} | row | ({} if managed else {"notes": ["never contacted"]}))
        if not entries:
            columns = dict.fromkeys(["entry", "time", "at", "what", "files", "transfers", "notes"])
            what = "configured at once" if managed else "never contacted"
            rows.append({"vm": name} | columns | {"what": what})
    return rows


def _plan_row(entry: ScheduleEntry, files: Mapping[str, Path]) -> dict[str, Any]:
    sizes = [(item, files[item["sha256"]].stat().st_size) for item in entry.items("file")]
    sizes += [(item, text_content(item["content"]).size) for item in entry.items("content")]
    notes = {
        "on the host": entry.on_host,
        "failure ignored": entry.ignore_failure,
        "not waited for": not entry.options.get("wait", True),
        "run again if unknown": entry.options.get("rerun"),
    }
    return {
        "files": [{"location": item["location"], "bytes": size} for item, size in sizes],
        "transfers": [{k: v for k, v in item.items() if v} for item in entry.items("transfer")],
        "notes": [words for words, holds in notes.items() if holds],
    }


def _plan_summary(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> str:
    vms, entries = len(experiment.vms), sum(row["entry"] is not None for row in rows)
    buffer = experiment.settings.get("start_buffer", 60)
    words = [counted(vms, "VM"), counted(entries, "entry")]
    return ", ".join([*words, f"time 0 comes {buffer:g} s after the last VM is configured"])


# What happened to a VM at one instant: when, a state, reboot, pause, break or resume, in words.
Mark = tuple[float, str, str, dict[str, Any]]


class VMRun(NamedTuple):
    """One VM's part in an experiment, as its rows tell it; attempts and marks are oldest first."""

    name: str
    state: str = ""  # or its last one
    reason: str = ""
    row: Row | None = None  # of vm_status, while the VM is there
    entries: Sequence[ScheduleEntry] = ()  # of the schedule's last generation
    latest: Mapping[int, Row] = {}  # attempt of each of them, by ordinal
    first: Mapping[int, Row] = {}
    attempts: Sequence[Row] = ()  # of all generations
    marks: Sequence[Mark] = ()  # what else happened


@dataclasses.dataclass
class Run:
    """One experiment as its rows tell it, also while it runs and after it was destroyed."""

    experiment: Row
    begin: float  # its launch
    end: float  # when it ended, or was read or destroyed
    vms: list[VMRun]  # in the order they were added
    loose: list[str]  # schedules without a VM


def read_run(db: Database, number: int | None = None) -> Run:
    """Read all that is known of an experiment; None means the current one."""
    experiment = db.row(
        """SELECT * FROM experiments
           WHERE id = coalesce(:id, (SELECT id FROM current_experiment))""",
        id=number,
    )
    if experiment is None:
        last = db.value("SELECT max(id) FROM experiments WHERE launched_at IS NOT NULL")
        hint = f"The last one that ran: --experiment {last}" if last else "Run one: vmrm run FILE"
        what = "current experiment" if number is None else f"experiment {number}"
        raise NotFound(f"there is no {what}", hint)

    def of_vms(view: str, order: str = "id") -> dict[str, list[Row]]:
        found = collections.defaultdict(list)
        sql = f"SELECT * FROM {view} WHERE experiment_id = :id ORDER BY {order}"  # noqa: S608
        for row in db.query(sql, id=experiment.id):
            found[row.server_name.lower()].append(row)
        return found

    moves, holds, present = of_vms("history"), of_vms("holds"), of_vms("vm_status", "ordinal")
    attempts = of_vms("attempt_times")  # before the schedules: no entry is younger
    schedules = of_vms("run_schedules", "generation")
    parsed = functools.cache(parse_schedule)  # `count` gives many VMs one text
    now = experiment.destroyed_at or CLOCK.wall()
    ends = [a.ended_at for tries in attempts.values() for a in tries if a.ended_at]
    end = max(experiment.launched_at or now, experiment.ended_at or now, *ends)
    run = Run(experiment, experiment.launched_at or math.inf, end, [], [])
    for key, moved in moves.items():
        texts = {s.generation: parsed(s.text or "[]") for s in schedules.pop(key, ())}
        for row in attempts[key]:
            entry = next(iter(texts.get(row.generation, [])[row.ordinal - 1 :]), None)
            on_host = entry is not None and entry.on_host
            label = f"{entry or f'entry {row.ordinal}'}{' on the host' if on_host else ''}"
            row.update(label=label, on_host=on_host, ignored=entry and entry.ignore_failure)
            row["end"] = max(row.begin, row.ended_at or now)
        last = max(texts, default=0)  # it stays, also that of a removed schedule
        entries, tries = texts.get(last, []), [a for a in attempts[key] if a.generation == last]
        latest, first = ({a.ordinal: a for a in order} for order in (tries, reversed(tries)))
        there = next(iter(present.get(key, ())), None)
        seen = (moved[0].server_name, moved[-1].new_state, (there or moved[-1]).reason, there)
        vm = VMRun(*seen, entries, latest, first, attempts[key])
        run.vms.append(vm._replace(marks=_marks(run, vm, moved, holds[key])))
    run.loose = sorted(s[-1].server_name for s in schedules.values() if s[-1].text)
    return run


def _marks(run: Run, vm: VMRun, moves: Iterable[Row], holds: Iterable[Row]) -> list[Mark]:
    """Return what happened to a VM besides its attempts, oldest first."""
    found, given = list[Mark](), []
    for row in moves:
        if row.at >= run.begin:
            why = {"reason": row.reason} if row.reason else {}
            found.append((row.at, "state", row.new_state, why))
    for row in holds:
        hold, ignored = Hold(row.experiment_time, row.duration_s), bool(row.ignored)
        given += [] if ignored else [hold]
        found.append((row.at, str(hold).split()[0], f"{hold} given", {"ignored": ignored}))
    in_guest = (a for a in vm.attempts if a.boot_id and not a.on_host)
    for before, after in itertools.pairwise(in_guest):
        if after.boot_id != before.boot_id:
            found.append((after.armed_at, "reboot", "rebooted", {"boot_id": after.boot_id}))
    times, start = Timeline(vm.entries, given).times, run.experiment.start_at or math.inf
    for entry in vm.entries:
        at = run.begin if entry.start_time < 0 else start + times[entry.ordinal]
        if (entry.pause or entry.is_resume) and at <= run.end:  # it has come
            found.append((at, entry.label.split()[0], entry.label, {"entry": entry.ordinal}))
    return sorted(found, key=lambda mark: mark[0])


class Report(NamedTuple):
    """How an experiment went: one row per VM, what went wrong, and whether all is well."""

    rows: list[dict[str, Any]]
    faults: list[str]
    summary: str

    @property
    def ok(self) -> bool:
        """Whether every VM did all of its work."""
        return not self.faults


def report_of(run: Run) -> Report:
    """Return how an experiment went."""
    experiment = run.experiment
    vms = [vm for vm in run.vms if vm.row or experiment.destroyed_at]
    stopped = experiment.halt in (Halt.STOP, Halt.KILL)
    faults = [fault for vm in vms for fault in _vm_faults(vm, stopped)]
    faults += [f"{name}: there is a schedule, but no such VM" for name in run.loose]
    if experiment.start_at is None:
        faults.append("the experiment did not reach its start time")
    rows = list(map(_vm_row, vms))
    entries, done = (sum(row[key] for row in rows) for key in ("entries", "done"))
    words = [counted(len(rows), "VM"), f"{done} of {counted(entries, 'entry')} done"]
    launched, start, ended = experiment.launched_at, experiment.start_at, experiment.ended_at
    words += [f"time 0 {start - launched:.0f} s after launch"] if launched and start else []
    words += [f"{ended - launched:.1f} s in all"] if launched and ended else []
    skipped = sum(a.outcome == Outcome.SKIPPED for vm in vms for a in vm.latest.values())
    words += [f"{skipped} skipped"] if skipped else []
    return Report(rows, faults, ", ".join(words))


def _vm_row(vm: VMRun) -> dict[str, Any]:
    latest = [a for a in vm.latest.values() if vm.entries[a.ordinal - 1].pause is None]
    outcomes = [a.outcome for a in latest if not (a.outcome == "done" and a.reboot)]
    first = (a for a in vm.first.values() if a.late_s is not None and not a.overdue)
    late = sorted(a.late_s * 1000 for a in first)
    entries = sum(entry.pause is None for entry in vm.entries)
    counts = {key: outcomes.count(key) for key in ("done", "failed", "unknown")}
    half, worst = (round(late[at], 1) if late else None for at in (len(late) // 2, -1))
    row = {"vm": vm.name, "state": vm.state, "entries": entries} | counts
    return row | {"late_p50_ms": half, "late_worst_ms": worst}


def _vm_faults(vm: VMRun, stopped: bool) -> Iterator[str]:
    managed = vm.state != VMState.NOT_APPLICABLE
    if vm.state == VMState.FAILED:
        yield f"{vm.name}: failed: {vm.reason}"
    elif stopped and managed and vm.row and vm.row.finished_at is None:
        yield f"{vm.name}: was stopped before its work was done"
    for entry in vm.entries:
        attempt, fault = vm.latest.get(entry.ordinal), ""
        if attempt is None:
            fault = "did not run" if managed and entry.pause is None else ""
        elif attempt.outcome in FAILED_OUTCOMES and not entry.ignore_failure:
            fault = f"{attempt.outcome}: {attempt.error}"
        if fault:
            yield f"{vm.name}, entry {entry.ordinal} ({entry}): {fault}"


FAILED_OUTCOMES = (Outcome.FAILED, Outcome.UNKNOWN)
# Of chrome://tracing's own palette.
TRACE_COLOURS = {"done": "good", "failed": "terrible", "unknown": "bad", "skipped": "grey"}
TRACE_COLOURS |= {"running": "yellow", "armed": "generic_work"}


def trace(run: Run) -> dict[str, Any]:
    """Return an experiment in the Chrome trace event format, for Perfetto and chrome://tracing.

    Each VM is a process. Its attempts are complete events on as many threads as overlap, since
    what shares a thread must nest; its marks are instants. Times are microseconds from the launch.
    """
    start, source = run.experiment.start_at, run.experiment.source
    zero = {"launch": run.begin, "start time": start}
    marks: list[Mark] = [(at, "experiment", text, {}) for text, at in zero.items() if at]
    experiment = VMRun(f"experiment {source}".strip(), marks=marks)
    events: list[dict[str, Any]] = []
    tid = 0  # used once in all of a trace
    said = ("attempt", "outcome", "exit_code", "late_s", "pid", "boot_id", "error")

    def microseconds(seconds: float) -> int:
        return max(0, round((seconds - run.begin) * 1e6))  # the host's clock may be set back

    def add(ph: str, name: str, **more: Any) -> None:
        events.append({"ph": ph, "name": name, "pid": pid, "tid": tid, **more})

    for pid, vm in enumerate((experiment, *run.vms), 1):
        tid += 1  # for what happens to the process as a whole
        add("M", "process_name", args={"name": vm.name})
        add("M", "process_sort_index", args={"sort_index": pid})
        add("M", "thread_name", args={"name": "events"})
        if vm.state:
            add("M", "process_labels", args={"labels": vm.state})
        for at, kind, text, details in vm.marks:
            scope = "g" if vm is experiment else "p"
            add("i", text, cat=kind, ts=microseconds(at), s=scope, args=details)
        for lane, attempts in enumerate(lanes(vm.attempts, microseconds)):
            tid += 1
            add("M", "thread_name", args={"name": f"attempts {lane + 1}" if lane else "attempts"})
            add("M", "thread_sort_index", args={"sort_index": tid})
            for attempt in attempts:
                begin, end = microseconds(attempt.begin), microseconds(attempt.end)
                more = {"cat": "attempt", "cname": TRACE_COLOURS[attempt.outcome]}
                known = {key: attempt[key] for key in said} | _instants(attempt)
                known |= {"entry": attempt.ordinal}
                args = {key: value for key, value in known.items() if value not in (None, "")}
                add("X", attempt.label, **more, ts=begin, dur=end - begin, args=args)
    about = {"vmrm": __version__, "experiment": run.experiment.id, "source": source}
    times = {"launched": _iso(run.begin), "start": _iso(start) if start else None}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about | times}


def lanes(attempts: Iterable[Row], place: Callable[[float], float]) -> list[list[Row]]:
    """Deal attempts out to as few lanes as they need so that none overlaps another of its lane.

    `place` says where a time is drawn: what touches there counts as free.
    """
    dealt: list[list[Row]] = []
    for attempt in sorted(attempts, key=lambda a: (place(a["begin"]), place(a["end"]))):
        begin = place(attempt["begin"])
        lane = next((lane for lane in dealt if place(lane[-1]["end"]) <= begin), None)
        if lane is None:
            dealt.append([attempt])
        else:
            lane.append(attempt)
    return dealt


# --- the report as a page

_PAGE = string.Template("""\
<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>$source: $word</title><style>
:root { color-scheme: light dark; --done: #2f9e62; --failed: #e05252; --unknown: #b968cf;
  --skipped: #98a2b3; --running: #3b82d6; --armed: #7da7d6; --mark: #c08a2b;
  --faint: color-mix(in srgb, canvastext 60%, canvas);
  --line: color-mix(in srgb, canvastext 14%, canvas);
  --band: color-mix(in srgb, canvastext 5%, canvas); }
body { margin: 0 auto; max-width: 1400px; padding: 28px 32px 60px;
  font: 14px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 span { color: #fff; border-radius: 4px; padding: 2px 9px; font-size: 14px; }
ul { max-height: 20em; overflow-y: auto; } .faint, th, footer { color: var(--faint); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 16px 4px 0; text-align: right; border-bottom: 1px solid var(--line); }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
.bad { color: var(--failed); font-weight: 600; }
.legend i { display: inline-block; width: 11px; height: 11px; margin: 0 6px 0 16px; }
.timeline { display: grid; grid-template-columns: minmax(5em, max-content) 1fr; }
.axis { position: sticky; top: 0; background: canvas; height: 26px; font-size: 12px; }
.name { max-width: 16em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.name:nth-child(even) { background: var(--band); } .zebra { fill: var(--band); }
svg { width: 100%; overflow: visible; } text { fill: var(--faint); text-anchor: middle; }
.mark { fill: var(--mark); } rect:hover { stroke: canvastext; } .grid { stroke: var(--line); }
.start { stroke: canvastext; stroke-dasharray: 4 3; }
details { border-left: 3px solid var(--failed); padding-left: 12px; margin: 8px 0; }
pre { background: var(--band); padding: 8px 12px; overflow-x: auto; }
$colours</style></head><body>
<h1>$source <span style="background:var(--$colour)">$word</span></h1>
<p class="faint">$summary</p><p class="faint">$facts</p>
$faults
<h2>Timeline</h2>
$timeline
$failures
<h2>VMs</h2>
$table
<footer>vmrm $version, Python $python, SQLite $sqlite, experiment $id</footer>
</body></html>
""")
_TAIL_LINES, _TAIL_BYTES, _MAX_TAILS = 20, 8192, 200


def report_page(db: Database, run: Run) -> str:
    """Return an experiment as one HTML page that needs nothing else: no script, no other file.

    Whatever comes from a guest stays text.
    """
    outcome, experiment, ended = report_of(run), run.experiment, run.experiment.ended_at
    word, colour = ("ok", "done") if outcome.ok else ("failed", "failed")
    if not ended:
        word, colour = ("running" if supervisor_pid(db) else "unfinished"), "running"
    last = "ended" if ended else "seen"
    times = {"launched": run.begin, "time 0": experiment.start_at, last: run.end}
    faults = "".join(f"<li>{_html(fault)}</li>" for fault in outcome.faults)
    return _PAGE.substitute(
        source=_html(Path(experiment.source).name or "an experiment made by hand"),
        word=word,
        colour=colour,
        colours=" ".join(f".{o} {{ fill: var(--{o}); stroke: var(--{o}); }}" for o in Outcome),
        summary=_html(outcome.summary),
        facts=", ".join(f"{key} {_iso(at)}" for key, at in times.items() if at),
        faults=f"<h2>Faults</h2><ul>{faults}</ul>" if faults else "",
        timeline=_page_timeline(run),
        failures="\n".join(_page_failures(db, run)),
        table=_page_table(outcome.rows),
        version=__version__,
        python=sys.version.split()[0],
        sqlite=sqlite3.sqlite_version,
        id=experiment.id,
    )


def _html(text: str) -> str:
    import html

    return html.escape(printable(text, None, "\t\n"))


def _page_table(rows: Sequence[Mapping[str, Any]]) -> str:
    def cell(key: str, value: object) -> str:
        bad = value if key in ("failed", "unknown") else value == "failed"
        return f"<td{' class=bad' if bad else ''}>{_html(_cell(value))}</td>"

    head = "".join(f"<th>{key.replace('_', ' ')}</th>" for key in (rows[0] if rows else ()))
    lines = ("".join(cell(key, value) for key, value in row.items()) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _page_timeline(run: Run) -> str:
    """Return the drawing: names beside one SVG whose x is in per cent, so that it scales."""

    def x(at: float) -> float:
        return round(min(max((at - run.begin) / max(run.end - run.begin, 1e-3), 0.0), 1.0) * 100, 3)

    start = run.experiment.start_at
    start = start if start and start <= run.end else None
    zero = start or run.begin
    ticks = [(x(zero + at), at) for at in _ticks(run.begin - zero, run.end - zero)]
    names, bands, shapes, top = [], [], [], 0.0
    for number, vm in enumerate(run.vms):
        dealt = lanes(vm.attempts, x)
        lane_height = max(4.0, min(14.0, 120 / max(len(dealt), 1)))  # many lanes share 120 pixels
        height = max(22.0, 6 + lane_height * len(dealt))
        said = _html(f"{vm.name}: {vm.state} {vm.reason}".strip())
        style = f'style="line-height:{height:g}px"'
        names.append(f'<div class="name" {style} title="{said}">{_html(vm.name)}</div>')
        if number % 2:
            bands.append(f'<rect class="zebra" y="{top:g}" width="100%" height="{height:g}"/>')
        for at, _, text, _ in vm.marks:
            said = _html(f"{vm.name}: {text} at {_iso(at)}")
            shape = f'class="mark" x="{x(at)}%" y="{top:g}" width="2" height="{height:g}"'
            shapes.append(f"<rect {shape}><title>{said}</title></rect>")
        for lane, attempts in enumerate(dealt):
            y = top + (height - lane_height * len(dealt)) / 2 + lane_height * (lane + 1 / 6)
            for attempt in attempts:
                begin, end = x(attempt.begin), x(attempt.end)
                shape = f'class="{attempt.outcome}" x="{begin}%" y="{y:g}"'
                shape += f' width="{round(end - begin, 3)}%" height="{lane_height * 2 / 3:g}"'
                said = _html("\n".join(_bar_words(vm, attempt)).strip())
                shapes.append(f"<rect {shape}><title>{said}</title></rect>")
        top += height
    across = f'y2="{top:g}"/>'
    lines = [f'<line class="grid" x1="{at}%" x2="{at}%" {across}' for at, _ in ticks]
    if start:
        shapes.append(f'<line class="start" x1="{x(start)}%" x2="{x(start)}%" {across}')
    texts = "".join(f'<text x="{at}%" y="18">{_plain_time(number)}</text>' for at, number in ticks)
    outcomes = sorted({a.outcome for vm in run.vms for a in vm.attempts})
    legend = {name: name for name in outcomes} | {"mark": "state, pause, reboot"}
    keys = (f'<i style="background:var(--{key})"></i>{said}' for key, said in legend.items())
    return "\n".join(
        [
            f'<p class="legend">{"".join(keys)}</p><div class="timeline">',
            f'<div class="axis">s from {"time 0" if start else "launch"}</div>',
            f'<svg class="axis">{texts}</svg><div>{"".join(names)}</div>',
            f'<svg role="img" aria-label="attempts over time" height="{top:g}">',
            *(*bands, *lines, *shapes, "</svg></div>"),
        ]
    )


def _bar_words(vm: VMRun, attempt: Row) -> Iterator[str]:
    number = f" (attempt {attempt.attempt})" if attempt.attempt > 1 else ""
    yield f"{vm.name}, entry {attempt.ordinal}: {attempt.label}{number}"
    code = "" if attempt.exit_code is None else f", exit code {attempt.exit_code}"
    yield f"{attempt.outcome}{code}"
    yield from (f"{key} {at}" for key, at in _instants(attempt).items() if at)
    if attempt.late_s is not None:
        yield f"late {attempt.late_s * 1000:.1f} ms"
    yield attempt.error


def _ticks(begin: float, end: float) -> list[float]:
    """Return some round numbers of a range, zero among them if it is there."""
    rough = max(end - begin, 1e-3) / 10
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [n * power for n in (1, 2, 5, 10)] + [15.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0]
    step = min(step for step in steps if step >= rough)
    return [round(n * step, 6) for n in range(math.ceil(begin / step), math.floor(end / step) + 1)]


def _page_failures(db: Database, run: Run) -> Iterator[str]:
    """Yield every failed attempt with the end of its output."""
    failed = [(vm, a) for vm in run.vms for a in vm.attempts if a.outcome in FAILED_OUTCOMES]
    failed.sort(key=lambda item: bool(item[1].ignored))  # what matters comes first
    if failed:
        yield "<h2>Failed and unknown attempts</h2>"
    logs = db.state_dir / f"logs.{run.experiment.id}"
    for vm, a in failed[:_MAX_TAILS]:
        head = f"{vm.name}, entry {a.ordinal} ({a.label}), attempt {a.attempt}: {a.outcome}"
        head += f"{', ignored' if a.ignored else ''}: {a.error}"
        yield f"<details{' open' if len(failed) <= 10 else ''}><summary>{_html(head)}</summary>"
        stem = logs / vm.name / f"{a.ordinal}.{a.attempt}"
        tails = {s: t for s in ("out", "err") if (t := _output_tail(Path(f"{stem}.{s}")))}
        for stream, tail in tails.items():
            yield f'<p class="faint">std{stream}</p><pre>{_html(tail)}</pre>'
        yield "</details>" if tails else '<p class="faint">no output</p></details>'
    if len(failed) > _MAX_TAILS:
        yield f'<p class="faint">and {len(failed) - _MAX_TAILS} more: vmrm schedule show VM</p>'


def _output_tail(path: Path) -> str:
    """Return the last lines of an attempt's output, as far as it is kept."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    is_cut = size > _TAIL_BYTES or len(lines) > _TAIL_LINES
    return "\n".join(["…"] * is_cut + lines[-_TAIL_LINES:])


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


# === output ======================================================================================

_TOLD = 1 << 16  # characters of an error or a remark: all faults of an experiment file
TEXT_WIDTH = 20  # below which a column of texts is no longer worth reading
VIEW_S = 5.0  # between two looks of a viewer at rows that nobody has changed
_STYLES = {"failed": "red", "unknown": "red", "configured": "green", "done": "green"}
_STYLES |= {"configuring": "yellow", "running": "yellow", "uninitialized": "dim"}

_Listing = Sequence[Mapping[str, Any]]


class Screen(NamedTuple):
    """Results on stdout, everything else on stderr; a table on a terminal, else tab-separated."""

    as_json: bool = False
    quiet: bool = False  # nothing but errors on stderr

    def show(self, result: object) -> None:
        if sys.stdout is None:  # closed by whoever started us
            return
        rows: Any = [result] if isinstance(result, Mapping) else result
        is_rows = isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows)
        if self.as_json:
            text = json.dumps(result, ensure_ascii=False, indent=2, default=str)
            print(printable(text, None, "\n"))
        elif rows and is_rows and sys.stdout.isatty():
            _print_fitting(rows, as_records=isinstance(result, Mapping))
        elif isinstance(rows, list):
            lines = [row.values() if is_rows else [row] for row in rows]
            for cells in result.items() if isinstance(result, Mapping) else lines:
                print("\t".join(map(_cell, cells)))
        elif result is not None:
            print(result)
        sys.stdout.flush()  # here, where a reader that has left is noticed

    def deliver(self, result: object, undo: Callable[[], object], what: str) -> None:
        """Show what a command made; if nobody can be told of it, undo it and raise an error."""
        try:
            if sys.stdout is None:
                raise OSError(errno.EBADF, "there is no standard output")
            self.show(result)
        except OSError as error:
            undo()
            if sys.stdout is not None:  # what it still holds would fail again at our end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            why = error.strerror or type(error).__name__
            raise VmrmError(f"{what}, for nobody could be told of it: {why}") from error
        except BaseException:
            undo()
            raise

    def tell(self, text: str) -> None:
        if not self.quiet:
            print(printable(text, _TOLD, "\n"), file=sys.stderr, flush=True)

    def error(self, error: VmrmError) -> None:
        text = printable(str(error), _TOLD, "\n")
        print(f"error: {text}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)

    @property
    def is_live(self) -> bool:  # stderr can show what moves
        return not self.quiet and sys.stderr.isatty()

    @contextlib.contextmanager
    def progress(self, folder: Path, total: int | None = None) -> Iterator[None]:
        """Show how far a copy is; the copying side writes it to a small file."""
        if not self.is_live:
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        class Copy(Progress):
            def get_renderables(self) -> Iterable[Any]:
                with contextlib.suppress(OSError, ValueError, IndexError):
                    done = int((folder / "progress").read_text())
                    self.update(self.task_ids[0], completed=done)
                return super().get_renderables()

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Copy(*columns, console=Console(stderr=True), transient=True) as bar:
            bar.add_task("", total=total)
            yield


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return " ".join(map(_cell, value.values()))
    if isinstance(value, float):  # to a thousandth; --json has it all
        value = _plain_time(round(value, 3))
    text = ", ".join(map(_cell, value)) if isinstance(value, list) else str(value)
    return printable(text, None, "")


def _print_fitting(rows: _Listing, as_records: bool) -> None:
    import shutil

    from rich.console import Console

    width, height = shutil.get_terminal_size()  # rich has 80 by 25 where TERM is dumb
    console = Console(width=width, height=height)
    for tight in () if as_records else (False, True):
        table = _table(rows, tight=tight)
        wide = console.options.update(width=10_000)
        if console.measure(table, options=wide).minimum <= console.width:
            return console.print(table)
    return console.print(_records(rows))


def _shown(rows: _Listing) -> list[dict[str, Any]]:
    from rich.text import Text

    keys = [key for key in rows[0] if any(row[key] not in (None, "", []) for row in rows)]
    texts = [{key: _short(row[key]) for key in keys} for row in rows]
    return [{key: Text(text, _STYLES.get(text, "")) for key, text in row.items()} for row in texts]


def _table(rows: _Listing, *, tight: bool = False, crop: bool = False) -> Any:
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table

    gap, shown = 0 if tight else 1, _shown(rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=not tight, padding=(0, gap, 0, 0))
    for key in shown[0]:
        heading = key.replace("_", "\n" if tight else " ")
        texts = [*heading.split("\n"), *(cells[key].plain for cells in shown)]
        longest = max(map(cell_len, texts))
        folds = tight and longest > TEXT_WIDTH
        numbers = all(isinstance(row[key], int | float | None) for row in rows)
        table.add_column(
            heading,
            justify="right" if numbers else "left",
            overflow="ellipsis" if crop else "fold",
            no_wrap=not folds,
            min_width=None if crop else TEXT_WIDTH if folds else longest,
        )
    for cells in shown:
        table.add_row(*cells.values())
    return table


def _records(rows: _Listing) -> Any:  # a line for each value; they fit in any width
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for number, cells in enumerate(_shown(rows)):
        if number:
            grid.add_row("", "")
        for key, cell in cells.items():
            if cell.plain:
                grid.add_row(Text(key.replace("_", " "), style="dim"), cell)
    return grid


def _short(value: object) -> str:  # a time of today without its date
    text = _cell(value)
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text):
        return text
    is_today = text[:10] == _iso(CLOCK.wall())[:10]
    return text[11:-1] if is_today else f"{text[:10]} {text[11:19]}"


class Viewer:
    """Watches an experiment to its end; stops it at the time-out and, the second time without
    waiting, at Ctrl-C."""

    def __init__(self, db: Database, screen: Screen, timeout: float | None = None) -> None:
        self.db, self.screen = db, screen
        self._deadline = CLOCK.monotonic() + (math.inf if timeout is None else timeout)
        self._told: dict[str, object] = {}  # the last news, by VM; '' and ' start' are about all
        self._seen, self._read_at = -1, -math.inf  # data version, and when it was read

    def watch(self, process: Any = None) -> None:
        """Return once the experiment has ended; `process` is the supervisor, if it is our child."""
        try:
            with self._live() as update:
                self._until_end(process, update)
        except KeyboardInterrupt:
            self.screen.tell("stopping; the programs in the VMs go on (again: at once)")
            self._stop(process)
            raise
        if process is not None:
            process.wait()
        if current_experiment(self.db)["ended_at"] is None:
            refuse_damaged(self.db.connection)
            hint = f"Continue: vmrm run. Its log: {run_directory(self.db, 'logs')}/supervisor.log"
            if process is not None and process.returncode == Unavailable.code:
                raise Unavailable("the supervisor could not use the database", hint)
            raise VmrmError("the supervisor died; nothing is lost", hint)

    def _until_end(self, process: Any, update: Callable[[], None]) -> None:
        look_at = 0.0
        while _is_supervised(self.db, process):
            began = CLOCK.monotonic()
            if began >= look_at:
                update()
                # A look at many VMs takes long, and near time 0 the handlers need the processor.
                look_at = CLOCK.monotonic() + min(3, 20 * (CLOCK.monotonic() - began))
            if CLOCK.monotonic() >= self._deadline:
                self._stop(process)
                raise TimedOut("the experiment was stopped at its time-out", "Continue: vmrm run")
            time_to_wait(0.1)
        self._seen = -1
        update()

    def _has_news(self) -> bool:  # somebody changed rows, or time passed, as a break knows
        version, now = self.db.data_version(), CLOCK.monotonic()
        if version == self._seen and now < self._read_at + VIEW_S:
            return False
        self._seen, self._read_at = version, now
        return True

    def _stop(self, process: Any) -> None:
        try:
            halt_experiment(self.db, Halt.STOP)
            while _is_supervised(self.db, process):
                time_to_wait(0.05)
        except KeyboardInterrupt:
            if pid := supervisor_pid(self.db):
                os.kill(pid, signal.SIGKILL)
            if process is not None:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def _live(self) -> Iterator[Callable[[], None]]:
        if not self.screen.is_live:
            yield self._lines
            return
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text

        table: Any = None
        console, drawn = Console(stderr=True), (math.nan, 0, 0)
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def draw() -> None:
                nonlocal drawn, table
                frame = (CLOCK.monotonic() // 1, console.width, console.height)
                if self._has_news() or frame[1:] != drawn[1:]:
                    table = self._picture(console.width, console.height - 4)
                elif frame == drawn:
                    return
                drawn = frame
                start = current_experiment(self.db)["start_at"]
                wait = "waiting for all VMs to be configured"
                text = Text(f"time {CLOCK.wall() - start:+.0f} s" if start else wait)
                live.update(Group(table, text), refresh=True)

            yield draw

    def _lines(self) -> None:
        if self.screen.quiet or not self._has_news():
            return
        for row in vm_rows(self.db):
            held = row["reason"].startswith((HELD, WAITS))
            news = [row[key] for key in ("state", "time", "done", "failed", "unknown")]
            self._tell_once(row["vm"], [*news, held], _progress_line(row))
            if row["state"] == VMState.UNINITIALIZED and row["reason"] and not held:
                self._tell_once("", row["reason"], row["reason"])  # the same for all of the pool
        if start := current_experiment(self.db)["start_at"]:
            self._tell_once(" start", start, f"all VMs are ready: time 0 is {_iso(start)}")

    def _tell_once(self, about: str, news: object, text: str) -> None:
        if self._told.get(about) != news:
            self._told[about] = news
            self.screen.tell(text)

    def _picture(self, width: int, height: int) -> Any:
        from rich.console import Group
        from rich.text import Text

        rows = vm_rows(self.db)
        rows.sort(key=lambda row: row["state"] == "configured" and row["done"] == row["entries"])
        shown = rows[: max(1, height - 3)]
        lines = [
            {
                "vm": row["vm"],
                "state": row["state"],
                "time": row["time"],
                "progress": _bar(row["done"], row["entries"]) if width >= 80 else "",
                "done": f"{row['done']}/{row['entries']}",
                "failed": row["failed"] + row["unknown"] or None,
                "now": row["reason"] or (self._present_entry(row["vm"]) if row["running"] else ""),
            }
            for row in shown
        ]
        rest = [Text(f"… and {len(rows) - len(shown)} more")] if len(rows) > len(shown) else []
        return Group(_table(lines, crop=True), *rest)

    def _present_entry(self, vm_name: str) -> str:
        sql = """SELECT entry FROM entry_status WHERE server_name = :name AND outcome = 'running'
                 ORDER BY sent_at DESC LIMIT 1"""
        entry = self.db.value(sql, name=vm_name)
        return ScheduleEntry.from_dict(json.loads(entry)).label if entry else ""


def _is_supervised(db: Database, process: Any) -> bool:
    # Ours may have come second to that of another `run`, which is then the one to watch.
    ours = process is not None and process.poll() is None
    return ours or supervisor_pid(db) is not None


def _progress_line(row: Mapping[str, Any]) -> str:
    words = [f"{row['vm']}: {row['state']}", *([f"at {row['time']}"] if row["time"] else [])]
    words.append(f"{row['done']}/{row['entries']} done")
    words += [f"{row[key]} {key}" for key in ("failed", "unknown") if row[key]]
    return ", ".join(words) + (f" ({row['reason']})" if row["reason"] else "")


def _bar(done: int, of: int, width: int = 20) -> str:
    full = width if of == 0 else width * done // of
    return "█" * full + "·" * (width - full)


# === commands ====================================================================================
#
# A command is a function named cmd_<group>_<name>. Its words after the Cli are the command line's:
# parameters with a default, and those after the star, are options. `command` enters it below.


class Command(NamedTuple):
    function: Callable[..., object]
    tail: str  # the words of a program that may follow it
    words: Mapping[str, str]  # of parameters whose meaning is not that of WORDS

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the command line may give, by name; the first parameter is the Cli."""
        parameters = inspect.signature(self.function, eval_str=True).parameters
        return dict(itertools.islice(parameters.items(), 1, None))

    @property
    def help(self) -> str:
        words = {**WORDS, **self.words}
        lines = [f"    {name}: {words[name]}" for name in self.parameters]
        text = inspect.getdoc(self.function) or ""
        return "\n".join([text, *(["", "Args:", *lines] if lines else [])])


COMMANDS: dict[str, Any] = {}  # by name: a Command, or the commands of a group

GROUPS = {
    "": """vmrm takes a lab of virtual machines through an experiment.

    Before any command: --db PATH (the database; default $VMRM_DB, else in ~/.local/state/vmrm).
    With any command: --json (results as JSON), --quiet (nothing but results and errors).
    Begin with: vmrm demo
    """,
    "schedule": "See a VM's schedule, or add to it.",
    "store": "Files for VMs, by name.",
    "pool": "VMs that are lent to jobs.",
}

# What parameters mean in every command that has them.
WORDS = {
    "vm": "The VM's name.",
    "vms": "The VMs' names.",
    "name": "The group's name.",
    "timeout": "Seconds within which the VM must begin to answer.",
    "token": "The lease's token; default $VMRM_LEASE.",
    "force": "Even if someone else holds the lease.",
    "experiment": "The number of an earlier, destroyed one; without it, the current one.",
    "allow_host": "Let on_host entries run their programs on this host.",
    "dir": "Where the VMs' directories are; without it, qemu in the state directory.",
}

_Function = TypeVar("_Function", bound=Callable[..., object])


def command(*, tail: str = "", **words: str) -> Callable[[_Function], _Function]:
    """Enter a function in COMMANDS by its name, with what its own parameters mean."""

    def enter(function: _Function) -> _Function:
        group, _, name = function.__name__.removeprefix("cmd_").partition("_")
        if group not in GROUPS:
            group, name = "", function.__name__.removeprefix("cmd_")
        commands = COMMANDS.setdefault(group, {}) if group else COMMANDS
        commands[name.replace("_", "-")] = Command(function, tail, words)
        return function

    return enter


class Cli:
    """What one command line gives its command: the database, the screen, a program's words."""

    def __init__(self, path: str | None, screen: Screen, tail: Sequence[str] = ()) -> None:
        self.path, self.screen, self.tail = path, screen, list(tail)

    @functools.cached_property
    def db(self) -> Database:  # made if there is none
        return Database(self.path)

    def close(self) -> None:
        if "db" in vars(self):
            self.db.close()

    def open(self, hint: str = "Load an experiment: vmrm load FILE") -> Database:
        """Return the database if there is one: reading makes none."""
        path = Path(self.path or default_database())
        if not path.exists():
            raise NotFound(f"no database at {str(path)!r}", hint)
        return self.db

    def pool(self) -> VmManager:
        return VmManager(db=self.open("Make a group: vmrm pool group NAME"))

    def vm(self, name: str) -> str:
        return self._name("SELECT server_name FROM vms WHERE server_name = :name", name)

    @contextlib.contextmanager
    def remote(self, name: str, timeout: float) -> Iterator[Remote]:
        """Yield the way to a VM of the experiment, or else of the pool."""
        sql = """SELECT server_name FROM vms WHERE server_name = :name
                 UNION ALL SELECT vm_name FROM pool_vms WHERE vm_name = :name"""
        name = self._name(sql, name)
        config = _pool_config(self.db, name) or handler_config(self.db, name)
        forget_abandoned(self.db)
        with workplace(self.db, name) as folder:
            yield Remote(self.db, config, folder, timeout)

    def _name(self, sql: str, name: str) -> str:
        found = self.open().value(sql, name=name)
        if found is None:
            raise NotFound(f"no VM {name!r}", "See which there are: vmrm status")
        return cast(str, found)

    def write(self, file: Path | None, text: str) -> None:
        if file is not None:
            with new_file(self.open(), file) as path:
                path.write_text(text, encoding="utf-8")
        else:
            print(text, end="")


@command()
def cmd_demo(cli: Cli) -> None:
    """Run a complete small experiment on three stand-in agents, in a temporary directory.

    Needs no VM and leaves nothing behind. Takes about ten seconds.
    """
    import tempfile

    screen = cli.screen
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmrm-demo-")))
        argv = own_command("agent", f"{root}/agents", "--count", "3")
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        agents = stack.enter_context(subprocess.Popen(argv, stdout=pipe, stdin=null))
        stack.callback(agents.terminate)
        assert agents.stdout is not None
        if not agents.stdout.readline():
            raise VmrmError("the stand-in agents did not start")
        (root / "lab.toml").write_text(DEMO.format(root=root), encoding="utf-8")
        screen.tell("Three stand-in agents play VMs. The experiment, lab.toml:\n")
        screen.tell("    " + DEMO.format(root="…").replace("\n", "\n    "))
        screen.tell("$ vmrm run lab.toml")
        db = stack.enter_context(Database(root / "lab.db"))
        load_experiment(db, read_experiment(root / "lab.toml"))
        launch(db)
        Viewer(db, screen).watch(spawn_supervisor(db))
        outcome = report_of(read_run(db))
        screen.show(outcome.rows)
        screen.tell(outcome.summary)
        if not screen.as_json:  # which is one document
            screen.tell("\n$ vmrm schedule show server")
            screen.show(entry_rows(db, "server"))
        screen.tell("\nThe transfer brought out out/server/…/served:")
        served = next((root / "out" / "server").rglob("served"))
        screen.tell(f"    {served.read_text().strip()}")
    if not outcome.ok:
        raise VmrmError("\n  ".join(["the demo failed", *outcome.faults]))
    screen.tell("\nThat was it; nothing is left behind. README.md shows how to write a lab.toml")


DEMO = """\
[experiment]
start_buffer = 1                          # seconds from "all configured" to time 0

[[vm]]
name = "server"
path = "agents/3.sock"                    # a guest agent's socket
launch_dir = "{root}/agents/3/launch"
schedule = [                              # negative times configure the VM, in order
    {{ start_time = -20, executable = "install.sh", arguments = ["it's $HOME"], content = [
        {{ location = "install.sh", executable = true, content = "#!/bin/sh\\necho got $1\\n" }},
    ] }},
    {{ start_time = -10, executable = "sh", arguments = [
        "-c",                             # exit code 10: reboot, then run me again
        "[ -e ../done ] && exit 0; touch ../done; echo rebooting; exit 10",
    ] }},                                 # positive times are seconds after the common start
    {{ start_time = 1, executable = "sh", arguments = [
        "-c", "date +%T.%N >> {root}/agents/3/served; echo serving",
    ] }},
    {{ start_time = 2, transfer = [        # bring files out of the VM
        {{ location = "{root}/agents/3/served", destination = "out" }},
    ] }},
]

[[vm]]
name = "client{{n}}"
count = 2
path = "agents/{{n}}.sock"
launch_dir = "{root}/agents/{{n}}/launch"
schedule = [
    {{ start_time = -5, executable = "sleep", arguments = ["1"] }},
    {{ start_time = 1.5, executable = "sh", arguments = ["-c", "echo asking the server"] }},
]
"""


@command(file="TOML, or JSON of the same structure.")
def cmd_load(cli: Cli, file: Path) -> object:
    """Check an experiment file and store it."""
    experiment = read_experiment(file)
    new = load_experiment(cli.db, experiment)
    entries = sum(len(json.loads(text)) for text in experiment.schedules.values())
    count = len(experiment.vms)
    return {"loaded": count if new else 0, "vms": count, "entries": entries}


@command(file="TOML, or JSON of the same structure.")
def cmd_plan(cli: Cli, file: Path) -> None:
    """Show what a run of an experiment file would do; nothing is connected or written."""
    experiment = read_experiment(file)
    rows = plan_rows(experiment)
    cli.screen.show(rows)
    cli.screen.tell(_plan_summary(experiment, rows))


@command(
    file="The experiment file; without it, what is loaded.",
    detach="Return at once; watch it later by another run.",
    timeout="Seconds after which the experiment is stopped (exit code 124).",
    start_buffer="Seconds from the last VM configured to time 0.",
    on_failure="What a failed VM means before time 0: abort, drop or wait.",
    late="What is overdue when a run is continued: start it at once, skip it, or shift all.",
    stay="Keep running when all work is done, so that entries can still be added.",
    report="A new file for the report as an HTML page, written however it ends.",
    retry="Repeat everything that failed or is unknown, as vmrm retry does.",
)
def cmd_run(
    cli: Cli,
    file: Path | None = None,
    *,
    detach: bool = False,
    timeout: float | None = None,
    start_buffer: float | None = None,
    on_failure: OnFailure | None = None,
    late: Late | None = None,
    allow_host: bool = False,
    stay: bool = False,
    report: Path | None = None,
    retry: bool = False,
) -> object:
    """Run the experiment, or continue it, and watch it to its end.

    Ctrl-C stops it: handlers leave, the programs in the VMs go on, and run continues it.
    What has begun is not repeated, but for entries before time 0 without which a failed VM
    could not go on.
    """
    if report is not None:
        _check_new(report, detach)
    experiment = None if file is None else read_experiment(file)
    if experiment is not None:
        check_host_entries(experiment.schedules, allow_host)
        load_experiment(cli.db, experiment)
    db = cli.open()
    settings = {"start_buffer": start_buffer, "on_failure": on_failure, "late": late}
    settings |= {"allow_host": allow_host or None, "retry": retry or None, "stay": stay or None}
    pid, process = _supervised(cli, {name: v for name, v in settings.items() if v is not None})
    for row in db.query("SELECT server_name FROM vms WHERE state = 'testing'"):
        cli.screen.tell(f"VM {row['server_name']!r} is testing: it is not run, and all wait for it")
    if detach:
        while process and process.poll() is None and supervisor_pid(db) is None:
            time_to_wait(0.01)  # so that `stop`, for one, finds it
        return {"supervisor": pid}
    try:
        Viewer(db, cli.screen, timeout).watch(process)
        _show_report(cli.screen, report_of(read_run(db)))
        return None
    finally:
        if report is not None:
            try:
                cli.write(report, report_page(db, read_run(db)))
            except (OSError, UsageError) as error:
                why = f"the report was not written: {_one_line(error)}"
                raise VmrmError(why, "Write it elsewhere: vmrm report FILE") from error


def _check_new(report: Path, detach: bool) -> None:
    if detach:
        raise UsageError("--report needs a run that waits", "Later: vmrm report FILE")
    if os.path.lexists(report):  # now, not when all is over and the report would be lost
        raise UsageError(f"{str(report)!r} exists already")
    if not os.access(report.absolute().parent, os.W_OK):
        raise UsageError(f"{str(report)!r} cannot be written: no such directory, or no right to")


def _supervised(cli: Cli, settings: Mapping[str, Any]) -> tuple[int, Any]:
    """Return the pid of the experiment's supervisor, and its process if we started it."""
    if pid := supervisor_pid(cli.db):
        now = current_experiment(cli.db)
        now["start_buffer"] = now["start_buffer_s"]
        # What is as it was asked for is no reason to refuse.
        if too_late := [name for name, value in settings.items() if now.get(name) != value]:
            raise _too_late(pid, *too_late)
        cli.screen.tell(f"the experiment is running already (process {pid}); watching")
        return pid, None
    stay = settings.get("stay", False)
    again = launch(cli.db, **{name: v for name, v in settings.items() if name != "stay"})
    if again:
        more = f" and {len(again) - 20} more" if len(again) > 20 else ""
        cli.screen.tell(f"once more: {'; '.join(again[:20])}{more}")
    process = spawn_supervisor(cli.db, stay)
    return process.pid, process


def _too_late(pid: int | None, *settings: str) -> Conflict:
    options = ", ".join(f"--{name.replace('_', '-')}" for name in settings)
    return Conflict(
        f"the experiment is running already (process {pid}): too late for {options}",
        "Watch it without: vmrm run, or stop it first: vmrm stop",
    )


def _show_report(screen: Screen, outcome: Report) -> None:
    if screen.as_json:
        document = {"ok": outcome.ok, "summary": outcome.summary, "vms": outcome.rows}
        screen.show(document | {"faults": outcome.faults})
    else:
        screen.show(outcome.rows)
        screen.tell(outcome.summary)
    if not outcome.ok:
        hint = "Repeat what failed or is unknown: vmrm run --retry, or vmrm retry VM [ENTRY]"
        raise VmrmError("\n  ".join(["the experiment failed", *outcome.faults]), hint)


@command(file="The new file, which must not exist; without it, stdout.")
def cmd_trace(cli: Cli, file: Path | None = None, *, experiment: int | None = None) -> None:
    """Write the run as a trace file that Perfetto and chrome://tracing open."""
    cli.write(file, json.dumps(trace(_launched(cli, experiment))) + "\n")


@command(file="The new file, which must not exist; without it, stdout.")
def cmd_report(cli: Cli, file: Path | None = None, *, experiment: int | None = None) -> None:
    """Write the run as one HTML page: timeline, failures with their output, summary."""
    cli.write(file, report_page(cli.db, _launched(cli, experiment)))


def _launched(cli: Cli, experiment: int | None) -> Run:
    run = read_run(cli.open(), experiment)
    if run.experiment["launched_at"] is None:
        raise NotFound("the experiment has not been launched yet", "Do so: vmrm run")
    return run


@command()
def cmd_status(cli: Cli) -> object:
    """Show where every VM is: state, time, entries done, failed, unknown and running."""
    return vm_rows(cli.open())


@command(follow="Keep printing until the experiment has ended, or Ctrl-C.")
def cmd_logs(cli: Cli, vm: str, *, follow: bool = False) -> None:
    """Print a VM's log: what its handler did, and the output of its programs."""
    db, name = cli.open(), cli.vm(vm)
    path = run_directory(db, "logs") / f"{name}.log"
    print_log(path, (lambda: supervisor_pid(db) is not None) if follow else lambda: False)


@command(vm="Default: all.", state="Default: configured.", timeout="Seconds, then exit code 124.")
def cmd_wait(
    cli: Cli, vm: str | None = None, *, state: VMState | None = None, timeout: float | None = None
) -> None:
    """Wait until a VM, or every managed one, is in a state."""
    db, name = cli.open(), None if vm is None else cli.vm(vm)
    state = state or VMState.CONFIGURED
    sql = """SELECT server_name FROM vms WHERE state <> :state AND state <> 'n/a'
               AND (:name IS NULL OR server_name = :name)"""
    deadline = CLOCK.monotonic() + (math.inf if timeout is None else timeout)
    while late := db.value(sql, state=state, name=name):
        if CLOCK.monotonic() >= deadline:
            raise TimedOut(f"VM {late!r} is not {state} after {timeout:g} s")
        time_to_wait(0.05)


@command(tail="PROGRAM [ARG ...]")
def cmd_exec(cli: Cli, vm: str, *, timeout: float = 30.0) -> object:
    """Run a program in a VM: vmrm exec VM PROGRAM [ARG ...]. Options go before VM.

    Passes on its output and exit code; 255 if the VM was not reached or the outcome is unknown.
    """
    if not cli.tail:
        raise UsageError("no program is named", "Name one: vmrm exec VM PROGRAM [ARG ...]")
    with cli.remote(vm, timeout) as remote:
        answer = remote.do("exec", argv=cli.tail)
        for name, stream in (("out", sys.stdout.buffer), ("err", sys.stderr.buffer)):
            stream.write((remote.folder / name).read_bytes())
            stream.flush()
    for name in answer["truncated"]:
        cli.screen.tell(f"vmrm: std{name} was cut at 16 MiB, the guest agent's limit")
    code = answer["exit_code"] if answer["signal"] is None else 128 + answer["signal"]
    raise SystemExit(code if 0 <= code < 256 else 1)  # Windows has 32 bits


@command(local="A file on this host.", remote="Its absolute path in the VM; directories are made.")
def cmd_push(cli: Cli, vm: str, local: Path, remote: str, *, timeout: float = 30.0) -> object:
    """Copy a file into a VM."""
    if local.is_dir():
        raise UsageError(f"{str(local)!r} is a directory", "Push its files, or an archive of it")
    if not local.is_file():
        raise UsageError(f"there is no file {str(local)!r}")
    if not is_guest_path(remote):
        raise UsageError(f"remote path {remote!r} is not absolute")
    target = remote + local.name if remote.endswith("/") else remote
    with local.open("rb") as opened:  # which this user may not be allowed to
        facts = os.fstat(opened.fileno())
    mode, size = f"{facts.st_mode & 0o755:o}", facts.st_size
    with cli.remote(vm, timeout) as access, cli.screen.progress(access.folder, size):
        (access.folder / "source").symlink_to(local.absolute())
        return access.do("push", remote=target, mode=mode, size=size)


@command(remote="Its absolute path in the VM.", local="A file or directory here (default: .).")
def cmd_pull(
    cli: Cli, vm: str, remote: str, local: Path | None = None, *, timeout: float = 30.0
) -> object:
    """Copy a file out of a VM."""
    if not is_guest_path(remote):
        raise UsageError(f"remote path {remote!r} is not absolute")
    target = local or Path()
    if target.is_dir():
        target /= (PurePosixPath if remote.startswith("/") else PureWindowsPath)(remote).name
    if not target.parent.is_dir():
        raise UsageError(f"there is no directory {str(target.parent)!r}")
    if target.exists() and not target.is_file():
        raise UsageError(f"{str(target)!r} is not a file")
    with cli.remote(vm, timeout) as access:
        temporary = make_sink(access.folder, target)
        with cli.screen.progress(access.folder):
            answer = access.do("pull", remote=remote)
        os.umask(mask := os.umask(0o077))
        temporary.chmod(answer["mode"] & ~mask)
        _crash("pull-before-rename")
        temporary.rename(target)
    return {"bytes": answer["bytes"]}


@command()
def cmd_info(cli: Cli, vm: str, *, timeout: float = 30.0) -> object:
    """Ask a VM's guest agent who it is: version, OS, host name, time, addresses, health."""
    with cli.remote(vm, timeout) as remote:
        return remote.do("info")


@command(timeout="Seconds it may take.")
def cmd_reboot(cli: Cli, vm: str, *, timeout: float = 300.0) -> object:
    """Reboot a VM and wait until its agent answers again."""
    with cli.remote(vm, timeout) as remote:
        return remote.do("reboot")


@command(entry="Only this entry, by its number in `schedule show`.")
def cmd_retry(cli: Cli, vm: str, entry: int | None = None) -> object:
    """Give a VM's failed and unknown entries another attempt."""
    count = retry_failed(cli.open(), cli.vm(vm), entry)
    if not count:
        raise UsageError(f"nothing of VM {vm!r} has failed")
    return {"retried": count}


@command(duration="Seconds.")
def cmd_pause(cli: Cli, *vms: str, duration: float) -> object:
    """Shift everything of VMs that has not started yet; pauses add up.

    Given before time 0, it begins at time 0. The start time itself never changes.
    """
    if not vms:
        raise UsageError("no VM is named", "See which there are: vmrm status")
    return pause_vms(cli.open(), vms, duration)


@command()
def cmd_break(cli: Cli, *vms: str) -> object:
    """Hold everything of VMs that has not started yet, until resume."""
    return cmd_pause(cli, *vms, duration=math.inf)


@command(vms="The VMs' names; without any, all that are in a break.")
def cmd_resume(cli: Cli, *vms: str) -> object:
    """End the break that VMs are in; timed pauses go on."""
    given = resume_vms(cli.open(), vms or None)
    if not given:
        raise UsageError("no VM is in a break")
    return given


@command(kill="Terminate guest programs, too.", timeout="Seconds to wait at most (exit code 124).")
def cmd_stop(cli: Cli, *, kill: bool = False, timeout: float = 60.0) -> None:
    """Stop the experiment: handlers leave, guest programs go on; run continues it."""
    db, process = cli.open(), None
    running = supervisor_pid(db) is not None or live_handlers(db)
    if not running and not (kill and (vms_with_programs(db) or is_being_killed(db))):
        raise UsageError("the experiment is not running")
    halt_experiment(db, Halt.KILL if kill else Halt.STOP)
    if not running:  # but an earlier one has left programs behind
        process = spawn_supervisor(db)
    deadline = CLOCK.monotonic() + timeout
    sql, stops = "SELECT halt FROM current_experiment", (Halt.STOP, Halt.KILL)
    # Without a halt they have left, and somebody runs it again.
    while db.value(sql) in stops and (_is_supervised(db, process) or live_handlers(db)):
        if CLOCK.monotonic() >= deadline:
            raise TimedOut(f"not all handlers have left after {timeout:g} s")
        time_to_wait(0.05)
    end_experiment(db)  # which a handler without supervisor does not
    tie_up(db)
    if kill and (left := vms_with_programs(db)):
        names = ", ".join([*left[:3], *(["…"] if left[3:] else [])])
        what = f"programs of {counted(len(left), 'VM')} could not be ended: {names}"
        raise VmrmError(what, f"See why: vmrm logs {left[0]}")


@command(yes="Really do it.", purge="Remove journal, logs and transfers, too.")
def cmd_destroy(cli: Cli, *, yes: bool = False, purge: bool = False) -> None:
    """End the experiment: its VMs, schedules and times go, journal and logs stay."""
    db = cli.open()
    if not yes:
        raise UsageError("this removes the experiment", "Say so: vmrm destroy --yes")
    destroy_experiment(db, purge=purge)


@command()
def cmd_handle(cli: Cli, vm: str, *, allow_host: bool = False) -> object:
    """Run one VM's handler in the foreground, without a supervisor."""
    db, name = cli.open(), cli.vm(vm)
    if supervisor_pid(db) is None:
        launch(db, allow_host=allow_host)
    elif allow_host and not current_experiment(db)["allow_host"]:
        raise _too_late(supervisor_pid(db), "allow_host")
    handle(db, name, alone=True)
    return [row for row in vm_rows(db) if row["vm"] == name]


@command(
    socket="The socket's path; with --count, a directory for N of them.",
    root="File commands outside this directory are refused.",
    count="Play N agents: sockets DIR/1.sock ..., roots DIR/1/ ...",
)
def cmd_agent(cli: Cli, socket: str, *, root: str | None = None, count: int | None = None) -> None:
    """Play a guest agent on a UNIX socket of this host, to try a schedule without a VM.

    Programs run on this host, with your rights. Ends at Ctrl-C or SIGTERM.
    """
    places = {socket: root}
    if count is not None:
        places = {f"{socket}/{n}.sock": f"{socket}/{n}" for n in range(1, count + 1)}
    try:
        drivers.serve_agents(places, ready=functools.partial(print, "listening", flush=True))
    except OSError as error:
        raise UsageError(f"cannot listen at {socket!r}: {error.strerror or error}") from error


@command(fix="Remove what nothing needs any more; take back VMs of the pool from the dead.")
def cmd_check(cli: Cli, *, fix: bool = False) -> None:
    """Check database, file store, requests and pool; exit code 1 if something is wrong."""
    db = cli.open()
    faults = check(db, fix)
    cli.screen.show(faults)
    left = len(check(db) if fix else faults)
    if left:
        hint = "Remove what is unused: vmrm check --fix" if loose_ends(db) and not fix else ""
        raise VmrmError(counted(left, "fault"), hint)


@command(file="The copy, which must not exist.")
def cmd_backup(cli: Cli, file: Path) -> None:
    """Copy the database to a new file while it is in use; the file store is not part of it."""
    with new_file(cli.open(), file) as copy:
        copy_database(cli.db.connection, copy)


# --- schedule


@command()
def cmd_schedule_show(cli: Cli, vm: str) -> object:
    """Show a VM's entries with planned and real times."""
    return entry_rows(cli.open(), cli.vm(vm))


@command(file="A TOML file with [[schedule]] tables, or a JSON list of entries.")
def cmd_schedule_add(cli: Cli, vm: str, file: Path) -> object:
    """Append entries to a VM's schedule; a running handler takes them up at once."""
    return append_entries(cli.open(), cli.vm(vm), file)


# --- store


@command(files="Paths on this host.", unpack="Add the contents of archives and compressed files.")
def cmd_store_add(cli: Cli, *files: Path, unpack: bool = False) -> None:
    """Add files to the store under their own names."""
    if not files:
        raise UsageError("no file is named", "Name at least one: vmrm store add FILE")
    with VmResourceStore(decompress=unpack, db=cli.db) as store:
        for file in files:
            store.add_file(file)


@command(pattern="Only names that match it, with shell wildcards.")
def cmd_store_list(cli: Cli, pattern: str = "*") -> object:
    """List stored files."""
    return [
        {"size": size, "name": name, "added": _iso(added.timestamp())}
        for size, name, added in VmResourceStore(db=cli.open()).list_contents(pattern)
    ]


@command(pattern="Those whose names match it, with shell wildcards.")
def cmd_store_remove(cli: Cli, pattern: str) -> object:
    """Remove stored files."""
    removed = VmResourceStore(db=cli.open()).remove_file(pattern)
    if not removed:
        raise NotFound(f"no stored file matches {pattern!r}", "See them: vmrm store list")
    return {"removed": removed}


# --- pool


@command(settings="Limits (none: no limit), times (90s, 2h), hooks (shell command lines).")
def cmd_pool_group(cli: Cli, name: str | None = None, **settings: str) -> object:
    """Show the groups, or make one, or change it, or show its settings."""
    if settings and name is None:
        raise UsageError("settings of which group?", "Name it: vmrm pool group NAME")
    db = cli.pool().db if name is None else cli.db
    rows = db.query("SELECT * FROM pool_groups ORDER BY position")
    if name is not None:
        if settings or name.lower() not in [row["name"].lower() for row in rows]:
            put_group(db, name, {key: _setting(key, text) for key, text in settings.items()})
        rows = db.query("SELECT * FROM pool_groups WHERE name = :name", name=name)
    known = {"name": "name", **group_settings(db)}
    shown = [{key: row[column] for key, column in known.items()} for row in rows]
    return shown if name is None else shown[0]


def _setting(key: str, text: str) -> object:
    if text in ("True", "False") and key not in ("release_cleans", "unique_ip"):
        raise UsageError(f"--{key.replace('_', '-')} needs a value")
    known = {"none": "" if key in set(HookKind) else None, "True": 1, "False": 0}
    if text in known or key in set(HookKind):
        return known.get(text, text)
    try:
        return int(text) if re.fullmatch("-?[0-9]+", text) else parse_seconds(text)
    except ValueError:
        return text


@command(group="Its group.", path="The guest agent's address.", ip="The VM's own address.")
def cmd_pool_add(cli: Cli, vm: str, group: str, *, path: str = "", ip: str = "") -> object:
    """Add an existing VM. It can be acquired once it passes a health check."""
    added = cli.pool().add_vm_to_pool(ip, vm, group, path=path)
    return {"vm": added.vm_name, "group": added.group, "state": added.state}


@command(group="Only those of this group.")
def cmd_pool_list(cli: Cli, group: str | None = None) -> object:
    """List the pool's VMs."""
    pool = cli.pool()
    lines = []
    for name in pool.vm_groups if group is None else [pool.group(group)["name"]]:
        if failure := pool.spawn_failure(name):
            cli.screen.tell(f"group {name}: {failure}")
        for vm in pool.get_all_vm_in_group(name):
            until = vm.held_until if vm.state == VmStates.HELD else vm.lease_end_at
            line = {"vm": vm.vm_name, "group": vm.group, "state": vm.state, "ip": vm.vm_ip}
            line |= {"owner": vm.bound_to_user, "sandbox": vm.bound_sandbox}
            line |= {"holder": vm.holder_pid, "until": _iso(until) if until else None}
            lines.append(
                line | {"task": vm.task_id, "builds": vm.builds_count, "reason": vm.reason}
            )
    return lines


@command()
def cmd_pool_info(cli: Cli, vm: str | None = None) -> object:
    """Show everything about a VM, or the whole pool in short."""
    pool = cli.pool()
    return pool.info() if vm is None else pool.get_vm_by_name(vm)


@command(
    tail="[-- COMMAND ...]",
    groups="The groups it may come from, in order of preference.",
    owner="Owner whose limit applies (default: your user name).",
    sandbox="Sandbox; a VM that this owner already used for it is preferred.",
    wait="Wait in the queue if there is none now.",
    timeout="Seconds to wait at most (exit code 124).",
    priority="In the queue: higher ones first.",
    lease="Seconds after which it ends unless renewed; default 1 h without --pid or COMMAND.",
    pid="The process that holds it: when it is dead, the VM is taken back.",
    task="A name for the job, shown in listings.",
    format="Print this, with {name}, {ip}, {path}, {token}, {group} filled in.",
)
def cmd_pool_acquire(
    cli: Cli,
    *groups: str,
    owner: str | None = None,
    sandbox: str = "",
    wait: bool = False,
    timeout: float | None = None,
    priority: int = 0,
    lease: float | None = None,
    pid: int | None = None,
    task: str | None = None,
    format: str | None = None,  # noqa: A002 (an option's name)
) -> None:
    """Lease a VM: vmrm pool acquire GROUP ... [-- COMMAND ...]; exit code 75 if there is none.

    vmrm becomes the COMMAND, with VMRM_VM, VMRM_IP, VMRM_PATH and VMRM_LEASE in its environment;
    the lease ends with it. Without a COMMAND, prints name, ip, path and token of the lease.
    """
    runs = bool(cli.tail)
    if runs and pid is not None:
        raise UsageError("a COMMAND holds the VM itself: it takes no --pid")
    if timeout is not None and not wait:
        raise UsageError("--timeout is for --wait")
    if format is not None:
        _filled_in(format, dict.fromkeys(_LEASED, ""))
    if runs:
        lease = None  # it ends with the COMMAND
    elif pid is None and lease is None:
        lease = 3600.0
    # We hold it until somebody was told of it, so that nothing is left if we die before.
    holder = None if pid is None else Process.of(pid)
    pool = cli.pool()
    for group in groups:
        pool.group(group)
    owner = _user() if owner is None else owner
    request = Request((groups,), owner, sandbox, Process.of(), lease, task, priority=priority)
    patience = None if not wait else math.inf if timeout is None else timeout
    vm = pool.acquire(request, patience, cli.screen.tell)[0]
    if runs:
        become(pool, vm, cli.tail)
    leased = {key: getattr(vm, field) for key, field in _LEASED.items()}
    cli.screen.deliver(
        leased if format is None else _filled_in(format, leased),
        functools.partial(pool.release_vm, vm.vm_name, token=vm.token),
        f"VM {vm.vm_name!r} was given back",
    )
    pool.hand_over(vm, holder)


_LEASED = {"name": "vm_name", "ip": "vm_ip", "path": "path", "token": "token", "group": "group"}


def _filled_in(text: str, values: Mapping[str, object]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UsageError(f"--format: {match[0]} is none of {', '.join(values)}")
        return str(values[match[1]])

    return re.sub(r"\{(\w*)\}", value, text)


@command(lease="Seconds from now.")
def cmd_pool_renew(cli: Cli, vm: str, *, lease: float = 3600.0, token: str | None = None) -> object:
    """Have a lease end later."""
    return {"until": _iso(cli.pool().renew_vm(vm, lease, token=_token(vm, token)))}


def _token(vm: str, given: str | None) -> str | None:
    """Return the token of a command: the given one, or that of the job it runs in."""
    of_job = os.environ.get("VMRM_VM", vm).lower() == vm.lower()
    return given or (os.environ.get("VMRM_LEASE") if of_job else None)


@command()
def cmd_pool_release(cli: Cli, *vms: str, token: str | None = None, force: bool = False) -> None:
    """Give VMs back to the pool."""

    def act(pool: VmManager, vm: str) -> None:
        if not pool.release_vm(vm, token=_token(vm, token), force=force):
            state = pool.get_vm_by_name(vm).state
            raise VmError(f"VM {vm!r} is {state}: nobody has a lease of it")

    _each(cli, vms, act)


def _each(cli: Cli, vms: Sequence[str], act: Callable[[VmManager, str], object]) -> None:
    """Do something to several VMs, but nothing if one of them is not there."""
    pool = cli.pool()
    if not vms:
        raise UsageError("no VM is named", "See which there are: vmrm pool list")
    errors = []
    for name in dict.fromkeys([pool.get_vm_by_name(vm).vm_name for vm in vms]):
        try:
            act(pool, name)
        except VmError as error:
            errors.append(error)
    for other in errors[:-1]:
        cli.screen.error(other)
    if errors:
        raise errors[-1]


@command(until="A time from now (90s, 2h, 3d) or a date in UTC (2030-12-31T18:00).")
def cmd_pool_hold(
    cli: Cli, vm: str, until: str, *, token: str | None = None, force: bool = False
) -> None:
    """Keep a VM for debugging: it is lent to nobody any more, and terminated after that time."""
    cli.pool().hold_vm(vm, _moment(until), token=_token(vm, token), force=force)


def _moment(text: str) -> float:
    with contextlib.suppress(ValueError):
        return CLOCK.wall() + parse_seconds(text)
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is neither a time like 90s, 2h, 3d nor a date") from None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


@command()
def cmd_pool_terminate(cli: Cli, *vms: str, token: str | None = None, force: bool = False) -> None:
    """Have the keeper terminate VMs and forget them."""

    def act(pool: VmManager, vm: str) -> None:
        why = "terminated by command"
        pool.start_vm_termination(vm, reason=why, token=_token(vm, token), force=force)

    _each(cli, vms, act)


@command()
def cmd_pool_remove(cli: Cli, *vms: str) -> None:
    """Forget terminating VMs whose machines are known to be gone."""
    _each(cli, vms, VmManager.remove_vm_from_pool)


@command()
def cmd_pool_log(cli: Cli, vm: str) -> None:
    """Print what the hooks of a VM printed, and how they ended."""
    db = cli.pool().db
    path = pool_log(db, vm)
    if not path.exists():
        VmDescriptor.load(db, vm)  # which says so, if there is no such VM
    print_log(path, lambda: False)


@command(vm="Only of this VM.")
def cmd_pool_history(cli: Cli, vm: str | None = None) -> object:
    """Show every change of state: when, who, why."""
    sql = """SELECT at, vm_name AS vm, "group", old_state AS "from",
                 coalesce(new_state, '(gone)') AS "to", owner, who, reason AS why
             FROM pool_history WHERE :vm IS NULL OR vm_name = :vm ORDER BY id"""
    return [{**row, "at": _iso(row["at"])} for row in cli.pool().db.query(sql, vm=vm)]


@command()
def cmd_pool_metrics(cli: Cli) -> object:
    """Print the pool's figures as Prometheus text."""
    return cli.pool().metrics().rstrip("\n")


@command(once="Do what is due now and what follows from it, then leave: for cron.")
def cmd_pool_serve(cli: Cli, *, once: bool = False) -> None:
    """Keep the pool until Ctrl-C or SIGTERM: spawn, check, clean, terminate and count its VMs.

    A stopped keeper kills its hooks, which the next one begins again. The VMs stay.
    """
    db = cli.pool().db
    logger = logging.getLogger("vmrm.keeper")
    log_to(logger, db.directory("pool") / f"{KEEPER}.log")
    if not cli.screen.quiet:
        told = logging.StreamHandler()
        told.setFormatter(LogFormatter())
        logger.addHandler(told)
    Keeper(db, once).run()


@command(
    tail="[-- WORD ...]",
    vm="The VM's name; without it, $VMRM_VM.",
    disk="A disk image, qcow2 or raw; what the VM writes is kept apart, until its end.",
    kernel="A kernel to boot instead of what is on the disk.",
    initrd="The kernel's initial RAM disk.",
    append="The kernel's command line.",
    memory="MiB.",
    cpus="Virtual processors.",
    accel="QEMU's accelerator; without it, KVM if that works, else software emulation.",
)
def cmd_pool_spawn_qemu(
    cli: Cli,
    vm: str | None = None,
    *,
    disk: str | None = None,
    kernel: str | None = None,
    initrd: str | None = None,
    append: str | None = None,
    memory: int = 512,
    cpus: int = 1,
    accel: str | None = None,
    dir: str | None = None,  # noqa: A002 - the option's name
) -> None:
    """Start a VM by QEMU, which outlives this command: a spawn hook; words after -- are QEMU's.

    Prints its name and the guest agent's path. It has no network unless QEMU's words give one.
    """
    import shutil

    words = qemu_words(memory, cpus, disk, kernel, initrd=initrd, append=append, accel=accel)
    machine = _qemu(cli, vm, dir)
    if not accel:
        program = shutil.which(QEMU)
        if fault := kvm_fault(program) if program else "":
            cli.screen.tell(f"KVM does not work here, so QEMU emulates the processor: {fault}")
        words += ["-accel", "tcg" if fault else "kvm"]
    if not dir:
        assert cli.db.connection  # it makes the state directory, private
    made = machine.spawn([*words, *cli.tail])
    what = f"VM {machine.name!r} was ended again"
    cli.screen.deliver(json.dumps(made), machine.terminate, what)


@command(vm="The VM's name; without it, $VMRM_VM.")
def cmd_pool_terminate_qemu(cli: Cli, vm: str | None = None, *, dir: str | None = None) -> None:  # noqa: A002
    """Terminate a VM started by spawn-qemu and delete its directory. Succeeds if it is gone."""
    _qemu(cli, vm, dir).terminate()


@command()
def cmd_pool_list_qemu(cli: Cli, *, dir: str | None = None) -> object:  # noqa: A002
    """List the VMs of spawn-qemu that run, one name per line: a list hook."""
    return qemu_running(_qemu_root(cli, dir))


def _qemu(cli: Cli, vm: str | None, folder: str | None) -> QemuVm:
    name = vm or os.environ.get("VMRM_VM")
    if not name:
        raise UsageError("no VM is named", "Name one, or set VMRM_VM")
    return QemuVm(_qemu_root(cli, folder), name)


def _qemu_root(cli: Cli, folder: str | None) -> Path:
    return Path(folder).absolute() if folder else cli.db.state_dir / "qemu"


def become(pool: VmManager, vm: VmDescriptor, words: Sequence[str]) -> NoReturn:
    told = {"VM": vm.vm_name, "IP": vm.vm_ip, "PATH": vm.path, "LEASE": vm.token}
    told |= {"GROUP": str(vm.group), "DB": str(pool.db.path)}
    environment = os.environ | {f"VMRM_{name}": value for name, value in told.items()}
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(words[0], list(words), environment)  # noqa: S606
    except OSError as error:
        pool.release_vm(vm.vm_name, token=vm.token)
        missing = isinstance(error, FileNotFoundError)
        raise VmrmError(f"{words[0]!r}: {error.strerror}", code=127 if missing else 126) from error


def print_log(path: Path, goes_on: Callable[[], bool]) -> None:
    import shutil

    offset, last = 0, False
    while not last:
        last = not goes_on()
        if path.exists():
            with path.open("rb") as log:
                log.seek(offset)
                shutil.copyfileobj(log, sys.stdout.buffer)
                offset = log.tell()
            sys.stdout.buffer.flush()
        time_to_wait(0 if last else 0.2)


# === main ========================================================================================


def _whole(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise ValueError
    return int(text)


# By a parameter's type: what reads its word, and what is said of a word that it refuses.
_PARSERS: dict[Any, tuple[Callable[[str], object], str]] = {
    str: (str, ""),
    bool: (
        {"True": True, "False": False}.__getitem__,
        "follows a switch, which takes no value; put switches last",
    ),
    float: (parse_seconds, "is not a number of seconds, 0 or more"),
    int: (_whole, "is not a whole number, 1 or more"),
    Path: (lambda word: Path(word or None), "names no file"),  # type: ignore[arg-type]
}


# Fire by itself guesses a type from the word.
def _parser(name: str, kind: Any) -> Callable[[str], object]:
    reads, fault = _PARSERS.get(kind) or (functools.partial(checked_word, name, known=kind), "")

    def parse(word: str) -> object:
        try:
            return reads(word)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{word!r} {fault}" if fault else str(error)) from None

    return parse


class _Pending:
    """A command that was understood but has not run: it runs once every word was consumed."""

    def __init__(self, run: Callable[[Cli], object]) -> None:
        self.run = run

    def __dir__(self) -> list[str]:
        return []  # fire applies left-over words to what it finds here


class _Group(dict[str, Any]):
    def __dir__(self) -> list[str]:
        return []  # fire would offer a dictionary's methods as well


def _for_fire(name: str, entry: Any) -> Any:
    """Return a command, or a group, as fire is to see it: what fire calls changes nothing."""
    if not isinstance(entry, Command):
        group = _Group({member: _for_fire(member, entry[member]) for member in entry})
        group.__doc__ = GROUPS[name]
        return group
    from fire import decorators

    def pending(*args: Any, **kwargs: Any) -> _Pending:
        return _Pending(lambda cli: entry.function(cli, *args, **kwargs))

    parameters, parsers = [], {}
    for parameter in entry.parameters.values():
        kind = next(iter(get_args(parameter.annotation)), parameter.annotation)  # without None
        parsers[parameter.name] = _parser(parameter.name, kind)
        shown = str if issubclass(kind, str) else kind
        parameters.append(parameter.replace(annotation=shown))
    pending.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    pending.__doc__ = entry.help
    return decorators.SetParseFns(**parsers)(decorators.SetParseFn(str)(pending))


def _named(words: Sequence[str]) -> tuple[list[str], Any]:  # a command, or a group
    names: list[str] = []
    found: Any = COMMANDS
    for word in words:
        if isinstance(found, Command) or word.startswith("-"):
            break
        name = word.replace("_", "-")
        if name not in found:
            see = " ".join(["See: vmrm", *names, "--help"])
            raise UsageError(f"no such command: {word}", see)
        names.append(name)
        found = found[name]
    return names, found


def _understand(words: Sequence[str], tail: Sequence[str]) -> _Pending:
    """Return the command that the words mean; it does nothing if fire has printed help."""
    names, entry = _named(words)
    rest, name = words[len(names) :], " ".join(["vmrm", *names])
    is_command, see = isinstance(entry, Command), f"See: {name} --help"
    if tail and not (is_command and entry.tail):
        raise UsageError(f"{name} takes no words after '--'", see)
    if is_command and not rest and all(p.default != p.empty for p in entry.parameters.values()):
        return _Pending(entry.function)  # `status`, in a loop, need not import fire
    if {"--help", "-h"} & set(rest):
        rest = ["--", "--help"]
    if short := [word for word in rest if re.match("--?[A-Za-z](=|$)", word)]:
        raise UsageError(f"options are not abbreviated: {short[0]}", see)
    import fire

    fire.core.Display = lambda lines, out: print("\n".join(lines))  # no pager
    fire.decorators.FIRE_METADATA = "_fire_metadata"  # which help hides
    fire.helptext._GetShortFlags = lambda flags: []
    shown = _for_fire(names[-1] if names else "", entry)
    for member in reversed(names):
        shown = _Group({member: shown})
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            got = fire.Fire(
                shown, [*names, *rest], "vmrm", lambda it: None if isinstance(it, _Pending) else it
            )
    except fire.core.FireExit as end:
        if end.code:
            said = end.trace.elements[-1].ErrorAsStr()
            said = re.sub(r"^Missing required flags: {'(.*)'}", r"missing option: --\1", said)
            raise UsageError(said[:1].lower() + said[1:], see) from None
        got = None
    except UsageError as error:  # of a parser
        error.hint = see
        raise
    return got if isinstance(got, _Pending) else _Pending(lambda _: None)


def _take_apart(argv: Sequence[str]) -> tuple[Cli, list[str]]:
    """Return the options of all commands, which may stand anywhere before the words of a program,
    and the words that fire is to understand."""
    path, ours, words, tail, rest = None, set(), list[str](), list[str](), list(argv)
    while rest:
        word = rest.pop(0)
        is_exec = words[:1] == ["exec"]
        if word in ("--json", "--quiet"):
            ours.add(word)
        elif word == "--db" or word.startswith("--db="):
            path = word[5:] or (rest.pop(0) if rest and word == "--db" else "")
            if not path:
                raise UsageError("--db needs a path")
        elif word == "--" and words and rest not in (["--help"], ["-h"]):
            if not rest:
                raise UsageError("nothing follows --", "Name a command after it, or leave it out")
            tail, rest = rest, []
        elif is_exec and word.startswith("--") and "=" not in word:
            words += [word, *rest[:1]]
            del rest[:1]
        elif is_exec and not word.startswith("-"):  # the VM, and all else is the program's
            words.append(word)
            tail, rest = rest[rest[:1] == ["--"] :], []
        else:
            words.append(word)
    return Cli(path, Screen("--json" in ours, "--quiet" in ours), tail), words


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, this process's own by default; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    screen = Screen()
    try:
        if words[:1] == ["_supervise"]:
            return _supervise(words[1:])
        if words[:1] == ["_check_agent"]:
            return _check_agent(words[1:])
        cli, line = _take_apart(words)
        screen = cli.screen
        need_packages(*PACKAGES)
        with contextlib.closing(cli):
            result = _understand(line, cli.tail).run(cli)
            if result is not None:
                screen.show(result)
        return 0
    except VmrmError as error:
        screen.error(error)
        return error.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except sqlite3.DatabaseError as error:
        screen.error(SchemaError(f"the database failed: {error}", "Look closer: vmrm check"))
        return 3
    except Exception as error:
        told = _told(error, words)
        screen.error(told)
        return told.code


# What a host refuses whoever asks, and what it may grant later.
_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG}
_SHORTAGES = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE}


def _told(error: Exception, words: Sequence[str]) -> VmrmError:
    """Return an unforeseen error as the user's, if the command line names its file, the host's,
    or a fault of vmrm, whose traceback is printed."""
    if isinstance(error, drivers.AddressError):
        return UsageError(str(error))
    if isinstance(error, drivers.DriverError):
        return VmrmError(str(error), error.hint)
    if isinstance(error, OSError) and error.strerror:
        path = "" if error.filename is None else os.path.realpath(os.fsdecode(error.filename))
        said = f"{os.fsdecode(error.filename)!r}: " if path else ""
        said += error.strerror[:1].lower() + error.strerror[1:]
        given = [os.path.realpath(word.partition("=")[2] or word) for word in words if word]
        if path and any(Path(path).is_relative_to(place) for place in given):
            return UsageError(said)
        if error.errno in _SHORTAGES:
            return Unavailable(said)
        if error.errno in _REFUSALS:
            return VmrmError(said)
    traceback.print_exception(error)
    what = f"internal error: {type(error).__name__}: {_one_line(error)}"
    return VmrmError(what, "This is a fault of vmrm: please report it, with the lines above")


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _end_after_all(lost: sys.UnraisableHookArgs) -> None:
    """End a little later if a signal's exception ended nothing but the destructor it met."""

    def end(*_: object) -> NoReturn:
        assert lost.exc_value is not None
        raise lost.exc_value

    if isinstance(lost.exc_value, SystemExit | KeyboardInterrupt):
        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    else:
        sys.__unraisablehook__(lost)


def console() -> NoReturn:
    """Be the `vmrm` console command. What ends it lets it clean up first, if it can be caught."""
    sys.unraisablehook = _end_after_all
    for number in (signal.SIGTERM, signal.SIGHUP) if sys.argv[1:2] != ["_supervise"] else ():
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, _end)
    if sys.stdout is not None:  # else there is none: a daemon's, perhaps
        cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":
    console()
