"""A guest that misbehaves: an honest agent behind a proxy that distorts chosen answers.

    with agents.stand_in(folder) as honest, hostile(honest.path, folder / "h.sock") as guest:
        guest.rules["guest-file-read"] = drip
        ...
        guest.rules.clear()         # honest again

A rule is a behaviour, called with an `Asked` for each request of that command ("*": every other
command). It returns the bytes of the answer, in pieces (a generator may pause, or never end),
or None to hang up. `BEHAVIOURS` has those that fit every command, by name. Like the agents behind
QEMU it serves one client at a time. `guest.requests` lists the commands that came.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drivers

MIB = 1 << 20


@dataclass
class Asked:
    """One request, and the means to answer it."""

    request: dict[str, Any]
    honest: Callable[[], bytes]  # asks the honest agent; b"" if it says nothing
    rest: Callable[[float], bool]  # pauses; true when all is over

    @property
    def command(self) -> str:
        """The command's name."""
        return str(self.request["execute"])

    @property
    def mark(self) -> bytes:
        """What the answer begins with: a sync's is led by 0xFF."""
        return b"\xff" if self.command == "guest-sync-delimited" else b""

    def line(self, value: object) -> bytes:
        """Return the line that answers with *value*."""
        return self.raw(json.dumps(value).encode())

    def raw(self, value: bytes) -> bytes:
        """Return the line that answers with *value*, some JSON or none."""
        ident = json.dumps(self.request.get("id")).encode()
        return self.mark + b'{"id": ' + ident + b', "return": ' + value + b"}\n"

    def truth(self) -> Any:
        """Return what the honest agent returns; None for an error."""
        text = self.honest().lstrip(b"\xff")
        return json.loads(text).get("return") if text else None


Behaviour = Callable[[Asked], Iterable[bytes] | None]


def silence(asked: Asked) -> Iterable[bytes]:
    """Do what is asked and say nothing."""
    asked.honest()
    return ()


def hang_up(asked: Asked) -> None:
    """Close the connection."""


def drip(asked: Asked) -> Iterator[bytes]:
    """Answer one byte at a time, ever so slowly."""
    for byte in asked.honest():
        yield bytes([byte])
        if asked.rest(0.05):
            return


def endless(asked: Asked) -> Iterator[bytes]:
    """Begin a text that never ends."""
    yield asked.raw(b'"').rstrip(b"}\n")
    while True:
        yield b"x" * 65536


def blank(asked: Asked) -> Iterator[bytes]:
    """Send empty lines without end."""
    while True:
        yield b"\n" * 65536


def strangers(asked: Asked) -> Iterator[bytes]:
    """Answer what nobody asked, without end."""
    while True:
        yield b'{"return": {}, "id": 1}\n' * 2000


def deep(asked: Asked) -> Iterable[bytes]:
    """Answer with lists in lists in lists."""
    return (asked.raw(b"[" * 100_000 + b"]" * 100_000),)


def deep_enough(asked: Asked) -> Iterable[bytes]:
    """Answer with lists that a parser still takes and that printing may not."""
    return (asked.raw(b"[" * 900 + b"]" * 900),)


def huge(asked: Asked) -> Iterator[bytes]:
    """Answer with one text of 70 MiB."""
    yield asked.raw(b'"').rstrip(b"}\n")
    yield from itertools.repeat(b"x" * MIB, 70)
    yield b'"}\n'


