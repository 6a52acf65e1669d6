"""A keeper for tests, and a cheap provider: every machine is a `sleep` that keeps a lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tables
from cli_lab import until
from lab import VMRM

import vmrm

FAST = vmrm.Timeouts(term_grace=0.3, recheck=0.05, young=0.2, look=0.5)


class Provider:
    """Machines of a directory: the file NAME is locked for as long as that machine runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        machine = "sh -c 'echo $$ > $VMRM_VM.pid; exec sleep 1000' > /dev/null 2>&1"
        self.hooks = {
            "spawn": f"cd {folder}; exec 9> $VMRM_VM; flock -w 9 9 || exit 1; setsid {machine} & "
            "echo IP=10.0.0.1 vm_name=$VMRM_VM",
            "terminate": f"cd {folder}; [ -e $VMRM_VM ] || exit 0; "
            "until flock -n $VMRM_VM rm $VMRM_VM; do kill -9 $(cat $VMRM_VM.pid); sleep 0.01; "
            "done; rm -f $VMRM_VM.pid",
            "list": f"cd {folder}; for f in *; do case $f in *.pid | '*') continue;; esac; "
            "flock -n $f true || echo $f; done",
            "check": "true",
        }

    def start(self, name: str) -> None:
        """Start a machine that no row knows."""
        hook = self.hooks["spawn"]
        subprocess.run(["sh", "-c", hook], env=os.environ | {"VMRM_VM": name}, check=True)

    def running(self) -> set[str]:
        """Return the names of the machines that run."""
        names = [path.name for path in self.folder.iterdir() if path.suffix != ".pid"]
        return {name for name in names if self._is_locked(self.folder / name)}

    @staticmethod
    def _is_locked(path: Path) -> bool:
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def end(self) -> None:
        """Kill all machines, also those that have not written their pid yet."""
        until(lambda: not self._kill())

    def _kill(self) -> set[str]:
        for path in self.folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        return self.running()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[vmrm.Database]:
    """Yield an empty database with short time-outs."""
    with vmrm.Database(tmp_path / "lab.db", timeouts=FAST) as database:
        yield database


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[Provider]:
    """Yield a provider whose machines end with the test."""
    machines = Provider(tmp_path / "machines")
    yield machines
    machines.end()


def group(db: vmrm.Database, hooks: Mapping[str, str], **settings: Any) -> None:
    """Put group `ci`, which spawns without delay and needs one VM, unless told otherwise."""
    vmrm.put_group(db, "ci", {"vm_spawn_min_interval": 0, **hooks, **settings})


def keep(db: vmrm.Database) -> None:
    """Do all that is due."""
    vmrm.Keeper(db, once=True).run()


@contextlib.contextmanager
def served(path: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a keeper in a process of its own, which ends by itself, or is told to, within the block.

    When the block fails, it is killed.
    """
    keeper = subprocess.Popen(
        [*VMRM, "--db", str(path), "pool", "serve", *words],
        env=os.environ | {"VMRM_TIMEOUT_SCALE": "0.1"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield keeper
        keeper.wait(30)
    finally:
        keeper.kill()
        keeper.wait()


def states(db: vmrm.Database) -> dict[str, str]:
    """Return the state of every VM."""
    return {name: row["state"] for name, row in tables.pool_vms(db.path).items()}


def reasons(db: vmrm.Database) -> list[str]:
    """Return all reasons in the pool's history, in order."""
    return [row["reason"] for row in tables.pool_history(db.path) if row["reason"]]


def log(db: vmrm.Database, name: str = "*") -> str:
    """Return the log of a VM's hooks, or all of them."""
    paths = sorted(db.directory("pool", "logs").glob(f"{name}.log"))
    return "\n".join(path.read_text() for path in paths)
