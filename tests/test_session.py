"""The driver against an agent that follows a script, however hostile."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import pickle
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import LOG, connected, reply, scripted

import drivers

Request = dict[str, Any]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_session_hands_each_reply_to_its_own_ticket() -> None:
    session = drivers.Session(LOG)
    tickets = [session.encode("guest-ping", None)[0] for _ in range(3)]
    for ticket in tickets:
        session.pending[ticket.ident] = ticket
    for ticket in reversed(tickets):
        session.accept(json.dumps({"return": ticket.ident, "id": ticket.ident}).encode())
    assert [ticket.result() for ticket in tickets] == [ticket.ident for ticket in tickets]
    assert not session.pending


def test_ids_do_not_repeat_between_sessions() -> None:
    idents = {drivers.Session(LOG).encode("guest-ping", None)[0].ident for _ in range(50)}
    assert len(idents) == 50


def test_silence_is_a_timeout_and_closes_the_connection() -> None:
    with scripted(lambda request: b"") as (driver, _):
        with pytest.raises(drivers.DriverTimeout) as caught:
            driver.call("guest-ping", timeout=0.05)
        assert (caught.value.what, caught.value.seconds) == ("guest-ping", 0.05)
        assert isinstance(caught.value, TimeoutError)
        assert not driver.connected_now
        with pytest.raises(drivers.StateError):
            driver.call("guest-ping")
        with pytest.raises(drivers.StateError):
            driver.fileno()


def test_a_late_reply_never_answers_another_request() -> None:
    late: list[bytes] = []

    def script(request: Request) -> bytes:
        if request["execute"] == "guest-file-read":
            late.append(reply(request, "late"))
            return b""
        return late.pop() + reply(request, "mine")

    with scripted(script) as (driver, _):
        link = driver._link()
        ticket, data = link.session.encode("guest-file-read", {"handle": 1})
        link.post(ticket, data, drivers.Deadline(5))
        assert driver.call("guest-ping", timeout=5) == "mine"
        assert link.collect(ticket, drivers.Deadline(5)) == "late"


def test_a_reply_with_a_wrong_id_is_dropped() -> None:
    with scripted(lambda r: reply({"id": 1}, "no") + reply(r, "yes")) as (driver, _):
        assert driver.call("guest-ping", timeout=5) == "yes"


def test_a_second_reply_to_the_same_request_is_dropped() -> None:
    answers = iter("abc")
    with scripted(lambda r: reply(r, next(answers)) + reply(r, "again")) as (driver, _):
        assert [driver.call("guest-ping", timeout=5) for _ in range(3)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"junk\n", drivers.FrameError),
        (b"\xff\n", drivers.FrameError),
        (b"[1]\n", drivers.ReplyError),
        (b'{"return": {}}\n', drivers.ReplyError),
        (b'{"return": {}, "id": "1"}\n', drivers.ReplyError),
        (b'{"return": {}, "id": [1]}\n', drivers.ReplyError),
        (b'{"return": {}, "id": true}\n', drivers.ReplyError),
        (b'{"error": {"class": "GenericError", "desc": "x"}}\n', drivers.ReplyError),
        (b'{"error": {"class": 1, "desc": "x"}, "id": 1}\n', drivers.ReplyError),
        (b'{"return": ' + b"[" * 10**5 + b"\n", drivers.FrameError),
        (None, drivers.LinkLost),
    ],
)
def test_a_broken_answer_is_an_error_and_closes_the_connection(
    answer: bytes | None, error: type[Exception]
) -> None:
    with scripted(lambda request: answer) as (driver, _):
        with pytest.raises(error):
            driver.call("guest-ping", timeout=5)
        assert not driver.connected_now


def test_the_end_in_the_middle_of_a_frame_is_a_lost_link() -> None:
    with scripted(lambda request: reply(request, {})[:-5]) as (driver, agent):
        threading.Timer(0.05, lambda: agent.far.shutdown(socket.SHUT_RDWR)).start()
        with pytest.raises(drivers.LinkLost):
            driver.call("guest-ping", timeout=5)


@pytest.mark.parametrize("noise", [b'{"return": {}, "id": 1}\n', b"\n", b"x"])
def test_a_flood_does_not_outlast_the_deadline(noise: bytes) -> None:
    def script(request: Request) -> bytes:
        while True:  # until the driver closes the connection
            agent.far.sendall(noise * 10_000)

    with scripted(script) as (driver, agent):
        with pytest.raises((drivers.DriverTimeout, drivers.FrameError)):
            driver.call("guest-ping", timeout=0.2)
        assert not driver.connected_now


def test_a_huge_or_deep_reply_makes_a_short_message() -> None:
    for value in ("[" * 400 + "]" * 400, json.dumps("x" * 10**6)):
        line = b'{"id": "no", "return": ' + value.encode() + b"}\n"
        with scripted(lambda request, line=line: line) as (driver, _):
            with pytest.raises(drivers.ProtocolError) as caught:
                driver.call("guest-ping", timeout=5)
            assert len(str(caught.value)) < 500


@contextlib.contextmanager
def bounded(end: socket.socket, seconds: float = 30) -> Iterator[None]:
    """Hang up after a while, so that who waits for ever does so no longer."""
    timer = threading.Timer(seconds, lambda: end.shutdown(socket.SHUT_RDWR))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def test_sending_has_a_deadline_too() -> None:
    near, far = socket.socketpair()
    with near, far, bounded(far):
        near.setblocking(False)
        link = drivers.Link(near, drivers.plain_wait, LOG)
        ticket, _ = link.session.encode("guest-file-write", None)
        with pytest.raises(drivers.DriverTimeout):
            link.post(ticket, b"x" * 10**7, drivers.Deadline(0.05))
        assert not link.open


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (lambda d: d.start(["true"]), {}),
        (lambda d: d.start(["true"]), {"pid": "1"}),
        (lambda d: d.start(["true"]), {"pid": -1}),
        (lambda d: d.start(["true"]), {"pid": True}),
        (lambda d: d.start(["true"]), []),
        (lambda d: d.status(1), {"exited": 1}),
        (lambda d: d.status(1), {"exited": True}),
        (lambda d: d.status(1), {"exited": True, "exitcode": "0"}),
        (lambda d: d.status(1), {"exited": True, "exitcode": 2**70}),
        (lambda d: d.status(1), {"exited": True, "exitcode": 0, "signal": 9}),
        (lambda d: d.status(1), {"exited": True, "exitcode": 0, "out-data": "!"}),
        (lambda d: d.status(1), {"exited": True, "exitcode": 0, "err-data": 5}),
        (lambda d: d.open("/f", "r"), "1000"),
        (lambda d: d.open("/f", "r"), -1),
        (lambda d: d.open("/f", "r"), None),
        (lambda d: d.read(1, 4), {"count": 5, "buf-b64": encoded(b"12345"), "eof": False}),
        (lambda d: d.read(1, 4), {"count": -1, "buf-b64": "", "eof": False}),
        (lambda d: d.read(1, 4), {"count": 3, "buf-b64": encoded(b"1234"), "eof": False}),
        (lambda d: d.read(1, 4), {"count": 3, "buf-b64": "a\u00e4==", "eof": False}),
        (lambda d: d.read(1, 4), {"count": 3, "buf-b64": "MTIz\n", "eof": False}),
        (lambda d: d.read(1, 4), {"count": 3, "buf-b64": encoded(b"123"), "eof": 1}),
        (lambda d: d.read(1, 4), {"buf-b64": "", "eof": True}),
        (lambda d: d.write_chunk(1, b"1234"), {"count": 5, "eof": False}),
        (lambda d: d.write_chunk(1, b"1234"), {"count": 0, "eof": False}),
        (lambda d: d.write_chunk(1, b"1234"), {"count": -4, "eof": False}),
        (lambda d: d.seek(1, 0), {"position": -1, "eof": False}),
        (lambda d: d.seek(1, 0), {"position": 1}),
        (lambda d: d.get_time(), "now"),
        (lambda d: d.get_time(), 2**63),
        (lambda d: d.get_os(), {"pretty-name": 5}),
        (lambda d: d.network_get_interfaces(), {}),
        (lambda d: d.network_get_interfaces(), [1]),
        (lambda d: d.info(), {"supported_commands": [{"name": "x"}]}),
        (lambda d: d.info(), "7.2"),
        (lambda d: list(d.pull("/f", io.BytesIO())), 1),
        (lambda d: d.exec_status(1), {"exited": True}),
    ],
)
def test_a_hostile_value_is_a_protocol_error(call: Any, value: object) -> None:
    with (
        scripted(lambda request: reply(request, value), timeout=5) as (driver, _),
        pytest.raises(drivers.ReplyError),
    ):
        call(driver)


def test_texts_of_a_hostile_agent_are_one_printable_line() -> None:
    told = {"class": "GenericError", "desc": "a\n\x1b[31m\udc80b"}

    def script(request: Request) -> bytes:
        return json.dumps({"error": told, "id": request["id"]}).encode() + b"\n"

    with scripted(script) as (driver, _), pytest.raises(drivers.AgentError) as caught:
        driver.call("guest-ping", timeout=5)
    assert str(caught.value).isprintable()
    assert caught.value.desc == told["desc"].replace("\udc80", "?")  # which cannot be written


def test_errors_survive_pickling() -> None:
    errors = [
        drivers.NoSocket("/a", "is gone", "Look"),
        drivers.DriverTimeout("guest-ping", 3),
        drivers.FrameError("is odd", b"x" * 5000),
        drivers.ReplyError("is odd", {"a": 1}, "guest-info"),
        drivers.Frozen("CommandNotFound", "disabled", "guest-exec", "Thaw"),
        drivers.StateError("driver is not connected"),
    ]
    for error in errors:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert copy.__dict__ == error.__dict__


# --- what else may happen inside a call ---


def test_whatever_the_wait_hook_raises_passes_through_and_closes_the_connection() -> None:
    class StoppedError(BaseException):
        pass

    def wait(fd: int, events: int, seconds: float) -> bool:
        raise StoppedError

    with scripted(lambda request: b"") as (driver, _):
        driver._link()._wait = wait
        with pytest.raises(StoppedError):
            driver.call("guest-ping")
        assert not driver.connected_now


def test_the_wait_hook_sees_descriptor_events_and_time() -> None:
    seen: list[tuple[int, int, float]] = []
    with scripted(lambda request: reply(request, {})) as (driver, _):
        link = driver._link()

        def wait(fd: int, events: int, seconds: float) -> bool:
            seen.append((fd, events, seconds))
            return drivers.plain_wait(fd, events, seconds)

        link._wait = wait
        driver.call("guest-ping", timeout=7)
        assert seen[0][:2] == (driver.fileno(), select.POLLIN)
        assert 0 < seen[0][2] <= 7


def test_nothing_travels_beside_a_large_request() -> None:
    order: list[str] = []

    def script(request: Request) -> bytes:
        order.append(request["execute"])
        if request["execute"] == "guest-file-read":
            return reply(request, {"count": 1, "buf-b64": encoded(b"x"), "eof": False})
        size = len(base64.b64decode(request["arguments"]["buf-b64"]))
        return reply(request, {"count": size, "eof": False})

    with scripted(script, timeout=5) as (driver, _):
        link = driver._link()
        reads = []
        for _ in range(2):
            ticket, data = link.session.encode("guest-file-read", {"handle": 1, "count": 1})
            link.post(ticket, data, drivers.Deadline(5))
            reads.append(ticket)
        driver.write_chunk(2, b"y" * 2000)
        # The large write waited for both small replies, and kept them.
        assert [ticket.done for ticket in reads] == [True, True]
        large, data = link.session.encode("guest-file-write", {"buf-b64": encoded(b"z" * 2000)})
        link.post(large, data, drivers.Deadline(5))
        assert not large.done
        driver.read(1, 1)
        assert large.done
    assert order == ["guest-file-read"] * 2 + ["guest-file-write"] * 2 + ["guest-file-read"]


def test_short_counts_are_written_to_the_end() -> None:
    written = bytearray()

    def script(request: Request) -> bytes:
        if request["execute"] == "guest-file-open":
            return reply(request, 1000)
        if request["execute"] != "guest-file-write":
            return reply(request, {})
        data = base64.b64decode(request["arguments"]["buf-b64"])
        written.extend(data[:30000])
        return reply(request, {"count": min(len(data), 30000), "eof": False})

    content = os.urandom(200_000)
    with scripted(script, timeout=5) as (driver, _):
        assert list(driver.push(io.BytesIO(content), "/f"))[-1] == len(content)
    assert bytes(written) == content


def windows_file(content: bytes) -> Any:
    """Return the script of an agent on Windows: the end is told only by a read of nothing."""
    places = {"at": 0}

    def script(request: Request) -> bytes:
        if request["execute"] != "guest-file-read":
            return reply(request, 1000)
        count = request["arguments"]["count"]
        data = content[places["at"] : places["at"] + count]
        places["at"] += len(data)
        return reply(request, {"count": len(data), "buf-b64": encoded(data), "eof": not data})

    return script


@pytest.mark.parametrize("size", [0, 1, 4096, 256 * 1024, 600_000])
def test_a_windows_file_ends_with_a_read_of_nothing(size: int, tmp_path: Path) -> None:
    content = b"A" * size
    with scripted(windows_file(content), timeout=5) as (driver, _):
        assert driver.read_file("C:\\f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == content


def test_a_handle_that_was_given_out_before_ends_the_connection() -> None:
    """Another agent counts there now: a suspended copy must not go on into one of its files."""
    handles = iter([1000, 1001, 1000])
    written: list[int] = []

    def script(request: Request) -> bytes:
        if request["execute"] == "guest-file-open":
            return reply(request, next(handles))
        if request["execute"] == "guest-file-write":
            written.append(request["arguments"]["handle"])
            return reply(request, {"count": 65536, "eof": False})
        return reply(request, {})

    with scripted(script, timeout=5) as (driver, agent):
        copy = driver.push(io.BytesIO(bytes(3 * 65536)), "/mine")
        next(copy)
        assert driver.open("/other", "r") == 1001
        with pytest.raises(drivers.LinkLost, match="rebooted"):
            driver.open("/new", "w")
        assert not driver.connected_now
        with pytest.raises(drivers.StateError):
            list(copy)
    assert written == [1000]
    last = agent.requests[-1]
    assert (last["execute"], last["arguments"]) == ("guest-file-close", {"handle": 1000})


@pytest.mark.parametrize("failing", ["guest-file-flush", "guest-file-close"])
def test_a_failing_flush_or_close_is_lost_data(failing: str) -> None:
    handles = itertools.count(1000)

    def script(request: Request) -> bytes:
        if request["execute"] == failing:
            told = {"class": "GenericError", "desc": "no space"}
            return json.dumps({"error": told, "id": request["id"]}).encode() + b"\n"
        if request["execute"] == "guest-file-write":
            return reply(request, {"count": 3, "eof": False})
        return reply(request, next(handles))

    with scripted(script, timeout=5) as (driver, agent):
        with pytest.raises(drivers.AgentError) as caught:
            list(driver.push(io.BytesIO(b"abc"), "/f"))
        assert caught.value.sent == failing
        assert driver._write("/f", "abc") is False
        assert "guest-file-close" in [request["execute"] for request in agent.requests]


def test_a_password_is_sent_as_base64_with_the_mandatory_flag() -> None:
    with scripted(lambda request: reply(request, {})) as (driver, agent):
        driver.set_user_password("root", "p\u00e4ss")
        driver.set_user_password("root", "$6$x", crypted=True)
    assert [request["arguments"] for request in agent.requests] == [
        {"username": "root", "password": encoded("p\u00e4ss".encode()), "crypted": False},
        {"username": "root", "password": encoded(b"$6$x"), "crypted": True},
    ]


def test_a_null_character_is_refused_before_anything_is_sent() -> None:
    with scripted(lambda request: reply(request, {})) as (driver, agent):
        for call in (
            lambda: driver.start(["a\0b"]),
            lambda: driver.open("/a\0b", "r"),
            lambda: driver.start(["a"], env=["A=\0"]),
        ):
            with pytest.raises(ValueError, match="null"):
                call()
        with pytest.raises(ValueError, match="surrogates"):
            driver.open("/\udc80", "r")
        assert driver.connected_now
    assert agent.requests == []


# --- connecting ---


@contextlib.contextmanager
def listening_script(path: Path, *answers: Any) -> Any:
    """Serve one connection after the other at *path*, each by the next of *answers*."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def run() -> None:
        for answer in answers:
            client, _ = listener.accept()
            with client:
                answer(client)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.close()
        thread.join(10)


