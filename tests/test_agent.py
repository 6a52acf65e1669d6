"""What holds for every agent, shown on the real qemu-ga and on the stand-in."""

from __future__ import annotations

import hashlib
import io
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from agents import LOG, Agent, connected, real_agent, stand_in

import drivers

Maker = Callable[..., AbstractContextManager[Agent]]
MIB = 2**20


@pytest.fixture(params=[pytest.param(real_agent, marks=pytest.mark.qga), stand_in])
def make(request: pytest.FixtureRequest) -> Maker:
    """Return what runs one kind of agent."""
    maker: Maker = request.param
    return maker


@pytest.fixture
def agent(make: Maker, tmp_path: Path) -> Iterator[Agent]:
    """Run one agent."""
    with make(tmp_path / "agent") as running:
        yield running


@pytest.fixture
def driver(agent: Agent) -> Iterator[drivers.QemuGuestAgentDriver]:
    """Yield a driver connected to the agent."""
    with connected(agent.path, timeout=20) as ready:
        yield ready


# --- files ---


SIZES = {str(size): size for size in (0, 1, 4095, 4096, 4097, MIB + 1)} | {"64 MiB": 64 * MIB}


@pytest.mark.parametrize("name", [*SIZES, "equal chunks"])
def test_files_arrive_bit_exact_both_ways(
    driver: drivers.QemuGuestAgentDriver, name: str, tmp_path: Path
) -> None:
    content = os.urandom(SIZES[name]) if name in SIZES else b"A" * 8192 + b"then more"
    guest, back = str(tmp_path / "guest file"), tmp_path / "back"
    progress = list(driver.push(io.BytesIO(content), guest))
    assert progress == sorted(progress)
    assert (progress[-1] if progress else 0) == len(content)
    assert digest(Path(guest)) == hashlib.sha256(content).digest()
    assert driver.read_file(guest, back)
    assert digest(back) == hashlib.sha256(content).digest()


def digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


@pytest.mark.parametrize(
    ("offset", "limit"), [(0, 0), (0, 1), (5, None), (0, 600_000), (300_000, 300_000), (10**7, 5)]
)
def test_a_part_of_a_file_is_pulled(
    driver: drivers.QemuGuestAgentDriver, tmp_path: Path, offset: int, limit: int | None
) -> None:
    content = os.urandom(700_000)
    (tmp_path / "f").write_bytes(content)
    sink = io.BytesIO()
    list(driver.pull(str(tmp_path / "f"), sink, offset=offset, limit=limit))
    expected = content[offset : None if limit is None else offset + limit]
    assert sink.getvalue() == expected
    bounded = driver.read_bytes(str(tmp_path / "f"), limit=limit or 0, offset=offset)
    assert bounded == (expected if limit else b"")


def test_other_calls_fit_between_the_chunks(
    driver: drivers.QemuGuestAgentDriver, tmp_path: Path
) -> None:
    content = os.urandom(2 * MIB)
    source, copy = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content)
    sink = io.BytesIO()
    pull = driver.pull(str(source), sink)
    push = driver.push(io.BytesIO(content), str(copy))
    while (next(pull, None), next(push, None)) != (None, None):
        assert driver.ping()
        assert driver.run(["true"]).exitcode == 0
        driver.write_chunk(handle := driver.open(str(tmp_path / "c"), "a"), b"y" * 3000)
        driver.close_handle(handle)
    assert sink.getvalue() == content == copy.read_bytes()


