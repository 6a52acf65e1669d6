"""What only the stand-in does: roots, reboots, boots kept over a crash, many in one process."""

from __future__ import annotations

import io
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from agents import LOG, Agent, connected, python_command, running, stand_in, stand_ins

import drivers


def alive(pid: int) -> bool:
    """Tell whether *pid* runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_dead(*pids: int) -> None:
    deadline = drivers.Deadline(10)
    while any(map(alive, pids)):
        assert not deadline.expired, f"{pids} still run"
        drivers.plain_wait(-1, 0, 0.005)


def family(driver: drivers.QemuGuestAgentDriver, script: str) -> tuple[int, int]:
    """Start *script*, which prints the pid of a child to its first argument; return both pids."""
    note = Path(driver.config["note"])
    pid = driver.start(["sh", "-c", script, "sh", str(note)])
    deadline = drivers.Deadline(10)
    while not (note.exists() and note.read_text().endswith("\n")):
        assert not deadline.expired
        drivers.plain_wait(-1, 0, 0.005)
    return pid, int(note.read_text())


# --- root ---


@pytest.mark.parametrize(
    "path",
    ["{out}", "{root}/../out", "{root}/link/out", "{root}/outlink", "{root}2/f", "/etc/hosts"],
)
@pytest.mark.parametrize("mode", ["r", "w", "a+"])
def test_files_outside_of_the_root_are_refused(tmp_path: Path, path: str, mode: str) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    (tmp_path / "root2").mkdir()
    out.write_text("secret")
    (root / "link").symlink_to(tmp_path)
    (root / "outlink").symlink_to(out)
    with (
        stand_in(tmp_path / "a", root=root) as agent,
        connected(agent.path) as driver,
        pytest.raises(drivers.AgentError),
    ):
        driver.open(path.format(root=root, out=out), mode)
    assert out.read_text() == "secret"
    assert not (tmp_path / "root2/f").exists()


def test_files_inside_of_the_root_are_served(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "link").symlink_to(root / "deep")
    with stand_in(tmp_path / "a", root=root) as agent, connected(agent.path) as driver:
        list(driver.push(io.BytesIO(b"hello"), f"{root}/link/../link/f"))
        assert (root / "deep/f").read_bytes() == b"hello"
        assert len(driver.boot_id()) == 36


# --- boots ---


def test_a_reboot_kills_programs_forgets_pids_and_keeps_the_client(tmp_path: Path) -> None:
    with (
        stand_in(tmp_path / "a") as agent,
        connected(agent.path, note=tmp_path / "note") as driver,
    ):
        before = driver.boot_id()
        pid, child = family(driver, "sleep 60 & echo $! > $1; wait")
        assert driver.open("/etc/passwd", "r") == 1001  # 1000 was the boot id's
        link = driver._link()
        ticket, data = link.session.encode("guest-shutdown", {"mode": "reboot"})
        link.post(ticket, data, drivers.Deadline(5))
        assert driver.ping()  # on the same connection; the shutdown itself has no reply
        assert not ticket.done
        wait_dead(pid, child)
        with pytest.raises(drivers.UnknownPid):
            driver.status(pid)
        # Handles count from 1000 again, so whoever still holds one of before loses the connection.
        assert driver.call("guest-file-open", {"path": "/etc/passwd", "mode": "r"}) == 1000
        with pytest.raises(drivers.LinkLost, match="rebooted"):
            driver.boot_id()
        assert not driver.connected_now
        driver.connect(timeout=10)
        assert driver.boot_id() not in ("", before)


def test_a_reboot_kills_what_programs_left_behind(tmp_path: Path) -> None:
    with (
        stand_in(tmp_path / "a") as agent,
        connected(agent.path, note=tmp_path / "note") as driver,
    ):
        pid, child = family(driver, "sleep 60 & echo $! > $1")
        while not driver.status(pid).exited:
            drivers.plain_wait(-1, 0, 0.001)
        assert alive(child)
        driver.reboot(timeout=0.1)
        wait_dead(child)
        assert driver.connect(timeout=10) > 0


def test_a_program_that_ended_is_gone_even_if_nobody_asked(tmp_path: Path) -> None:
    """A zombie would pass for a running program to who looks for its pid."""
    with stand_in(tmp_path / "a") as agent, connected(agent.path) as driver:
        pids = [driver.start(["true"], capture=capture) for capture in (False, True)]
        deadline = drivers.Deadline(10)
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert not deadline.expired
            drivers.plain_wait(-1, 0, 0.005)
        assert [driver.wait_for_exitcode(pid) for pid in pids] == [0, 0]


def test_a_booting_guest_answers_afterwards(tmp_path: Path) -> None:
    with stand_in(tmp_path / "a", boot_s=0.5) as agent, connected(agent.path) as driver:
        driver.reboot(timeout=0.05)
        began = time.monotonic()
        driver.connect(timeout=10)
        assert time.monotonic() - began > 0.2
        assert driver.health() == "ok"


def test_a_killed_agent_comes_back_on_the_same_boot_and_its_programs_go_on(tmp_path: Path) -> None:
    with stand_in(tmp_path / "a") as agent:
        boots = []
        with connected(agent.path) as driver:
            driver.reboot(timeout=0.05)
            driver.connect(timeout=10)
            boots.append(driver.boot_id())
            pid = driver.start(["sleep", "60"])
        agent.kill()
        assert alive(pid)
        agent.start()
        with connected(agent.path) as driver:
            boots.append(driver.boot_id())
        assert agent.stop() == 0
        os.kill(pid, signal.SIGKILL)
        agent.start()
        with connected(agent.path) as driver:
            boots.append(driver.boot_id())
        assert boots[0] == boots[1] != boots[2]


def test_two_agents_have_two_boot_ids(tmp_path: Path) -> None:
    with (
        stand_in(tmp_path / "a") as one,
        stand_in(tmp_path / "b") as two,
        connected(one.path) as first,
        connected(two.path) as second,
    ):
        assert first.boot_id() != second.boot_id()


@pytest.mark.parametrize("mode", ["powerdown", "halt"])
def test_powering_down_ends_the_agent(tmp_path: Path, mode: str) -> None:
    with (
        stand_in(tmp_path / "a") as agent,
        connected(agent.path, note=tmp_path / "note") as driver,
    ):
        pid, child = family(driver, "sleep 60 & echo $! > $1; wait")
        with pytest.raises(drivers.LinkLost):
            driver.call("guest-shutdown", {"mode": mode})
        assert agent.process is not None
        assert agent.process.wait(10) == 0
        assert not agent.path.exists()
        wait_dead(pid, child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_all_its_programs(tmp_path: Path, number: int) -> None:
    with (
        stand_in(tmp_path / "a") as agent,
        connected(agent.path, note=tmp_path / "note") as driver,
    ):
        pids = family(driver, "sleep 60 & echo $! > $1; wait")
        assert agent.process is not None
        agent.process.send_signal(number)
        assert agent.process.wait(10) == 0
        wait_dead(*pids)
        assert not agent.path.exists()


# --- the socket ---


def test_a_socket_that_is_served_is_not_taken_over(tmp_path: Path) -> None:
    with stand_in(tmp_path / "a") as agent:
        with pytest.raises(FileExistsError):
            drivers.serve_agents({str(agent.path): None})
        with connected(agent.path) as driver:
            assert driver.ping()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        drivers.serve_agents({str(tmp_path / "file"): None})
    assert (tmp_path / "file").read_text() == "mine"


def test_a_long_socket_path_is_served(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    places = {str(folder / "s"): None}
    call = f"drivers.serve_agents({places!r}, ready=lambda: print('ready', flush=True))"
    agent = Agent(tmp_path / "unused", python_command(call))
    agent.start_announced()
    try:
        with connected(folder / "s") as driver:
            assert driver.ping()
    finally:
        assert agent.stop() == 0
    assert not (folder / "s").exists()


def test_junk_gets_errors_and_the_agent_lives(tmp_path: Path) -> None:
    with stand_in(tmp_path / "a") as agent, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(agent.path))
        client.settimeout(10)
        lines = client.makefile("rb")
        for junk in (
            b"hello\n",
            b"[1]",
            b'{"execute": "guest-ping", "x": 1}',
            b'{"exec-oob": "guest-ping"}',
            b'{"execute": 1}',
            b'{"execute": "guest-ping", "arguments": []}',
            b'{"execute": "guest-sync", "arguments": {"id": 9223372036854775808}}',
            b'{"execute": "guest-sync", "arguments": {"id": true}}',
            b'{"execute": "guest-sync"}',
            b'{"execute": "guest-file-read", "arguments": {"handle": 1, "count": 1}}',
            b'{"execute": "guest-file-open", "arguments": {"path": "a\\u0000b"}}',
            b'{"execute": "guest-exec", "arguments": {"path": "a\\u0000b"}}',
            b'{"execute": "guest-exec", "arguments": {"path": "true", "arg": [1]}}',
            b'{"execute": "guest-exec", "arguments": {"path": "true", "input-data": "!"}}',
            b'{"execute": "guest-shutdown", "arguments": {"mode": "nap"}}',
            b'{"a": nonsense}',
            b"\xff",
        ):
            client.sendall(junk)
            assert b'"error"' in lines.readline(), junk
        client.sendall(b'{"execute": "guest-ping", "id": [1]}{"execute": "guest-ping", "id": {}}')
        assert lines.readline() == b'{"return": {}, "id": [1]}\n'
        assert lines.readline() == b'{"return": {}, "id": {}}\n'


def test_limits_are_those_of_qemu_ga(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(5000))
    with stand_in(tmp_path / "a") as agent, connected(agent.path) as driver:
        handle = driver.open(str(tmp_path / "f"), "r")
        with pytest.raises(drivers.AgentError):
            driver.read(handle, 48 * 2**20 + 1)
        assert driver.call("guest-file-read", {"handle": handle})["count"] == 4096
        wide = driver.open(str(tmp_path / "g"), "w")
        with pytest.raises(drivers.ProtocolError):  # the error of a lexer carries no id
            driver.write_chunk(wide, bytes(49 * 2**20))


def test_the_clock_of_the_host_is_left_alone(tmp_path: Path) -> None:
    with stand_in(tmp_path / "a") as agent, connected(agent.path) as driver:
        before = time.time()
        driver.set_time(10**18)
        assert 0 <= driver.get_time() - 10**18 < 10 * 10**9
        assert abs(time.time() - before) < 10
        driver.set_time()
        assert abs(driver.get_time() - time.time_ns()) < 10**9


def test_fifty_agents_in_one_process(tmp_path: Path) -> None:
    with stand_ins(tmp_path / "many", 50) as agent:
        clients = [
            drivers.QemuGuestAgentDriver({"path": str(tmp_path / f"many/{n}.sock")}, LOG)
            for n in range(1, 51)
        ]
        for client in clients:
            client.connect(timeout=10)
        pids = [client.start(["sh", "-c", f"exit {n}"]) for n, client in enumerate(clients)]
        codes = [client.wait_for_exitcode(pid) for client, pid in zip(clients, pids, strict=True)]
        assert codes == list(range(50))
        assert len({client.boot_id() for client in clients}) == 50
        clients[0].reboot(timeout=0.05)
        assert all(client.ping() for client in clients[1:])
        inside = tmp_path / "many/2/f"
        clients[1].write(str(inside), "mine")
        assert inside.read_text() == "mine"
        assert clients[2].read_file(str(inside), tmp_path / "back") is False
        assert clients[2].read_file("/etc/hosts", tmp_path / "back") is False
        # Once it has nothing to do, it does nothing.
        assert agent.process is not None
        stat = Path(f"/proc/{agent.process.pid}/stat")
        before = stat.read_text().split()[13:15]
        drivers.plain_wait(-1, 0, 0.3)
        assert stat.read_text().split()[13:15] == before
        for client in clients:
            client.close()
        assert agent.stop() == 0
        assert not list((tmp_path / "many").glob("*.sock"))


def test_running_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "s"
    call = f"drivers.serve_agents({ {str(path): None}!r})"
    with running(Agent(path, python_command(call))) as agent:
        pids = []
        with connected(path) as driver:
            pids = [driver.start(["sleep", "60"], capture=True) for _ in range(3)]
    assert agent.process is not None
    assert agent.process.returncode == 0
    wait_dead(*pids)