def sync_ident(client: socket.socket) -> int:
    return int(json.loads(client.recv(4096).lstrip(b"\xff"))["arguments"]["id"])


def answer_all(client: socket.socket) -> None:
    """Behave: answer the sync and then guest-get-osinfo."""
    client.sendall(b"\xff" + json.dumps({"return": sync_ident(client)}).encode() + b"\n")
    while request := client.recv(4096):
        client.sendall(reply(json.loads(request), {"id": "linux", "pretty-name": "Test 1"}))


def test_ten_megabytes_of_stale_tail_are_skipped(tmp_path: Path) -> None:
    def stale(client: socket.socket) -> None:
        ident = sync_ident(client)
        client.sendall(b"A" * 10**7 + b'"}}\n{"error": {"class": "x", "desc": "stray"}}\n')
        client.sendall(b'\xff{"return": 12345}\n')  # an earlier client's sync
        client.sendall(b'\xff{"ret')  # and a torn one
        client.sendall(b"\xff" + json.dumps({"return": ident}).encode() + b"\n")
        while request := client.recv(4096):
            client.sendall(reply(json.loads(request), {"id": "linux", "pretty-name": "Test 1"}))

    path = tmp_path / "s"
    with listening_script(path, stale), connected(path) as driver:
        assert driver.target_os == "Test 1"
        assert len(driver._link()._frames.held) == 0


