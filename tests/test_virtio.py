"""The driver over virtio-serial, on real micro VMs.

Here the channel has no connections: what one client left unread or half sent is still there for
the next, the port outlives the agent and the guest's system, and a paused guest is only silent.
None of that shows on a host socket. What the guest holds is asked of the guest itself (sha256sum,
ls), not of the driver alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shlex
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import guests
import pytest
from agents import LOG, connected
from guests import Guest

import drivers
from drivers import QemuGuestAgentDriver as Driver

pytestmark = pytest.mark.vm

MIB = 1 << 20
CONTENT = random.Random(2).randbytes(16 * MIB)
EQUAL = CONTENT[:4096] * 2 + CONTENT[:1000]
FILES = {
    "0": b"",
    "1": b"\n",
    "4095": CONTENT[:4095],
    "4096": CONTENT[:4096],
    "4097": CONTENT[:4097],
    "two-equal-chunks-then-more": EQUAL,
    "1MiB+1": CONTENT[: MIB + 1],
    "16MiB": CONTENT,
}


@pytest.fixture
def driver(micro_vm: Guest) -> Iterator[Driver]:
    """Yield a connected driver for the shared guest, which a test leaves as it was."""
    with connected(micro_vm.agent_path) as found:
        yield found


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """Boot a guest that these tests may reboot, pause and rob of its agent.

    It has memory for an agent that holds 16 MiB of output raw, as base64 and as JSON at once.
    """
    guests.require_guests()
    with Guest("victim", tmp_path_factory.mktemp("victim"), memory=384) as guest:
        guest.wait_agent()
        yield guest


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """Boot a guest whose agent may run no program."""
    guests.require_guests()
    folder = tmp_path_factory.mktemp("restricted")
    with Guest("restricted", folder, agent_words=["-b", "guest-exec"]) as guest:
        guest.wait_agent()
        yield guest


def _sh(driver: Driver, script: str, timeout: float = 60) -> bytes:
    """Run a shell script that must succeed, and return its output."""
    done = driver.run(["/bin/sh", "-c", script], timeout=timeout)
    assert done.exitcode == 0, done.err
    return done.out


def _push(driver: Driver, content: bytes, path: str) -> list[int]:
    return list(driver.push(io.BytesIO(content), path))


def _pull(driver: Driver, path: str) -> bytes:
    sink = io.BytesIO()
    for _ in driver.pull(path, sink):
        pass
    return sink.getvalue()


def _until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        drivers.plain_wait(-1, 0, 0.05)


# === Connecting ================================================================================


def test_connecting_learns_the_system(driver: Driver) -> None:
    assert not driver.is_windows
    assert driver.target_os == driver.get_os() == "vmrm test guest"


def test_connecting_to_a_guest_that_does_not_name_its_system(micro_vm: Guest) -> None:
    """Without /etc/os-release, as in a bare busybox, guest-get-osinfo tells the kernel alone."""
    with micro_vm.agent() as agent:
        agent.run("/bin/mv", "/etc/os-release", "/etc/hidden")
    try:
        with connected(micro_vm.agent_path) as driver:
            assert "pretty-name" not in driver.call("guest-get-osinfo")
            assert not driver.is_windows
            assert driver.target_os
    finally:
        with micro_vm.agent() as agent:
            agent.run("/bin/mv", "/etc/hidden", "/etc/os-release")


def test_health_of_a_healthy_guest(driver: Driver) -> None:
    assert driver.health() == "ok"
    assert driver.ping()
    assert driver.enabled("guest-exec")


def test_a_second_client_is_told_that_somebody_may_hold_the_socket(
    driver: Driver, micro_vm: Guest
) -> None:
    second = Driver({"path": str(micro_vm.agent_path), "name": "second"}, driver.log)
    with pytest.raises(drivers.NoAnswer) as caught:
        second.connect(timeout=2)
    assert str(micro_vm.agent_path) in str(caught.value)
    assert "other client" in caught.value.hint
    assert driver.ping(), "the first client was disturbed"
    driver.close()
    second.connect(timeout=20)
    assert second.ping()
    second.close()


def test_a_guest_that_is_gone_leaves_no_socket(tmp_path: Path) -> None:
    guests.require_guests()
    with Guest("gone", tmp_path, disk=False) as guest:
        guest.wait_agent()
        with connected(guest.agent_path) as driver:
            guest.stop()
            with pytest.raises(drivers.LinkLost):
                driver.call("guest-ping")
            with pytest.raises(drivers.NoSocket):
                driver.connect(timeout=1)


def test_a_client_may_come_before_the_guest_has_booted(tmp_path: Path) -> None:
    guests.require_guests()
    with (
        Guest("early", tmp_path, disk=False) as guest,
        connected_early(guest) as driver,
    ):
        assert driver.ping()


def connected_early(guest: Guest) -> AbstractContextManager[Driver]:
    """Connect with as much patience as a boot takes, but for one short try that must fail."""
    impatient = Driver({"path": str(guest.agent_path)}, LOG)
    with pytest.raises(drivers.NoAnswer):
        impatient.connect(timeout=0.3)
    impatient.connect(timeout=guests.BOOT_TIMEOUT_S)
    impatient.close()
    return connected(guest.agent_path)


# === Files =====================================================================================


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_files_arrive_bit_by_bit_both_ways(driver: Driver, content: bytes) -> None:
    path = "/var/tmp/bits"
    progress = _push(driver, content, path)
    assert progress == sorted(progress)
    assert (progress or [0])[-1] == len(content)
    digest = _sh(driver, f"sha256sum < {path}").split()[0].decode()
    assert digest == hashlib.sha256(content).hexdigest()
    assert _pull(driver, path) == content
    _sh(driver, f"rm {path}")


def test_other_calls_between_the_chunks_of_a_copy_change_nothing(driver: Driver) -> None:
    content, path = CONTENT[: 2 * MIB], "/var/tmp/interleaved"
    for _ in driver.push(io.BytesIO(content), path):
        assert driver.call("guest-ping") == {}
        assert _sh(driver, "echo between") == b"between\n"
    sink = io.BytesIO()
    for got in driver.pull(path, sink):
        assert driver.call("guest-get-host-name") == {"host-name": "shared"}
        if got % MIB == 0:
            # Longer than one read of the agent: alone on the channel, or a reply is lost.
            assert _sh(driver, f"printf %s {'x' * 9000}") == b"x" * 9000
    assert sink.getvalue() == content


def test_two_pulls_at_once_do_not_mix(driver: Driver) -> None:
    halves = {"/var/tmp/left": CONTENT[:MIB], "/var/tmp/right": CONTENT[MIB : 2 * MIB]}
    for path, content in halves.items():
        _push(driver, content, path)
    sinks = {path: io.BytesIO() for path in halves}
    copies = [driver.pull(path, sink) for path, sink in sinks.items()]
    for _ in zip(*copies, strict=True):
        pass
    assert {path: sink.getvalue() for path, sink in sinks.items()} == halves


def test_a_file_that_grows_is_read_from_where_it_was_left(driver: Driver) -> None:
    path = "/var/tmp/grows"
    _push(driver, b"first ", path)
    assert driver.read_bytes(path, limit=100) == b"first "
    _sh(driver, f"printf second >> {path}")
    assert driver.read_bytes(path, limit=100, offset=6) == b"second"
    assert driver.read_bytes(path, limit=3, offset=6) == b"sec"
    assert driver.read_bytes(path, limit=100, offset=12) == b""


def test_a_full_disk_is_an_error_even_if_only_the_close_tells(driver: Driver) -> None:
    with pytest.raises(drivers.AgentError):
        _push(driver, b"too much", "/dev/full")
    _sh(driver, "mkdir -p /tmp/small; mount -t tmpfs -o size=256k small /tmp/small")
    try:
        with pytest.raises(drivers.AgentError):
            _push(driver, CONTENT[:MIB], "/tmp/small/file")
        assert driver.ping()
        assert not _open_files(driver, "/tmp/small"), "the failed copy left its file open"
    finally:
        _sh(driver, "umount /tmp/small")


def _open_files(driver: Driver, folder: str) -> list[str]:
    links = _sh(driver, "ls -l /proc/$(pidof qemu-ga)/fd").decode().split()
    return [word for word in links if word.startswith(folder)]


def test_an_abandoned_copy_leaves_no_file_open(driver: Driver) -> None:
    _push(driver, CONTENT[:MIB], "/var/tmp/abandoned")
    reading = driver.pull("/var/tmp/abandoned", io.BytesIO())
    writing = driver.push(io.BytesIO(CONTENT), "/var/tmp/abandoned-too")
    next(reading)
    next(writing)
    assert len(_open_files(driver, "/var/tmp/abandoned")) == 2
    for copy in (reading, writing):
        assert isinstance(copy, Generator)
        copy.close()
    assert not _open_files(driver, "/var/tmp/abandoned")


def test_the_reference_methods_work_with_busybox(driver: Driver, tmp_path: Path) -> None:
    folder = '/var/tmp/it\'s a "dir"; $HOME * ü'
    quoted = shlex.quote(folder)
    _sh(driver, f"rm -rf {quoted}")
    assert driver.file_exists(folder) is False
    assert driver.write(f"{folder}/sub/näme", "grüße\n")
    assert driver.append(f"{folder}/sub/näme", "more\n")
    assert _sh(driver, f"cat {quoted}/sub/*").decode() == "grüße\nmore\n"
    assert driver.file_exists(f"{folder}/sub/n*me")
    assert driver.file_exists(f"{folder}/sub/x*") is False
    assert driver.make_file_executable(f"{folder}/sub/näme")
    assert _sh(driver, f"[ -x {quoted}/sub/* ] && echo yes") == b"yes\n"
    assert driver.get_files(folder) == [f"{folder}/sub/näme"]
    assert driver.read_file(f"{folder}/sub/näme", tmp_path / "got")
    assert (tmp_path / "got").read_text() == "grüße\nmore\n"
    assert driver.delete_file(f"{folder}/sub/näme")
    assert driver.delete_file(f"{folder}/sub/näme") is False
    assert driver.get_files(folder) == []


@pytest.mark.parametrize("kind", [int, float, str], ids=["int", "float", "words"])
def test_only_files_newer_than_a_time_are_listed_with_busybox(
    driver: Driver, kind: Callable[[float], object]
) -> None:
    _sh(driver, "mkdir -p /var/tmp/ages; cd /var/tmp/ages; touch old new; touch -d @1000000000 old")
    after: object = kind(1500000000.25)
    if kind is str:
        after = "2017-07-14 02:40:00"
    assert driver.get_files("/var/tmp/ages", after) == ["/var/tmp/ages/new"]  # type: ignore[arg-type]


# === Programs ==================================================================================


def test_arguments_input_and_environment_arrive_exactly(driver: Driver) -> None:
    words = [
        "",
        " ",
        "a b",
        "$HOME",
        "'",
        '"',
        ";",
        "*",
        "\\",
        "two\nlines",
        "grüße 💾",
        "-n",
        "\x7f",
    ]
    done = driver.run(
        ["/bin/sh", "-c", 'printf "%s\\0" "$@"; cat', "sh", *words], input_data="in\n"
    )
    assert done.exitcode == 0
    assert done.out.decode() == "".join(f"{word}\0" for word in words) + "in\n"
    done = driver.run(["/usr/bin/env"], env=["A=1=2", "B=x y\nz"])
    assert sorted(done.out.decode().split("\n", 1)) == sorted(["A=1=2", "B=x y\nz\n"])


def test_a_request_larger_than_every_buffer_arrives_whole(driver: Driver) -> None:
    done = driver.run(["/bin/cat"], input_data=CONTENT[:MIB], timeout=60)
    assert done.out == CONTENT[:MIB]


def test_a_signal_is_told_from_an_exit(driver: Driver) -> None:
    assert driver.run(["/bin/sh", "-c", "exit 3"]).exitcode == 3
    done = driver.run(["/bin/sh", "-c", "kill -TERM $$"])
    assert (done.exitcode, done.signal) == (None, 15)


def test_output_that_is_not_utf8_arrives_raw_and_is_shown_replaced(driver: Driver) -> None:
    raw = b"\xff\xfe gr\xc3\xbc \xc3"
    script = "printf '" + "".join(f"\\{byte:03o}" for byte in raw) + "'"
    assert _sh(driver, script) == raw
    pid = driver.execute("/bin/sh", ["-c", script])
    assert pid is not None
    assert driver.wait_for_exitcode(pid) == 0
    assert driver.get_stdout(pid) == "\ufffd\ufffd gr\u00fc \ufffd"


def test_20_mib_of_output_are_cut_at_16_and_said_to_be(victim: Guest) -> None:
    with connected(victim.agent_path, timeout=120) as driver:
        script = "head -c 20971520 /dev/zero | tr '\\0' x; echo end >&2"
        done = driver.run(["/bin/sh", "-c", script], timeout=120)
        assert done.exitcode == 0
        assert done.out == b"x" * (16 * MIB)
        assert done.out_truncated
        assert (done.err, done.err_truncated) == (b"end\n", False)
        assert driver.ping()


def test_a_daemon_that_keeps_the_output_open_times_out_and_can_still_be_waited_for(
    driver: Driver,
) -> None:
    script = "echo started; sleep 300 & echo $! > /var/tmp/daemon.pid"
    with pytest.raises(drivers.DriverTimeout):
        driver.run(["/bin/sh", "-c", script], timeout=1)
    assert driver.connected_now
    pid = driver.start(["/bin/sh", "-c", script], capture=True)
    drivers.plain_wait(-1, 0, 0.5)
    assert not driver.status(pid).exited
    _sh(driver, "killall sleep")
    status = drivers.ExecStatus(exited=False)

    def ended() -> bool:
        nonlocal status
        status = driver.status(pid)
        return status.exited

    _until(ended)
    assert (status.exitcode, status.out) == (0, b"started\n")
    with pytest.raises(drivers.UnknownPid):
        driver.status(pid)


def test_a_daemon_without_captured_output_ends_for_the_agent_at_once(driver: Driver) -> None:
    pid = driver.start(["/bin/sh", "-c", "sleep 300 & exit 7"])
    _until(lambda: driver.status(pid).exitcode == 7, 10)
    _sh(driver, "killall sleep")


# === What other clients left ===================================================================


def test_a_client_that_left_in_the_middle_of_a_big_read_is_not_noticed(victim: Guest) -> None:
    with connected(victim.agent_path) as driver:
        _push(driver, CONTENT[: 8 * MIB], "/var/tmp/big")
        _push(driver, b"mine", "/var/tmp/small")
    with victim.agent() as agent:
        handle = agent.call("guest-file-open", path="/var/tmp/big", mode="r")
        agent.send("guest-file-read", handle=handle, count=8 * MIB)
        assert agent.socket.recv(1000)
    with connected(victim.agent_path, connect_timeout=60) as driver:
        assert driver.read_bytes("/var/tmp/small", limit=100) == b"mine"
        assert driver.call("guest-get-host-name") == {"host-name": "victim"}


def test_a_half_sent_request_is_neither_run_nor_in_the_way(victim: Guest) -> None:
    request = {"execute": "guest-exec", "arguments": {"path": "/bin/touch", "arg": ["/tmp/half"]}}
    with victim.agent() as agent:
        agent.socket.sendall(json.dumps(request).encode()[:-3])
    with connected(victim.agent_path) as driver:
        assert driver.ping()
        assert _sh(driver, "ls /tmp") == b""


def test_an_answer_that_nobody_read_does_not_answer_the_next_client(victim: Guest) -> None:
    with victim.agent() as agent:
        for _ in range(20):
            agent.send("guest-get-host-name")
    with connected(victim.agent_path) as driver:
        assert [driver.call("guest-ping") for _ in range(30)] == [{}] * 30


# === Policy and frozen file systems ============================================================


def test_a_forbidden_command_is_named_and_the_rest_works(restricted: Guest) -> None:
    with connected(restricted.agent_path) as driver:
        with pytest.raises(drivers.CommandDisabled, match="guest-exec") as caught:
            driver.run(["/bin/true"])
        assert "guest-exec" in caught.value.hint
        assert driver.execute("/bin/true") is None
        assert driver.health() == "no-exec"
        assert not driver.enabled("guest-exec")
        assert _push(driver, CONTENT[:5000], "/var/tmp/allowed") == [5000]
        assert _pull(driver, "/var/tmp/allowed") == CONTENT[:5000]
        assert len(driver.boot_id()) == 36


def test_an_unknown_command_is_told_from_a_forbidden_one(restricted: Guest) -> None:
    with (
        connected(restricted.agent_path) as driver,
        pytest.raises(drivers.CommandMissing, match="guest-no-such"),
    ):
        driver.call("guest-no-such")


def test_a_frozen_guest_says_so_also_to_a_new_client(victim: Guest) -> None:
    with connected(victim.agent_path) as driver:
        assert driver.call("guest-fsfreeze-freeze") >= 1, "the disk at /var should freeze"
        try:
            _assert_frozen(driver)
            driver.close()
            with connected(victim.agent_path) as later:
                _assert_frozen(later)
        finally:
            driver.connect()
            driver.call("guest-fsfreeze-thaw")
        assert driver.health() == "ok"
        _push(driver, b"thawed", "/var/tmp/thawed")


def _assert_frozen(driver: Driver) -> None:
    assert driver.ping()
    assert driver.health() == "frozen"
    for command in ("guest-exec", "guest-file-open"):
        with pytest.raises(drivers.Frozen, match=command):
            driver.call(command, {"path": "/var/tmp/cold"})


# === Agents, guests and processors that stop ===================================================


def test_an_agent_killed_under_a_program_has_forgotten_it(victim: Guest) -> None:
    with connected(victim.agent_path, timeout=5) as driver:
        before = driver.boot_id()
        pid = driver.start(["/bin/sleep", "300"])
        _kill_agent_from_inside(driver)
        with pytest.raises(drivers.DriverError):
            _until(lambda: driver.status(pid).exited)
        driver.connect()
        assert driver.boot_id() == before
        with pytest.raises(drivers.UnknownPid):
            driver.status(pid)
        assert _sh(driver, f"kill {pid} && echo alive") == b"alive\n"


def test_an_agent_killed_under_a_pull_cuts_it_with_an_error(victim: Guest) -> None:
    with connected(victim.agent_path, timeout=5) as driver:
        _push(driver, CONTENT[: 4 * MIB], "/var/tmp/cut")
        sink = io.BytesIO()
        copy = driver.pull("/var/tmp/cut", sink)
        next(copy)
        _kill_agent_from_inside(driver)
        drivers.plain_wait(-1, 0, 1.0)
        with pytest.raises(drivers.DriverError):
            for _ in copy:
                pass
        assert len(sink.getvalue()) < 4 * MIB
        driver.connect()
        assert _pull(driver, "/var/tmp/cut") == CONTENT[: 4 * MIB]


def _kill_agent_from_inside(driver: Driver) -> None:
    """Kill the agent a moment after it has answered; another starts by itself."""
    driver.start(["/bin/sh", "-c", "usleep 300000; killall -9 qemu-ga"])


def test_a_reboot_that_was_asked_for_gives_another_boot_id(victim: Guest) -> None:
    with connected(victim.agent_path) as driver:
        before = driver.boot_id()
        _push(driver, b"kept", "/var/tmp/kept")
        pid = driver.start(["/bin/sleep", "300"])
        driver.output_cache[pid] = {"exited": True, "exitcode": 0}
        driver.reboot()
        assert not driver.connected_now
        assert driver.output_cache == {}
        victim.wait_reboot(before)
        driver.connect()
        assert driver.boot_id() not in ("", before)
        assert driver.read_bytes("/var/tmp/kept", limit=100) == b"kept"
        with pytest.raises(drivers.UnknownPid):
            driver.status(pid)


def test_a_reboot_that_nobody_asked_for_is_noticed_by_the_boot_id(victim: Guest) -> None:
    with connected(victim.agent_path, timeout=2) as driver:
        before = driver.boot_id()
        victim.qmp("system_reset")

        def noticed() -> bool:
            try:
                return driver.boot_id() not in ("", before)
            except drivers.DriverError:
                driver.connect(timeout=guests.BOOT_TIMEOUT_S)
                return False

        _until(noticed, guests.BOOT_TIMEOUT_S)


def test_a_reboot_under_a_push_never_lets_it_write_into_another_file(victim: Guest) -> None:
    """The port survives the reboot, and the new agent numbers its files from 1000 again."""
    with connected(victim.agent_path) as driver:
        _push(driver, b"precious", "/var/tmp/precious")
        _sh(driver, "sync")
    victim.reboot()
    with connected(victim.agent_path, timeout=60) as driver:
        copy = driver.push(io.BytesIO(CONTENT[:MIB]), "/var/tmp/interrupted")
        next(copy)
        victim.qmp("system_reset")
        _until(lambda: not victim.port_open())
        with pytest.raises(drivers.DriverError):
            driver.call("guest-ping")  # answered by the new agent, on the old connection
            driver.open("/var/tmp/precious", "r+")
            for _ in copy:
                pass
        driver.connect(timeout=guests.BOOT_TIMEOUT_S)
        assert driver.read_bytes("/var/tmp/precious", limit=100) == b"precious"


def test_a_paused_guest_times_out_and_no_late_reply_answers_another_request(victim: Guest) -> None:
    with connected(victim.agent_path) as driver:
        victim.qmp("stop")
        try:
            with pytest.raises(drivers.DriverTimeout):
                driver.call("guest-get-host-name", timeout=0.5)
            assert not driver.connected_now
            with pytest.raises(drivers.StateError):
                driver.call("guest-ping")
            with pytest.raises(drivers.NoAnswer):
                driver.connect(timeout=1)
        finally:
            victim.qmp("cont")
        driver.connect()
        assert [driver.call("guest-ping") for _ in range(20)] == [{}] * 20
        assert driver.call("guest-get-host-name") == {"host-name": "victim"}


def test_a_pause_in_the_middle_of_a_pull_ends_it_with_a_timeout(victim: Guest) -> None:
    with connected(victim.agent_path, timeout=1) as driver:
        _push(driver, CONTENT[: 4 * MIB], "/var/tmp/paused")
        sink = io.BytesIO()
        copy = driver.pull("/var/tmp/paused", sink)
        next(copy)
        victim.qmp("stop")
        try:
            with pytest.raises(drivers.DriverTimeout):
                for _ in copy:
                    pass
        finally:
            victim.qmp("cont")
        assert CONTENT.startswith(sink.getvalue())
        driver.connect()
        assert _pull(driver, "/var/tmp/paused") == CONTENT[: 4 * MIB]
