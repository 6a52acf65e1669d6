"""The journal: one row per attempt, and the first word about how it ended stands."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmrm
from vmrm import Attempt, Database, Journal, NextStep, Outcome, ScheduleDb, ScheduleEntry

TWO = '[{"start_time": -5, "executable": "a"}, {"start_time": 1, "executable": "b"}]'


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "lab.db") as database:
        vmrm.VMMapping(db=database).put("u", "web", state="configuring")
        ScheduleDb(db=database).put("web", TWO)
        yield database


@pytest.fixture
def journal(db: Database) -> Journal:
    return Journal(db, "web")


def status(db: Database) -> dict[str, Any]:
    row = db.row("SELECT * FROM vm_status WHERE server_name = 'web'")
    assert row is not None
    return row


def test_arming_makes_an_open_attempt_of_each_entry(db: Database, journal: Journal) -> None:
    armed = journal.arm({1: None, 2: 77.5}, "boot-1")
    assert journal.latest() == armed
    assert [(a.ordinal, a.attempt, a.outcome, a.planned_at) for a in armed.values()] == [
        (1, 1, Outcome.ARMED, None),
        (2, 1, Outcome.ARMED, 77.5),
    ]
    assert all(a.is_open and a.boot_id == "boot-1" for a in armed.values())


def test_an_entry_has_one_open_attempt_at_most(journal: Journal) -> None:
    journal.arm({1: None}, "boot")
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        journal.arm({2: 5.0, 1: None}, "boot")
    assert journal.latest().keys() == {1}, "and nothing of the refused arming is left"


def test_a_start_is_recorded_with_the_vms_time(db: Database, journal: Journal) -> None:
    attempt = journal.arm({1: None}, "boot")[1]
    journal.started(attempt, 1000.5, 4711, -5.0, None)
    found = journal.latest()[1]
    assert (found.outcome, found.sent_at, found.pid, found.is_open) == (
        Outcome.RUNNING,
        1000.5,
        4711,
        True,
    )
    assert db.value('SELECT "current_time" FROM vms') == "-5"
    assert status(db)["running"] == 1


@pytest.mark.parametrize(
    ("outcome", "details"),
    [
        (Outcome.DONE, {"exit_code": 0}),
        (Outcome.DONE, {"exit_code": 10, "reboot": True}),
        (Outcome.FAILED, {"exit_code": 3, "error": "ended with 3"}),
        (Outcome.UNKNOWN, {"error": "nobody saw its end"}),
        (Outcome.SKIPPED, {}),
    ],
)
def test_an_end_is_recorded_and_the_first_word_about_it_stands(
    journal: Journal, outcome: Outcome, details: dict[str, Any]
) -> None:
    attempt = journal.arm({1: None}, "boot")[1]
    journal.ended(attempt, outcome, **details)
    found = journal.latest()[1]
    assert found.outcome is outcome
    assert not found.is_open
    assert {key: getattr(found, key) for key in details} == details
    journal.ended(attempt, Outcome.FAILED, exit_code=99, error="late")
    journal.started(attempt, 1.0, 1, -5, None)
    assert journal.latest()[1] == found


def test_a_second_attempt_counts_on_and_is_the_latest(db: Database, journal: Journal) -> None:
    first = journal.arm({1: None}, "boot-1")[1]
    journal.ended(first, Outcome.DONE, exit_code=10, reboot=True)
    second = journal.arm({1: None}, "boot-2")[1]
    assert (second.attempt, journal.latest()[1]) == (2, second)
    assert status(db)["done"] == 0, "a program that asks for a reboot is not done"
    journal.ended(second, Outcome.DONE, exit_code=0)
    assert (status(db)["done"], status(db)["entries"]) == (1, 2)
    assert db.value("SELECT count(*) FROM attempts") == 2


def test_an_end_needs_its_instant_and_an_open_attempt_has_none(
    db: Database, journal: Journal
) -> None:
    attempt = journal.arm({1: None}, "boot")[1]
    assert db.value("SELECT ended_at FROM attempts") is None
    journal.ended(attempt, Outcome.DONE, exit_code=0)
    assert db.value("SELECT ended_at >= armed_at FROM attempts") == 1


def test_attempts_of_other_vms_and_experiments_are_nobodys_business(db: Database) -> None:
    Journal(db, "web").arm({1: None}, "boot")
    assert Journal(db, "db").latest() == {}
    vmrm.destroy_experiment(db)
    vmrm.VMMapping(db=db).put("u", "web")
    ScheduleDb(db=db).put("web", TWO)
    assert Journal(db, "web").latest() == {}
    Journal(db, "web").arm({1: None}, "boot")
    assert [r["experiment_id"] for r in db.query("SELECT * FROM attempts ORDER BY id")] == [1, 2]


def test_the_token_tells_experiments_and_generations_apart(db: Database) -> None:
    tokens = [Journal(db, "web").token]
    ScheduleDb(db=db).destroy_one("web")
    tokens.append(Journal(db, "web").token)
    vmrm.destroy_experiment(db)
    tokens.append(Journal(db, "web").token)
    assert len(set(tokens)) == 3


def test_the_attempts_of_a_replaced_schedule_have_other_numbers(db: Database) -> None:
    """Their output files would be taken for the old ones, and be read on from their end."""
    assert Journal(db, "web").arm({1: None}, "boot")[1].attempt == 1
    ScheduleDb(db=db).destroy_one("web")
    ScheduleDb(db=db).put("web", TWO)
    armed = Journal(db, "web").arm({1: None, 2: 5.0}, "boot")
    assert {o: a.attempt for o, a in armed.items()} == {1: 2, 2: 1}


# === Retrying ====================================================================================


def end(journal: Journal, ordinal: int, outcome: Outcome) -> None:
    attempt = journal.arm({ordinal: None}, "boot")[ordinal]
    journal.ended(attempt, outcome, error="x")


def test_a_retry_concerns_what_failed_or_is_unknown_and_nothing_else(db: Database) -> None:
    outcomes = [Outcome.FAILED, Outcome.UNKNOWN, Outcome.DONE, Outcome.SKIPPED]
    item = '{"start_time": 1, "executable": "a"}'
    tolerated = '{"start_time": 2, "executable": "a", "ignore_failure": true}'
    ScheduleDb(db=db).put("web", f"[{', '.join([item] * 5)}, {tolerated}]")
    journal = Journal(db, "web")
    for ordinal, outcome in enumerate(outcomes, 1):
        end(journal, ordinal, outcome)
    end(journal, 6, Outcome.FAILED)
    assert vmrm.retry_failed(db, "WEB") == 2
    assert {o for o, a in journal.latest().items() if a.retried} == {1, 2}
    assert vmrm.retry_failed(db) == 0, "what is marked is not marked again"


def test_a_retry_of_one_entry_leaves_the_others(db: Database, journal: Journal) -> None:
    end(journal, 1, Outcome.FAILED)
    end(journal, 2, Outcome.FAILED)
    assert vmrm.retry_failed(db, "web", 2) == 1
    assert {o for o, a in journal.latest().items() if a.retried} == {2}


def test_only_the_latest_attempt_is_retried(db: Database, journal: Journal) -> None:
    end(journal, 1, Outcome.FAILED)
    vmrm.retry_failed(db)
    end(journal, 1, Outcome.DONE)
    assert vmrm.retry_failed(db) == 0
    assert not journal.latest()[1].retried


@pytest.mark.parametrize(("started", "state"), [(False, "configuring"), (True, "configured")])
def test_a_failed_vm_goes_back_to_where_it_was(db: Database, started: bool, state: str) -> None:
    mapping = vmrm.VMMapping(db=db)
    if started:
        vmrm.ExperimentStart(db=db).add_start_time()
    mapping.set_vm_state_by_uuid("u", "failed", reason="no disk")
    assert vmrm.retry_failed(db, "web") == 1
    assert mapping.get("u")["state"] == state
    assert db.value("SELECT reason FROM vms") == ""


# === What is next ================================================================================


def attempt_of(outcome: Outcome, **changes: Any) -> Attempt:
    values = {
        "id": 1, "claim": "attempt.1", "ordinal": 1, "attempt": 1, "outcome": outcome,
        "planned_at": None,
        "armed_at": 0.0, "sent_at": None,
        "boot_id": "now", "pid": None, "exit_code": None, "reboot": False,
        "retried": False, "error": "",
    }  # fmt: skip
    return Attempt(**(values | changes))


NEXT = {
    Outcome.ARMED: NextStep.WATCH,
    Outcome.RUNNING: NextStep.WATCH,
    Outcome.DONE: NextStep.NOTHING,
    Outcome.SKIPPED: NextStep.NOTHING,
    Outcome.FAILED: NextStep.FAILED,
    Outcome.UNKNOWN: NextStep.FAILED,
}


@pytest.mark.parametrize("outcome", list(Outcome))
def test_what_an_entry_needs_next_follows_from_its_latest_attempt(outcome: Outcome) -> None:
    entry = ScheduleEntry(-5)
    assert vmrm.next_step(entry, None, "now") is NextStep.RUN
    assert vmrm.next_step(entry, attempt_of(outcome), "now") is NEXT[outcome]
    assert vmrm.next_step(entry, attempt_of(outcome, retried=True), "now") is NextStep.RUN
    entry.ignore_failure = True
    tolerated = NextStep.NOTHING if NEXT[outcome] is NextStep.FAILED else NEXT[outcome]
    assert vmrm.next_step(entry, attempt_of(outcome), "now") is tolerated


def test_a_program_that_asked_for_a_reboot_runs_again_in_another_boot_only() -> None:
    asked = attempt_of(Outcome.DONE, exit_code=10, reboot=True)
    assert vmrm.next_step(ScheduleEntry(-5), asked, "now") is NextStep.REBOOT
    assert vmrm.next_step(ScheduleEntry(-5), asked, "another") is NextStep.RUN


def test_an_unknown_end_is_run_again_only_by_rerun_and_not_for_ever() -> None:
    entry = ScheduleEntry(-5)
    entry.options["rerun"] = True
    steps = [
        vmrm.next_step(entry, attempt_of(Outcome.UNKNOWN, attempt=n), "now")
        for n in range(1, vmrm.MAX_REBOOTS + 2)
    ]
    assert [step for step, _ in itertools.groupby(steps)] == [NextStep.RUN, NextStep.FAILED]
    assert vmrm.next_step(entry, attempt_of(Outcome.FAILED), "now") is NextStep.FAILED
