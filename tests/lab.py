"""A small lab for tests: stand-in agents, an experiment that keeps its own record, and an audit.

Every program of the experiment writes down that it began and that it ended, in the guest, where
vmrm does not look. `audit` compares that record with the journal.
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tables

import vmrm

ROOT = Path(__file__).resolve().parent.parent
VMRM = vmrm.own_command()  # as the installed command; tests/test_package.py runs the script

# Scales every time-out and interval of vmrm; nothing here waits for a real second.
FAST = {"VMRM_TIMEOUT_SCALE": "0.2"}


def stand_ins(folder: Path, count: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Play `count` agents: sockets <folder>/<n>.sock, their file systems below <folder>/<n>/."""
    folder.mkdir(parents=True, exist_ok=True)
    return announced(*VMRM, "agent", str(folder), "--count", str(count))


def lone_agent(path: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Play one agent that may touch every file."""
    return announced(*VMRM, "agent", str(path))


@contextmanager
def announced(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run an agent that says when it listens, and end it."""
    command = ["setpriv", "--pdeathsig", "KILL", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield process
        finally:
            process.terminate()


def noted(words: str = "", pause: float = 0.03) -> list[str]:
    """Return arguments of `sh` that note begin and end of a run around `words`, in ../../record."""
    note = 'printf "%s %s\\n" "$N" {} >> ../../record'
    return ["-c", f"{note.format('begin')}; sleep {pause}; {words or ':'}; {note.format('end')}"]


def entry(number: int, at: float, words: str = "", **more: Any) -> dict[str, Any]:
    """Return an entry that notes itself under its number."""
    return {
        "start_time": at,
        "executable": "sh",
        "arguments": noted(words),
        "env": {"N": str(number)},
        **more,
    }


# The tail of an entry that asks for one reboot: it notes its end itself, since it does not return.
REBOOT_ONCE = (
    'if [ ! -e ../../asked ]; then touch ../../asked; echo "$N end" >> ../../record; exit 10; fi'
)


def twenty_entries(guest: str) -> list[dict[str, Any]]:
    """Return a schedule with files, equal times, a reboot, an ignored failure and a transfer."""
    negative = [entry(n, -100 + 10 * n) for n in range(1, 6)]
    negative.append(entry(6, -50))
    negative.append(entry(7, -40, REBOOT_ONCE))
    placed = [{"location": "note.txt", "content": "it's here\n"}]
    negative.append(entry(8, -30, "grep -q here note.txt", content=placed))
    positive = [entry(n, 0.1 * (n - 8)) for n in range(9, 19)]
    positive.append(entry(19, 1.1, "false; exit 3", ignore_failure=True))
    positive.append({"start_time": 1.2, "transfer": [{"location": f"{guest}/launch/record"}]})
    return negative + positive


class Command(subprocess.Popen[str]):
    """A command of vmrm's; as a context manager it ends with the block, killed if that fails."""

    def __exit__(self, kind: type[BaseException] | None, *more: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *more)


@dataclass
class Lab:
    """An experiment on stand-ins in a directory of its own."""

    folder: Path
    count: int = 1
    start_buffer: float = 0.4
    names: list[str] = field(default_factory=list)

    @property
    def db(self) -> Path:
        """The database."""
        return self.folder / "lab.db"

    def guest(self, n: int) -> Path:
        """Return the file system of guest n, from 1."""
        return self.folder / "agents" / str(n)

    def write(self, schedule: Any = twenty_entries) -> Path:
        """Write the experiment file: every VM gets `schedule(guest)`."""
        vms = [
            {
                "name": f"vm{n}",
                "path": f"agents/{n}.sock",
                "launch_dir": f"{self.guest(n)}/launch",
                "agent_timeout": 20,
                "schedule": schedule(str(self.guest(n))),
            }
            for n in range(1, self.count + 1)
        ]
        path = self.folder / "lab.json"
        path.write_text(json.dumps({"experiment": {"start_buffer": self.start_buffer}, "vm": vms}))
        return path

    def start(self, *words: str, **env: str) -> Command:
        """Start a command on this lab's database."""
        return Command(
            [*VMRM, "--db", str(self.db), *words],
            env={**os.environ, **FAST, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(
        self, *words: str, timeout: float = 120, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this lab's database to its end."""
        process = self.start(*words, **env)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{words} did not end: {err}\n{self.logs()}") from None
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def run_to_the_end(self, tries: int = 4) -> list[int]:
        """Run the experiment, continuing it, until it succeeds; return the exit codes."""
        codes = []
        for _ in range(tries):
            done = self.run("run")
            codes.append(done.returncode)
            if done.returncode == 0:
                return codes
        raise AssertionError(f"{codes}: {done.stderr}\n{self.logs()}")

    def handler_pids(self) -> list[int]:
        """Return the pids of the live handlers, as their rows have them."""
        pids = [row["handler_pid"] for row in tables.vms(self.db).values()]
        return [pid for pid in pids if pid and Path(f"/proc/{pid}").exists()]

    def supervisor_pid(self) -> int | None:
        """Return the pid of the live supervisor."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if b"_supervise" not in words or str(self.db).encode() not in words:
                    continue
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                siblings = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            if b"_supervise" not in siblings:
                return int(folder.name)
        return None

    def logs(self, whole: bool = False) -> str:
        """Return the logs, by default their last lines for a failing test's message."""
        paths = sorted((self.folder / "lab.db.d").glob("logs.*/*.log"))
        last = 0 if whole else -3000
        return "\n".join(f"--- {path.name}\n{path.read_text()[last:]}" for path in paths)

    def audit(self) -> None:
        """Assert that the journal and the guests' own records agree about what has run."""
        for name, row in tables.vms(self.db).items():
            launch = Path(row["launch_dir"])
            path = launch / "record"
            record = path.read_text().splitlines() if path.exists() else []
            self.audit_vm(name, record, len(list(launch.glob("*/*/attempt.*"))))
        self.audit_start()

    def audit_start(self) -> None:
        """Assert that there was one start time, and that everybody has planned by it."""
        experiment = tables.experiment(self.db)
        start = experiment["start_at"]
        told = set(re.findall(r"the experiment starts at (\S+)", self.logs(whole=True)))
        assert len(told) <= 1, told
        assert start is not None or not told, f"the start {told} is no longer known"
        if start is None or tables.holds(self.db):  # which move what is planned
            return
        times = {(row["server_name"], row["ordinal"]): row for row in tables.entries(self.db)}
        pauses = {row["server_name"] for row in times.values() if row["pause"] is not None}
        for row in tables.attempts(self.db):
            entry = times.get((row["server_name"], row["ordinal"]))
            if entry and row["planned_at"] and row["server_name"] not in pauses:
                late = row["planned_at"] - start - entry["start_time"]
                assert abs(late) < 0.001, f"planned by another start than {start}: {row}"

    def audit_vm(self, name: str, record: list[str], claims: int, lossy: bool = False) -> None:
        """Assert that what a guest has written down is what the journal says of it.

        Args:
            name: The VM.
            record: The lines that its programs wrote.
            claims: How many attempts have left a directory.
            lossy: Whether the guest has lost what it had not synced, some of both.
        """
        attempts = tables.attempts(self.db, name)
        assert not [row for row in attempts if row["outcome"] in ("armed", "running")], attempts
        scripts = [row for row in tables.entries(self.db, name) if row["executable"] is not None]
        for item in scripts:
            number = item["ordinal"]
            began = record.count(f"{number} begin")
            mine = [row for row in attempts if row["ordinal"] == number]
            begun = [row for row in mine if "did not begin" not in row["error"]]
            sure = sum(row["outcome"] in ("done", "failed") for row in begun)
            unknown = sum(row["outcome"] == "unknown" for row in mine)
            seen = (name, number, began, [(row["attempt"], row["outcome"]) for row in mine])
            assert began <= sure + unknown, seen
            assert lossy or 1 <= began >= sure, seen
            assert mine, seen
        runs = sum(line.endswith(" begin") for line in record)
        assert lossy or not scripts or 0 < runs <= claims, (record, claims)


@contextmanager
def living_handler(db: vmrm.Database, ordinal: int = 1) -> Iterator[None]:
    """Hold what tells that a VM's handler lives: the lock that it takes first."""
    with (db.directory("locks") / f"handler.{ordinal}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def crash_labels() -> list[str]:
    """Return every named crash point of vmrm: what its calls of `_crash` are given."""
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "vmrm.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "_crash"
    ]
    labels = {ast.literal_eval(call.args[0]) for call in calls}
    assert len(labels) > 20, "crash points are called otherwise now"
    return sorted(labels)


def kill(pid: int) -> None:
    """Kill a process that may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