def test_a_mute_connection_is_replaced_by_a_fresh_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening_script(path, lambda client: None, answer_all):
        driver = drivers.QemuGuestAgentDriver({"path": str(path)}, LOG)
        assert driver.connect(timeout=5) > 0
        assert driver.ping(timeout=5)
        driver.close()


def test_a_last_try_without_time_does_not_hide_what_is_wrong(tmp_path: Path) -> None:
    path, driver = tmp_path / "s", drivers.QemuGuestAgentDriver({"path": str(tmp_path / "s")}, LOG)
    served = threading.Event()

    def mute(client: socket.socket) -> None:
        served.set()
        client.recv(9999)
        client.recv(1)

    # The second try begins after a pause of 50 ms.
    with listening_script(path, lambda client: None, mute):
        with pytest.raises(drivers.LinkLost):
            driver.connect(timeout=0.15)
        assert served.wait(10)


def test_nobody_answering_is_told_from_nothing_there(tmp_path: Path) -> None:
    path = tmp_path / "s"
    driver = drivers.QemuGuestAgentDriver({"path": str(path)}, LOG)
    with pytest.raises(drivers.NoSocket):
        driver.connect(retry=False)
    with pytest.raises(drivers.NoSocket):
        driver.connect(timeout=0.2)
    with listening_script(
        path, lambda client: client.recv(1) and client.recv(9999) and client.recv(1)
    ):
        with pytest.raises(drivers.NoAnswer) as caught:
            driver.connect(timeout=0.2, retry=False)
        assert caught.value.hint
        assert str(path) in str(caught.value)
    with pytest.raises(drivers.NoSocket, match="refused"):
        driver.connect(retry=False)