def test_an_abandoned_transfer_leaves_no_handle_and_no_confusion(
    driver: drivers.QemuGuestAgentDriver, agent: Agent, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(bytes(2 * MIB))
    assert agent.process is not None
    before = len(os.listdir(f"/proc/{agent.process.pid}/fd"))  # noqa: PTH208
    for transfer in (
        driver.pull(str(tmp_path / "f"), io.BytesIO()),
        driver.push(io.BytesIO(bytes(MIB)), str(tmp_path / "g")),
    ):
        next(transfer)
        transfer.close()
    assert driver.call("guest-ping") == {}
    assert len(os.listdir(f"/proc/{agent.process.pid}/fd")) == before  # noqa: PTH208


def test_a_full_disk_is_an_error(driver: drivers.QemuGuestAgentDriver) -> None:
    with pytest.raises(drivers.AgentError):
        list(driver.push(io.BytesIO(b"x" * 100), "/dev/full"))
    assert driver._write("/dev/full", "x" * 100) is False
    assert driver.connected_now


def test_a_failing_local_disk_closes_the_handle(
    driver: drivers.QemuGuestAgentDriver, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(bytes(MIB))
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(OSError, match="No space"),
    ):
        list(driver.pull(str(tmp_path / "f"), full))
    assert driver.call("guest-ping") == {}


def test_appended_data_is_read_on_the_same_handle(
    driver: drivers.QemuGuestAgentDriver, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one")
    handle = driver.open(str(log), "r")
    assert driver.read(handle, 100) == (b"one", True)
    assert driver.read(handle, 100) == (b"", True)
    with log.open("ab") as end:
        end.write(b"two")
    assert driver.read(handle, 100) == (b"two", True)
    assert driver.seek(handle, 1)[0] == 1
    assert driver.read(handle, 2) == (b"ne", False)
    driver.close_handle(handle)
    with pytest.raises(drivers.AgentError):
        driver.read(handle, 1)


def test_written_data_waits_for_the_flush(
    driver: drivers.QemuGuestAgentDriver, tmp_path: Path
) -> None:
    handle = driver.open(str(tmp_path / "f"), "w")
    driver.write_chunk(handle, b"hello")
    assert (tmp_path / "f").read_bytes() == b""
    driver.file_flush(handle)
    assert (tmp_path / "f").read_bytes() == b"hello"
    driver.close_handle(handle)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666


def test_what_cannot_be_opened_or_read_is_an_agent_error(
    driver: drivers.QemuGuestAgentDriver, tmp_path: Path
) -> None:
    for path, mode in (("/nowhere/f", "r"), (str(tmp_path), "w"), (str(tmp_path / "f"), "x")):
        with pytest.raises(drivers.AgentError):
            driver.open(path, mode)
    with pytest.raises(drivers.AgentError):
        driver.read_bytes(str(tmp_path), limit=5)  # a directory opens and fails to be read
    assert driver.read_file("/nowhere/f", tmp_path / "back") is False
    assert [path.name for path in tmp_path.iterdir()] == ["agent"]


# --- programs ---


def test_a_program_gets_its_arguments_exactly(driver: drivers.QemuGuestAgentDriver) -> None:
    words = ["$HOME", "a b", "'", '"', ";", "*", "\n", "", "\\", "\u00e4\u2603", "-n", "--"]
    status = driver.run(["printf", "%s\\0", *words])
    assert status.out.decode().split("\0")[:-1] == words


def test_environment_input_and_exit_code(driver: drivers.QemuGuestAgentDriver) -> None:
    assert driver.run(["env"], env=["A=1", "B=x=y"]).out == b"A=1\nB=x=y\n"
    content = os.urandom(200_000)
    assert driver.run(["cat"], input_data=content).out == content
    assert driver.run(["cat"], input_data="").out == b""
    assert driver.run(["cat"]).out == b""
    status = driver.run(["sh", "-c", "echo out; echo err >&2; pwd; exit 7"])
    assert (status.exitcode, status.signal, status.err) == (7, None, b"err\n")
    assert status.out.startswith(b"out\n")


def test_death_by_signal_is_told(driver: drivers.QemuGuestAgentDriver) -> None:
    status = driver.run(["sh", "-c", "kill -TERM $$"])
    assert (status.exitcode, status.signal) == (None, signal.SIGTERM)
    pid = driver.execute("sh", ["-c", "kill -KILL $$"])
    assert pid is not None
    assert driver.wait_for_exitcode(pid) == 128 + signal.SIGKILL


def test_what_cannot_be_started_is_an_agent_error(driver: drivers.QemuGuestAgentDriver) -> None:
    with pytest.raises(drivers.AgentError):
        driver.start(["/nowhere/program"])
    assert driver.execute("/nowhere/program") is None
    assert driver.async_exec("/etc/passwd") is None


def test_the_end_is_told_once(driver: drivers.QemuGuestAgentDriver) -> None:
    pid = driver.start(["true"])
    while not driver.status(pid).exited:
        drivers.plain_wait(-1, 0, 0.001)
    with pytest.raises(drivers.UnknownPid):
        driver.status(pid)
    with pytest.raises(drivers.UnknownPid):
        driver.status(2**40)


def test_output_of_20_mib_is_cut_and_says_so(driver: drivers.QemuGuestAgentDriver) -> None:
    script = "head -c 20971520 /dev/zero; echo short >&2"
    status = driver.run(["sh", "-c", script], timeout=60)
    assert (len(status.out), status.out_truncated) == (16 * MIB, True)
    assert (status.err, status.err_truncated) == (b"short\n", False)


def test_output_that_is_no_text_is_kept_as_bytes_and_shown_with_marks(
    driver: drivers.QemuGuestAgentDriver,
) -> None:
    script = "printf 'a\\377b\\303'"
    assert driver.run(["sh", "-c", script]).out == b"a\xffb\xc3"
    pid = driver.execute("sh", ["-c", script])
    assert pid is not None
    assert driver.wait_for_exitcode(pid) == 0
    assert driver.get_stdout(pid) == "a\ufffdb\ufffd"


def test_a_daemon_left_behind_holds_captured_output_only(
    driver: drivers.QemuGuestAgentDriver, tmp_path: Path
) -> None:
    leave = ["sh", "-c", 'sleep 30 & echo $! >> "$1"', "sh", str(tmp_path / "pids")]
    with pytest.raises(drivers.DriverTimeout):
        driver.run(leave, timeout=0.3)
    assert driver.connected_now  # no request was under way
    pid = driver.start(leave, capture=False)
    assert driver.wait_for_exitcode(pid) == 0
    daemons = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(daemons) == 2
    for daemon in daemons:
        os.kill(daemon, signal.SIGKILL)


def test_programs_run_beside_each_other(driver: drivers.QemuGuestAgentDriver) -> None:
    slow = driver.start(["sleep", "30"])
    assert driver.run(["true"]).exitcode == 0
    assert driver.status(slow) == drivers.ExecStatus(exited=False)
    driver.run(["kill", str(slow)])


# --- clients ---


def test_a_client_that_left_in_the_middle_of_a_read_disturbs_nobody(
    make: Maker, agent: Agent, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(os.urandom(8 * MIB))
    with connected(agent.path) as first:
        handle = first.open(str(tmp_path / "f"), "r")
        link = first._link()
        ticket, data = link.session.encode("guest-file-read", {"handle": handle, "count": 8 * MIB})
        link.post(ticket, data, drivers.Deadline(5))
        assert drivers.plain_wait(first.fileno(), select.POLLIN, 5)
    if make is real_agent:
        # On a host socket qemu-ga 7.2 ends when a client leaves bytes unread (not so in a guest).
        assert agent.process is not None
        agent.process.wait(10)
        agent.path.unlink(missing_ok=True)
        agent.start()
    with connected(agent.path) as second:
        assert second.ping()
        assert (
            second.read_bytes(str(tmp_path / "f"), limit=8 * MIB) == (tmp_path / "f").read_bytes()
        )


def test_half_a_request_disturbs_nobody(agent: Agent) -> None:
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(agent.path))
        rude.sendall(b'{"execute": "guest-exec", "arguments": {"pa')
    with connected(agent.path) as driver:
        assert driver.run(["true"]).exitcode == 0


def test_half_a_request_on_the_same_connection_is_reset_by_a_sync(
    driver: drivers.QemuGuestAgentDriver,
) -> None:
    sock = driver._link()._live()
    sock.send(b'{"execute": "guest-exec", "arguments": {"pa')
    assert driver.sync() is not None
    assert driver.run(["true"]).exitcode == 0


def test_a_second_client_waits_until_the_first_leaves(agent: Agent) -> None:
    second = drivers.QemuGuestAgentDriver({"path": str(agent.path)}, LOG)
    with connected(agent.path) as first:
        with pytest.raises(drivers.NoAnswer) as caught:
            second.connect(timeout=0.3)
        assert "other client" in caught.value.hint
        assert first.ping()
    assert second.connect(timeout=10) > 0
    second.close()


def test_an_agent_restarted_in_the_middle_is_found_again(agent: Agent) -> None:
    with connected(agent.path) as driver:
        before = driver.boot_id()
        pid = driver.start(["sleep", "30"])
        agent.kill()
        with pytest.raises(drivers.LinkLost):
            driver.call("guest-ping")
        with pytest.raises(drivers.StateError):
            driver.call("guest-ping")
        with pytest.raises(drivers.NoSocket):
            driver.connect(retry=False)
        threading.Timer(0.2, lambda: (agent.path.unlink(), agent.start())).start()
        assert driver.connect(timeout=10) > 0
        assert driver.boot_id() == before
        with pytest.raises(drivers.UnknownPid):
            driver.status(pid)
        os.kill(pid, signal.SIGKILL)  # it outlived its agent


# --- what the agent is ---


def test_the_agent_tells_of_itself(driver: drivers.QemuGuestAgentDriver) -> None:
    assert driver.get_os() == driver.target_os
    assert not driver.is_windows
    assert driver.enabled("guest-exec")
    assert not driver.enabled("guest-nonsense")
    assert isinstance(driver.info()["version"], str)
    assert abs(driver.get_time() - time.time_ns()) < 10**9
    assert "lo" in [interface["name"] for interface in driver.network_get_interfaces()]
    assert driver.health() == "ok"
    assert driver.connected() == {}
    assert driver.boot_id() == driver.boot_id() != ""


def test_a_missing_command_is_told_from_a_failing_one(driver: drivers.QemuGuestAgentDriver) -> None:
    with pytest.raises(drivers.CommandMissing) as caught:
        driver.call("guest-nonsense")
    assert caught.value.sent == "guest-nonsense"
    with pytest.raises(drivers.AgentError) as refused:
        driver.call("guest-ping", {"x": 1})
    assert type(refused.value) is drivers.AgentError
    assert refused.value.class_ == "GenericError"


@pytest.mark.qga
def test_a_blocked_command_is_named(tmp_path: Path) -> None:
    with real_agent(tmp_path / "agent", "guest-exec") as agent, connected(agent.path) as driver:
        with pytest.raises(drivers.CommandDisabled) as caught:
            driver.start(["true"])
        assert "guest-exec" in caught.value.hint
        assert driver.health() == "no-exec"
        assert driver.file_exists("/") is None
        assert driver.create_directories("/tmp/x") is None
        assert driver.ping()


@pytest.mark.qga
def test_a_blocked_osinfo_does_not_hide_the_system(tmp_path: Path) -> None:
    with (
        real_agent(tmp_path / "agent", "guest-get-osinfo") as agent,
        connected(agent.path) as driver,
    ):
        assert (driver.target_os, driver.is_windows) == ("POSIX", False)


@pytest.mark.qga
def test_a_frozen_guest_is_told_from_a_blocked_command(tmp_path: Path) -> None:
    with real_agent(tmp_path / "agent", frozen=True) as agent, connected(agent.path) as driver:
        with pytest.raises(drivers.Frozen) as caught:
            driver.start(["true"])
        assert "Thaw" in caught.value.hint
        with pytest.raises(drivers.CommandMissing):
            driver.call("guest-nonsense")
        assert driver.health() == "frozen"
        assert driver.boot_id() == ""
        assert driver.ping()
