"""The schema refuses what must not be, and a Database refuses what is not its file."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import traceback
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

import vmrm
from vmrm import Database

SCHEMA = Path(vmrm.__file__).with_name("schema.sql").read_text()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """Yield a fresh database; at its end no transaction may be open and the file must be sound."""
    with Database(tmp_path / "lab.db") as database:
        yield database
        assert not database.connection.in_transaction
        assert database.value("PRAGMA integrity_check") == "ok"


def in_child(work: Callable[[], None]) -> None:
    """Run *work* in a forked child; fail if it raised."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# === What a row may say ==========================================================================

ROWS: dict[str, dict[str, Any]] = {
    "experiments": {"created_at": 1.0, "destroyed_at": 2.0},
    "vms": {"server_uuid": "u", "server_name": "web", "state_at": 1.0},
    "schedules": {"server_name": "web", "text": "[]"},
    "attempts": {
        "experiment_id": 1,
        "server_name": "web",
        "generation": 1,
        "ordinal": 1,
        "attempt": 1,
        "outcome": "armed",
        "armed_at": 1.0,
    },
    "past_schedules": {"experiment_id": 1, "server_name": "web", "generation": 1, "text": "[]"},
    "holds": {"experiment_id": 1, "server_name": "web", "at": 1.0, "experiment_time": 0.0},
    "requests": {
        "id": "r",
        "server_name": "web",
        "operation": "info",
        "arguments": "{}",
        "deadline_at": 2.0,
    },
    "files": {
        "store": "s",
        "name": "a.txt",
        "sha256": "0" * 64,
        "size_bytes": 1,
        "uploaded_at": 1.0,
    },
    "history": {"server_name": "web", "at": 1.0, "new_state": "failed"},
    "pool_groups": {"name": "g", "position": 1},
    "pool_vms": {
        "vm_name": "p1",
        "group": "g",
        "state": "got_ip",
        "state_at": 1.0,
        "spawned_at": 1.0,
    },
    "leases": {"vm_name": "p1", "token": "t", "holder": "1 1 b 1", "acquired_at": 1.0},
    "pool_waiters": {
        "token": "t",
        "wants": "[]",
        "owner": "ann",
        "holder": "1 1 b 1",
        "heartbeat_at": 1.0,
    },
    "pool_info": {"group": "g", "key": "k", "value": "v"},
    "pool_server": {"id": 1, "boot": "b", "namespace": 1},
    "pool_history": {"vm_name": "p1", "group": "g", "at": 1.0},
    "pool_counts": {"group": "h", "state": "ready", "times": 1},
}


def insert(db: Database, table: str, **changes: object) -> None:
    """Write the table's good row with *changes*."""
    row = ROWS[table] | changes
    names, marks = ", ".join(f'"{key}"' for key in row), ", ".join(f":{key}" for key in row)
    db.write(f"INSERT INTO {table} ({names}) VALUES ({marks})", **row)  # noqa: S608


def tables(db: Database) -> list[str]:
    """Return the names of all tables of ours."""
    sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    return [row["name"] for row in db.query(sql)]


def test_the_good_rows_of_these_tests_are_accepted_and_cover_every_table(db: Database) -> None:
    for table in ROWS:
        insert(db, table)
    assert sorted(ROWS) == sorted(tables(db))


