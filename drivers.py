"""Talk to the agent inside a virtual machine, and play that agent where there is none.

Bytes flow through four parts, each usable without the next:

    socket  <->  Link  ->  FrameBuffer  ->  Session  ->  driver's methods
               (waits)   (bytes to lines) (lines to replies)

`FrameBuffer` and `Session` do no input or output. `Link` is one connection; whatever fails
inside it closes it for good, so a socket is never left holding a request or out of step. The
rule not to be broken: a request over 1 KiB travels alone, since two that together exceed one
read of the agent lose a reply on virtio-serial (measured with qemu-ga 7.2).

Errors say what is wrong, not where it was noticed:

    DriverError (OSError)         message, hint
    ├── AddressError              no agent's address (also a ValueError)
    ├── ConnectError              address
    │   ├── NoSocket              nothing listens at that address
    │   └── NoAnswer              something listens and says nothing
    ├── DriverTimeout             what, seconds (also a TimeoutError)
    ├── LinkLost                  the peer closed or reset the connection
    ├── ProtocolError             the peer broke the protocol
    │   ├── FrameError            raw
    │   └── ReplyError            reply, sent
    ├── StateError                a call on a driver that is not connected
    └── AgentError                class_, desc, sent: the agent answered with an error
        ├── CommandDisabled       the agent's policy forbids the command
        ├── CommandMissing        the agent does not know the command
        ├── Frozen                disabled while the guest's file systems are frozen
        └── UnknownPid            the agent knows no such program (any more)

The guest is not trusted: every reply is checked for types, sizes and encoding before use.
Facts about the protocol come from QEMU's qga/qapi-schema.json and from measurements with
qemu-ga 7.2 and 10.2. This module needs the standard library alone.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import functools
import io
import itertools
import json
import logging
import math
import mmap
import os
import re
import reprlib
import resource
import select
import signal
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TypeVar, cast

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

# === errors =======================================================================================


def printable(text: str | bytes, limit: int | None = 1000, keep: str | None = None) -> str:
    """Return text that a guest may have made so that rows, logs, terminals and pages can have it.

    What does not print is escaped as in JSON, but for *keep*, without which it becomes one line
    with single blanks; what has over *limit* characters (None: any number) ends with "…".
    """
    longest = len(text) if limit is None else 4 * limit  # blanks and bytes take more
    cut = len(text) > longest
    text = text[:longest].decode(errors="replace") if isinstance(text, bytes) else text[:longest]
    if keep is None:
        text = " ".join(text.split())
    if limit is not None and (cut or len(text) > limit):
        text = text[: limit - 1] + "…"
    if text.translate(dict.fromkeys(map(ord, keep or ""))).isprintable():
        return text
    escaped = "".join(
        c if c.isprintable() or c in (keep or "") else json.dumps(c)[1:-1] for c in text
    )
    return escaped if limit is None or len(escaped) <= limit else escaped[: limit - 1] + "…"


class DriverError(OSError):
    """Any failure of a driver, an OSError as the reference says: one printable line, and a hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = printable(message)
        self.hint = hint
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # The parameters of the classes differ; a copy needs the members alone.
        return type(self).__new__, (type(self),), self.__dict__


class AddressError(DriverError, ValueError):
    """A text that is no agent's address."""


class ConnectError(DriverError):
    """No connection to `address`."""

    def __init__(self, address: str, reason: str, hint: str = "") -> None:
        super().__init__(f"agent at {address!r} {reason}", hint)
        self.address = address


class NoSocket(ConnectError):
    """Nothing listens at `address`."""


class NoAnswer(ConnectError):
    """Something accepts connections at `address`, but no agent answers."""


class DriverTimeout(DriverError, TimeoutError):
    """`what` was not done within `seconds`."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"{what} was not done within {seconds:g} s")
        self.what, self.seconds = what, seconds


class LinkLost(DriverError):
    """The peer closed or reset the connection; what was under way may or may not have run."""


class ProtocolError(DriverError):
    """The peer sent something that the protocol does not allow."""


class FrameError(ProtocolError):
    """`raw` (its beginning) is not a frame."""

    def __init__(self, reason: str, raw: bytes) -> None:
        super().__init__(f"frame {reason}: {raw[:60]!r}")
        self.raw = raw[:1000]


class ReplyError(ProtocolError):
    """`reply` does not fit the request `sent` (a command's name, or "" if none is known)."""

    def __init__(self, reason: str, reply: Any, sent: str = "") -> None:
        # A hostile reply may be huge or nested too deeply for repr().
        self.reply = reprlib.repr(reply)
        super().__init__(f"reply to {sent!r} {reason}: {self.reply}")
        self.sent = sent


class StateError(DriverError):
    """The driver is not connected, or not any more."""

    def __init__(self, message: str = "driver is not connected") -> None:
        super().__init__(message, "Call connect() first")


class AgentError(DriverError):
    """The agent answered `sent` (a command's name) with an error of class `class_` and text `desc`.

    Decide by class, never by text, which differs between versions of the agent.
    """

    def __init__(self, class_: str, desc: str, sent: str, hint: str = "") -> None:
        super().__init__(f"{sent} failed in the guest: {desc}", hint)
        self.class_, self.desc, self.sent = class_, desc[:1000], sent


class CommandDisabled(AgentError):
    """The agent knows the command, and its configuration forbids it."""


class CommandMissing(AgentError):
    """The agent does not know the command; it is too old, or built for another system."""


class Frozen(AgentError):
    """The guest's file systems are frozen; until they are thawed hardly any command is allowed."""


class UnknownPid(AgentError):
    """The agent knows no program of this pid: never started, already asked, or before a reboot."""


# === deadline =====================================================================================


class Deadline:
    """A point in monotonic time, made once and passed down; None means never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self._at = time.monotonic() + self.seconds

    def remaining(self) -> float:
        """Return the seconds left, never negative; infinity if there is no end."""
        return max(0.0, self._at - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether no time is left."""
        return self.remaining() <= 0


# Yields seconds to wait between looks: short at first, growing to *longest*, without end.
def _delays(longest: float) -> Iterator[float]:
    delay = min(0.0003, longest)
    while True:
        yield delay
        delay = min(delay * 1.5, longest)


WaitHook = Callable[[int, int, float], bool]
Seconds = float | None
Words = Mapping[str, Any] | None  # a request's arguments
Copy = Generator[int, None, None]  # yields the bytes copied so far, per chunk
GuestPath = str | PurePath
LocalPath = str | os.PathLike[str]
Env = Sequence[str] | None
Data = str | bytes | None


def plain_wait(fd: int, events: int, seconds: float) -> bool:
    """Wait until *fd* has one of poll's *events*, and tell whether it has; fd -1 passes time."""
    if fd < 0:
        # Poll counts whole milliseconds, too coarse for the first looks at a program.
        select.select((), (), (), seconds)
        return False
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(None if seconds == math.inf else seconds * 1000))


# === addresses ====================================================================================


class Address(NamedTuple):
    """Where an agent listens: a socket `family` and the `target` that connect() takes."""

    family: int
    target: str | tuple[str, int] | tuple[int, int]

    def __str__(self) -> str:
        if isinstance(self.target, str):
            return self.target if self.target.startswith("/") else f"unix:{self.target}"
        host, port = self.target
        if self.family == socket.AF_VSOCK:
            return f"vsock:{host}:{port}"
        return f"tcp:[{host}]:{port}" if ":" in str(host) else f"tcp:{host}:{port}"


_TCP = re.compile(r"tcp:(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]]+)):(\d{1,5})", re.ASCII)
_VSOCK = re.compile(r"vsock:(\d{1,10}):(\d{1,10})", re.ASCII)
# A plain path has no colon, or a slash before it.
_PATH = re.compile(r"unix:([^\0]+)|([^\0:]*/[^\0]*|[^\0:]+)")


def parse_address(text: str) -> Address:
    """Read `/p`, `unix:/p`, `tcp:HOST:PORT`, `tcp:[V6]:PORT` or `vsock:CID:PORT`."""
    if (match := _TCP.fullmatch(text)) and 0 < int(match[3]) < 65536:
        return Address(socket.AF_INET, (match[1] or match[2], int(match[3])))
    if (match := _VSOCK.fullmatch(text)) and max(int(match[1]), int(match[2])) < 2**32 - 1:
        return Address(socket.AF_VSOCK, (int(match[1]), int(match[2])))
    if match := _PATH.fullmatch(text):
        return Address(socket.AF_UNIX, match[1] or match[2])
    raise AddressError(
        f"address {text!r} is not a path, unix:PATH, tcp:HOST:PORT or vsock:CID:PORT"
    )


@contextlib.contextmanager
def short_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a name of the socket *path* that fits into a UNIX address of 107 bytes (unix(7))."""
    if len(os.fsencode(path)) <= 107:
        yield os.fspath(path)
        return
    folder, name = os.path.split(path)
    fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


# With vsock, nobody listens on the port (ECONNRESET), or there is no such guest (ENODEV).
_NOTHING_THERE = {
    errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENODEV,
    errno.EHOSTUNREACH, errno.ENETUNREACH,
}  # fmt: skip
# An agent answers within milliseconds, a busy one within this.
_FAIR_TRY_S = 0.5
_BUSY_HINT = "Start the guest's agent, or stop the other client that perhaps holds the socket"


def _refusal(address: Address, code: int) -> ConnectError:
    if code in (errno.EAGAIN, errno.ETIMEDOUT):  # the queue of a busy server is full
        return NoAnswer(str(address), "does not take the connection", _BUSY_HINT)
    hint = "Start the VM or its agent, or correct the path"
    if code in (errno.EACCES, errno.EPERM):
        hint = "You may not use this socket: see whose it is (ls -l); be its owner or in its group"
    kind = NoSocket if code in _NOTHING_THERE else ConnectError
    return kind(str(address), f"cannot be reached: {os.strerror(code)}", hint)


def _open_socket(address: Address, wait: WaitHook, deadline: Deadline) -> socket.socket:
    """Return a connected, non-blocking socket. Raises ConnectError: of a host's last address."""
    with contextlib.ExitStack() as stack:
        targets: list[tuple[int, Any]] = [(address.family, address.target)]
        try:
            if isinstance(address.target, str):
                targets = [(socket.AF_UNIX, stack.enter_context(short_path(address.target)))]
            elif address.family == socket.AF_INET:
                host, port = str(address.target[0]), address.target[1]
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                targets = [(family, target) for family, _, _, _, target in found]
        except socket.gaierror as error:
            raise NoSocket(str(address), f"has no known host: {error.strerror}") from error
        except OSError as error:
            raise _refusal(address, error.errno or 0) from error
        code = errno.EHOSTUNREACH
        for family, target in targets:
            made = _connect(family, target, wait, deadline)
            if isinstance(made, socket.socket):
                return made
            code = made
    raise _refusal(address, code)


