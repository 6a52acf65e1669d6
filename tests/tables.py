"""What tests read of the tables, and the little that they write: no other test file has SQL.

Except those of the schema, the journal and the writer lock themselves. Every function takes the
database's path and reads it from outside of vmrm, each time on a connection of its own.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _read(db: Path, sql: str, *values: object) -> list[Row]:
    with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(sql, values)]


def _change(db: Path, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(db, timeout=60)) as connection, connection:
        connection.execute(sql, values)


# === the experiment ============================================================================


def experiment(db: Path) -> Row:
    """Return the current experiment."""
    return _read(db, "SELECT * FROM current_experiment")[0]


def vms(db: Path) -> dict[str, Row]:
    """Return the experiment's VMs by name."""
    sql = "SELECT *, CAST(handler AS INTEGER) AS handler_pid FROM vms ORDER BY ordinal"
    return {row["server_name"]: row for row in _read(db, sql)}


def states(db: Path) -> dict[str, str]:
    """Return the state of each VM."""
    return {name: row["state"] for name, row in vms(db).items()}


def attempts(db: Path, vm: str | None = None) -> list[Row]:
    """Return the journal, of one VM or of all, in the order in which it was written."""
    sql = "SELECT * FROM attempts WHERE ?1 IS NULL OR server_name = ?1 ORDER BY id"
    return _read(db, sql, vm)


def entries(db: Path, vm: str | None = None) -> list[Row]:
    """Return each entry of the present schedules with its latest attempt."""
    sql = """SELECT * FROM entry_status WHERE ?1 IS NULL OR server_name = ?1
             ORDER BY server_name, ordinal"""
    return _read(db, sql, vm)


def status(db: Path) -> dict[str, Row]:
    """Return what `status` counts for each VM, by name."""
    return {row["server_name"]: row for row in _read(db, "SELECT * FROM vm_status")}


def requests(db: Path) -> list[Row]:
    """Return the requests of commands to handlers."""
    return _read(db, "SELECT * FROM requests")


def holds(db: Path) -> list[Row]:
    """Return the pauses, breaks and resumes that commands gave, also those without effect."""
    return _read(db, "SELECT * FROM holds ORDER BY id")


def history(db: Path) -> list[Row]:
    """Return every move of every VM."""
    return _read(db, "SELECT * FROM history ORDER BY id")


def generations(db: Path) -> list[int]:
    """Return the generation of each VM's schedule."""
    return [row["generation"] for row in _read(db, "SELECT * FROM schedules")]


# === the pool ==================================================================================


def pool_vms(db: Path) -> dict[str, Row]:
    """Return the pool's VMs with their leases by name, the oldest first."""
    sql = "SELECT *, CAST(hook_process AS INTEGER) AS hook_pid FROM pool_list"
    found = _read(db, f"{sql} ORDER BY spawned_at, vm_name")
    return {row["vm_name"]: row for row in found}


def set_holder(db: Path, vm: str, **words: object) -> None:
    """Make the holder of a VM another process, by its pid, start, boot or namespace."""
    names = ("pid", "started", "boot", "namespace")
    text = _read(db, "SELECT holder FROM leases WHERE vm_name = ?", vm)[0]["holder"]
    holder = dict(zip(names, text.split(), strict=True)) | words
    put(db, "leases", {"holder": " ".join(map(str, holder.values()))}, vm_name=vm)


def pool_groups(db: Path) -> list[Row]:
    """Return the pool's groups."""
    return _read(db, "SELECT * FROM pool_groups ORDER BY position")


def pool_history(db: Path) -> list[Row]:
    """Return every move of every VM of the pool."""
    return _read(db, "SELECT * FROM pool_history ORDER BY id")


def pool_waiters(db: Path) -> list[Row]:
    """Return who waits for a VM of the pool."""
    return _read(db, "SELECT * FROM pool_waiters")


def most_bound(db: Path) -> int:
    """Return how many VMs of the pool are bound to the owner who has most, or 0."""
    sql = """SELECT count(*) AS n FROM pool_vms WHERE state <> 'terminating'
             AND bound_to_user IS NOT NULL GROUP BY bound_to_user ORDER BY n DESC"""
    return next((row["n"] for row in _read(db, sql)), 0)


def keeper_runs(db: Path) -> bool:
    """Whether a keeper says that it has started."""
    return any(row["started_at"] for row in _read(db, "SELECT * FROM pool_server"))


# === what only time or damage brings about =====================================================


def put(db: Path, table: str, values: Row, **where: object) -> None:
    """Set columns in all rows of a table, or in those where others have a value."""
    change = ", ".join(f"{name} = ?" for name in values)
    which = " AND ".join(f"{name} = ?" for name in where) or "1"
    sql = f"UPDATE {table} SET {change} WHERE {which}"  # noqa: S608
    _change(db, sql, *values.values(), *where.values())


def add(db: Path, table: str, row: Row) -> None:
    """Add a row to a table."""
    columns, places = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
    _change(db, f"INSERT INTO {table} ({columns}) VALUES ({places})", *row.values())  # noqa: S608


def add_pool_vm(db: Path, row: Row) -> None:
    """Add a VM to the pool, in any state; one in use has a lease without a process."""
    if row["state"] == "in_use":
        lease = {"token": "t", "acquired_at": row["state_at"], "lease_end_at": 9e9}
        add(db, "leases", {"vm_name": row["vm_name"], **lease})
    add(db, "pool_vms", row)


def note(db: Path, group: str, key: str, value: object) -> None:
    """Note something of a group as the keeper does."""
    sql = "REPLACE INTO pool_info VALUES (?, ?, ?)"
    _change(db, sql, group, f"keeper.{key}", json.dumps(value))


def note_spawn_failures(db: Path, group: str, times: int, at: float) -> None:
    """Make so many spawn hooks of a group fail in a row, the last one at that time."""
    note(db, group, "failed", {"times": times, "at": at, "why": "no reason"})


def empty(db: Path, table: str) -> None:
    """Remove all rows of a table."""
    _change(db, f"DELETE FROM {table}")  # noqa: S608


def let_time_go_by(db: Path, seconds: float) -> None:
    """Make the experiment's start, and what is planned by it, so much earlier."""
    _change(db, "UPDATE experiments SET start_at = start_at - ?", seconds)
    _change(db, "UPDATE attempts SET planned_at = planned_at - ?", seconds)


def date_back_pool_info(db: Path) -> None:
    """Make the keeper's notes about its groups as old as can be."""
    sql = "UPDATE pool_info SET value = json_set(value, '$.at', 0) WHERE json_valid(value)"
    _change(db, sql)


def dump(db: Path) -> list[str]:
    """Return everything in a database, also of a foreign one, as SQL."""
    with closing(sqlite3.connect(db)) as connection:
        return list(connection.iterdump())


def set_clock_back(db: Path, seconds: float) -> None:
    """Make what was sent a matter of the future, as after a clock that was set back."""
    _change(db, "UPDATE attempts SET sent_at = sent_at + ?", seconds)


def append_entry(connection: sqlite3.Connection, vm: str, entry: Row) -> None:
    """Append an entry to a schedule inside a transaction, and wake nobody."""
    sql = "SELECT text FROM schedules WHERE server_name = ?"
    text = json.loads(connection.execute(sql, (vm,)).fetchone()[0])
    connection.execute(
        "UPDATE schedules SET text = ? WHERE server_name = ?", (json.dumps([*text, entry]), vm)
    )