REFUSED = [
    ("experiments", {"start_buffer_s": -1}),
    ("experiments", {"on_failure": "panic"}),
    ("experiments", {"halt": "later"}),
    ("experiments", {"late": "never"}),
    ("experiments", {"allow_host": 2}),
    ("experiments", {"purged": 2}),
    ("experiments", {"start_cleared": 2}),
    ("attempts", {"overdue": 2}),
    ("vms", {"server_uuid": ""}),
    ("vms", {"server_name": ""}),
    ("vms", {"server_name": "-web"}),
    ("vms", {"server_name": "we b"}),
    ("vms", {"server_name": "we/b"}),
    ("vms", {"server_name": "wéb"}),
    ("vms", {"server_name": "w" * 65}),
    ("vms", {"state": "ready"}),
    ("vms", {"state": "CONFIGURED"}),
    ("vms", {"agent_timeout_s": 0}),
    ("vms", {"set_time": 2}),
    ("schedules", {"text": "["}),
    ("attempts", {"attempt": 0}),
    ("attempts", {"outcome": "lost"}),
    ("attempts", {"outcome": "done"}),
    ("attempts", {"ended_at": 3.0}),
    ("attempts", {"reboot": 2}),
    ("attempts", {"retried": 2}),
    ("holds", {"duration_s": 0.0}),
    ("holds", {"ignored": 2}),
    ("requests", {"arguments": "{"}),
    ("requests", {"answer": "{"}),
    ("requests", {"withdrawn": 2}),
    ("requests", {"withdrawn": 1, "claimed_by": "1 1 b 1"}),
    ("files", {"name": "../a"}),
    ("files", {"name": ".a"}),
    ("files", {"name": "a" * 65}),
    ("pool_groups", {"name": "g/h"}),
    ("pool_groups", {"max_vm_per_user": -1}),
    ("pool_groups", {"max_vm_total": -1}),
    ("pool_groups", {"min_ready": -1}),
    ("pool_groups", {"max_spawn_processes": 0}),
    ("pool_groups", {"vm_spawn_min_interval_s": -1}),
    ("pool_groups", {"vm_health_check_period_s": 0}),
    ("pool_groups", {"vm_health_check_max_time_s": 0}),
    ("pool_groups", {"vm_max_check_fails": -1}),
    ("pool_groups", {"vm_dirty_terminating_timeout_s": -1}),
    ("pool_groups", {"vm_terminating_timeout_s": 0}),
    ("pool_groups", {"reuse_max_count": 0}),
    ("pool_groups", {"reuse_max_age_s": 0}),
    ("pool_groups", {"reuse_max_idle_s": 0}),
    ("pool_groups", {"spawn_timeout_s": 0}),
    ("pool_groups", {"release_timeout_s": 0}),
    ("pool_groups", {"terminate_timeout_s": 0}),
    ("pool_groups", {"list_timeout_s": 0}),
    ("pool_groups", {"release_cleans": 2}),
    ("pool_groups", {"unique_ip": 2}),
    ("pool_vms", {"vm_name": "../p"}),
    ("pool_vms", {"state": "idle"}),
    ("pool_vms", {"state": "in_use"}),
    ("leases", {"holder": None, "lease_end_at": None}),
    ("pool_vms", {"state": "held"}),
    ("pool_vms", {"state": "ready", "check_fails": 1}),
    ("pool_vms", {"state": "ready", "releasing_at": 1.0}),
    ("pool_vms", {"check_fails": -1}),
    ("pool_vms", {"bound_to_user": ""}),
    ("pool_vms", {"builds_count": -1}),
    ("pool_vms", {"terminate_tries": -1}),
    ("pool_vms", {"hook": "reboot"}),
    ("pool_waiters", {"wants": "["}),
    ("pool_server", {"id": 2}),
]


@pytest.mark.parametrize(("table", "changes"), REFUSED, ids=str)
def test_a_row_that_breaks_a_check_is_refused(
    db: Database, table: str, changes: dict[str, object]
) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        insert(db, table, **changes)
    assert db.value(f"SELECT count(*) FROM {table}") == 0  # noqa: S608


def test_every_check_of_the_schema_has_a_row_that_it_refuses(db: Database) -> None:
    """By counting: every CHECK stands in a table and column that REFUSED tries."""
    tried = {(table, key) for table, changes in REFUSED for key in changes}
    for table in tables(db):
        sql = db.value("SELECT sql FROM sqlite_schema WHERE name = :table", table=table)
        sql = re.sub(r"--.*", "", sql)
        for column in re.findall(r'^\s+"?(\w+)"? [A-Z]+[^,\n]*CHECK', sql, re.MULTILINE):
            assert (table, column) in tried


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        ("vms", {"server_uuid": "u2", "server_name": "WEB"}),
        ("schedules", {"server_name": "Web"}),
        ("attempts", {"attempt": 1, "outcome": "done", "ended_at": 3.0}),
        ("attempts", {"attempt": 2}),
        ("attempts", {"attempt": 2, "outcome": "running"}),
        ("files", {"name": "A.TXT"}),
        ("requests", {}),
        ("pool_groups", {"name": "G"}),
        ("pool_vms", {"vm_name": "P1"}),
        ("leases", {"vm_name": "P1"}),
        ("pool_waiters", {}),
        ("pool_info", {}),
    ],
    ids=str,
)
def test_a_second_row_of_the_same_thing_is_refused(
    db: Database, table: str, changes: dict[str, object]
) -> None:
    insert(db, table)
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(db, table, **changes)