# Returns the socket, or why there is none as an errno; what *wait* raises passes through.
def _connect(family: int, target: Any, wait: WaitHook, deadline: Deadline) -> socket.socket | int:
    with contextlib.ExitStack() as unless_connected:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            unless_connected.callback(sock.close)
            code = sock.connect_ex(target)
        except OSError as error:
            return error.errno or errno.ENAMETOOLONG
        if code == errno.EINPROGRESS:
            ready = wait(sock.fileno(), select.POLLOUT, deadline.remaining())
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if ready else errno.ETIMEDOUT
        if code:
            return code
        if family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        unless_connected.pop_all()
    return sock


# === frame buffer =================================================================================

# Bounds of a reply, looked at before it is parsed: what it costs to hold, to parse, to print.
# Content comes as one text of base64, so also the largest replies have few elements.
REPLY_LIMIT = 2**20  # bytes, if no content was asked for
_ELEMENT_LIMIT = 50_000
_DEPTH_LIMIT = 32


class FrameBuffer:
    """Bytes in, lines out; no input or output of its own."""

    def __init__(self, limit: int = REPLY_LIMIT) -> None:
        self.limit = limit  # bytes of a frame; may be changed at any time
        self.held = bytearray()  # of a frame that is not complete
        self._scanned = 0  # bytes of it known to hold no newline: big frames stay linear
        self._skipping = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take *data* in; while skipping, everything up to the mark is dropped at once."""
        if self._skipping:
            _, mark, data = bytes(data).partition(b"\xff")
            self._skipping = not mark
        self.held += data

    def skip_to_mark(self) -> None:
        """Discard everything up to and including the next 0xFF, without holding it in memory."""
        held = bytes(self.held)
        self.held.clear()
        self._scanned = 0
        self._skipping = True
        self.feed(held)

    def next_frame(self) -> bytes | None:
        """Return the next line that is not blank, or None if more bytes are needed."""
        while 0 <= (end := self.held.find(b"\n", self._scanned)) <= self.limit:
            frame = bytes(memoryview(self.held)[:end])
            # Deleting in front only moves a pointer in CPython's bytearray.
            del self.held[: end + 1]
            self._scanned = 0
            if frame and not frame.isspace():
                return frame
        self._scanned = len(self.held)
        if self._scanned > self.limit:
            raise FrameError(f"exceeds {self.limit} bytes", bytes(self.held[:1000]))
        return None


# === session ======================================================================================


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way; its reply is kept here until somebody asks for it."""

    command: str
    ident: int
    large: bool  # nothing else may be under way beside it
    limit: int  # bytes of the reply
    done: bool = False
    reply: dict[str, Any] = field(default_factory=dict)

    def result(self) -> Any:
        """Return what the agent returned. Raises AgentError if it answered with an error."""
        if told := self.reply.get("error"):
            raise AgentError(told["class"], told["desc"], self.command)
        return self.reply["return"]


# Requests up to this size may overlap; measured safe on virtio-serial up to 2.1 kB in one write.
_SMALL_REQUEST = 1024
_OUTPUT_LIMIT = 16 * 2**20  # GUEST_EXEC_MAX_OUTPUT in qga/commands.c


def _no_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_decode_json = json.JSONDecoder(parse_constant=_no_json).decode


class Session:
    """Requests and replies of one connection, matched by id; no input or output of its own.

    Ids begin at a random number: a late reply to an earlier connection answers nothing here.
    """

    def __init__(self, log: logging.Logger) -> None:
        self.pending: dict[int, Ticket] = {}
        self._log = log
        self._idents = itertools.count(int.from_bytes(os.urandom(6)))

    def encode(self, command: str, arguments: Words, content: bytes = b"") -> tuple[Ticket, bytes]:
        """Return a ticket, to be made `pending`, and the bytes to send; *content* is written."""
        ident = next(self._idents)
        words = f', "arguments": {_encode_json(arguments)}' if arguments else ""
        data = f'{{"execute": {_encode_json(command)}, "id": {ident}{words}}}'.encode()
        if content:
            # Put in by hand: the encoder of JSON would look at each of its characters.
            base64_ = binascii.b2a_base64(content, newline=False)
            data = b"".join((data[:-2], b', "buf-b64": "', base64_, b'"}}'))
        size = 0  # of what the reply may have as base64
        if command == "guest-file-read":  # an agent reads 4096 bytes unless told
            size = int((arguments or {}).get("count", 4096))
        elif command == "guest-exec-status":
            size = 2 * _OUTPUT_LIMIT
        limit = REPLY_LIMIT + 4 * (size // 3 + 2)
        return Ticket(command, ident, len(data) > _SMALL_REQUEST, limit), data

    @property
    def next_limit(self) -> int:
        """Bytes that the next reply may have: the agent answers in the order of requests."""
        return next((ticket.limit for ticket in self.pending.values()), REPLY_LIMIT)

    def accept(self, frame: bytes) -> None:
        """Hand the reply in *frame* to its ticket; one that nobody waits for is dropped."""
        reply = parse_reply(frame)
        ident = reply.get("id")
        if type(ident) is not int:
            raise ReplyError("carries no id", reply)
        ticket = self.pending.pop(ident, None)
        if ticket is None:
            self._log.debug("dropped a reply with id %d that nobody waits for", ident)
            return
        ticket.reply, ticket.done = reply, True


# Counts a byte, up to the limit; of few in many, find() is many times faster than count().
def _count(frame: bytes, mark: bytes) -> int:
    at = number = 0
    while number <= _ELEMENT_LIMIT and (at := frame.find(mark, at) + 1):
        number += 1
    return number


# Possessive, so that what a guest leaves open is not tried again from each of its quotes.
_TEXT_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)


def _depth(frame: bytes) -> int:
    marks = _TEXT_OR_BRACKET.finditer(frame)
    return max(itertools.accumulate(bool(mark[1]) - bool(mark[2]) for mark in marks))