def test_a_long_path_is_reached(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    fd = os.open(folder, os.O_PATH)
    try:
        with (
            listening_script(Path(f"/proc/self/fd/{fd}/s"), answer_all),
            connected(folder / "s") as driver,
        ):
            assert driver.ping(timeout=5)
    finally:
        os.close(fd)


def test_a_name_too_long_for_any_address_is_a_connect_error(tmp_path: Path) -> None:
    driver = drivers.QemuGuestAgentDriver({"path": str(tmp_path / ("s" * 200))}, LOG)
    with pytest.raises(drivers.ConnectError, match="too long"):
        driver.connect(timeout=0.2)


def test_tcp_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: answer_all(server.accept()[0]), daemon=True)
        thread.start()
        with connected(f"tcp:127.0.0.1:{server.getsockname()[1]}") as driver:
            assert driver.target_os == "Test 1"
        thread.join(10)
    driver = drivers.QemuGuestAgentDriver({"path": "tcp:127.0.0.1:1"}, LOG)
    with pytest.raises(drivers.NoSocket):
        driver.connect(retry=False)


def test_a_reboot_is_accepted_by_silence_and_ends_the_connection() -> None:
    with scripted(lambda request: b"") as (driver, agent):
        driver.output_cache[1] = {"exited": True}
        driver.reboot(timeout=0.05)
        assert not driver.connected_now
        assert driver.output_cache == {}
    assert agent.requests[0]["arguments"] == {"mode": "reboot"}