def test_there_is_one_current_experiment_and_any_number_of_old_ones(db: Database) -> None:
    insert(db, "experiments")
    insert(db, "experiments")
    insert(db, "experiments", destroyed_at=None)
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(db, "experiments", destroyed_at=None)


def test_every_table_is_strict_about_types(db: Database) -> None:
    strict = {row["name"]: row["strict"] for row in db.query("PRAGMA table_list")}
    assert all(strict[table] for table in tables(db))
    with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT"):
        insert(db, "vms", state_at="soon")


def listed(table: str, column: str) -> set[str]:
    """Return the words of a column's CHECK (… IN (…)) as schema.sql has them."""
    text = SCHEMA.partition(f"CREATE TABLE {table} (")[2].partition(") STRICT")[0]
    words = re.search(rf"CHECK \({column} IN\s*\(([^)]*)\)", text)
    assert words is not None
    return set(re.findall(r"'([^']*)'", words[1]))


@pytest.mark.parametrize(
    ("table", "column", "enum"),
    [
        ("vms", "state", vmrm.VMState),
        ("attempts", "outcome", vmrm.Outcome),
        ("experiments", "on_failure", vmrm.OnFailure),
        ("experiments", "halt", vmrm.Halt),
        ("pool_vms", "state", vmrm.VmStates),
    ],
)
def test_the_lists_of_the_schema_are_the_enums(
    table: str, column: str, enum: type[StrEnum]
) -> None:
    assert listed(table, column) == set(enum)


# === Triggers ====================================================================================


@pytest.mark.parametrize("state", ["ready", "check_health", "terminating", "held"])
def test_a_vm_in_use_has_a_lease_which_ends_with_the_state_that_allows_one(
    db: Database, state: str
) -> None:
    insert(db, "pool_vms", state="ready")
    with pytest.raises(sqlite3.IntegrityError, match="CHECK: a VM in use has a lease"):
        db.write("UPDATE pool_vms SET state = 'in_use'")
    insert(db, "leases", vm_name="P1")
    db.write("UPDATE pool_vms SET state = 'in_use'")
    db.write("UPDATE pool_vms SET state = :state, held_until = 9", state=state)
    assert db.value("SELECT count(*) FROM leases") == (state == "held")
    db.write("DELETE FROM pool_vms")
    assert db.value("SELECT count(*) FROM leases") == 0


def test_every_state_of_a_vm_is_in_its_history_and_nothing_else(db: Database) -> None:
    mapping = vmrm.VMMapping(db=db)
    mapping.put("u", "web")
    mapping.set_vm_state_by_uuid("u", "configuring")
    mapping.set_vm_state_by_uuid("u", "configuring")
    mapping.set_vm_time_by_uuid("u", "-5")
    mapping.set_vm_state_by_uuid("u", "failed", reason="it burns")
    rows = db.query("SELECT old_state, new_state, reason, experiment_id FROM history ORDER BY id")
    assert [tuple(row.values()) for row in rows] == [
        (None, "uninitialized", "", 1),
        ("uninitialized", "configuring", "", 1),
        ("configuring", "failed", "it burns", 1),
    ]


