"""The queue of writers: one at a time, everybody in turn, and a deadline that names the holder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest

import vmrm
from vmrm import Busy, Database, FileLock, Timeouts

FORK = multiprocessing.get_context("fork")
PATIENT = Timeouts(writer=60)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Database(tmp_path / "lab.db") as db:
        vmrm.current_experiment(db)
        db.connection.execute("CREATE TABLE counts (who INTEGER, n INTEGER)")
    return tmp_path / "lab.db"


def _hold(path: Path, holding: Event) -> None:
    with Database(path, timeouts=PATIENT) as db, db.transaction():
        db.connection.execute("INSERT INTO counts VALUES (1, 1)")
        holding.set()
        signal.pause()


@pytest.fixture
def holder(path: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    """Yield a process that sits in a transaction until it is killed."""
    holding = FORK.Event()
    process = FORK.Process(target=_hold, args=(path, holding))
    process.start()
    assert holding.wait(20)
    yield process
    process.kill()
    process.join(20)


def test_a_writer_that_waits_too_long_is_told_who_holds_the_lock(
    path: Path, holder: multiprocessing.process.BaseProcess
) -> None:
    with Database(path, timeouts=Timeouts(writer=0.1)) as db:
        with pytest.raises(Busy, match=f"busy for 0.1 s by process {holder.pid}") as caught:
            db.write("INSERT INTO counts VALUES (2, 1)")
        assert caught.value.code == 75
        assert caught.value.hint
        with pytest.raises(vmrm.ScheduleDbTimeoutError, match=f"process {holder.pid}"):
            vmrm.ScheduleDb(db=db).put("web", "[]")


def test_reading_needs_no_lock(path: Path, holder: multiprocessing.process.BaseProcess) -> None:
    with Database(path, timeouts=Timeouts(writer=0.1)) as db:
        assert db.value("SELECT count(*) FROM counts") == 0


def test_a_killed_holder_frees_the_lock_and_leaves_nothing_half_done(
    path: Path, holder: multiprocessing.process.BaseProcess
) -> None:
    threading.Timer(0.2, holder.kill).start()
    with Database(path, timeouts=PATIENT) as db:
        db.write("INSERT INTO counts VALUES (2, 1)")
        assert [tuple(row.values()) for row in db.query("SELECT * FROM counts")] == [(2, 1)]


def test_whoever_gave_up_does_not_keep_the_lock(
    path: Path, holder: multiprocessing.process.BaseProcess
) -> None:
    """The helper thread of a writer that gave up gets the lock later, and lets go at once."""
    with Database(path, timeouts=Timeouts(writer=0.05)) as late:
        for _ in range(3):
            with pytest.raises(Busy):
                late.write("INSERT INTO counts VALUES (2, 1)")
        holder.kill()
        holder.join(20)
        helpers = [t for t in threading.enumerate() if t.name == "vmrm-lock"]
        for helper in helpers:
            helper.join(20)
            assert not helper.is_alive()
        with Database(path, timeouts=Timeouts(writer=5)) as other:
            other.write("INSERT INTO counts VALUES (3, 1)")
        late.write("INSERT INTO counts VALUES (2, 1)")
    assert FileLock(path.with_name("lab.db.d") / "locks" / "writer").holder is None


def _count(path: Path, who: int, gate: Barrier, stop: Event) -> None:
    with Database(path, timeouts=PATIENT) as db:
        db.write("INSERT INTO counts VALUES (:who, 0)", who=who)
        gate.wait(60)
        while not stop.is_set():
            db.write("UPDATE counts SET n = n + 1 WHERE who = :who", who=who)


def test_every_writer_gets_its_turn(path: Path) -> None:
    """Of five writers at full speed each gets on; by SQLite's own handler one waited seconds."""
    gate, stop, pause = FORK.Barrier(6), FORK.Event(), threading.Event()
    writers = [FORK.Process(target=_count, args=(path, who, gate, stop)) for who in range(5)]
    for writer in writers:
        writer.start()
    gate.wait(60)
    with Database(path) as db:
        deadline, slowest = time.monotonic() + 60, 0
        while slowest < 1000 and time.monotonic() < deadline:
            pause.wait(0.05)
            slowest = db.value("SELECT min(n) FROM counts")
        counts = [row["n"] for row in db.query("SELECT n FROM counts")]
    stop.set()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 5
    assert slowest >= 1000, f"starved: {counts}"


def test_threads_of_one_process_exclude_each_other(path: Path) -> None:
    """One read-then-write after the other: no update is lost, though flock excludes no threads."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with Database(path, timeouts=PATIENT) as db:
                for _ in range(20):
                    with db.transaction():
                        n = db.value("SELECT n FROM counts")
                        db.connection.execute("UPDATE counts SET n = ?", (n + 1,))
        except BaseException as error:
            errors.append(error)

    with Database(path) as db:
        db.write("INSERT INTO counts VALUES (0, 0)")
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    with Database(path) as db:
        assert db.value("SELECT n FROM counts") == 120


def test_a_thread_that_waits_too_long_is_told_so_too(path: Path) -> None:
    with Database(path, timeouts=Timeouts(writer=0.05)) as db:
        same, lock = Database(path, timeouts=db.timeouts), db.lock("writer")
        busy = pytest.raises(Busy, match=f"process {os.getpid()}")
        with same, db.transaction(), busy, same.transaction():
            pytest.fail("two hold it")
        with same, same.transaction():
            assert lock.holder == os.getpid()
        assert lock.holder is None


def test_an_error_inside_frees_the_lock(path: Path) -> None:
    with Database(path, timeouts=Timeouts(writer=0.05)) as db:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), db.transaction():
                raise ZeroDivisionError
        assert db.lock("writer").holder is None


def test_waiting_leaves_no_descriptor_open(
    path: Path, holder: multiprocessing.process.BaseProcess
) -> None:
    with Database(path, timeouts=Timeouts(writer=10)) as db:
        db.query("SELECT * FROM counts")
        before = len(list(Path("/proc/self/fd").iterdir()))
        threading.Timer(0.2, holder.kill).start()
        db.write("INSERT INTO counts VALUES (2, 1)")
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_lock_file_is_private_and_never_followed_through_a_link(tmp_path: Path) -> None:
    lock, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert lock.try_()
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
    assert not other.try_()
    lock.release()
    assert other.try_()
    other.release()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        FileLock(tmp_path / "link").try_()
    assert not (tmp_path / "target").exists()


def test_a_process_forks_without_the_thread_that_waited_for_a_lock(tmp_path: Path) -> None:
    lock, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert lock.try_()
    release = threading.Timer(0.1, lock.release)
    release.start()
    assert other.take_in_turn(10)
    release.join()
    if (child := os.fork()) == 0:
        os._exit(0)
    assert "vmrm-lock" not in {thread.name for thread in threading.enumerate()}
    assert os.waitpid(child, 0)[1] == 0
