"""Agents for the tests: the real qemu-ga on a host socket, the stand-in, and a scripted one.

The real one runs as a process of this host, so every command that could touch the host itself
(shutdown, clock, freeze, passwords, processors) is blocked from the start.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import drivers

LOG = logging.getLogger("test")
HERE = Path(__file__).resolve().parent.parent

# Commands that would change the host on which the real agent runs.
DANGEROUS = [
    "guest-shutdown",
    "guest-set-time",
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-freeze-list",
    "guest-fstrim",
    "guest-suspend-disk",
    "guest-suspend-ram",
    "guest-suspend-hybrid",
    "guest-set-user-password",
    "guest-set-vcpus",
    "guest-set-memory-blocks",
    "guest-ssh-add-authorized-keys",
    "guest-ssh-remove-authorized-keys",
]


def need(program: str) -> str:
    """Return the path of *program*; skip without it at a desk, fail in CI."""
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if found is not None:
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(f"{program} is missing")
    pytest.skip(f"{program} is not installed")


class Agent:
    """An agent process that listens on `path`; `kill` ends it at once, `start` runs it again."""

    def __init__(self, path: Path, command: list[str]) -> None:
        self.path = path
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait until its socket is there."""
        self.process = subprocess.Popen(self.command, cwd="/", stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not listening(self.path):
            assert self.process.poll() is None, f"agent ended with {self.process.returncode}"
            assert time.monotonic() < deadline, "agent does not listen"
            drivers.plain_wait(-1, 0, 0.01)

    def start_announced(self) -> None:
        """Start a process that prints a line when it listens."""
        self.process = subprocess.Popen(self.command, cwd="/", stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            assert lines.readline() == b"ready\n"

    def kill(self) -> None:
        """Kill the process as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """End the process politely; return its exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def listening(path: Path) -> bool:
    """Tell from the kernel's table, without connecting, whether a socket listens at *path*."""
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    # Column 3 holds __SO_ACCEPTCON (0x10000) for listening sockets.
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in lines)


@contextlib.contextmanager
def real_agent(folder: Path, *blocked: str, frozen: bool = False) -> Iterator[Agent]:
    """Run qemu-ga with *folder* as its state directory, and further commands *blocked*."""
    program = need("qemu-ga")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "agent.sock"
    if frozen:
        (folder / "qga.state.isfrozen").touch()
    rules = ",".join([*DANGEROUS, *blocked])
    command = [program, "-m", "unix-listen", "-p", str(path), "-t", str(folder), "-b", rules]
    with running(Agent(path, command)) as agent:
        try:
            yield agent
        finally:
            # While frozen it ignores a polite end, and it has nothing to clean up here.
            agent.kill()


@contextlib.contextmanager
def running(agent: Agent) -> Iterator[Agent]:
    """Start *agent* and end it."""
    path = agent.path
    path.unlink(missing_ok=True)
    try:
        agent.start()
        yield agent
    finally:
        if agent.process is not None and agent.process.poll() is None:
            agent.stop()


@contextlib.contextmanager
def connected(path: Path | str, **config: object) -> Iterator[drivers.QemuGuestAgentDriver]:
    """Yield a connected driver for the agent at *path*."""
    driver = drivers.QemuGuestAgentDriver({"path": str(path), "name": "vm", **config}, LOG)
    driver.connect(timeout=10)
    try:
        yield driver
    finally:
        driver.close()


@contextlib.contextmanager
def stand_in(folder: Path, root: Path | None = None, boot_s: float = 0) -> Iterator[Agent]:
    """Run the stand-in agent in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "agent.sock"
    places = {str(path): None if root is None else str(root)}
    call = f"drivers.serve_agents({places!r}, boot_s={boot_s!r})"
    with running(Agent(path, python_command(call))) as agent:
        yield agent


@contextlib.contextmanager
def stand_ins(folder: Path, count: int) -> Iterator[Agent]:
    """Run *count* stand-in agents in one process; the sockets are `<folder>/<n>.sock`."""
    places = {str(folder / f"{n}.sock"): str(folder / str(n)) for n in range(1, count + 1)}
    call = f"drivers.serve_agents({places!r})"
    with running(Agent(folder / f"{count}.sock", python_command(call))) as agent:
        yield agent


def python_command(call: str) -> list[str]:
    """Return the command that imports `drivers` from this checkout and makes *call*."""
    setup = f"import sys; sys.path.insert(0, {str(HERE)!r}); import drivers; "
    return [sys.executable, "-c", setup + call]


class Scripted:
    """An agent at the other end of a socket pair that answers each request as *script* says.

    *script* takes the request and returns bytes to send, or None to close the connection.
    """

    def __init__(self, script: Callable[[dict[str, Any]], bytes | None]) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.raw = b""
        self.near, self.far = socket.socketpair()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        splitter = drivers.RequestSplitter()
        with self.far, contextlib.suppress(OSError):
            while data := self.far.recv(65536):
                self.raw += data
                splitter.feed(data.lstrip(b"\xff"))
                while (value := splitter.next_value()) is not None:
                    self.requests.append(value)
                    answer = self.script(self.requests[-1])
                    if answer is None:
                        return
                    self.far.sendall(answer)

    def driver(self, **config: object) -> drivers.QemuGuestAgentDriver:
        """Return a driver that is connected to this agent."""
        driver = drivers.QemuGuestAgentDriver({"path": "/nowhere", "name": "vm", **config}, LOG)
        self.near.setblocking(False)
        driver.driver = drivers.Link(self.near, drivers.plain_wait, LOG)
        return driver

    def end(self) -> None:
        """Close the connection and wait for the script to end."""
        with contextlib.suppress(OSError):
            self.near.shutdown(socket.SHUT_RDWR)
        self.near.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


def reply(request: dict[str, Any], value: object) -> bytes:
    """Return the line that answers *request* with *value*."""
    return json.dumps({"return": value, "id": request["id"]}).encode() + b"\n"


@contextlib.contextmanager
def scripted(
    script: Callable[[dict[str, Any]], bytes | None], **config: object
) -> Iterator[tuple[drivers.QemuGuestAgentDriver, Scripted]]:
    """Yield a driver connected to an agent that follows *script*, and that agent."""
    agent = Scripted(script)
    try:
        yield agent.driver(**config), agent
    finally:
        agent.end()