CHANGES: dict[str, Callable[[Database], object]] = {
    "schedule put": lambda db: insert(db, "schedules"),
    "schedule put again": lambda db: db.write("UPDATE schedules SET text = '[]'"),
    "pause": lambda db: insert(db, "holds"),
    "request": lambda db: insert(db, "requests"),
    "retry": lambda db: db.write("UPDATE attempts SET retried = 1"),
    "start time": lambda db: db.write("UPDATE experiments SET start_at = 5.0"),
    "halt": lambda db: db.write("UPDATE experiments SET halt = 'stop'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_a_handler_must_see_raises_the_revision(db: Database, change: str) -> None:
    vmrm.current_experiment(db)
    insert(db, "vms", finished_at=9.0)
    insert(db, "attempts", outcome="failed", ended_at=2.0)
    if change == "schedule put again":
        insert(db, "schedules")
    before = db.value("SELECT revision FROM vms")
    CHANGES[change](db)
    assert db.value("SELECT revision FROM vms") == before + 1
    again = change.startswith("schedule") or change == "retry"
    assert (db.value("SELECT finished_at FROM vms") is None) == again


def test_a_handlers_own_bookkeeping_does_not_raise_the_revision(db: Database) -> None:
    insert(db, "vms")
    insert(db, "attempts")
    db.write("UPDATE vms SET state = 'configuring', skew_s = 1.0, handler = '1 1 b 1'")
    db.write("UPDATE attempts SET outcome = 'running', pid = 4")
    assert db.value("SELECT revision FROM vms") == 0


# === Queries that are asked often ================================================================


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT revision FROM vms WHERE server_name = :x",
        "SELECT * FROM vms WHERE server_uuid = :x",
        "SELECT text FROM schedules WHERE server_name = :x",
        "SELECT * FROM current_experiment",
        "SELECT * FROM requests WHERE server_name = :x AND answered_at IS NULL",
        "SELECT * FROM requests WHERE id = :x",
        """SELECT max(attempt) FROM attempts WHERE experiment_id = 1 AND server_name = :x
           AND generation = 1 AND ordinal = 1""",
        "UPDATE attempts SET pid = 1 WHERE id = :x AND outcome IN ('armed', 'running')",
        "SELECT * FROM files WHERE store = :x AND name = :x",
    ],
)
def test_a_hot_query_searches_an_index(db: Database, sql: str) -> None:
    plan = [row["detail"] for row in db.query(f"EXPLAIN QUERY PLAN {sql}", x="web")]
    assert plan
    assert not [step for step in plan if step.startswith("SCAN") and "USING INDEX" not in step]


def test_the_latest_attempt_of_each_entry_is_searched_not_scanned(db: Database) -> None:
    steps = db.query("EXPLAIN QUERY PLAN SELECT * FROM entry_status WHERE server_name = 'web'")
    plan = [row["detail"] for row in steps]
    assert [step for step in plan if step.startswith("SEARCH b USING")]
    assert not [step for step in plan if re.match(r"SCAN (a|b|s)\b", step)]


# === Whose file it is ============================================================================


def test_a_new_database_names_its_program_and_version(db: Database) -> None:
    assert db.value("PRAGMA application_id") == int.from_bytes(b"vmrm")
    assert db.value("PRAGMA user_version") == 3
    assert db.value("PRAGMA journal_mode") == "wal"


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(vmrm.SchemaError, match="another program") as caught:
        vmrm.VMMapping(db=path).get_all()
    assert str(path) in str(caught.value)
    assert caught.value.code == 3
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", [0, 1, 999])
def test_another_version_is_refused_naming_both(tmp_path: Path, version: int) -> None:
    path = tmp_path / "lab.db"
    with Database(path) as db:
        db.connection.execute(f"PRAGMA user_version = {version}")
    message = f"schema version {version}, this vmrm wants 3"
    with pytest.raises(vmrm.SchemaError, match=message), Database(path) as db:
        db.query("SELECT * FROM vms")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 100)
    with pytest.raises(vmrm.SchemaError, match="not a database"):
        vmrm.VMMapping(db=path).get_all()
    assert path.read_text() == "dear diary, " * 100


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lab.db"
    with Database(path) as db:
        vmrm.current_experiment(db)
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])
    with pytest.raises(vmrm.SchemaError, match="not a database"):
        vmrm.VMMapping(db=path).get_all()


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    path = tmp_path / "lab.db"
    path.touch()
    assert vmrm.VMMapping(db=path).get_all() == []


def test_a_missing_database_is_not_made_where_it_is_only_looked_at(tmp_path: Path) -> None:
    db = Database(tmp_path / "none" / "lab.db", create=False)
    with pytest.raises(vmrm.NotFound, match="no database at"):
        db.query("SELECT * FROM vms")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("path", ["/proc/nowhere/lab.db", "/dev/null/lab.db"])