def test_a_refused_reboot_is_an_error_and_keeps_the_connection() -> None:
    told = {"class": "GenericError", "desc": "child process has failed to shutdown"}

    def script(request: Request) -> bytes:
        return json.dumps({"error": told, "id": request["id"]}).encode() + b"\n"

    with scripted(script) as (driver, _):
        with pytest.raises(drivers.AgentError):
            driver.reboot()
        assert driver.connected_now


def drip(request: Request) -> bytes:
    """Answer as an agent that reads and writes a byte at a time and never comes to an end."""
    values = {
        "guest-file-open": 1000,
        "guest-file-read": {"count": 1, "buf-b64": encoded(b"x"), "eof": False},
        "guest-file-write": {"count": 1, "eof": False},
    }
    return reply(request, values.get(request["execute"], {}))


@pytest.mark.parametrize(
    "copy",
    [
        lambda driver: list(driver.pull("/f", io.BytesIO(), limit=1 << 40)),
        lambda driver: driver.read_bytes("/f", limit=1 << 18),
        lambda driver: list(driver.push(io.BytesIO(bytes(1 << 20)), "/f")),
    ],
)
def test_a_file_that_comes_byte_by_byte_is_given_up(copy: Any) -> None:
    with scripted(drip) as (driver, agent), pytest.raises(drivers.AgentError, match="crumbs"):
        copy(driver)
    assert len(agent.requests) < 100
