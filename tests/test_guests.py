"""The micro VMs prove themselves, with a bare client: what other tests rely on is so."""

from __future__ import annotations

import base64
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import guests
import pytest
from cli_lab import until
from conftest import await_exit, processes
from guests import Guest, GuestError, RawAgent

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def own_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """Boot a guest that these tests may reboot, pause and rob of its agent."""
    guests.require_guests()
    with Guest("own", tmp_path_factory.mktemp("own")) as guest:
        guest.wait_agent()
        yield guest


def _boot_id(guest: Guest) -> str:
    with guest.agent() as agent:
        return agent.boot_id()


def _write(agent: RawAgent, path: str, content: bytes) -> None:
    handle = agent.call("guest-file-open", path=path, mode="w")
    agent.call("guest-file-write", handle=handle, buf_b64=base64.b64encode(content).decode())
    agent.call("guest-file-close", handle=handle)


def test_the_agent_answers_a_delimited_sync_with_its_id(micro_vm: Guest) -> None:
    with micro_vm.agent() as agent:
        number = random.getrandbits(63)
        agent.send("guest-sync-delimited", id=number)
        assert agent.socket.recv(1) == b"\xff"
        assert agent.reply() == number


def test_the_guest_is_linux_with_its_own_name_and_kernel(micro_vm: Guest) -> None:
    with micro_vm.agent() as agent:
        assert agent.call("guest-get-host-name") == {"host-name": "shared"}
        kernel = agent.call("guest-get-osinfo")["kernel-release"]
        assert "cloud" in kernel
        assert kernel != os.uname().release


def test_a_shell_runs_as_another_user(micro_vm: Guest) -> None:
    with micro_vm.agent() as agent:
        script = "/tmp/who am i.sh"
        _write(agent, script, b'id -un; echo "$HOME"; touch /root/x; echo "$?"\n')
        done = agent.run("/bin/su", "-s", "/bin/sh", "tester", f"{script}")
    assert done.code == 0
    assert done.out == b"tester\n/home/tester\n1\n"
    assert b"Permission denied" in done.err


def test_programs_see_lo_a_tty_device_and_a_writable_tmp(micro_vm: Guest) -> None:
    with micro_vm.agent() as agent:
        names = [card["name"] for card in agent.call("guest-network-get-interfaces")]
        done = agent.run("/bin/sh", "-c", "su tester -c 'echo hi > /tmp/t && cat /tmp/t'; ls /dev")
    assert "lo" in names
    assert done.out.startswith(b"hi\n")
    assert {b"null", b"ptmx", b"vda", b"ttyS0"} <= set(done.out.split())


def test_a_reboot_keeps_var_and_the_socket_and_changes_the_boot_id(own_vm: Guest) -> None:
    pid = own_vm.pid
    with own_vm.agent() as agent:
        before = agent.boot_id()
        _write(agent, "/var/kept", b"kept over the reboot")
        _write(agent, "/tmp/lost", b"")
    after = own_vm.reboot()
    assert after != before
    assert own_vm.pid == pid
    with own_vm.agent() as agent:
        assert agent.run("/bin/cat", "/var/kept").out == b"kept over the reboot"
        assert agent.run("/bin/ls", "/tmp/lost").code == 1


def test_a_reset_from_outside_changes_the_boot_id(own_vm: Guest) -> None:
    before = _boot_id(own_vm)
    own_vm.qmp("system_reset")
    assert own_vm.wait_reboot(before) != before


def test_a_killed_agent_is_back_in_the_same_boot_and_has_forgotten_its_programs(
    own_vm: Guest,
) -> None:
    with own_vm.agent() as agent:
        before = agent.boot_id()
        pid = agent.call("guest-exec", path="/bin/sleep", arg=["300"])["pid"]
    own_vm.kill_agent()
    with own_vm.agent() as agent:
        assert agent.boot_id() == before
        with pytest.raises(GuestError, match="pid"):
            agent.call("guest-exec-status", pid=pid)
        assert agent.run("/bin/kill", str(pid)).code == 0


def test_a_paused_guest_is_silent_and_then_goes_on(own_vm: Guest) -> None:
    own_vm.qmp("stop")
    try:
        assert own_vm.qmp("query-status")["status"] == "paused"
        with pytest.raises(TimeoutError):
            own_vm.agent(timeout=0.5)
    finally:
        own_vm.qmp("cont")
    own_vm.wait_agent()
    assert _boot_id(own_vm)


def test_qemu_tells_whether_the_guest_has_the_port_open(own_vm: Guest) -> None:
    before = _boot_id(own_vm)
    assert own_vm.port_open()
    own_vm.qmp("system_reset")
    assert not own_vm.port_open()
    own_vm.wait_reboot(before)
    assert own_vm.port_open()


def test_qmp_refuses_what_it_does_not_know(own_vm: Guest) -> None:
    with pytest.raises(GuestError, match="no-such-command"):
        own_vm.qmp("no-such-command")


def test_power_off_ends_qemu_and_a_second_start_finds_var(tmp_path: Path) -> None:
    guests.require_guests()
    with Guest("cold", tmp_path) as guest:
        guest.wait_agent()
        with guest.agent() as agent:
            _write(agent, "/var/kept", b"over a power cycle")
            agent.send("guest-shutdown", mode="powerdown")
            guest.process.wait(30)
        guest.stop()
        guest.start()
        guest.wait_agent()
        with guest.agent() as agent:
            assert agent.run("/bin/cat", "/var/kept").out == b"over a power cycle"


def test_four_guests_run_at_once_each_with_a_disk_of_its_own(tmp_path: Path) -> None:
    guests.require_guests()
    with guests.guests(4, tmp_path, agent_words=["-b", "guest-set-time"]) as group:
        for guest in group:
            with guest.agent() as agent:
                _write(agent, "/var/name", guest.name.encode())
        for guest in group:
            with guest.agent() as agent:
                assert agent.run("/bin/cat", "/var/name").out == guest.name.encode()
                commands = agent.call("guest-info")["supported_commands"]
                assert {c["name"] for c in commands if not c["enabled"]} >= {"guest-set-time"}
        assert len({_boot_id(guest) for guest in group}) == 4


def test_a_guest_that_never_answers_shows_its_console(tmp_path: Path) -> None:
    guests.require_guests()
    with Guest("mute", tmp_path, agent_words=["--no-such-option"]) as guest:
        until(lambda: "no-such-option" in guest.console.read_text(errors="replace"), 90)
        with pytest.raises(GuestError, match=r"(?s)not ready within .* console:.*no-such-option"):
            guest.wait_agent(timeout=1)


def test_qemu_dies_with_the_thread_that_started_it(tmp_path: Path) -> None:
    guests.require_guests()
    script = (
        "import os, sys, pathlib, guests\n"
        "guest = guests.Guest('orphan', pathlib.Path(sys.argv[1]))\n"
        "guest.start()\n"
        "print(guest.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        check=False,
    )
    pid = int(done.stdout)
    assert done.returncode == -9
    await_exit({pid}, 5)
    assert pid not in {process.pid for process in processes() if process.state != "Z"}
