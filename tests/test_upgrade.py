"""A database of an older version is upgraded in place; whatever happens, nothing of it is lost."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tables
from cli_lab import until
from conftest import Cli
from lab import FAST, crash_labels, stand_ins

import vmrm

LEASE = "a20303f029237c89249782ab62ac5ee6"  # of the lease in the stored database
LABELS = [label for label in crash_labels() if label.startswith("upgrade-")]


@pytest.fixture
def old(cli: Cli) -> Path:
    """Lay the stored database of version 2 at the command line's place."""
    text = (Path(__file__).parent / "version2.sql").read_text()
    with closing(sqlite3.connect(cli.db)) as db:
        db.executescript(text.replace("@FOLDER@", str(cli.folder)))
    for folder, said in (("logs", "its "), ("logs.1", "former\n"), ("transfers", "")):
        path = cli.folder / "lab.db.d" / folder / "vm1/4.1.out"
        path.parent.mkdir(parents=True)
        path.write_text(said)
    return cli.db


def schema(path: Path) -> set[tuple[str, str]]:
    """Return everything that a database's schema is made of, but for who upgraded it."""
    sql = """SELECT name, sql FROM sqlite_schema
             WHERE sql IS NOT NULL AND tbl_name NOT LIKE '%sqlite_%'"""
    with closing(sqlite3.connect(path)) as db:
        return set(db.execute(sql))


