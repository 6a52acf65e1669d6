"""Launch and start times, and the barrier that sets the start time exactly once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tables
from lab import living_handler

import vmrm
from vmrm import Database, ExperimentStart, VMMapping


class FakeClock(vmrm.Clock):
    """A clock that stands until it is moved."""

    now = 1_000_000.25

    def wall(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(vmrm, "CLOCK", fake)
    return fake


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "lab.db") as database:
        yield database


@pytest.fixture
def start(db: Database) -> ExperimentStart:
    return ExperimentStart(db=db)


@pytest.fixture
def mapping(db: Database) -> VMMapping:
    return VMMapping(db=db)


def at(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def start_at(db: Database) -> float | None:
    value: float | None = tables.experiment(db.path)["start_at"]
    return value


def halt(db: Database) -> str | None:
    value: str | None = tables.experiment(db.path)["halt"]
    return value


def set_policy(db: Database, policy: str) -> None:
    """Change what a failed VM means, and then the VMs, by one that nobody waits for."""
    tables.put(db.path, "experiments", {"on_failure": policy})
    VMMapping(db=db).put("bystander", "bystander", state="n/a")


# === The times ===================================================================================


def test_before_anything_was_reported_every_time_is_none(start: ExperimentStart) -> None:
    assert start.get_start_time() is None
    assert start.get_launch_time() is None
    assert start.get_time_since_start() is None
    assert start.get_time_to_start() is None


def test_a_start_time_is_rounded_up_to_a_whole_second(
    start: ExperimentStart, clock: FakeClock
) -> None:
    assert start.add_start_time() == at(1_000_061)
    assert start.get_start_time() == at(1_000_061)


def test_a_whole_second_is_not_rounded(start: ExperimentStart, clock: FakeClock) -> None:
    clock.now = 1_000_000.0
    assert start.add_start_time() == at(1_000_060)


def test_the_first_start_time_stands(start: ExperimentStart, clock: FakeClock) -> None:
    first = start.add_start_time()
    clock.now += 500
    assert start.add_start_time() == first
    clock.now -= 5000
    assert start.add_start_time() == first
    assert start.get_start_time() == first


def test_a_cleared_start_time_can_be_added_again(start: ExperimentStart, clock: FakeClock) -> None:
    start.add_start_time()
    assert start.clear_start_time() == {"start_time": None}
    assert start.get_start_time() is None
    clock.now += 500
    assert start.add_start_time() == at(1_000_561)


def test_a_start_time_is_not_cleared_under_a_live_handler(
    start: ExperimentStart, mapping: VMMapping
) -> None:
    mapping.put("u", "web")
    start.add_start_time()
    with living_handler(start.db), pytest.raises(vmrm.Conflict, match="1 handler lives"):
        start.clear_start_time()
    assert start.get_start_time() is not None


def test_a_launch_time_is_in_whole_seconds_and_utc(
    start: ExperimentStart, clock: FakeClock
) -> None:
    launched = start.set_launch_time()
    assert launched == start.get_launch_time() == at(1_000_000)
    assert launched.tzinfo is UTC


def test_time_since_start_begins_with_the_start_and_counts_whole_seconds(
    start: ExperimentStart, clock: FakeClock
) -> None:
    start.add_start_time()
    assert start.get_time_since_start() is None
    clock.now = 1_000_061.0
    assert start.get_time_since_start() == 0
    clock.now = 1_000_062.9
    assert start.get_time_since_start() == 1


def test_time_to_start_counts_from_the_launch(start: ExperimentStart, clock: FakeClock) -> None:
    start.set_launch_time()
    assert start.get_time_to_start() is None
    clock.now += 100
    start.add_start_time()
    assert start.get_time_to_start() == 161


# === The barrier =================================================================================


def configured(mapping: VMMapping, *uuids: str) -> None:
    """Take VMs to configured by the way that a handler takes."""
    for uuid in uuids:
        mapping.set_vm_state_by_uuid(uuid, "configuring")
        mapping.set_vm_state_by_uuid(uuid, "configured")


def test_the_last_vm_to_be_configured_sets_the_start_time(
    start: ExperimentStart, mapping: VMMapping, clock: FakeClock
) -> None:
    for name in ("a", "b", "c"):
        mapping.put(f"u-{name}", name)
    mapping.put("u-n", "n", state="n/a")
    start.set_launch_time()
    configured(mapping, "u-a", "u-b")
    assert start.get_start_time() is None
    clock.now += 10
    configured(mapping, "u-c")
    assert start.get_start_time() == at(1_000_071)


def test_nothing_starts_before_the_launch(
    start: ExperimentStart, mapping: VMMapping, clock: FakeClock
) -> None:
    mapping.put("u", "web")
    configured(mapping, "u")
    assert start.get_start_time() is None
    start.set_launch_time()
    assert start.get_start_time() == at(1_000_061)


def test_vms_that_are_all_unmanaged_start_nothing(
    start: ExperimentStart, mapping: VMMapping
) -> None:
    mapping.put("u", "web", state="n/a")
    start.set_launch_time()
    assert start.get_start_time() is None


def test_removing_the_only_vm_that_is_not_ready_opens_the_barrier(
    start: ExperimentStart, mapping: VMMapping
) -> None:
    mapping.put("u", "web")
    mapping.put("v", "slow")
    start.set_launch_time()
    configured(mapping, "u")
    assert start.get_start_time() is None
    mapping.destroy_one("v")
    assert start.get_start_time() is not None


def test_a_vm_added_in_time_is_waited_for(start: ExperimentStart, mapping: VMMapping) -> None:
    mapping.put("u", "web")
    start.set_launch_time()
    mapping.set_vm_state_by_uuid("u", "configuring")
    mapping.put("v", "late")
    mapping.set_vm_state_by_uuid("u", "configured")
    assert start.get_start_time() is None
    configured(mapping, "v")
    assert start.get_start_time() is not None


def test_a_vm_put_as_configured_opens_the_barrier_too(
    start: ExperimentStart, mapping: VMMapping
) -> None:
    start.set_launch_time()
    mapping.put("u", "web", state="configured")
    assert start.get_start_time() is not None


@pytest.mark.parametrize("state", ["uninitialized", "configuring", "testing"])
@pytest.mark.parametrize("policy", list(vmrm.OnFailure))
def test_a_vm_on_its_way_closes_the_barrier_whatever_the_policy(
    db: Database, mapping: VMMapping, state: str, policy: str
) -> None:
    mapping.put("u", "web", state="configured")
    mapping.put("v", "slow", state=state)
    set_policy(db, policy)
    ExperimentStart(db=db).set_launch_time()
    assert start_at(db) is None
    assert halt(db) is None


@pytest.mark.parametrize(
    ("policy", "starts", "halts"),
    [("abort", False, "abort"), ("drop", True, None), ("wait", False, None)],
)
def test_a_failed_vm_aborts_is_dropped_or_waited_for(
    db: Database, mapping: VMMapping, policy: str, starts: bool, halts: str | None
) -> None:
    mapping.put("u", "web", state="configured")
    mapping.put("v", "bad", state="configuring")
    ExperimentStart(db=db).set_launch_time()
    set_policy(db, policy)
    mapping.set_vm_state_by_uuid("v", "failed", reason="no disk")
    assert (start_at(db) is not None) == starts
    assert halt(db) == halts


def test_a_change_of_policy_decides_at_once(db: Database, mapping: VMMapping) -> None:
    mapping.put("u", "web", state="configured")
    mapping.put("v", "bad", state="failed")
    set_policy(db, "wait")
    ExperimentStart(db=db).set_launch_time()
    assert start_at(db) is None
    set_policy(db, "drop")
    assert start_at(db) is not None


def test_nobody_left_to_start_is_no_start(db: Database, mapping: VMMapping) -> None:
    mapping.put("v", "bad", state="failed")
    set_policy(db, "drop")
    ExperimentStart(db=db).set_launch_time()
    assert start_at(db) is None


def test_after_the_start_a_failure_stops_nothing(db: Database, mapping: VMMapping) -> None:
    mapping.put("u", "web", state="configured")
    ExperimentStart(db=db).set_launch_time()
    before = start_at(db)
    mapping.set_vm_state_by_uuid("u", "failed")
    mapping.put("v", "late", state="configured")
    assert (start_at(db), halt(db)) == (before, None)


def test_a_waiting_experiment_starts_when_the_failed_vm_was_retried(
    db: Database, mapping: VMMapping
) -> None:
    mapping.put("u", "web", state="configured")
    mapping.put("v", "bad", state="failed")
    set_policy(db, "wait")
    ExperimentStart(db=db).set_launch_time()
    assert vmrm.retry_failed(db, "bad") == 1
    assert mapping.get("v")["state"] == "configuring"
    mapping.set_vm_state_by_uuid("v", "configured")
    assert start_at(db) is not None


def test_whoever_waits_is_woken_when_the_start_time_is_set(
    db: Database, mapping: VMMapping
) -> None:
    mapping.put("u", "web", state="configuring")
    mapping.put("v", "db", state="configured")
    ExperimentStart(db=db).set_launch_time()
    sockets = [vmrm.WakeSocket(db, ordinal) for ordinal in (vmrm.SUPERVISOR, 1, 2)]
    try:
        mapping.set_vm_state_by_uuid("u", "configured")
        assert [socket.recv(64) for socket in sockets] == [b"w"] * 3
    finally:
        for socket in sockets:
            socket.close()


# === Many at once ================================================================================


def _configure(path: Path, uuid: str, gate: multiprocessing.synchronize.Barrier) -> None:
    with VMMapping(db=path) as mapping:
        mapping.get(uuid)
        gate.wait(30)
        mapping.set_vm_state_by_uuid(uuid, "configured")


def _add(path: Path, gate: multiprocessing.synchronize.Barrier) -> None:
    with ExperimentStart(db=path) as start:
        start.get_start_time()
        gate.wait(30)
        start.add_start_time()


@pytest.mark.parametrize("count", [2, 8])
def test_processes_that_configure_the_last_vms_at_once_set_one_start_time(
    tmp_path: Path, count: int
) -> None:
    path = tmp_path / "lab.db"
    uuids = [f"u{number}" for number in range(count)]
    with Database(path) as db:
        VMMapping(db=db).batch_put(
            {"server_uuid": uuid, "server_name": uuid, "state": "configuring"} for uuid in uuids
        )
        ExperimentStart(db=db).set_launch_time()
        seen = vmrm.WakeSocket(db, vmrm.SUPERVISOR)
    run_at_once(_configure, [(path, uuid) for uuid in uuids])
    with Database(path) as db:
        last = max(row["at"] for row in tables.history(db.path) if row["new_state"] == "configured")
        # The barrier's clock is read after the state's, in the same transaction.
        assert start_at(db) is not None
        assert 0 <= (start_at(db) or 0) - (last + 60) < 2
        assert [row["revision"] for row in tables.vms(db.path).values()] == [1] * count
        assert seen.recv(64) == b"w"
    seen.close()


def test_processes_that_add_a_start_time_at_once_agree_on_one(tmp_path: Path) -> None:
    path = tmp_path / "lab.db"
    with Database(path) as db:
        VMMapping(db=db).put("u", "web")
    run_at_once(_add, [(path,)] * 6)
    with Database(path) as db:
        assert start_at(db) is not None
        assert [row["revision"] for row in tables.vms(db.path).values()] == [1], (
            "it was written once"
        )


def run_at_once(target: object, arguments: list[tuple[object, ...]]) -> None:
    """Run *target* in one process per tuple of arguments, all released at the same time."""
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(len(arguments))
    processes = [
        context.Process(target=target, args=(*words, gate))  # type: ignore[arg-type]
        for words in arguments
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)
