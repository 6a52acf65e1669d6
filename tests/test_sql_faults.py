"""An SQL statement fails, whichever it is: who ran it catches up, and nothing runs twice.

`VMRM_EVERY_STATEMENT=1` has every statement fail in turn, by hand; else it is a sample.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_lab import until
from keepers import Provider, group, served, states
from lab import REBOOT_ONCE, ROOT, Lab, entry, stand_ins
from test_handler import load, vm
from test_recovery import at_once

import vmrm

SEED = 20261125
CODES = ("IOERR", "FULL", "BUSY")
OPENING = 30  # statements: who cannot even open the database says so, and ends
EVERY = "VMRM_EVERY_STATEMENT" in os.environ
SABOTAGE = str(ROOT / "tests" / "sabotage")


def chosen(first: int, last: int, count: int) -> list[int]:
    """Return which statements fail, of those that there are about."""
    every = range(first, last + 1)
    picked = list(every) if EVERY else random.Random(SEED).sample(every, count)
    print(f"seed {SEED}: statements {sorted(picked)}")
    return picked


def fault(role: str, number: int, file: Path, code: str = "") -> dict[str, str]:
    """Return the environment in which that statement of that role fails, once.

    With code KILL, it is killed after the COMMIT of that number.
    """
    words = f"{role}:{number}:{code or CODES[number % 3]}:{file}"
    return {"PYTHONPATH": SABOTAGE, "VMRM_FAULT": words}


def failing(folder: Path, role: str, number: int, code: str = "") -> None:
    """Run an experiment to which an entry is added, while one statement of it fails."""
    lab, failed = Lab(folder / f"{role}{number}"), folder / f"{role}{number}.failed"
    launch, go = lab.guest(1) / "launch", folder / f"{role}{number}.go"
    schedule: list[dict[str, Any]] = [
        entry(1, -2, REBOOT_ONCE),
        entry(2, -1),
        entry(3, 0.5, f"while [ ! -e {go} ]; do sleep 0.1; done"),
        *(entry(n, 0.2 * n) for n in range(4, 8)),
        {"start_time": 1.6, "transfer": [{"location": f"{launch}/record"}]},
    ]
    lab.folder.mkdir()
    with stand_ins(lab.folder / "agents", 1):
        path = lab.folder / "agents" / "1.sock"
        load(lab, vm("vm1", path, launch, *schedule))
        with lab.start("run", **fault(role, number, failed, code)) as run:
            try:
                until((launch / "record").exists, 60)
                added = folder / f"{role}{number}.added.json"
                added.write_text(json.dumps([entry(9, 1.8)]))
                assert lab.run("schedule", "add", "vm1", str(added)).returncode == 0
                go.touch()
                out, err = run.communicate(timeout=90)
            except BaseException:
                run.kill()
                lab.run("stop", "--kill")
                raise
        sql = failed.read_text()  # else there are not so many statements
        if code == "KILL" and role == "supervisor":
            lab.run_to_the_end()
        else:
            assert run.returncode == 0, f"{sql}: {out}{err}\n{lab.logs()}"
    lab.audit()
    began = Counter(line for line in (launch / "record").read_text().split("\n") if "begin" in line)
    assert began == {f"{n} begin": 2 if n == 1 else 1 for n in (*range(1, 8), 9)}, (sql, began)
    assert list((lab.folder / "lab.db.d").glob("transfers.*/**/record")), sql
    assert lab.run("check").returncode == 0, sql


@pytest.mark.parametrize(
    ("role", "code", "first", "last", "count"),
    [
        ("handler", "", 1, 200, 4),
        ("supervisor", "", OPENING, 110, 3),
        ("handler", "KILL", 1, 29, 3),
        ("supervisor", "KILL", 1, 4, 2),
    ],
)
def test_a_statement_that_fails_loses_nothing_and_repeats_nothing(
    tmp_path: Path, role: str, code: str, first: int, last: int, count: int
) -> None:
    numbers = chosen(first, last, count)
    at_once(*(partial(failing, tmp_path, role, number, code) for number in numbers))


def keeping(folder: Path, number: int) -> None:
    """Have VMs spawned, lent, released and terminated, while a statement of the keeper fails."""
    home, failed = folder / f"keeper{number}", folder / f"keeper{number}.failed"
    home.mkdir()
    provider = Provider(home / "machines")
    with vmrm.Database(home / "lab.db") as db:
        hooks = {**provider.hooks, "release": "true"}
        group(db, hooks, min_ready=1, max_vm_total=2, release_cleans=True)
        pool = vmrm.VmManager(db=db)

        def ready() -> list[str]:
            return [name for name, state in states(db).items() if state == "ready"]

        try:
            with served(home / "lab.db", **fault("keeper", number, failed)) as keeper:
                until(ready, 60)
                lent = pool.acquire_vm(["ci"], "me", "box", os.getpid())
                pool.release_vm(lent.vm_name)
                until(lambda: lent.vm_name in ready(), 60)
                pool.start_vm_termination(lent.vm_name)
                until(lambda: lent.vm_name not in states(db) and ready(), 60)
                assert keeper.poll() is None
                keeper.send_signal(signal.SIGTERM)
                keeper.wait(30)
            sql = failed.read_text()  # else there are not so many statements
            assert keeper.returncode == 0, sql
            assert provider.running() == set(states(db)), sql
        finally:
            provider.end()


def test_a_statement_of_the_keeper_that_fails_loses_no_machine(tmp_path: Path) -> None:
    at_once(*(partial(keeping, tmp_path, number) for number in chosen(OPENING, 180, 4)))


@pytest.mark.parametrize("number", [1, 12])
def test_a_supervisor_that_cannot_open_its_database_says_try_later(
    tmp_path: Path, number: int
) -> None:
    lab = Lab(tmp_path)
    with stand_ins(tmp_path / "agents", 1):
        launch = lab.guest(1) / "launch"
        load(lab, vm("vm1", tmp_path / "agents" / "1.sock", launch, entry(1, -1)))
        done = lab.run("run", **fault("supervisor", number, tmp_path / "failed"))
        assert done.returncode == 75, done.stderr
        assert (tmp_path / "failed").exists()
        assert "could not use the database" in done.stderr
        assert lab.run("run").returncode == 0
    lab.audit()


@pytest.mark.parametrize("number", [1, 12])
def test_a_keeper_that_cannot_open_its_database_says_try_later(tmp_path: Path, number: int) -> None:
    lab = Lab(tmp_path)
    with vmrm.Database(lab.db) as db:
        group(db, {"check": "true"})
    done = lab.run("pool", "serve", **fault("keeper", number, tmp_path / "failed"))
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "failed").exists()
    assert len(done.stderr.splitlines()) == 2, "an error and a hint"
    assert lab.run("pool", "serve", "--once").returncode == 0
