"""Sabotage of vmrm's own processes, for tests: first on $PYTHONPATH, it comes with every start.

VMRM_SLOW_START=WORD:SECONDS     a process with this word in its command line begins so late
VMRM_FAULT=ROLE:N:CODE:FILE      the N-th SQL statement of the first handler, supervisor or keeper
                                 to come so far fails with that code of SQLite, once: then FILE,
                                 which must not exist yet, holds the statement
VMRM_FAULT=ROLE:N:KILL:FILE      it dies as by kill -9 right after its N-th COMMIT, once; a command
                                 is of the role "command", with all that it starts by itself
"""

import os
import signal
import sqlite3
import time
from pathlib import Path

WORDS = Path("/proc/self/cmdline").read_bytes().split(b"\0")
FIRST = os.getpid()

role, _, seconds = os.environ.get("VMRM_SLOW_START", "").partition(":")
if role and role.encode() in WORDS:
    time.sleep(float(seconds))


def role_now() -> str:
    """Return what this process is: a handler is a fork of the supervisor."""
    if b"_supervise" in WORDS:
        return "supervisor" if os.getpid() == FIRST else "handler"
    return "keeper" if b"serve" in WORDS else "command"


class Fault:
    """Counts a process's statements and fails one of them."""

    def __init__(self, words: str) -> None:
        self.role, number, self.code, self.file = words.split(":", 3)
        self.number, self.count, self.pid = int(number), 0, 0

    def check(self, sql: str, *, done: bool = False) -> None:
        """Raise if it is this statement's turn; a COMMIT of odd number is done before it fails."""
        if role_now() != self.role:
            return
        if self.pid != os.getpid():
            self.pid, self.count = os.getpid(), 0
        kill, commit = self.code == "KILL", sql.endswith("COMMIT")
        self.count += done and commit if kill else not done
        late = kill or (commit and self.number % 2 == 1)
        if self.count != self.number or done is not late or (kill and not commit):
            return
        try:
            with Path(self.file).open("x") as file:
                file.write(sql)
        except FileExistsError:
            return
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        error = sqlite3.OperationalError(f"injected: {self.code}")
        error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{self.code}")
        error.sqlite_errorname = f"SQLITE_{self.code}"
        raise error


def sabotage(fault: Fault) -> None:
    """Have every connection that is opened from now on ask `fault` first."""
    connect = sqlite3.connect

    def opened(*arguments, factory=sqlite3.Connection, **more):
        class Faulty(factory):
            def execute(self, sql, *parameters):
                fault.check(sql)
                cursor = super().execute(sql, *parameters)
                fault.check(sql, done=True)
                return cursor

            def executescript(self, sql):  # what makes a database
                cursor = super().executescript(sql)
                fault.check(sql.rstrip(" ;"), done=True)
                return cursor

        return connect(*arguments, factory=Faulty, **more)

    sqlite3.connect = opened


if "VMRM_FAULT" in os.environ:
    sabotage(Fault(os.environ["VMRM_FAULT"]))
