"""Agents for the tests: the real qemu-ga on a host socket, the stand-in, and a scripted one.

The real one runs as a process of this host, so every command that could touch the host itself
(shutdown, clock, freeze, passwords, processors) is blocked from the start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import drivers

LOG = logging.getLogger("test")
QEMU_GA = shutil.which("qemu-ga") or shutil.which("qemu-ga", path="/usr/sbin:/usr/local/sbin")
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


def need_qemu_ga() -> str:
    """Return the path of qemu-ga; skip without it at a desk, fail in CI."""
    if QEMU_GA is None:
        if os.environ.get("CI") == "true":
            pytest.fail("qemu-ga is missing")
        pytest.skip("qemu-ga is not installed")
    return QEMU_GA


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
    program = need_qemu_ga()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "agent.sock"
    if frozen:
        (folder / "qga.state.isfrozen").touch()
    rules = ",".join([*DANGEROUS, *blocked])
    command = [program, "-m", "unix-listen", "-p", str(path), "-t", str(folder), "-r", "-b", rules]
    agent = Agent(path, command)
    with running(agent):
        yield agent


@contextlib.contextmanager
def running(agent: Agent) -> Iterator[Agent]:
    """Start *agent* and end it."""
    path = agent.path
    path.unlink(missing_ok=True)
    agent.start()
    try:
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