def parse_reply(frame: bytes) -> dict[str, Any]:
    """Return the reply in *frame*: an object with either `return` or a well-formed `error`."""
    if len(frame) > 2 * _DEPTH_LIMIT:
        openers = _count(frame, b"[") + _count(frame, b"{")
        if openers + _count(frame, b",") > _ELEMENT_LIMIT:
            raise FrameError(f"has over {_ELEMENT_LIMIT} elements", frame)
        if openers > _DEPTH_LIMIT and _depth(frame) > _DEPTH_LIMIT:
            raise FrameError(f"is nested over {_DEPTH_LIMIT} levels deep", frame)
    try:
        reply = _decode_json(frame.decode())
        if b"\\" in frame:  # half a surrogate pair is text that nobody could write down
            text = json.dumps(reply, ensure_ascii=False)
            reply = json.loads(text.encode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise FrameError("is not JSON", frame) from error
    if not isinstance(reply, dict) or ("return" in reply) == ("error" in reply):
        raise ReplyError("has not exactly one of return and error", reply)
    if "error" in reply:
        told = reply["error"]
        texts = [told.get("class"), told.get("desc")] if isinstance(told, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ReplyError("has a malformed error", reply)
    return reply


# === link =========================================================================================

_RECEIVE_BYTES = 256 * 1024
# qemu-ga writes 2 KiB at a time. Who takes each up at once spends both sides' time on wake-ups: a
# long reply is a quarter faster with this rest before each further piece of it (measured).
_LULL_S = 50e-6
_SYNC = "guest-sync-delimited"
_Method = TypeVar("_Method", bound=Callable[..., Any])


# Makes any failure inside a method of a link the end of the link.
def _fatal(method: _Method) -> _Method:
    @functools.wraps(method)
    def guarded(self: Link, *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except BaseException:
            self.close()
            raise

    return cast(_Method, guarded)


class Link:
    """One connection to an agent. Any failure inside it, of the wait hook too, ends it for good."""

    def __init__(self, sock: socket.socket, wait: WaitHook, log: logging.Logger) -> None:
        self.session = Session(log)
        self.last_handle = -1  # the highest file handle that this connection was given
        self._frames = FrameBuffer()
        self._wait = wait
        self._sock: socket.socket | None = sock
        # Mapped, not allocated: of a thousand links only those that receive much hold that much.
        self._space = memoryview(mmap.mmap(-1, _RECEIVE_BYTES))

    @property
    def open(self) -> bool:
        """Whether the link can still be used."""
        return self._sock is not None

    def fileno(self) -> int:
        """Return the socket's descriptor. Raises StateError on a closed link."""
        return self._live().fileno()

    def close(self) -> None:
        """Close the socket; requests under way lose their replies."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None

    def _live(self) -> socket.socket:
        if self._sock is None:
            raise StateError
        return self._sock

    @_fatal
    def post(self, ticket: Ticket, data: bytes, deadline: Deadline) -> Ticket:
        """Send a request, alone if it or one under way is large; return its ticket."""
        self._live()
        pending = self.session.pending
        if any(ticket.large or other.large for other in pending.values()):
            self.drain(deadline)
        pending[ticket.ident] = ticket
        self._send(data, deadline, ticket.command)
        return ticket

    def collect(self, ticket: Ticket, deadline: Deadline) -> Any:
        """Return the result of *ticket*, keeping the replies to others that come before it."""
        if not ticket.done and self.session.pending.get(ticket.ident) is not ticket:
            raise StateError(f"{ticket.command} was sent on a connection that is gone")
        self.drain(deadline, ticket)
        return ticket.result()

    @_fatal
    def drain(self, deadline: Deadline, until: Ticket | None = None) -> None:
        """Take in and keep the replies to all requests under way, or up to that to one."""
        while self.session.pending and not (until and until.done):
            waited_for = until or next(iter(self.session.pending.values()))
            self._receive(deadline, waited_for.command)

    @_fatal
    def sync(self, deadline: Deadline) -> int:
        """Drop whatever is left of earlier clients and return the random id that proves it."""
        ident = int.from_bytes(os.urandom(7))
        self.session.pending.clear()
        request = {"execute": _SYNC, "arguments": {"id": ident}}
        # 0xFF resets the agent's lexer, should half a request of a former client be in it.
        self._send(b"\xff" + json.dumps(request).encode(), deadline, _SYNC)
        self._frames.skip_to_mark()
        while not self._is_sync_reply(ident):
            self._receive(deadline, _SYNC, accept=False)
        return ident

    # A line behind a 0xFF that is not ours belongs to a former client.
    def _is_sync_reply(self, ident: int) -> bool:
        while (frame := self._frames.next_frame()) is not None:
            with contextlib.suppress(ProtocolError):
                if parse_reply(frame.rpartition(b"\xff")[2]).get("return") == ident:
                    return True
            self._frames.skip_to_mark()
        return False

    def _send(self, data: bytes, deadline: Deadline, what: str) -> None:
        sock, rest = self._live(), memoryview(data)
        while rest:
            try:
                rest = rest[sock.send(rest) :]
            except BlockingIOError:
                left = deadline.remaining()
                if not left or not self._wait(sock.fileno(), select.POLLOUT, left):
                    raise DriverTimeout(f"sending {what}", deadline.seconds) from None
            except OSError as error:
                raise LinkLost(f"connection was lost while sending {what}: {error}") from error

    # Waits for bytes, takes them in and, unless a sync goes on, hands out what is complete.
    def _receive(self, deadline: Deadline, what: str, accept: bool = True) -> None:
        sock = self._live()
        # A guest that never pauses must not outlast the deadline either.
        left = deadline.remaining()
        if not left or not self._wait(sock.fileno(), select.POLLIN, left):
            raise DriverTimeout(what, deadline.seconds)
        if self._frames.held:
            plain_wait(-1, 0, _LULL_S)
        try:
            size = sock.recv_into(self._space)
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkLost(f"connection was lost while waiting for {what}: {error}") from error
        if not size:
            raise LinkLost(f"agent closed the connection before it answered {what}")
        self._frames.feed(self._space[:size])
        self._frames.limit = self.session.next_limit
        while accept and (frame := self._frames.next_frame()) is not None:
            self.session.accept(frame)
            self._frames.limit = self.session.next_limit


# === abstract driver ==============================================================================

# What the reference's methods run in a guest, for sh and for PowerShell. Paths are arguments ("sh
# -c SCRIPT sh PATH", or the array $w); none is ever part of a script.
STOP_PS = "$ErrorActionPreference = 'Stop'; "
# Bytes, since a service has no console whose encoding could be set.
TELL_PS = (
    "$out = [Console]::OpenStandardOutput(); function tell($text) { "
    "$bytes = [Text.Encoding]::UTF8.GetBytes($text + [char]0); "
    "$out.Write($bytes, 0, $bytes.Length) }; function seconds($time) { "
    "[int64][Math]::Floor(($time - [datetime]'1970-01-01').TotalSeconds) }; "
)
_EXISTS = (
    # An empty IFS keeps spaces together while the shell still expands the wildcards in $1.
    '[ -e "$1" ] && exit 0; IFS=; for f in $1; do [ -e "$f" ] && exit 0; done; exit 1',
    "if (Test-Path -Path $w[0]) { exit 0 } exit 1",
)
_MKDIR = (
    'mkdir -p "$1"',
    "New-Item -ItemType Directory -Force -Path $w[0] -ErrorAction Stop | Out-Null",
)
_DELETE = (
    '[ -e "$1" ] || [ -L "$1" ] || exit 1; rm -f "$1"',
    "Remove-Item -LiteralPath $w[0] -Force -ErrorAction Stop",
)
_PRUNE = (
    'd=$1; while [ -n "$d" ] && rmdir "$d" 2>/dev/null; do '
    'case $d in */*) d=${d%/*};; *) d=;; esac; done; [ ! -e "$1" ]',
    "$d = $w[0]; while ($d -and -not (Get-ChildItem -Force -LiteralPath $d)) "
    "{ Remove-Item -LiteralPath $d -ErrorAction Stop; $d = Split-Path -Parent $d }",
)
_FIND = (
    # busybox's find has -newer but not -newermt, hence the reference file, and its touch takes no
    # fraction of a second, hence $3, the whole seconds.
    '[ -e "$1" ] || exit 2; [ -n "$2" ] || exec find "$1" -type f -print0; '
    "ref=$(mktemp) && trap 'rm -f \"$ref\"' EXIT || exit 3; "
    'touch -d "$2" "$ref" 2>/dev/null || touch -d "$3" "$ref" || exit 3; '
    'find "$1" -type f -newer "$ref" -print0',
    STOP_PS + TELL_PS + "$after = if ($w[1]) { [datetime]$w[1] } else { [datetime]::MinValue }; "
    "Get-ChildItem -Recurse -File -Force -LiteralPath $w[0] | "
    "Where-Object { $_.LastWriteTime -gt $after } | ForEach-Object { tell $_.FullName }",
)
_BOOT_ID = re.compile(rb"\s*([0-9A-Za-z-]+)\s*")
_BOOT_ID_PATH = "/proc/sys/kernel/random/boot_id"
# The first process of a Windows session has the boot's life. The time of booting itself will not
# do: it moves when the clock is set, which we do after each boot.
_BOOT_PS = (
    "(Get-CimInstance Win32_Process -Filter \"Name='wininit.exe'\").CreationDate.ToFileTimeUtc()"
)
USER_FOLDER = "work"  # of an entry with a user, beside the entry's script
_UNFIT_FOR_NAME = re.compile(r"[^A-Za-z0-9._-]")


def powershell(script: str, *words: str) -> list[str]:
    """Return the argument list that runs *script* on Windows with *words* as its array `$w`."""
    # To PowerShell, printers' single quotes are single quotes too.
    quoted = ", ".join(
        "'" + re.sub("(['\u2018\u2019\u201a\u201b])", r"\1\1", word) + "'" for word in words
    )
    # An encoded command needs no quoting by the agent, whose rules differ from the shell's.
    encoded = base64.b64encode(f"$w = @({quoted}); {script}".encode("utf-16-le")).decode()
    # Otherwise it tells its errors and its progress in XML.
    plain = ["-NoProfile", "-NonInteractive", "-OutputFormat", "Text"]
    return ["powershell.exe", *plain, "-EncodedCommand", encoded]


def script_argv(script: tuple[str, str], is_windows: bool, *words: str) -> list[str]:
    """Return the argument list that runs a script, for sh or for PowerShell, with *words*."""
    posix = ["/bin/sh", "-c", script[0], "sh", *words]
    return powershell(script[1], *words) if is_windows else posix


def _as_bytes(data: str | bytes) -> bytes:
    return data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data


class ExecStatus(NamedTuple):
    """What the agent knows of a program: once it exited, its exit code or signal and output."""

    exited: bool
    exitcode: int | None = None
    signal: int | None = None  # on Windows the number of an unhandled exception
    out: bytes = b""
    err: bytes = b""
    out_truncated: bool = False
    err_truncated: bool = False


class AbstractDriver(ABC):
    """What vmrm asks of a driver, and all that it asks: the contract of drivers by others.

    A subclass implements the abstract methods; everything else is made of them here. Beyond what
    each says of itself:

    - `connect` takes no parameter that it needs: it tries for `connect_timeout` seconds, which may
      be set before each call, and raises NoSocket, NoAnswer or another ConnectError at their end.
      It sets `target_os`, and `is_windows` for a guest with cmd.exe instead of /bin/sh.
    - The other methods raise a DriverError: DriverTimeout (after `timeout` seconds) or LinkLost
      for trouble with the connection, after which vmrm connects anew; an AgentError for what the
      guest refused; UnknownPid for a program that it does not know (any more).
    - `execute` takes a path or a name on the guest's PATH, and does not wait for the program.
      `exec_status` keeps in `output_cache`, by pid: exited, exitcode or signal, and, of a program
      that was started with `capture_output`, stdout and stderr as text, stdout_trunc, stderr_trunc.
    - `reboot` returns at once; `connect` is called until the guest is back, which `boot_id` tells.
    - Waiting is done by `wait(fd, events, seconds)`, or with fd -1 for time to pass; it is
      replaced by vmrm and may raise anything, to end the call.

    `config` needs "path" (see `parse_address`) and may have "name", "launch_dir", "timeout"
    (seconds per call, 30) and "connect_timeout" (seconds, 20). `log` takes what is worth knowing.
    """

    _EXEC_ERROR_MSG = "`execute` returned `None` indicating an error has occurred."

    def __init__(self, config: Mapping[str, Any], log: logging.Logger) -> None:
        path = config.get("path")
        if not path:
            raise FileNotFoundError(f"vm {config.get('name', '')!r} has no path to its agent")
        self.address = parse_address(str(path))
        self.config, self.log = config, log
        self.driver: Any = None  # the connection
        self.lock = threading.Condition()  # held while a request is sent and answered
        self.target_os = ""  # pretty name of the guest's system, known once connected
        self.is_windows = False
        self.used_agent_paths: set[str] = set()
        self.output_cache: dict[int, dict[str, Any]] = {}
        self.timeout = float(config.get("timeout") or 30)
        self.connect_timeout = float(config.get("connect_timeout") or 20)
        self.wait: WaitHook = plain_wait

    # --- what a subclass does ---

    @abstractmethod
    def connect(self) -> int:
        """Connect to the agent and synchronise; return the token of that exchange."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""
        raise NotImplementedError

    @abstractmethod
    def sync(self, timeout: float = 5) -> int | None:
        """Synchronise with the agent within *timeout* seconds; return the token or None."""
        raise NotImplementedError

    @abstractmethod
    def ping(self, timeout: float = 10) -> bool:
        """Tell whether the agent answers within *timeout* seconds."""
        raise NotImplementedError

    @abstractmethod
    def execute(
        self,
        path: str,
        arg: str | Sequence[str] | None = None,
        env: Env = None,
        input_data: Data = None,
        capture_output: bool = True,
    ) -> int | None:
        """Start a program in the guest; return its pid, or None if the agent refused.

        *arg* is one argument as text or a list of them; *env* (a list of "KEY=value") replaces
        the whole environment. A daemon counts as running while it holds captured output.
        """
        raise NotImplementedError

    @abstractmethod
    def exec_status(self, pid: int) -> dict[str, Any]:
        """Return what the agent knows of program *pid*, and pass it to `store_captured_output`."""
        raise NotImplementedError

    @abstractmethod
    def store_captured_output(self, pid: int, output: Mapping[str, Any]) -> None:
        """Keep what the agent told of program *pid* in `output_cache`."""
        raise NotImplementedError

    @abstractmethod
    def file_flush(self, handle: int) -> None:
        """Flush an open file of the guest."""
        raise NotImplementedError

    @abstractmethod
    def _write(self, filename: str, data: str | bytes, mode: str = "w") -> bool:
        """Write *data* to a file of the guest; return whether the agent accepted it."""
        raise NotImplementedError

    @abstractmethod
    def write_from_file(self, filename: str, local_filename: LocalPath, mode: str = "w") -> bool:
        """Write a local file's content to a file of the guest."""
        raise NotImplementedError

    @abstractmethod
    def read_file(self, filename: str, local_destination: LocalPath, mode: str = "rb") -> bool:
        """Fetch a file of the guest to the local path *local_destination*."""
        raise NotImplementedError

    @abstractmethod
    def get_os(self) -> str:
        """Return the pretty name of the guest's system."""
        raise NotImplementedError

    @abstractmethod
    def get_time(self) -> int:
        """Return the guest's time in nanoseconds since 1970."""
        raise NotImplementedError

    @abstractmethod
    def set_time(self, now_ns: int | None = None) -> None:
        """Set the guest's clock to *now_ns*, or to the host's present time."""
        raise NotImplementedError

    @abstractmethod
    def set_user_password(self, username: str, password: str) -> None:
        """Set the password of a user of the guest."""
        raise NotImplementedError

    @abstractmethod
    def network_get_interfaces(self) -> list[dict[str, Any]]:
        """Return the guest's network interfaces."""
        raise NotImplementedError

    @abstractmethod
    def reboot(self) -> None:
        """Make the guest reboot."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def get_engine() -> str:
        """Return the name of the engine whose VMs this driver can talk to."""
        raise NotImplementedError

    def connected(self, timeout: float = 10) -> dict[str, Any]:
        """Return {} if the agent answers within *timeout* seconds. Raises DriverTimeout if not."""
        if not self.ping(timeout):
            raise DriverTimeout("guest-ping", timeout)
        return {}

    # --- what else vmrm calls, made of the above; a subclass may know a better way ---

    def fileno(self) -> int:
        """Return a descriptor that is readable once the connection is lost, or -1."""
        return -1

    def call(self, command: str, arguments: Words = None, *, timeout: Seconds = None) -> Any:
        """Send the QEMU guest agent a request. Raises CommandMissing: there is no such agent."""
        raise CommandMissing("CommandNotFound", "this driver talks to no QEMU agent", command)

    def info(self) -> dict[str, Any]:
        """Return "version" and "supported_commands" of the agent, as far as it has them."""
        return {}

    def health(self, timeout: float = 10) -> str:
        """Return "ok", "frozen", "no-exec" (it answers, but runs no program) or "no-answer"."""
        program = ["cmd.exe", "/c", "exit 0"] if self.is_windows else ["/bin/sh", "-c", "exit 0"]
        try:
            self.connected(timeout)
            return "ok" if self.run(program, timeout=timeout).exitcode == 0 else "no-exec"
        except Frozen:
            return "frozen"
        except AgentError:
            return "no-exec"
        except DriverError:
            return "no-answer"

    def boot_id(self) -> str:
        """Return a word that changes with each boot of the guest, or "" if none can be had."""
        try:
            if self.is_windows:
                text = self.run(powershell(_BOOT_PS), timeout=self.timeout).out
            else:
                text = self.read_bytes(_BOOT_ID_PATH, limit=64)
        except AgentError as error:
            self.log.debug("the guest has no boot id: %s", error)
            return ""
        match = _BOOT_ID.fullmatch(text)
        return match[1].decode() if match else ""

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Env = None,
        input_data: Data = None,
        capture: bool = False,
    ) -> int:
        """Start a program and return its pid. Raises AgentError if it cannot be started."""
        return self._start(list(argv), env, input_data, capture)

    def _start(self, argv: list[str], env: Env, data: Data, capture: bool) -> int:
        pid = self.execute(argv[0], argv[1:], env, data, capture)
        if pid is None:
            raise AgentError("GenericError", f"cannot start {argv[0]!r}", "execute")
        return pid

    def status(self, pid: int, timeout: float = math.inf) -> ExecStatus:
        """Return what is known of *pid*; an end is told once. Raises UnknownPid."""
        self.exec_status(pid)
        entry = self.output_cache[pid]
        if not entry["exited"]:
            return ExecStatus(exited=False)
        del self.output_cache[pid]
        out, err = (_as_bytes(entry.get(name) or "") for name in ("stdout", "stderr"))
        cut = (bool(entry.get(f"{name}_trunc")) for name in ("stdout", "stderr"))
        number = entry.get("signal")
        code = entry["exitcode"] if number is None else None
        return ExecStatus(True, code, number, out, err, *cut)

    def run(self, argv: Sequence[str], *, timeout: Seconds = None, **options: Any) -> ExecStatus:
        """Run a program to its end and return its exit and output; *options* are those of `start`.

        After *timeout* seconds a DriverTimeout leaves connection and program as they are.
        """
        deadline, delays = Deadline(timeout), _delays(0.1)
        pid = self.start(argv, capture=True, **options)
        # A second of grace, so that the program's deadline does not cut a status in two.
        while not (status := self.status(pid, deadline.remaining() + 1)).exited:
            if deadline.expired:
                raise DriverTimeout(f"program {argv[0]!r}", deadline.seconds)
            self.wait(-1, 0, min(next(delays), deadline.remaining()))
        return status

    def read_bytes(self, path: str, *, limit: int, offset: int = 0) -> bytes:
        """Return at most *limit* bytes of the guest's file from *offset* on. Raises AgentError."""
        sink = io.BytesIO()
        for _ in self.pull(path, sink, offset=offset, limit=limit):
            pass
        return sink.getvalue()

    def push(self, source: BinaryIO, path: str, *, mode: str = "w") -> Copy:
        """Copy *source* to the guest's file *path*, in mode "w" or "a". Raises AgentError."""
        import tempfile

        with tempfile.NamedTemporaryFile(prefix="vmrm-") as copy:
            while chunk := source.read(1 << 20):
                copy.write(chunk)
            copy.flush()
            if not self.write_from_file(path, copy.name, mode):
                raise AgentError("GenericError", f"cannot write {path!r}", "write_from_file")
            yield copy.tell()

    def pull(self, path: str, sink: BinaryIO, *, offset: int = 0, limit: int | None = None) -> Copy:
        """Copy at most *limit* bytes of a file of the guest to *sink*. Raises AgentError."""
        import tempfile

        got, left = 0, math.inf if limit is None else limit
        with tempfile.TemporaryDirectory(prefix="vmrm-") as folder:
            copy = Path(folder) / "copy"
            if not self.read_file(path, copy):
                raise AgentError("GenericError", f"cannot read {path!r}", "read_file")
            with copy.open("rb") as source:
                source.seek(offset)
                while data := source.read(int(min(left - got, _PULL_BYTES))):
                    sink.write(data)
                    got += len(data)
                    yield got

    # --- programs and their output ---

    def _reset_cache(self) -> None:
        """Forget all output; after a reboot the same pids are other programs."""
        self.output_cache.clear()

    def get_exitcode(self, pid: int) -> int | None:
        """Return the exit code of *pid*, or None while it runs; for a signal 128 + its number."""
        status = self._cached_status(pid)
        if not status["exited"]:
            return None
        number = status.get("signal")
        if number is None:
            return int(status["exitcode"])
        return int(number) + (128 if number < 128 else 0)  # Windows has bigger ones

    def wait_for_exitcode(self, pid: int, interval: float = 1) -> int:
        """Return the exit code of *pid* once it has one, looking every *interval* s or sooner."""
        delays = _delays(interval)
        while (code := self.get_exitcode(pid)) is None:
            self.wait(-1, 0, next(delays))
        return code

    def evaluate_process_success(self, pid: int, interval: float = 1) -> bool:
        """Wait for *pid* as `wait_for_exitcode` does; return whether its exit code is 0."""
        return self.wait_for_exitcode(pid, interval) == 0

    def get_stdout(self, pid: int) -> str | None:
        """Return the standard output of *pid*, or None if there is none (yet)."""
        return self._get_stream("stdout", pid)

    def get_stderr(self, pid: int) -> str | None:
        """Return the standard error output of *pid*, or None if there is none (yet)."""
        return self._get_stream("stderr", pid)

    def _get_stream(self, stream_name: str, pid: int) -> str | None:
        return cast("str | None", self._cached_status(pid).get(stream_name))

    # The agent forgets a program when it has told its end once; so it is asked until then.
    def _cached_status(self, pid: int) -> dict[str, Any]:
        if not self.output_cache.get(pid, {}).get("exited"):
            self.exec_status(pid)
        return self.output_cache[pid]

    # --- files of the guest ---

    # Runs a script to its end; None if it cannot be started.
    def _run_script(
        self, script: tuple[str, str], path: GuestPath, *words: str, patience: float = 1
    ) -> ExecStatus | None:
        text = os.fspath(path)
        words = (f"./{text}" if text.startswith("-") else text, *words)  # else it is an option
        argv = script_argv(script, self.is_windows, *words)
        try:
            return self.run(argv, timeout=patience * self.timeout)
        except UnknownPid:
            raise
        except AgentError as error:
            self.log.error("%s %s", self._EXEC_ERROR_MSG, error)
            return None

    def _succeeds(self, script: tuple[str, str], path: GuestPath) -> bool | None:
        status = self._run_script(script, path)
        return None if status is None else status.exitcode == 0

    def file_exists(self, path: str) -> bool | None:
        """Tell whether *path*, or what its wildcards match, exists; None if that failed."""
        return self._succeeds(_EXISTS, path)

    def create_directories(self, directory: GuestPath) -> bool | None:
        """Create *directory* and what is missing above it; None if the attempt failed."""
        return self._succeeds(_MKDIR, directory)

    def delete_file(self, path: GuestPath) -> bool | None:
        """Delete the file *path*; False if there is none; None if the attempt failed."""
        return self._succeeds(_DELETE, path)

    def _delete_parent_directories(self, directory: PurePath) -> bool | None:
        """Delete *directory* and its parents up to the first that is not empty."""
        return self._succeeds(_PRUNE, directory)

    def make_file_executable(self, path: GuestPath) -> bool | None:
        """Let everybody run the file *path* (on Windows they may); None if the attempt failed."""
        return True if self.is_windows else self._succeeds(('chmod a+x "$1"', ""), path)

    def get_files(self, path: GuestPath, timestamp: str | float | None = None) -> list[str] | None:
        """Return all files at or below *path* (modified after *timestamp*), or None if that fails.

        A date in words is one for the guest's `touch -d` (on Windows PowerShell's [datetime]).
        """
        after = whole = "" if timestamp is None else str(timestamp)
        if isinstance(timestamp, int | float):
            after, whole = f"@{timestamp}", f"@{timestamp // 1:.0f}"
            if self.is_windows:
                after = datetime.fromtimestamp(timestamp, UTC).isoformat()
        status = self._run_script(_FIND, path, after, whole, patience=10)
        if status is None:
            return None
        if status.out_truncated or (status.exitcode != 0 and not status.out):
            reason = printable(status.err) or f"exit code {status.exitcode}"
            self.log.error("cannot list files at %r in the guest: %s", path, reason)
            return None
        return [name for name in status.out.decode(errors="replace").split("\0") if name]

    def write(self, filename: str, data: str | bytes, mode: str = "w") -> bool:
        """Write *data* to a file of the guest, creating the directories above it."""
        parent = self._pure_path(filename).parent
        if parent != parent.parent and not self.create_directories(parent):
            self.log.error("cannot create %r in the guest", str(parent))
            return False
        return self._write(filename, data, mode)

    def append(self, filename: str, content: str | bytes) -> bool:
        """Append *content* to a file of the guest, as `write` does."""
        return self.write(filename, content, mode="a")

    # --- places of a schedule entry ---

    def _pure_path(self, path: GuestPath) -> PurePath:
        return PureWindowsPath(path) if self.is_windows else PurePosixPath(path)

    def deconflict_agent_path(self, path: GuestPath) -> PurePath:
        """Return *path*, or the first of `path-2`, `path-3`, … that was not given out before."""
        wanted = str(self._pure_path(path))
        names = itertools.chain([wanted], (f"{wanted}-{n}" for n in itertools.count(2)))
        unique = next(name for name in names if name.casefold() not in self.used_agent_paths)
        self.used_agent_paths.add(unique.casefold())
        return self._pure_path(unique)

    def create_paths(self, schedule_entry: Any) -> None:
        """Choose the guest's places for *schedule_entry* and set them on it as text.

        `call_arguments_filename` is the script, `working_dir` where it runs (for an entry with a
        user, what is the user's), `reboot_filepath` the file there that asks for a reboot.
        """
        default, suffix = ("C:\\launch", "bat") if self.is_windows else ("/var/launch", "sh")
        program = str(schedule_entry.executable or "").replace("\\", "/").rpartition("/")[2]
        # Leading dots and dashes would hide the directory or look like an option.
        name = _UNFIT_FOR_NAME.sub("_", program).lstrip(".-")[:64] or "files"
        at = schedule_entry.start_time  # as a schedule writes it: -10, 0.5, inf
        at = int(at) if math.isfinite(at) and at == int(at) else at
        launch = self._pure_path(str(self.config.get("launch_dir") or default))
        place = self.deconflict_agent_path(launch / str(at) / name)
        schedule_entry.call_arguments_filename = str(place / f"call_arguments.{suffix}")
        if getattr(schedule_entry, "options", {}).get("user"):
            place /= USER_FOLDER
        schedule_entry.working_dir = str(place)
        schedule_entry.reboot_filepath = str(place / "reboot")


# === qemu guest agent driver ======================================================================

_PUSH_BYTES = 64 * 1024  # bigger writes are no faster, the agent's CPU is the bound (measured)
_PULL_BYTES = 256 * 1024  # the fastest reads, and still small enough to share the channel
_CRUMBS = 16  # in a row; an agent reads and writes what it is asked, but at the end of a file


def _field(reply: Any, key: str, kind: type, sent: str) -> Any:
    value = reply.get(key) if isinstance(reply, dict) else None
    if type(value) is not kind:
        raise ReplyError(f"has no {key} of type {kind.__name__}", reply, sent)
    return value


def _number(reply: Any, key: str, low: int, high: int, sent: str) -> int:
    value = _field(reply, key, int, sent)
    if not low <= value <= high:
        raise ReplyError(f"has a {key} out of range", reply, sent)
    return int(value)


def _content(reply: Any, key: str, sent: str) -> bytes:
    text = _field(reply, key, str, sent)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise ReplyError("has bad base64", text[:60], sent) from error


def _encoded(data: bytes | bytearray | memoryview) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _no_nul(*words: str) -> None:
    if any("\0" in word for word in words):
        raise ValueError(f"argument has a null character: {words!r}")


def _parse_status(reply: Any) -> ExecStatus:
    sent = "guest-exec-status"
    if not _field(reply, "exited", bool, sent):
        return ExecStatus(exited=False)
    if ("exitcode" in reply) == ("signal" in reply):
        raise ReplyError("has not exactly one of exitcode and signal", reply, sent)
    end = "exitcode" if "exitcode" in reply else "signal"
    told: dict[str, Any] = {end: _number(reply, end, -(2**31), 2**32 - 1, sent)}
    for stream in ("out", "err"):
        key = f"{stream}-data"
        data = _content(reply, key, sent) if key in reply else b""
        # Agents before 10.2 set `…-truncated` to false exactly when output *was* cut (QEMU commit
        # 28c5d27dd4), so its mere presence says nothing; the length does.
        cut = reply.get(f"{stream}-truncated") is True or len(data) == _OUTPUT_LIMIT
        told |= {stream: data, f"{stream}_truncated": cut}
    return ExecStatus(True, **told)


class AgentConnection(AbstractDriver):
    """A connection to a QEMU guest agent; what fails in it ends it, until the next `connect`."""

    def __init__(self, config: Mapping[str, Any], log: logging.Logger) -> None:
        super().__init__(config, log)
        self._learned = False
        self._info: dict[str, Any] | None = None

    def connect(self, timeout: Seconds = None, retry: bool = True) -> int:
        """Connect afresh, drop what earlier clients left, and return the synchronisation id.

        Each try has a new connection: one opened while a guest boots may stay mute for ever.
        Raises what the last try met that had time for an answer.
        """
        deadline = Deadline(self.connect_timeout if timeout is None else timeout)
        pauses = iter([0.05, 0.1, 0.2, 0.5])
        patience = 5.0 if retry else math.inf
        failure: DriverError | None = None
        while True:
            seconds = min(patience, deadline.remaining())
            try:
                with self.lock:
                    return self._connect_once(Deadline(seconds))
            except (NoSocket, NoAnswer, LinkLost, DriverTimeout, ProtocolError) as error:
                self.close()
                # Silence in what little time was left says less than what an earlier try met.
                if failure is None or seconds >= _FAIR_TRY_S or not isinstance(error, NoAnswer):
                    failure = error
                self.log.debug("cannot connect: %s", error)
            pause = next(pauses, 1.0)
            if not retry or deadline.remaining() <= pause:
                raise failure
            patience *= 2
            self.wait(-1, 0, pause)

    def _connect_once(self, deadline: Deadline) -> int:
        self.close()
        link = Link(_open_socket(self.address, self._wait_now, deadline), self._wait_now, self.log)
        try:
            ident = link.sync(deadline)
        except DriverTimeout as error:
            reason = "takes connections but does not answer"
            raise NoAnswer(str(self.address), reason, _BUSY_HINT) from error
        self.driver = link
        if not self._learned:
            self._reset_cache()
            self._learn_system()
        return ident

    def _wait_now(self, fd: int, events: int, seconds: float) -> bool:
        return self.wait(fd, events, seconds)

    def _learn_system(self) -> None:
        try:
            osinfo = self.call("guest-get-osinfo")
            self.target_os = self._pretty_name(osinfo)
            self.is_windows = osinfo.get("id") == "mswindows"
        except AgentError:  # it may not say so itself
            # Only agents for Windows offer this command (qga/qapi-schema.json).
            self.is_windows = self.enabled("guest-get-devices") and not self.boot_id()
            self.target_os = "Windows" if self.is_windows else "POSIX"
        self._learned = True

    def close(self) -> None:
        if self.driver is not None:
            self.driver.close()
        self.driver = self._info = None

    @property
    def connected_now(self) -> bool:
        """Whether there is a connection, as far as known without asking the agent."""
        return self.driver is not None and self.driver.open

    def fileno(self) -> int:
        """Return the socket's descriptor, to be polled while no call runs. Raises StateError."""
        return self._link().fileno()

    def _link(self) -> Link:
        link: Link | None = self.driver
        if link is None or not link.open:
            raise StateError
        return link

    def sync(self, timeout: float = 5) -> int | None:
        deadline = Deadline(timeout)
        with self.lock:
            link = self._link()
            try:
                link.drain(deadline)
                return link.sync(deadline)
            except (DriverTimeout, LinkLost, ProtocolError) as error:
                self.log.warning("cannot synchronise with the agent: %s", error)
                return None

    def ping(self, timeout: float = 10) -> bool:
        try:
            self.connected(timeout)
        except DriverError as error:
            self.log.debug("no answer to a ping: %s", error)
            return False
        return True

    def connected(self, timeout: float = 10) -> dict[str, Any]:
        self.call("guest-ping", timeout=timeout)
        return {}

    def call(self, command: str, arguments: Words = None, *, timeout: Seconds = None) -> Any:
        """Send one request and return what the agent returned, unchecked."""
        return self._call(self._link(), command, arguments, timeout)

    # Only ever on that link: on another one, a handle may be another file's.
    def _call(self, link: Link, command: str, words: Words = None, timeout: Seconds = None) -> Any:
        deadline = Deadline(self.timeout if timeout is None else timeout)
        with self.lock:
            ticket = link.post(*link.session.encode(command, words), deadline)
            return self._collect(link, ticket, deadline)

    def _collect(self, link: Link, ticket: Ticket, deadline: Deadline) -> Any:
        try:
            return link.collect(ticket, deadline)
        except AgentError as error:
            if error.class_ != "CommandNotFound":
                raise
            raise self._explained(link, error) from error

    # The class of a disabled and of a missing command is one: returns what *error* means.
    def _explained(self, link: Link, error: AgentError) -> AgentError:
        told = (error.class_, error.desc, error.sent)
        if error.sent in ("guest-info", "guest-fsfreeze-status"):
            return CommandDisabled(*told)
        try:
            self._info = None
            if error.sent not in self._commands(link):
                return CommandMissing(*told, "Install a newer guest agent")
            if self._call(link, "guest-fsfreeze-status") == "frozen":
                return Frozen(*told, "Thaw the guest's file systems: guest-fsfreeze-thaw")
        except AgentError:
            if self._info is None:
                return error
        return CommandDisabled(*told, f"Allow {error.sent} in the configuration of the agent")

    def info(self) -> dict[str, Any]:
        self._commands(self._link())
        return dict(self._info or {})

    def enabled(self, command: str) -> bool:
        """Tell whether the agent knows *command* and its configuration allows it."""
        return self._commands(self._link()).get(command, False)

    def _commands(self, link: Link) -> dict[str, bool]:
        if self._info is None:
            info = self._call(link, "guest-info")
            for item in _field(info, "supported_commands", list, "guest-info"):
                _field(item, "name", str, "guest-info")
                _field(item, "enabled", bool, "guest-info")
            self._info = info
        return {item["name"]: item["enabled"] for item in self._info["supported_commands"]}

    # Every member is optional, and a bare Linux tells of its kernel alone.
    @staticmethod
    def _pretty_name(osinfo: Any) -> str:
        keys = ("pretty-name", "name", "id", "kernel-release")
        names = [osinfo.get(key, "") for key in keys] if isinstance(osinfo, dict) else [None]
        if not all(isinstance(name, str) for name in names):
            raise ReplyError("names no system", osinfo, "guest-get-osinfo")
        return printable(next(filter(None, names), "unknown"))


class QemuGuestAgentDriver(AgentConnection):
    """Driver for the QEMU Guest Agent; below "strict" a method gives a value or raises an error."""

    @staticmethod
    def get_engine() -> str:
        return "QemuVM"

    # --- programs, as in the reference ---

    def execute(
        self,
        path: str,
        arg: str | Sequence[str] | None = None,
        env: Env = None,
        input_data: Data = None,
        capture_output: bool = True,
    ) -> int | None:
        if arg is not None and not isinstance(arg, str | list | tuple):
            raise TypeError(f"arg must be a string or a list, not {type(arg).__name__}")
        argv = [path, *([arg] if isinstance(arg, str) else arg or [])]
        try:
            return self.start(argv, env=env, input_data=input_data, capture=capture_output)
        except AgentError as error:
            self.log.error("cannot start %r: %s", path, error)
            return None

    # The reference has three names for this; none of them waits for the program.
    async_exec = _prep_async_exec = execute

    def exec_status(self, pid: int) -> dict[str, Any]:
        reply = self._ask_status(pid)
        self.store_captured_output(pid, reply)
        return dict(reply)

    def store_captured_output(self, pid: int, output: Mapping[str, Any]) -> None:
        status = _parse_status(output)
        entry: dict[str, Any] = {"exited": status.exited}
        for key in ("exitcode", "signal"):
            if (number := getattr(status, key)) is not None:
                entry[key] = number
        for stream in ("out", "err"):
            if data := getattr(status, stream):
                entry[f"std{stream}"] = data.decode(errors="replace")
                entry[f"std{stream}_trunc"] = getattr(status, f"{stream}_truncated")
        self.output_cache[pid] = entry

    # --- files, as in the reference ---

    # Takes all *steps* to do *what*; returns False (and logs why) if the agent refused one.
    def _accepted(self, what: str, steps: Iterable[object]) -> bool:
        try:
            for _ in steps:
                pass
        except AgentError as error:
            self.log.error("cannot %s in the guest: %s", what, error)
            return False
        return True

    def _write(self, filename: str, data: str | bytes, mode: str = "w") -> bool:
        copy = self.push(io.BytesIO(_as_bytes(data)), filename, mode=mode)
        return self._accepted(f"write {filename!r}", copy)

    def write_from_file(self, filename: str, local_filename: LocalPath, mode: str = "w") -> bool:
        with Path(local_filename).open("rb") as source:
            return self._accepted(f"write {filename!r}", self.push(source, filename, mode=mode))

    def read_file(self, filename: str, local_destination: LocalPath, mode: str = "rb") -> bool:
        if mode not in ("r", "rb"):
            raise ValueError(f"mode {mode!r} does not read")
        target = Path(local_destination)
        temporary = target.with_name(f".vmrm-{os.urandom(8).hex()}")
        try:
            with temporary.open("xb") as sink:
                done = self._accepted(f"read {filename!r}", self.pull(filename, sink))
            if done:
                temporary.replace(target)
            return done
        finally:
            temporary.unlink(missing_ok=True)

    def file_flush(self, handle: int) -> None:
        self.call("guest-file-flush", {"handle": handle})

    def file_write_content(self, handle: int, content: str | bytes) -> bool:
        """Write *content* to an open file; return False (and log why) if the agent refused."""
        return self._write_to_handle(handle, io.BytesIO(_as_bytes(content)))

    def file_write_from_file(self, handle: int, filename: LocalPath) -> bool:
        """Write the local file *filename* to an open file; return as `file_write_content` does."""
        with Path(filename).open("rb") as source:
            return self._write_to_handle(handle, source)

    def _write_to_handle(self, handle: int, source: BinaryIO) -> bool:
        chunks = iter(lambda: source.read(_PUSH_BYTES), b"")
        steps = map(functools.partial(self.write_chunk, handle), chunks)
        return self._accepted(f"write to handle {handle}", steps)

    # --- the guest's system, as in the reference ---

    def get_os(self) -> str:
        return self._pretty_name(self.call("guest-get-osinfo"))

    def get_time(self) -> int:
        reply = {"time": self.call("guest-get-time")}
        return _number(reply, "time", -(2**63), 2**63 - 1, "guest-get-time")

    def set_time(self, now_ns: int | None = None) -> None:
        self.call("guest-set-time", {"time": time.time_ns() if now_ns is None else now_ns})

    def set_user_password(self, username: str, password: str, crypted: bool = False) -> None:
        """Set the password of the guest's user; *crypted*: it is one of crypt(3) already."""
        words = {"username": username, "password": _encoded(_as_bytes(password))}
        self.call("guest-set-user-password", {**words, "crypted": crypted})

    def network_get_interfaces(self) -> list[dict[str, Any]]:
        found = self.call("guest-network-get-interfaces")
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise ReplyError("is no list of objects", found, "guest-network-get-interfaces")
        return found

    def reboot(self, timeout: float = 1) -> None:
        """Make the guest reboot, and close; silence for *timeout* seconds means that it will."""
        with self.lock:
            link = self._link()
            encoded = link.session.encode("guest-shutdown", {"mode": "reboot"})
            ticket = link.post(*encoded, Deadline(self.timeout))
            try:
                self._collect(link, ticket, Deadline(timeout))
            except (DriverTimeout, LinkLost):  # only a failure is answered, in milliseconds
                self.log.debug("the guest accepted the reboot silently")
            self.close()
            self._reset_cache()

    # --- strict: programs ---

    def _start(self, argv: list[str], env: Env, data: Data, capture: bool) -> int:
        _no_nul(*argv, *(env or ()))
        request: dict[str, Any] = {"path": argv[0], "arg": argv[1:], "capture-output": capture}
        if env is not None:
            request["env"] = list(env)
        if data is not None:
            request["input-data"] = _encoded(_as_bytes(data))
        pid = _number(self.call("guest-exec", request), "pid", 1, 2**63 - 1, "guest-exec")
        # Pids come round; what an earlier program left is not this one's.
        self.output_cache.pop(pid, None)
        return pid

    def status(self, pid: int, timeout: float = math.inf) -> ExecStatus:
        return _parse_status(self._ask_status(pid, timeout))

    def _ask_status(self, pid: int, timeout: float = math.inf) -> Any:
        seconds = min(self.timeout, timeout)
        try:
            return self.call("guest-exec-status", {"pid": pid}, timeout=seconds)
        except AgentError as error:
            # Texts differ by version; an unknown pid is the only generic error of this command.
            if type(error) is AgentError:
                raise UnknownPid(error.class_, error.desc, error.sent) from error
            raise

    # --- strict: files ---

    def open(self, path: str, mode: str) -> int:
        """Open a file of the guest in one of fopen's modes; return its handle."""
        return self._open(self._link(), path, mode)

    # On virtio-serial a connection outlives the agent, which counts handles up from 1000 for ever,
    # even over its own restarts (fd_counter in qga/main.c), but may start again with the guest. Who
    # still holds a handle of the former agent must not use it on a file of the new one.
    def _open(self, link: Link, path: str, mode: str) -> int:
        _no_nul(path)
        with self.lock:
            reply = self._call(link, "guest-file-open", {"path": path, "mode": mode})
            handle = _number({"handle": reply}, "handle", 0, 2**63 - 1, "guest-file-open")
            if handle > link.last_handle:
                link.last_handle = handle
                return handle
            with contextlib.suppress(AgentError):
                self._call(link, "guest-file-close", {"handle": handle})
            link.close()
        raise LinkLost("the guest rebooted behind the connection: file handles repeat")

    def close_handle(self, handle: int) -> None:
        """Close an open file. An AgentError means that what was written may be lost."""
        self.call("guest-file-close", {"handle": handle})

    def seek(self, handle: int, offset: int, whence: int = 0) -> tuple[int, bool]:
        """Move in an open file as lseek(2) does; return the new position and whether it ended."""
        sent = "guest-file-seek"
        reply = self.call(sent, {"handle": handle, "offset": offset, "whence": whence})
        return _number(reply, "position", 0, 2**63 - 1, sent), _field(reply, "eof", bool, sent)

    def read(self, handle: int, count: int) -> tuple[bytes, bool]:
        """Read up to *count* bytes (48 MiB at most); return them and whether the file ended."""
        reply = self.call("guest-file-read", {"handle": handle, "count": count})
        return self._parse_read(reply, count)

    @staticmethod
    def _parse_read(reply: Any, asked: int) -> tuple[bytes, bool]:
        sent = "guest-file-read"
        data = _content(reply, "buf-b64", sent)
        if _number(reply, "count", 0, asked, sent) != len(data):
            raise ReplyError(f"counts other than its {len(data)} bytes", reply["count"], sent)
        return data, _field(reply, "eof", bool, sent)

    def write_chunk(self, handle: int, data: bytes | memoryview) -> None:
        """Write all of *data* (below 47 MiB) to an open file, however little the agent takes."""
        sent, rest = "guest-file-write", memoryview(data)
        for _ in range(_CRUMBS):
            if not rest:
                return
            reply = self.call(sent, {"handle": handle, "buf-b64": _encoded(rest)})
            rest = rest[_number(reply, "count", 1, len(rest), sent) :]
        if rest:
            raise AgentError("GenericError", "the agent takes it in crumbs", sent)

    # Opens a file and closes it in the end, whatever happens while the connection lives. A close
    # that fails is an error: with a full disk it is the only sign of lost data.
    @contextlib.contextmanager
    def _opened(self, path: str, mode: str) -> Iterator[tuple[Link, int]]:
        link = self._link()
        handle = self._open(link, path, mode)
        try:
            yield link, handle
        except BaseException:
            # On another connection the same number may be another file.
            if link.open:
                with contextlib.suppress(DriverError):
                    self._call(link, "guest-file-close", {"handle": handle}, 5)
            raise
        self._call(link, "guest-file-close", {"handle": handle})

    def push(self, source: BinaryIO, path: str, *, mode: str = "w") -> Copy:
        """As `AbstractDriver.push`; one write is under way, and none between two yields."""
        sent = 0
        with self._opened(path, mode) as (link, handle):
            data, ticket, request = self._next_write(link, handle, source)
            while data:
                deadline = Deadline(self.timeout)
                with self.lock:
                    link.post(ticket, request, deadline)
                    following = self._next_write(link, handle, source)
                    reply = self._collect(link, ticket, deadline)
                taken = _number(reply, "count", 1, len(data), "guest-file-write")
                if taken < len(data):
                    self.write_chunk(handle, memoryview(data)[taken:])
                sent += len(data)
                yield sent
                data, ticket, request = following
            self._call(link, "guest-file-flush", {"handle": handle})

    @staticmethod
    def _next_write(link: Link, handle: int, source: BinaryIO) -> tuple[bytes, Ticket, bytes]:
        data = source.read(_PUSH_BYTES)
        return data, *link.session.encode("guest-file-write", {"handle": handle}, data)

    def pull(self, path: str, sink: BinaryIO, *, offset: int = 0, limit: int | None = None) -> Copy:
        """As `AbstractDriver.pull`; one read is ahead, other calls fit between two yields."""
        got, crumbs = 0, 0
        left = math.inf if limit is None else limit  # bytes not asked for yet
        ahead: deque[tuple[Ticket, int]] = deque()
        with self._opened(path, "r") as (link, handle):
            if offset:
                self.seek(handle, offset)
            while True:
                with self.lock:
                    while left > 0 and len(ahead) < 2:
                        count = int(min(left, _PULL_BYTES))
                        words = {"handle": handle, "count": count}
                        encoded = link.session.encode("guest-file-read", words)
                        ahead.append((link.post(*encoded, Deadline(self.timeout)), count))
                        left -= count
                    if not ahead:
                        return
                    ticket, count = ahead.popleft()
                    reply = self._collect(link, ticket, Deadline(self.timeout))
                data, eof = self._parse_read(reply, count)
                left += count - len(data)
                sink.write(data)
                got += len(data)
                if data:
                    yield got
                if eof or not data:  # an agent of Windows says so with no bytes only
                    return
                crumbs = crumbs + 1 if len(data) < count else 0
                if crumbs == _CRUMBS:
                    raise AgentError("GenericError", "it comes in crumbs", "guest-file-read")


# === programs on this host ========================================================================


# An open file that holds *content* and has no place in the file system.
def _memory_file(content: bytes) -> io.BufferedRandom:
    file = os.fdopen(os.memfd_create("content"), "w+b")
    file.write(content)
    file.seek(0)
    return file


# === stand-in agent ===============================================================================

_REQUEST_LIMIT = 64 * 2**20  # MAX_TOKEN_SIZE in QEMU's qobject/json-streamer.c
_READ_LIMIT = 48 * 2**20
# What stands where JSON has a fault only because it is cut off there.
_CUT_OFF = re.compile(
    r'"(?:[^"\\]|\\.)*\\?|t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?|-|\\?(?:u[0-9A-Fa-f]{0,4})?',
    re.DOTALL,
)


class RequestSplitter:
    """Bytes in, values of JSON out, wherever they are cut; 0xFF drops what is incomplete."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._may_be_whole = False

    def feed(self, data: bytes) -> None:
        """Take *data* in."""
        self._held += data
        # Nothing else completes a request; a big one is not parsed again with each piece.
        self._may_be_whole |= len(self._held) < 1000 or any(mark in data for mark in b"}]\xff")

    def next_value(self) -> Any:
        """Return the next value, or None; drop what is none, and raise ValueError."""
        held = self._held
        if self._may_be_whole:
            before, mark, _ = held.partition(b"\xff")
            # With a character for each byte, places in the text are those in the bytes.
            text = before.decode("latin-1")
            try:
                value, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
                value = value if text.isascii() else json.loads(held[:end])
                del held[:end]
                return value
            except (ValueError, RecursionError) as error:
                if mark or not _CUT_OFF.fullmatch(text, getattr(error, "pos", 0)):
                    del held[: len(before) + len(mark)]
                    raise ValueError(f"JSON parse error: {error}") from error
            self._may_be_whole = False
        if len(held) > _REQUEST_LIMIT:
            held.clear()
            raise ValueError("JSON token size limit exceeded")
        return None


class _Program:
    """A program that the stand-in started, in a process group of its own."""

    def __init__(
        self, loop: AbstractEventLoop, argv: Sequence[str], capture: bool, **options: Any
    ) -> None:
        output = subprocess.PIPE if capture else subprocess.DEVNULL
        # Every descriptor of this process is closed on exec already.
        self.process = subprocess.Popen(
            argv, stdout=output, stderr=output, cwd="/", close_fds=False, process_group=0,
            bufsize=0, **options,
        )  # fmt: skip
        self._loop = loop
        self._output = {"out": bytearray(), "err": bytearray()}
        # Its end is waited for at once: a zombie would pass for a running program.
        self._open: dict[Any, Any] = {io.FileIO(os.pidfd_open(self.process.pid)): None}
        if capture:
            pipes = (self.process.stdout, self.process.stderr)
            self._open.update(zip(pipes, self._output.values(), strict=True))
        for file in self._open:
            loop.add_reader(file, self._read, file)

    def _read(self, file: Any) -> None:
        data = self._open[file]
        if data is not None and (got := os.read(file.fileno(), 65536)):
            data += got[: _OUTPUT_LIMIT + 1 - len(data)]  # one more says that some is missing
        else:
            self._close(file)

    def _close(self, file: Any) -> None:
        if self._open.pop(file) is None:
            self.process.wait()
        self._loop.remove_reader(file)
        file.close()

    def report(self) -> dict[str, Any]:
        """Return what guest-exec-status tells of it."""
        if self._open:  # a daemon holds its output, too
            return {"exited": False}
        code = self.process.returncode
        reply: dict[str, Any] = {"exited": True, "exitcode" if code >= 0 else "signal": abs(code)}
        for name, data in self._output.items():
            if data:
                reply[f"{name}-data"] = _encoded(data[:_OUTPUT_LIMIT])
                reply[f"{name}-truncated"] = len(data) > _OUTPUT_LIMIT
        return reply

    def bury(self) -> None:
        """Wait for its end after a kill, and close what is open."""
        for file in list(self._open):
            self._close(file)


class StandInAgent:
    """The state of one agent: open files, programs, boots, clock. Its commands are `guest_…`.

    Guest paths are paths of this host. With *root*, file commands outside of it are refused,
    after links and `..` are resolved; programs are not confined. `<socket_path>.boot` has a byte
    for each boot that ended, so that an agent that is killed and started again is on the same.
    """

    def __init__(self, socket_path: Path, loop: AbstractEventLoop, root: Path | None) -> None:
        # The folder's links are resolved, the socket itself may not exist yet.
        self.socket_path = socket_path.parent.resolve() / socket_path.name
        self.root = None if root is None else root.resolve()
        self.halted = False  # it was told to power down
        self.rebooted = False  # it was told to reboot; the server resets this
        self._loop = loop
        self._boots = Path(f"{self.socket_path}.boot")
        self._clock_offset = 0
        self._next_handle = 1000
        self._files: dict[int, Any] = {}
        self._programs: dict[int, _Program] = {}
        self._groups: dict[int, subprocess.Popen[bytes]] = {}  # all that were started

    @property
    def boot(self) -> str:
        """The boot id."""
        import uuid

        number = self._boots.stat().st_size if self._boots.exists() else 0
        host = uuid.UUID(Path(_BOOT_ID_PATH).read_text().strip())
        return str(uuid.uuid5(host, f"{self.socket_path} {number}"))

    def end_boot(self) -> None:
        """Kill all programs, forget everything, and make the next boot another one."""
        for group, leader in self._groups.items():
            # The number of a leader that has ended can be another's only once its group is empty.
            if leader.returncode is None or not Path(f"/proc/{group}").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
        for program in self._programs.values():
            program.bury()
        for file in self._files.values():
            file.raw.close()  # what was not flushed is lost
        for forgotten in (self._files, self._programs, self._groups):
            forgotten.clear()
        self._next_handle = 1000
        with self._boots.open("ab") as boots:
            boots.write(b".")

    def answer_next(self, requests: RequestSplitter) -> bytes | None:
        """Return the reply to the next of *requests*, b"" for silence, None if there is none."""
        request: Any = None
        try:
            request = requests.next_value()
            if request is None or (result := self._perform(request)) is None:
                return None if request is None else b""
            reply = {"return": result}
        except (OSError, ValueError, TypeError, LookupError) as error:
            told = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            class_ = "CommandNotFound" if type(error) is LookupError else "GenericError"
            reply = {"error": {"class": class_, "desc": told}}
        if isinstance(request, dict) and "id" in request:
            reply["id"] = request["id"]
        mark = b"\xff" if "return" in reply and "delimited" in request["execute"] else b""
        return mark + json.dumps(reply).encode() + b"\n"

    def _perform(self, request: Any) -> Any:
        if not isinstance(request, dict) or request.keys() - {"execute", "arguments", "id"}:
            raise ValueError("QMP input is no object, or has a member that is unexpected")
        command, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(command, str) or not isinstance(arguments, dict):
            raise ValueError("QMP input lacks 'execute', or 'arguments' is no object")
        if command not in _COMMANDS:
            raise LookupError(f"The command {command} has not been found")
        words = {key.replace("-", "_"): value for key, value in arguments.items()}
        return getattr(self, command.replace("-", "_"))(**words)

    # --- commands: the agent and its system ---

    def guest_ping(self) -> dict[str, Any]:
        return {}

    def guest_sync(self, id: int) -> int:  # noqa: A002
        if type(id) is not int or not -(2**63) <= id < 2**63:
            raise TypeError("Invalid parameter type for 'id', expected: integer")
        return id

    guest_sync_delimited = guest_sync

    def guest_info(self) -> dict[str, Any]:
        commands = [{"name": name, "enabled": True} for name in _COMMANDS]
        return {"version": "7.2.0", "supported_commands": commands}

    def guest_get_osinfo(self) -> dict[str, Any]:
        import platform

        release = platform.freedesktop_os_release()
        return {"id": release["ID"], "pretty-name": release["PRETTY_NAME"]}

    def guest_get_host_name(self) -> dict[str, Any]:
        return {"host-name": socket.gethostname()}

    def guest_network_get_interfaces(self) -> list[dict[str, Any]]:
        return [{"name": name} for _, name in socket.if_nameindex()]

    _now = staticmethod(time.time_ns)

    def guest_get_time(self) -> int:
        return self._now() + self._clock_offset

    def guest_set_time(self, time: int | None = None) -> dict[str, Any]:
        """Move this agent's clock only; without a value it follows the host's again."""
        self._clock_offset = 0 if time is None else time - self._now()
        return {}

    def guest_shutdown(self, mode: str = "powerdown") -> None:
        if mode not in ("powerdown", "halt", "reboot"):
            raise ValueError("Invalid parameter 'mode'")
        self.end_boot()
        self.halted, self.rebooted = mode != "reboot", mode == "reboot"

    # --- commands: programs ---

    def guest_exec(
        self,
        path: str,
        arg: Sequence[str] = (),
        env: Sequence[str] | None = None,
        input_data: str = "",
        capture_output: bool = False,
    ) -> dict[str, Any]:
        variables = None if env is None else dict(word.partition("=")[::2] for word in env)
        with _memory_file(base64.b64decode(input_data, validate=True)) as stdin:
            words = [path, *arg]
            program = _Program(self._loop, words, capture_output, env=variables, stdin=stdin)
        pid = program.process.pid
        self._programs[pid], self._groups[pid] = program, program.process
        return {"pid": pid}

    def guest_exec_status(self, pid: int) -> dict[str, Any]:
        reply = self._programs[pid].report()
        if reply["exited"]:
            del self._programs[pid]  # it is told once
            try:
                os.killpg(pid, 0)
            except ProcessLookupError:  # nobody is left in its group
                del self._groups[pid]
        return reply

    # --- commands: files ---

    def guest_file_open(self, path: str, mode: str = "r") -> int:
        if not re.fullmatch(r"[rwa](b?\+?|\+b)", mode):
            raise ValueError(f"invalid file open mode '{mode}'")
        if path == _BOOT_ID_PATH:
            file: Any = _memory_file(f"{self.boot}\n".encode())
        else:
            real = self.host_path(path)
            created = mode[0] != "r" and not Path(real).exists()
            # As with qemu-ga, what is written is on disk only after a flush or 4096 bytes.
            file = open(real, mode.replace("b", "") + "b", 4096, opener=_open_now)  # noqa: SIM115
            if created:
                os.fchmod(file.fileno(), 0o666)  # qemu-ga does not let the umask apply either
        self._files[self._next_handle] = file
        self._next_handle += 1
        return self._next_handle - 1

    def host_path(self, path: str) -> str:
        """Return the host's path of a guest's. Raises ValueError outside of the root."""
        real = os.path.realpath(os.path.join("/", path))  # noqa: PTH118 - an absolute path wins
        if self.root is not None and not Path(real).is_relative_to(self.root):
            raise ValueError(f"failed to open file '{path}': outside of the agent's root")
        return real

    def guest_file_read(self, handle: int, count: int = 4096) -> dict[str, Any]:
        if not 0 <= count <= _READ_LIMIT:
            raise ValueError(f"value '{count}' is invalid for argument count")
        data = self._files[handle].read(count) or b""
        return {"count": len(data), "buf-b64": _encoded(data), "eof": len(data) < count}

    def guest_file_write(self, handle: int, buf_b64: str) -> dict[str, Any]:
        data = base64.b64decode(buf_b64, validate=True)
        return {"count": self._files[handle].write(data), "eof": False}

    def guest_file_seek(self, handle: int, offset: int, whence: int) -> dict[str, Any]:
        return {"position": self._files[handle].seek(offset, whence), "eof": False}

    def guest_file_flush(self, handle: int) -> dict[str, Any]:
        self._files[handle].flush()
        return {}

    def guest_file_close(self, handle: int) -> dict[str, Any]:
        self._files.pop(handle).close()
        return {}


_COMMANDS = [name.replace("_", "-") for name in vars(StandInAgent) if name.startswith("guest_")]


# Neither waits for the other end of a pipe nor follows a link.
def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


# A socket that listens at *path*, replacing one that nobody serves any more.
def _listener(path: Path) -> socket.socket:
    with contextlib.ExitStack() as unless_done, short_path(path) as target:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        unless_done.callback(sock.close)
        if path.is_socket() and sock.connect_ex(target) == errno.ECONNREFUSED:
            path.unlink()
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "something is there already", str(path))
        sock.bind(target)
        path.chmod(0o600)
        sock.listen(1)
        unless_done.pop_all()
    return sock


def serve_agents(
    places: Mapping[str, str | None],
    *,
    kind: type[StandInAgent] = StandInAgent,
    boot_s: float = 0,
    ready: Callable[[], None] | None = None,
) -> None:
    """Play guest agents until SIGTERM or SIGINT; call from the main thread.

    *places* are the sockets' paths, each with the agent's root or None; a root is created. A
    reboot takes *boot_s* seconds. *ready* is called once all sockets listen. Raises
    FileExistsError if something is at a socket's path already.
    """
    # Only a process that plays agents pays for this import.
    import asyncio

    # One request at a time; while a reply is unread none is taken.
    async def converse(client: socket.socket, agent: StandInAgent) -> None:
        loop, requests = asyncio.get_running_loop(), RequestSplitter()
        while data := await loop.sock_recv(client, _RECEIVE_BYTES):
            requests.feed(data)
            while (reply := agent.answer_next(requests)) is not None:
                await loop.sock_sendall(client, reply)
                if agent.halted:
                    return
                # Even without a pause the other agents of this process have their turn now.
                pause, agent.rebooted = boot_s if agent.rebooted else 0, False
                await asyncio.sleep(pause)

    # One client after the other, as qemu-ga does, until the guest powers down.
    async def play(listener: socket.socket, agent: StandInAgent) -> None:
        try:
            while not agent.halted:
                client, _ = await asyncio.get_running_loop().sock_accept(listener)
                with client, contextlib.suppress(OSError):  # it may leave at any time
                    await converse(client, agent)
        finally:
            listener.close()
            agent.socket_path.unlink(missing_ok=True)
            agent.end_boot()

    async def play_all() -> None:
        loop, playing = asyncio.get_running_loop(), []
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asyncio.current_task(loop).cancel)  # type: ignore[union-attr]
        for path, root in places.items():
            if root is not None:
                Path(root).mkdir(parents=True, exist_ok=True)
            agent = kind(Path(path), loop, None if root is None else Path(root))
            playing.append(loop.create_task(play(_listener(agent.socket_path), agent)))
            await asyncio.sleep(0)  # what has begun tidies up when it is cancelled
        if ready is not None:
            ready()
        await asyncio.gather(*playing)

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(play_all())