def content(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return [*map(str, db.execute("PRAGMA user_version").fetchone()), *db.iterdump()]


def counts(path: Path) -> dict[str, int]:
    """Return how many rows each table has."""
    with closing(sqlite3.connect(path)) as db:
        listed = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        tables = [name for (name,) in listed if "sqlite_" not in name]
        counted = "SELECT count(*) FROM "
        return {name: db.execute(f'{counted} "{name}"').fetchone()[0] for name in tables}


def rows(cli: Cli, *words: str) -> Any:
    done = cli(*words, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def upgraded_well(cli: Cli, before: list[str]) -> None:
    """Assert that the database is as new, has its rows, and that the old one lies beside it."""
    assert counts(cli.folder / "lab.db.v2").items() <= counts(cli.db).items()
    found = {row["vm"]: (row["state"], row["done"], row["failed"]) for row in rows(cli, "status")}
    assert found == {"vm1": ("configured", 2, 1), "vm2": ("configured", 1, 0)}
    held = {row["vm"]: (row["state"], row["owner"]) for row in rows(cli, "pool", "list")}
    assert held == {"m1": ("ready", None), "m2": ("ready", None), "m3": ("in_use", "ann")}
    with vmrm.Database(cli.folder / "new.db") as new:
        assert new.value("PRAGMA user_version") > 2
    assert schema(cli.db) == schema(cli.folder / "new.db")
    state = cli.folder / "lab.db.d"
    kept = {path.parts[-3]: path.read_text() for path in state.glob("*/vm1/4.1.out")}
    assert kept == {"logs.1": "former\n", "logs.2": "its ", "transfers.2": ""}
    copies = list(cli.folder.glob("lab.db.v2*"))
    assert [content(path) for path in copies] == [before]


def test_an_upgrade_keeps_every_row_and_a_copy(cli: Cli, old: Path) -> None:
    before = content(old)
    first = cli("status")
    assert (first.code, "lab.db.v2" in first.err) == (0, True), first
    upgraded_well(cli, before)
    assert cli("status").err == ""
    assert cli("pool", "release", "m3", "--token", LEASE).code == 0
    assert cli("check").code == 0


def test_an_experiment_goes_on_where_the_older_vmrm_left_it(cli: Cli, old: Path) -> None:
    done = cli.folder / "agents/1/launch/2/sh/attempt.1"  # what entry 4 was running in
    with (
        closing(sqlite3.connect(old)) as db,
        db,
    ):  # what is still to come stays so, whatever the date
        db.execute("UPDATE experiments SET start_at = ? WHERE id = 2", (time.time() // 1 - 60,))
    with stand_ins(cli.folder / "agents", 2):
        done.mkdir(parents=True)
        (done / "exit").write_text("0 0\n")
        (done / "out").write_text("its output\n")
        with subprocess.Popen(
            cli.command("run"), env=cli.environment | FAST, stderr=subprocess.DEVNULL
        ) as run:
            until(lambda: {row["vm"]: row["done"] for row in rows(cli, "status")}["vm1"] >= 3)
            assert cli("stop").code == 0
            run.wait(30)
    record = cli.folder / "agents/1/launch/record"
    assert not record.exists() or "two" not in record.read_text()
    entry = rows(cli, "schedule", "show", "vm1")[3]
    assert (entry["outcome"], entry["attempt"]) == ("done", 1)
    assert (cli.folder / "lab.db.d/logs.2/vm1/4.1.out").read_text() == "its output\n"


@pytest.mark.parametrize("label", LABELS)
def test_killed_in_the_middle_of_an_upgrade(cli: Cli, old: Path, label: str) -> None:
    before = content(old)
    killed = cli("status", env={"VMRM_CRASH": f"{label}:1"})
    assert killed.code == -signal.SIGKILL, killed
    upgraded_well(cli, before)


def test_what_cannot_be_upgraded_stays_as_it_is(cli: Cli, old: Path) -> None:
    with closing(sqlite3.connect(old)) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET sql = replace(sql, 'REAL NOT NULL', 'ANY')")
        db.commit()
    with closing(sqlite3.connect(old)) as db:
        db.execute("UPDATE attempts SET armed_at = 'never' WHERE id = 3")
        db.commit()
    before = content(old)
    assert cli("status").code == 3
    assert content(old) == before


def test_an_older_vmrm_that_works_with_it_is_left_in_peace(cli: Cli, old: Path) -> None:
    before, lock = content(old), cli.folder / "lab.db.d/locks/supervisor"
    lock.parent.mkdir(parents=True)
    command = [shutil.which("flock") or "flock", str(lock), "sh", "-c", "echo; read -r _"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        refused = cli("status")
        assert (refused.code, f"process {worker.pid} " in refused.err) == (2, True), refused
        assert content(old) == before
        worker.communicate(b"\n")
    assert cli("status").code == 0


def test_vms_of_the_pool_that_are_one_machine_are_told_and_one_of_them_is_lent(
    cli: Cli, old: Path
) -> None:
    with closing(sqlite3.connect(old)) as db:
        db.execute(
            "UPDATE pool_vms SET path = 'unix:/run/qga/../qga/m1.sock' WHERE vm_name <> 'm1'"
        )
        db.execute("UPDATE pool_vms SET path = 'what? no: address' WHERE vm_name = 'm1'")
        db.commit()
    listed = {row["vm"]: (row["state"], row["reason"]) for row in rows(cli, "pool", "list")}
    in_use = listed.pop("m3")
    assert listed == {"m1": ("ready", ""), "m2": ("held", "it is the machine of VM m3")}
    assert in_use[0] == "in_use", "whoever works with the machine goes on, and no one beside him"
    assert rows(cli, "pool", "info", "m3")["path"] == "unix:/run/qga/../qga/m1.sock"
    told = cli("check")
    assert (told.code, "it is the machine of VM m" in told.out + told.err) == (1, True)
    assert cli("pool", "terminate", "m2").code == 0
    assert cli("pool", "remove", "m2").code == 0
    assert cli("check").code == 0


def test_the_experiments_machines_are_none_of_the_pool_after_an_upgrade(
    cli: Cli, old: Path
) -> None:
    assert rows(cli, "status")[0]["vm"] == "vm1"
    done = cli("pool", "add", "more", "ci", "--path", f"{cli.folder}/agents/../agents/1.sock")
    assert (done.code, "the path of the experiment's VM 'vm1'" in done.err) == (2, True)


def test_a_listing_that_an_older_keeper_left_running_is_ended(cli: Cli, old: Path) -> None:
    words = ["env", "VMRM_HOOK=list", "sleep", "1000"]
    with subprocess.Popen(words, start_new_session=True) as hook:
        process = [hook.pid, vmrm.process_started(hook.pid), vmrm.boot_id()]
        tables.note(old, "ci", "listed", {"at": 1, "hook": process})
        served = cli("pool", "serve", "--once")
        hook.send_signal(signal.SIGTERM)  # which comes too late
    assert (served.code, hook.returncode) == (0, -signal.SIGKILL)