def test_a_path_where_nothing_can_be_made_is_one_clear_error(path: str) -> None:
    with pytest.raises(vmrm.UsageError, match=rf"cannot open '{path}'"):
        vmrm.VMMapping(db=path).get_all()


def test_a_directory_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(vmrm.UsageError, match="is not a file"):
        vmrm.VMMapping(db=tmp_path).get_all()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "fuse.sshfs"])
def test_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(vmrm, "_file_system", lambda path: kind)
    with pytest.raises(vmrm.UsageError, match=rf"network file system \({kind}\)") as caught:
        vmrm.VMMapping(db=tmp_path / "lab.db").get_all()
    assert "local disk" in caught.value.hint
    assert not (tmp_path / "lab.db").exists()


def test_the_file_system_of_a_path_is_what_the_kernel_says() -> None:
    assert vmrm._file_system(Path("/proc")) == "proc"


# === Privacy and forks ===========================================================================


def test_everything_is_private_to_the_user(tmp_path: Path) -> None:
    os.umask(before := os.umask(0))
    assert before != 0, "this test would prove nothing under umask 0"
    os.umask(0)
    try:
        with Database(tmp_path / "sub" / "lab.db") as db:
            vmrm.current_experiment(db)
            vmrm.VmResourceStore(db=db).add_file_from_content("x", "a.txt")
            paths = [tmp_path / "sub", *(tmp_path / "sub").rglob("*")]
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    finally:
        os.umask(before)
    wrong = {p: oct(m) for p, m in modes.items() if m != (0o700 if p.is_dir() else 0o600)}
    assert not wrong
    assert any(path.name == "writer" for path in modes)


def test_a_child_process_gets_a_connection_of_its_own(db: Database) -> None:
    vmrm.VMMapping(db=db).put("u", "web")
    parents = db.connection

    def work() -> None:
        assert db.connection is not parents
        vmrm.VMMapping(db=db).put("u2", "db")
        assert len(db.query("SELECT * FROM vms")) == 2

    in_child(work)
    assert db.connection is parents
    assert [row["server_name"] for row in db.query("SELECT * FROM vms")] == ["web", "db"]


def test_a_child_that_drops_a_mapping_leaves_the_parents_connection_alone(tmp_path: Path) -> None:
    mapping = vmrm.VMMapping(db=tmp_path / "lab.db")
    mapping.put("u", "web")

    def work() -> None:
        nonlocal mapping
        parents = mapping.db.connection
        mapping.db._pid -= 1  # as in a child that has not used it yet
        del mapping
        assert parents.execute("SELECT count(*) FROM vms").fetchone()[0] == 1, "it was closed"

    in_child(work)
    mapping.put("u2", "db")
    assert mapping.get_all(length=True) == 2


def test_a_child_can_write_while_its_parent_is_in_a_transaction_of_another_database(
    db: Database, tmp_path: Path
) -> None:
    def work() -> None:
        with Database(tmp_path / "other.db", timeouts=vmrm.Timeouts(writer=5)) as other:
            vmrm.VMMapping(db=other).put("u", "web")

    with db.transaction():
        in_child(work)


def test_a_failed_transaction_leaves_nothing_behind(db: Database) -> None:
    vmrm.current_experiment(db)
    with pytest.raises(ZeroDivisionError), db.transaction(durable=True):
        db.connection.execute("UPDATE experiments SET source = 'half'")
        raise ZeroDivisionError
    assert db.value("SELECT source FROM experiments") == ""
    assert db.value("PRAGMA synchronous") == 1, "NORMAL again"


def test_a_durable_transaction_is_written_through(db: Database) -> None:
    with db.transaction(durable=True):
        assert db.value("PRAGMA synchronous") == 2
    assert db.value("PRAGMA synchronous") == 1


def test_the_default_database_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMRM_DB", "/somewhere/lab.db")
    assert vmrm.default_database() == Path("/somewhere/lab.db")
    monkeypatch.delenv("VMRM_DB")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert vmrm.default_database() == Path("/state/vmrm/vmrm.db")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert vmrm.default_database() == Path("/home/ann/.local/state/vmrm/vmrm.db")