def many(asked: Asked) -> Iterator[bytes]:
    """Answer with 70 MiB of empty lists."""
    yield asked.raw(b"[[]").rstrip(b"}\n")
    yield from itertools.repeat(b",[]" * (MIB // 3), 70)
    yield b"]}\n"


def many_for_any(asked: Asked) -> Iterable[bytes]:
    """Answer with so many empty lists that each command's limit of size has room for them."""
    return (asked.raw(b"[" + b"[]," * (MIB // 4) + b"[]]"),)


def many_members(asked: Asked) -> Iterable[bytes]:
    """Answer with an object of many members, within any limit of size."""
    members = b",".join(b'"%d":0' % n for n in range(80_000))
    return (asked.raw(b"{" + members + b"}"),)


def wrong_ident(asked: Asked) -> Iterable[bytes]:
    """Answer with an id of another type."""
    return (asked.mark + b'{"return": {}, "id": {"id": [null]}}\n',)


def malformed_error(asked: Asked) -> Iterable[bytes]:
    """Answer with an error whose members are none."""
    ident = json.dumps(asked.request.get("id")).encode()
    return (asked.mark + b'{"error": {"class": [], "desc": {}}, "id": ' + ident + b"}\n",)


def rude_error(asked: Asked) -> Iterable[bytes]:
    """Answer with an error whose text is long, odd and full of control characters."""
    told = {"class": "GenericError", "desc": "\x1b[2J\x00\n\u202e" * 20_000}
    return (json.dumps({"error": told, "id": asked.request.get("id")}).encode() + b"\n",)


def broken_text(asked: Asked) -> Iterable[bytes]:
    """Answer with half of a surrogate pair in every text of the honest answer."""
    told = json.dumps(replaced(asked.truth(), str, "\ud800")).encode()
    return (asked.raw(told),)


def not_a_number(asked: Asked) -> Iterable[bytes]:
    """Answer with NaN for every number of the honest answer."""
    return (asked.line(replaced(asked.truth(), int, float("nan"))),)


def no_number(asked: Asked) -> Iterable[bytes]:
    """Answer with a number that no integer type holds for every number."""
    return (asked.line(replaced(asked.truth(), int, 10**4000)),)


def negative(asked: Asked) -> Iterable[bytes]:
    """Answer with -1 for every number."""
    return (asked.line(replaced(asked.truth(), int, -1)),)


def wrong_type(value: object) -> Behaviour:
    """Answer with *value*, whatever was asked."""
    return lambda asked: (asked.line(value),)


def wrong_members(value: object) -> Behaviour:
    """Answer with *value* for each member of the honest answer."""

    def behave(asked: Asked) -> Iterable[bytes]:
        truth = asked.truth()
        there = dict.fromkeys(truth, value) if isinstance(truth, dict) else [value]
        return (asked.line(there),)

    return behave


def missing_members(asked: Asked) -> Iterable[bytes]:
    """Answer with an object, or a list of objects, that has no member."""
    return (asked.line([{}] if isinstance(asked.truth(), list) else {}),)


def replaced(value: Any, kind: type, by: object) -> Any:
    """Return *value* with everything of type *kind* in it replaced."""
    if isinstance(value, dict):
        return {key: replaced(item, kind, by) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, kind, by) for item in value]
    return by if type(value) is kind or value is None else value


BEHAVIOURS: dict[str, Behaviour] = {
    "silence": silence,
    "hang up": hang_up,
    "drip": drip,
    "endless": endless,
    "blank": blank,
    "strangers": strangers,
    "deep": deep,
    "deep enough": deep_enough,
    "huge": huge,
    "many": many,
    "many for any": many_for_any,
    "many members": many_members,
    "wrong id": wrong_ident,
    "malformed error": malformed_error,
    "rude error": rude_error,
    "broken text": broken_text,
    "NaN": not_a_number,
    "no number": no_number,
    "negative": negative,
    "no members": missing_members,
    "null": wrong_type(None),
    "true": wrong_type(True),
    "a number": wrong_type(7),
    "a text": wrong_type("7"),
    "a list": wrong_type([]),
    "members null": wrong_members(None),
    "members lists": wrong_members([[]]),
    "members texts": wrong_members("!"),
}


# --- behaviours of single commands ---


def with_member(name: str, value: bytes) -> Behaviour:
    """Answer honestly, but for one member, which is the JSON *value*."""

    def behave(asked: Asked) -> Iterable[bytes]:
        honest = json.dumps(asked.truth() | {name: "@"}).encode()
        return (asked.raw(honest.replace(b'"@"', value)),)

    return behave


def error(told: dict[str, str]) -> Behaviour:
    """Answer with an error of that class and text."""

    def behave(asked: Asked) -> Iterable[bytes]:
        asked.honest()
        return (json.dumps({"error": told, "id": asked.request["id"]}).encode() + b"\n",)

    return behave


def slow(seconds: float) -> Behaviour:
    """Answer honestly, that many seconds late."""

    def behave(asked: Asked) -> Iterable[bytes]:
        asked.rest(seconds)
        return (asked.honest(),)

    return behave


def crumbs(asked: Asked) -> Iterable[bytes]:
    """Bring one byte per read, and take one byte per write."""
    name = "count" if asked.command == "guest-file-read" else "buf-b64"
    asked.request["arguments"][name] = 1 if name == "count" else "eA=="
    reply = json.loads(asked.honest())
    if "return" in reply and "eof" in reply["return"]:
        reply["return"]["eof"] = False
    return (json.dumps(reply).encode() + b"\n",)


def never_exits(*words: str) -> Behaviour:
    """Say that programs started with any of *words* in their command run for ever.

    For guest-exec and guest-exec-status; without words every program does.
    """
    forever: set[int] = set()

    def behave(asked: Asked) -> Iterable[bytes]:
        told = asked.honest()
        arguments = asked.request["arguments"]
        if asked.command == "guest-exec":
            said = json.dumps([arguments["path"], *arguments.get("arg", [])])
            if not words or any(word in said for word in words):
                forever.add(json.loads(told)["return"]["pid"])
        elif arguments["pid"] in forever:
            return (asked.line({"exited": False}),)
        return (told,)

    return behave


def other_boot() -> Behaviour:
    """Tell another boot id at every look; for guest-file-read, which then reads nothing else."""

    def behave(asked: Asked) -> Iterable[bytes]:
        truth = asked.truth()
        if truth is not None and truth["count"] == 37:
            word = secrets.token_hex(18) + "\n"
            truth = {"count": 37, "buf-b64": drivers._encoded(word.encode()), "eof": True}
        return (asked.line(truth),)

    return behave


# --- the proxy ---


class HostileAgent:
    """Listens at `path` and answers as `rules` say, else as the agent at *upstream* does."""

    def __init__(self, upstream: Path, path: Path) -> None:
        self.path = path
        self.rules: dict[str, Behaviour] = {}
        self.requests: list[str] = []
        self._upstream = upstream
        self._over = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def end(self) -> None:
        """Hang up and listen no more."""
        self._over.set()
        for sock in (self._listener, self._client):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over.is_set():
                self._client, _ = self._listener.accept()
                honest = socket.socket(socket.AF_UNIX)
                with self._client, honest, contextlib.suppress(OSError):
                    honest.connect(str(self._upstream))
                    self._talk(self._client, honest)

    def _talk(self, client: socket.socket, honest: socket.socket) -> None:
        splitter = drivers.RequestSplitter()
        while data := client.recv(1 << 18):
            splitter.feed(data.replace(b"\xff", b""))
            while (request := splitter.next_value()) is not None:
                self.requests.append(request["execute"])
                rule = self.rules.get(request["execute"], self.rules.get("*"))
                asked = Asked(request, lambda r=request: _ask(honest, r), self._over.wait)
                answer = (asked.honest(),) if rule is None else rule(asked)
                if answer is None:
                    return
                for piece in answer:
                    client.sendall(piece)


def _ask(honest: socket.socket, request: dict[str, Any]) -> bytes:
    """Return the honest agent's line; nothing if it is silent, as it is when it shuts down."""
    honest.sendall(json.dumps(request).encode())
    parts: list[bytes] = []
    patience = 0.5 if request["execute"] == "guest-shutdown" else 60.0
    while not parts or not parts[-1].endswith(b"\n"):
        if not select.select([honest], [], [], patience)[0]:
            return b""
        if not (data := honest.recv(1 << 18)):
            raise ConnectionResetError
        parts.append(data)
    return b"".join(parts)


@contextlib.contextmanager
def hostile(upstream: Path, path: Path) -> Iterator[HostileAgent]:
    """Put a hostile agent at *path* in front of the honest one at *upstream*."""
    agent = HostileAgent(upstream, path)
    try:
        yield agent
    finally:
        agent.end()
