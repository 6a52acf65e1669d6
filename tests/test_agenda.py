"""The agenda under a clock that jumps: hours of sleeping and awaiting in no time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmrm
from vmrm import Agenda, Steps, Task


class FakeClock(vmrm.Clock):
    """Monotonic time that only `run` moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Life:
    """An agenda, its clock, and what happened when (in seconds since the beginning)."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.agenda = Agenda(self.clock)
        self.seen: list[tuple[float, str]] = []

    def note(self, word: str) -> None:
        self.seen.append((self.clock.now - FakeClock.now, word))

    def steps(self, name: str, *wishes: float | Sequence[Task]) -> Steps:
        """Note each beginning of a step, and the end."""
        for number, wish in enumerate(wishes):
            self.note(f"{name}{number}")
            yield wish
        self.note(f"{name}!")

    def run(self, seconds: float = math.inf, limit: int = 10_000) -> None:
        """Run what is due, jumping from one due time to the next, for at most *seconds*."""
        until = self.clock.now + seconds
        for _ in range(limit):
            due = self.agenda.next_due()
            if due > until or math.isinf(due):
                break
            self.clock.now = max(self.clock.now, due)
            self.agenda.run_next()
        else:
            pytest.fail(f"still busy after {limit} steps")
        if not math.isinf(until):
            self.clock.now = until


@pytest.fixture
def life() -> Life:
    return Life()


def test_an_empty_agenda_never_has_anything_due(life: Life) -> None:
    assert life.agenda.next_due() == math.inf
    life.agenda.run_next()


def test_hours_of_sleep_pass_in_the_right_order(life: Life) -> None:
    life.agenda.spawn(life.steps("a", 3600, 7200))
    life.agenda.spawn(life.steps("b", 5000))
    life.run()
    assert life.seen == [
        (0, "a0"),
        (0, "b0"),
        (3600, "a1"),
        (5000, "b!"),
        (10800, "a!"),
    ]


def test_a_task_can_be_spawned_for_later(life: Life) -> None:
    life.agenda.spawn(life.steps("a"), at=FakeClock.now + 30)
    assert life.agenda.next_due() == FakeClock.now + 30
    life.agenda.run_next()
    assert life.seen == [], "it is not due yet"
    life.run()
    assert life.seen == [(30, "a!")]


def test_what_is_due_at_the_same_time_runs_in_the_order_it_was_asked_for(life: Life) -> None:
    for name in "cab":
        life.agenda.spawn(life.steps(name, 5))
    life.run()
    assert [word for _, word in life.seen] == ["c0", "a0", "b0", "c!", "a!", "b!"]


def test_one_step_is_run_at_a_time(life: Life) -> None:
    life.agenda.spawn(life.steps("a", 0, 0))
    life.agenda.spawn(life.steps("b", 0))
    for expected in ("a0", "b0", "a1", "b!", "a!"):
        life.agenda.run_next()
        assert life.seen[-1] == (0, expected)


def test_a_woken_task_is_due_now_and_its_old_time_is_forgotten(life: Life) -> None:
    task = life.agenda.spawn(life.steps("a", 3600, 3600))
    life.run(10)
    life.agenda.wake(task)
    assert life.agenda.next_due() == life.clock.now
    life.run()
    assert life.seen == [(0, "a0"), (10, "a1"), (3610, "a!")]


def test_a_task_that_sleeps_for_ever_waits_until_it_is_woken(life: Life) -> None:
    task = life.agenda.spawn(life.steps("a", math.inf))
    life.run(1_000_000)
    assert life.agenda.next_due() == math.inf
    life.agenda.wake(task)
    life.run()
    assert life.seen == [(0, "a0"), (1_000_000, "a!")]
    assert task.done


def test_waking_what_is_done_or_was_woken_already_changes_nothing(life: Life) -> None:
    task = life.agenda.spawn(life.steps("a", 50, 50))
    life.run(1)
    for _ in range(3):
        life.agenda.wake(task)
    life.run()
    assert life.seen == [(0, "a0"), (1, "a1"), (51, "a!")]
    life.agenda.wake(task)
    assert life.agenda.next_due() == math.inf


def test_awaiting_goes_on_when_the_last_has_ended_and_not_when_woken(life: Life) -> None:
    quick, slow = (life.agenda.spawn(life.steps(*task)) for task in (("q", 10), ("s", 3600)))
    waiting = life.agenda.spawn(life.steps("w", [quick, slow]))
    life.run(100)
    life.agenda.wake(waiting)
    life.run()
    assert life.seen == [(0, "q0"), (0, "s0"), (0, "w0"), (10, "q!"), (3600, "s!"), (3600, "w!")]


def test_awaiting_what_has_ended_already_goes_on_at_once(life: Life) -> None:
    done = life.agenda.spawn(life.steps("d"))
    life.run()
    life.agenda.spawn(life.steps("w", [done], []))
    life.run()
    assert life.seen == [(0, "d!"), (0, "w0"), (0, "w1"), (0, "w!")]


def test_many_may_await_one(life: Life) -> None:
    one = life.agenda.spawn(life.steps("o", 7))
    for name in ("x", "y"):
        life.agenda.spawn(life.steps(name, [one]))
    life.run()
    assert life.seen[-3:] == [(7, "o!"), (7, "x!"), (7, "y!")]


def test_an_error_reaches_who_runs_the_agenda_and_the_others_go_on(life: Life) -> None:
    def bad() -> Steps:
        yield 5
        raise ZeroDivisionError

    life.agenda.spawn(bad())
    life.agenda.spawn(life.steps("a", 10))
    with pytest.raises(ZeroDivisionError):
        life.run()
    life.run()
    assert life.seen[-1] == (10, "a!")


def test_stale_tops_do_not_pile_up(life: Life) -> None:
    """Woken ten thousand times, a task leaves no ten thousand entries behind."""

    def sleeper() -> Steps:
        while True:
            yield 1000

    task = life.agenda.spawn(sleeper())
    for _ in range(10_000):
        life.run(0.5)
        life.agenda.wake(task)
    life.run(2000, limit=20_000)
    assert len(life.agenda._heap) < 10


@given(
    st.lists(st.lists(st.floats(0, 1000), max_size=5), max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.floats(0, 500)), max_size=8),
)
def test_every_step_runs_once_never_early_and_time_never_goes_back(
    sleeps: list[list[float]], wakes: list[tuple[int, float]]
) -> None:
    life = Life()
    earliest = dict[str, float]()

    def steps(name: str, wishes: list[float]) -> Iterator[float]:
        for number, wish in enumerate(wishes):
            life.note(f"{name}.{number}")
            earliest[f"{name}.{number + 1}"] = life.clock.now - FakeClock.now + wish
            yield wish
        life.note(f"{name}.{len(wishes)}")

    woken = set[str]()
    tasks = [life.agenda.spawn(steps(str(n), w)) for n, w in enumerate(sleeps)]  # type: ignore[arg-type]
    for number, seconds in wakes:
        life.run(seconds)
        if number < len(tasks):
            life.agenda.wake(tasks[number])
            woken.add(str(number))
    life.run()
    assert all(task.done for task in tasks)
    told = [word for _, word in life.seen]
    assert sorted(told) == sorted(
        f"{n}.{i}" for n, w in enumerate(sleeps) for i in range(len(w) + 1)
    )
    assert [at for at, _ in life.seen] == sorted(at for at, _ in life.seen)
    for at, word in life.seen:
        if word.partition(".")[0] not in woken:
            assert at >= earliest.get(word, 0) - 1e-6
