"""The driver against a raw socket, both on the same real qemu-ga of this host."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from figures import Figure, cost, interleaved, rate
from raw import RawAgent

import drivers

_MIB = 1 << 20
_CHUNKS = (64 << 10, 128 << 10, 256 << 10, 512 << 10)
_START_S = 10.0


@contextlib.contextmanager
def _qemu_ga(folder: Path) -> Iterator[Path]:
    """Run the real agent; yield its socket.

    Without -r this agent exits when a client leaves with an answer unread (QEMU 7.2).
    """
    path = folder / "qga.sock"
    command = ["qemu-ga", "-m", "unix-listen", "-p", str(path), "-t", str(folder), "-r"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + _START_S
            while not path.exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"qemu-ga made no socket within {_START_S:g} s")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    raise RuntimeError(f"qemu-ga ended with {process.wait(0.02)}")
            yield path
        finally:
            process.kill()


@contextlib.contextmanager
def _driver(path: Path) -> Iterator[drivers.QemuGuestAgentDriver]:
    driver = drivers.QemuGuestAgentDriver({"path": path}, logging.getLogger("bench"))
    driver.connect()
    try:
        yield driver
    finally:
        driver.close()


def _seconds(action: Callable[[], object], times: int = 1) -> float:
    """Return the seconds that one call takes, on average of *times*."""
    before = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - before) / times


class _Bench:
    """Each method measures once, on a connection of its own: the agent serves one client."""

    def __init__(self, socket_path: Path, folder: Path, size: int, calls: int) -> None:
        self.socket_path, self.calls = socket_path, calls
        self.local, self.remote = folder / "local", folder / "remote"
        self.local.write_bytes(os.urandom(size))
        self.remote.write_bytes(self.local.read_bytes())
        self.mib = size / _MIB

    def check(self) -> None:
        """Stop if a copy is not the original."""
        if self.local.read_bytes() != self.remote.read_bytes():
            raise RuntimeError("the copy differs from the original")

    def our_push(self) -> float:
        with _driver(self.socket_path) as driver:
            action = functools.partial(driver.write_from_file, str(self.remote), self.local)
            return self.mib / _seconds(action)

    def their_push(self, chunk: int) -> float:
        with RawAgent(self.socket_path) as raw:
            return self.mib / _seconds(lambda: raw.push(self.local, self.remote, chunk))

    def our_pull(self) -> float:
        with _driver(self.socket_path) as driver:
            action = functools.partial(driver.read_file, str(self.remote), self.local)
            return self.mib / _seconds(action)

    def their_pull(self, chunk: int) -> float:
        with RawAgent(self.socket_path) as raw:
            return self.mib / _seconds(lambda: raw.pull(self.remote, self.local, chunk))

    def our_ping(self) -> float:
        with _driver(self.socket_path) as driver:
            return _seconds(driver.ping, self.calls) * 1e6

    def their_ping(self) -> float:
        with RawAgent(self.socket_path) as raw:
            return _seconds(lambda: raw.call("guest-ping"), self.calls) * 1e6

    def our_exec(self) -> float:
        with _driver(self.socket_path) as driver:
            return _seconds(lambda: driver.run(["true"]), self.calls // 10 + 1) * 1e3

    def their_exec(self) -> float:
        with RawAgent(self.socket_path) as raw:
            return _seconds(lambda: raw.run("true"), self.calls // 10 + 1) * 1e3


def measure(folder: Path, *, size_mib: int, calls: int, rounds: int) -> list[Figure]:
    """Measure push, pull, ping and exec.

    Parameters:
        folder: an empty directory.
        size_mib: size of the file that is copied, in MiB.
        calls: pings of one round; a tenth as many programs are run.
        rounds: how often each is measured, ours and theirs in turn.
    """
    with _qemu_ga(folder) as path:
        bench = _Bench(path, folder, size_mib * _MIB, calls)
        push_chunk = max(_CHUNKS, key=bench.their_push)
        push = interleaved(rounds, bench.our_push, lambda: bench.their_push(push_chunk))
        bench.check()
        pull_chunk = max(_CHUNKS, key=bench.their_pull)
        pull = interleaved(rounds, bench.our_pull, lambda: bench.their_pull(pull_chunk))
        bench.check()
        ping = interleaved(2 * rounds + 1, bench.our_ping, bench.their_ping)
        run = interleaved(2 * rounds + 1, bench.our_exec, bench.their_exec)
    return [
        rate(f"push {size_mib} MiB", "MiB/s", push, 0.95),
        rate(f"pull {size_mib} MiB", "MiB/s", pull, 0.9),
        cost("ping", "us", ping, 1.3),
        cost("exec of true", "ms", run, 1.2),
    ]
