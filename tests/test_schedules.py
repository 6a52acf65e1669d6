"""Schedule entries, their JSON texts, the order they happen in, and what may be put when."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tables
from hypothesis import assume, given
from hypothesis import strategies as st
from lab import living_handler

import vmrm
from vmrm import Database, Journal, ScheduleDb, ScheduleEntry

INF = math.inf
TEXT = '[{"start_time": 1, "executable": "a"}]'


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "lab.db") as database:
        yield database


@pytest.fixture
def schedules(db: Database) -> ScheduleDb:
    return ScheduleDb(db=db)


def text_of(*items: dict[str, Any]) -> str:
    return json.dumps(items)


def program(start_time: float, name: str = "a", **more: Any) -> dict[str, Any]:
    return {"start_time": start_time, "executable": name, **more}


def entries_of(*items: dict[str, Any]) -> list[ScheduleEntry]:
    return [ScheduleEntry.from_dict(item, number) for number, item in enumerate(items, 1)]


# === One entry ===================================================================================


def test_start_time_zero_is_only_for_a_pause() -> None:
    with pytest.raises(ValueError, match="start_time 0"):
        ScheduleEntry(0)
    with pytest.raises(ValueError, match="start_time 0"):
        ScheduleEntry(0.0)
    assert ScheduleEntry(0, pause=5).pause == 5


@pytest.mark.parametrize("start_time", [math.nan, "5", None, True, 10**400])
def test_a_start_time_must_be_a_number(start_time: Any) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        ScheduleEntry(start_time)


@pytest.mark.parametrize("duration", [0, -1, -INF, math.nan, "5", True])
def test_a_pause_must_be_positive(duration: Any) -> None:
    with pytest.raises(ValueError, match="not positive"):
        ScheduleEntry(5).add_pause(duration)


@pytest.mark.parametrize("path", [None, 5, ["ls"], b"ls"])
def test_an_executable_must_be_a_string(path: Any) -> None:
    with pytest.raises(RuntimeError, match="is not a string"):
        ScheduleEntry(5).set_executable(path)


@pytest.mark.parametrize("arguments", [5, None, {"a": 1}, ["a", 5], b"a", "a\0b", ["a\0"]])
def test_arguments_must_be_text(arguments: Any) -> None:
    entry = ScheduleEntry(5)
    with pytest.raises(TypeError, match="neither a string nor a list of strings"):
        entry.append_arguments(arguments)
    assert entry.arguments is None


def test_arguments_are_appended_in_their_own_kind() -> None:
    entry = ScheduleEntry(5)
    entry.set_executable("a", ["x y"])
    entry.append_arguments(("z", "$q"))
    assert entry.arguments == ["x y", "z", "$q"]
    entry = ScheduleEntry(5)
    entry.set_executable("a", "x  $y")
    entry.append_arguments("z")
    assert entry.arguments == "x  $y z"
    entry.append_arguments(["two words", "$q"])
    assert entry.arguments == "x  $y z 'two words' '$q'"


def test_a_callback_gives_its_content_when_the_schedule_is_stored() -> None:
    entry, calls = ScheduleEntry(5), list[int]()
    entry.add_content("a.txt", lambda: f"call {calls.append(1) or len(calls)}")
    assert calls == []
    assert json.loads(vmrm.schedule_text([entry]))[0]["content"][0]["content"] == "call 1"


def test_an_entry_says_in_a_few_words_what_it_does() -> None:
    cases = [
        (program(-10, "/usr/bin/true"), "-10 true"),
        (program(1.5, "C:\\x\\y.exe"), "1.5 y.exe"),
        ({"start_time": 3, "pause": "inf"}, "3 break"),
        ({"start_time": 3, "pause": 20}, "3 pause 20"),
        ({"start_time": 3, "resume": True}, "3 resume"),
        ({"start_time": 3, "file": [{"location": "a", "filename": "a"}]}, "3 file"),
        ({"start_time": 3, "content": [{"location": "a", "content": ""}]}, "3 content"),
        ({"start_time": 3, "transfer": [{"location": "/a"}]}, "3 transfer"),
    ]
    assert [str(entry) for entry in entries_of(*(case for case, _ in cases))] == [
        said for _, said in cases
    ]


def test_what_an_entry_is_made_of_survives_its_text() -> None:
    entry = ScheduleEntry(-5, ignore_failure=True)
    entry.set_executable("run.sh", ["--role", "web server"])
    entry.add_file("run.sh", "setup.sh", executable=True)
    entry.add_content("/etc/motd", "hello\nÄ ' \"")
    entry.add_file_transfer("/var/log", interval=None, destination="/srv/out")
    entry.add_file_transfer("/var/run")
    entry.options = {"env": {"A": "1"}, "timeout": 5, "wait": False}
    again = vmrm.parse_schedule(vmrm.schedule_text([entry]))[0]
    assert (again.start_time, again.ignore_failure, again.ordinal) == (-5, True, 1)
    assert (again.executable, again.arguments) == ("run.sh", ["--role", "web server"])
    assert again.data == entry.data
    assert again.options == entry.options


FAULTY: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to do": ({"start_time": 1}, "it does nothing"),
    "no time": ({"executable": "a"}, "start_time is missing"),
    "time 0": (program(0), "start_time 0 is the barrier"),
    "at -inf": (program(-INF), "only for a pause"),
    "at inf": (program(INF), "only for a pause"),
    "pause at inf": ({"start_time": INF, "pause": 1}, "only negative"),
    "pause at -5": ({"start_time": -5, "pause": 1}, "must be at -inf"),
    "pause of 0": ({"start_time": 5, "pause": 0}, "pause is 0, but must be a positive"),
    "pause with work": ({**program(5), "pause": 1}, "cannot also have 'executable'"),
    "resume with work": ({**program(5), "resume": True}, "cannot also have 'executable'"),
    "negative resume": ({"start_time": -5, "resume": True}, "a resume must be at a positive time"),
    "endless timeout": (program(5, timeout=INF), "timeout is inf"),
    "nan": (program(math.nan), "start_time is nan"),
    "arguments alone": (
        {"start_time": 5, "arguments": ["x"], "transfer": [{"location": "/a"}]},
        "arguments needs an executable",
    ),
    "env": (program(5, env={"A-B": "x"}), "env is"),
    "user": (program(5, user="-root"), "user is '-root'"),
    "a relative program on the host": (
        {"start_time": 5, "executable": "./a", "on_host": True},
        "an absolute path, or the name of a stored file",
    ),
    "a file on the host": (
        {
            "start_time": 5,
            "executable": "/a",
            "on_host": True,
            "content": [{"location": "/x", "content": ""}],
        },
        "an on_host entry runs a program and cannot have 'content'",
    ),
    "misspelt": (program(5, ignore_failures=True), "did you mean 'ignore_failure'?"),
    "misspelt in a file": (
        {"start_time": 5, "file": [{"location": "a", "filename": "b", "executible": True}]},
        "entry, file: unknown key 'executible', did you mean 'executable'?",
    ),
    "no filename": ({"start_time": 5, "file": [{"location": "a"}]}, "file: filename is missing"),
    "a file, not a list": ({"start_time": 5, "file": {"location": "a"}}, "must be a list"),
}


@pytest.mark.parametrize(("item", "said"), FAULTY.values(), ids=FAULTY)
def test_a_faulty_entry_is_refused_with_a_word_about_it(item: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="entry") as caught:
        ScheduleEntry.from_dict(item)
    assert said in str(caught.value)


# === Texts =======================================================================================

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
seconds = st.one_of(st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6, allow_nan=False)).filter(
    bool
)
positive = st.one_of(st.integers(1, 10**6), st.floats(1e-3, 1e6))
switches = st.booleans()
files = st.fixed_dictionaries({"location": words, "filename": words, "executable": switches})
contents = st.fixed_dictionaries(
    {"location": words, "content": words | st.just(""), "executable": switches}
)
transfers = st.fixed_dictionaries({"location": words}, optional={"interval": positive})
runs = st.fixed_dictionaries(
    {"start_time": seconds, "executable": words},
    optional={
        "arguments": words | st.lists(words),
        "env": st.dictionaries(st.from_regex(r"\A[A-Z_][A-Z0-9_]{0,5}\Z"), words, max_size=2),
        "cwd": words,
        "timeout": positive,
        "ignore_failure": switches,
        "rerun": switches,
        "wait": switches,
        "file": st.lists(files, min_size=1, max_size=2),
        "content": st.lists(contents, min_size=1, max_size=2),
        "transfer": st.lists(transfers, min_size=1, max_size=2),
    },
)
pauses = st.one_of(
    st.fixed_dictionaries({"start_time": st.integers(0, 100), "pause": positive | st.just(INF)}),
    st.fixed_dictionaries({"start_time": st.just(-INF), "pause": positive}),
)


@given(st.lists(runs | pauses, max_size=4))
def test_every_entry_that_is_accepted_survives_its_text(items: list[dict[str, Any]]) -> None:
    entries = entries_of(*items)
    text = vmrm.schedule_text(entries)
    again = vmrm.parse_schedule(text)
    assert [vars(entry) for entry in again] == [vars(entry) for entry in entries]
    assert vmrm.schedule_text(again) == text
    # It is JSON in the strict sense, so SQLite's own functions can take it apart.
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from([*vmrm.ENTRY_KEYS, *vmrm.DATA_KEYS, "location", "x"]), inner
            )
        ),
    ).map(lambda value: json.dumps([value]))
)
def test_any_text_is_a_schedule_or_a_value_error(text: str) -> None:
    try:
        entries = vmrm.parse_schedule(text)
    except ValueError:
        return
    assert all(isinstance(entry, ScheduleEntry) for entry in entries)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a JSON list"),
        ("{}", "must be a JSON list of entries"),
        ("[1]", "entry 1: 1 is not a table"),
        ('[{"start_time": NaN, "executable": "a"}]', "NaN is not JSON"),
        ('[{"start_time": Infinity, "pause": 1}]', 'write infinity as "inf"'),
        ('[{"start_time": "5", "executable": "a"}]', "start_time is '5'"),
        ('[{"start_time": "nan", "executable": "a"}]', "start_time is 'nan'"),
        (f"[{TEXT[1:-1]}, {{}}]", "entry 2: start_time is missing"),
        ("[" * 100_000, "must be a JSON list"),
    ],
)
def test_a_text_that_is_no_schedule_is_refused_and_not_stored(
    schedules: ScheduleDb, text: str, said: str
) -> None:
    with pytest.raises(ValueError, match=r"schedule|entry|JSON") as caught:
        schedules.put("web", text)
    assert said in str(caught.value)
    assert schedules.get("web") is None


def test_infinities_are_the_strings_inf_and_minus_inf() -> None:
    entries = vmrm.parse_schedule(
        '[{"start_time": "-inf", "pause": 5}, {"start_time": 0, "pause": "inf"}]'
    )
    assert [(entry.start_time, entry.pause) for entry in entries] == [(-INF, 5), (0, INF)]
    assert json.loads(vmrm.schedule_text(entries)) == [
        {"start_time": "-inf", "pause": 5},
        {"start_time": 0, "pause": "inf"},
    ]


# === Putting and getting =========================================================================


def test_the_text_comes_back_as_it_was_put(schedules: ScheduleDb) -> None:
    text = '[ {"executable":"ä",\n "start_time" : 1.0} ]\n'
    schedules.put("web", text, "10.0.0.1")
    assert schedules.get("web") == schedules.get("WEB") == text
    assert schedules.get("other") is None


def test_listing_gives_names_and_texts_and_takes_a_pattern(schedules: ScheduleDb) -> None:
    schedules.batch_put([{"server_name": n, "text": TEXT} for n in ("web2", "web1", "db")])
    assert schedules.list_all("web*") == [
        {"server_name": "web1", "text": TEXT},
        {"server_name": "web2", "text": TEXT},
    ]
    assert [item["server_name"] for item in schedules.list_all()] == ["db", "web1", "web2"]
    assert schedules.list_all("x*") == []


def test_a_batch_with_one_fault_stores_nothing(schedules: ScheduleDb) -> None:
    good = {"server_name": "web", "text": TEXT}
    for bad in ({"server_name": "db", "text": "x"}, {"server_name": "d/b", "text": TEXT}):
        with pytest.raises(ValueError, match=r"schedule|name"):
            schedules.batch_put([good, bad])
    assert schedules.list_all() == []


def test_before_anything_has_run_a_schedule_is_replaced(schedules: ScheduleDb) -> None:
    schedules.put("web", TEXT)
    schedules.put("web", text_of(program(2, "b")))
    assert schedules.get("web") == text_of(program(2, "b"))


def begin(db: Database, ordinal: int = 1) -> Journal:
    """Let an entry of `web` have an attempt."""
    journal = Journal(db, "web")
    journal.arm({ordinal: None}, "boot")
    return journal


def test_once_something_has_run_entries_can_only_be_added(
    db: Database, schedules: ScheduleDb
) -> None:
    old = [program(-5, "a"), program(1, "b", wait=True)]
    schedules.put("web", text_of(*old))
    begin(db)
    longer = text_of(*old, program(9, "c"))
    schedules.put("web", longer)
    schedules.put("web", longer)
    assert schedules.get("web") == longer


@pytest.mark.parametrize(
    ("new", "ordinal"),
    [
        ([], 1),
        ([program(-5, "a")], 2),
        ([program(-5, "z"), program(1, "b")], 1),
        ([program(-5, "a"), program(2, "b"), program(3, "c")], 2),
        ([program(1, "b"), program(-5, "a")], 1),
        ([program(-5, "a"), program(1, "b", wait=False)], 2),
    ],
)
def test_what_changes_a_schedule_that_has_begun_is_refused_naming_the_entry(
    db: Database, schedules: ScheduleDb, new: list[dict[str, Any]], ordinal: int
) -> None:
    old = text_of(program(-5, "a"), program(1, "b"))
    schedules.put("web", old)
    begin(db)
    with pytest.raises(ValueError, match=f"has begun to run, and entry {ordinal} of"):
        schedules.put("web", text_of(*new))
    with pytest.raises(ValueError, match="has begun to run"):
        schedules.batch_put(
            [{"server_name": "db", "text": TEXT}, {"server_name": "web", "text": text_of(*new)}]
        )
    assert schedules.get("web") == old
    assert schedules.get("db") is None


def test_entries_are_compared_as_json_not_as_text(db: Database, schedules: ScheduleDb) -> None:
    schedules.put("web", '[{"start_time": 1, "executable": "\\u00e4"}]')
    begin(db)
    schedules.put("web", '[{"executable":"ä","start_time":1.0},{"start_time":2,"executable":"b"}]')
    assert len(vmrm.parse_schedule(schedules.get("web") or "")) == 2


def test_a_destroyed_schedule_begins_a_new_generation(db: Database, schedules: ScheduleDb) -> None:
    schedules.put("web", TEXT)
    begin(db)
    schedules.destroy_one("web")
    assert schedules.get("web") is None
    assert schedules.list_all() == []
    schedules.put("web", text_of(program(7, "other")))
    assert tables.generations(db.path) == [2]
    assert Journal(db, "web").latest() == {}, "old attempts are not taken for the new entries'"
    assert len(tables.attempts(db.path)) == 1, "and are kept"
    assert tables.entries(db.path)[0]["outcome"] is None


def test_destroying_all_schedules_spares_the_rest(db: Database, schedules: ScheduleDb) -> None:
    vmrm.VMMapping(db=db).put("u", "web")
    schedules.put("web", TEXT)
    schedules.put("db", TEXT)
    schedules.destroy_one("nobody")
    schedules.destroy_all()
    assert schedules.list_all() == []
    assert tables.generations(db.path) == [2, 2]
    assert vmrm.VMMapping(db=db).get_all(length=True) == 1


def test_a_schedule_is_not_destroyed_under_a_live_handler(
    db: Database, schedules: ScheduleDb
) -> None:
    vmrm.VMMapping(db=db).put("u", "web")
    schedules.put("web", TEXT)
    with living_handler(db):
        for destroy in (lambda: schedules.destroy_one("web"), schedules.destroy_all):
            with pytest.raises(vmrm.Conflict, match="1 handler lives"):
                destroy()
    assert schedules.get("web") == TEXT


def test_a_put_wakes_the_vms_handler(db: Database, schedules: ScheduleDb) -> None:
    vmrm.VMMapping(db=db).put("u", "web")
    socket = vmrm.WakeSocket(db, 1)
    schedules.put("db", TEXT)
    with pytest.raises(BlockingIOError):
        socket.recv(8)
    schedules.put("web", TEXT)
    assert socket.recv(8) == b"w"
    socket.close()


# === Order and effective times ===================================================================

BREAK = {"pause": INF}


def resumed(*times: float) -> list[vmrm.Hold]:
    return [vmrm.Hold(time, None) for time in times]


def times(
    *items: dict[str, Any], resumes: tuple[float, ...] = (), holds: tuple[vmrm.Hold, ...] = ()
) -> list[float]:
    """Return the effective times in the order in which the entries are written."""
    entries = entries_of(*items)
    by_ordinal = vmrm.Timeline(entries, [*resumed(*resumes), *holds]).times
    return [by_ordinal[entry.ordinal] for entry in entries]


def test_a_break_shifts_what_follows_by_how_long_it_held() -> None:
    """The reference's example: 10 E1, break at 15, 30 E2, 50 E3, resumed at 1000."""
    items = (program(10), {"start_time": 15, **BREAK}, program(30), program(50))
    assert times(*items) == [10, 15, INF, INF]
    assert times(*items, resumes=(1000,)) == [10, 15, 1015, 1035]


def test_a_pause_shifts_what_follows_by_its_duration() -> None:
    items = (program(10), {"start_time": 15, "pause": 60}, program(15), program(30), program(-4))
    assert times(*items) == [10, 15, 15, 90, -4]
    assert times(*items, resumes=(20,)) == [10, 15, 15, 90, -4], "a resume ends no pause"


def test_pauses_add_up_and_delay_the_break_after_them() -> None:
    items = (
        {"start_time": 5, "pause": 10},
        {"start_time": 6, "pause": 10},
        {"start_time": 7, **BREAK},
        program(8),
    )
    assert times(*items, resumes=(30,)) == [5, 16, 27, 31]


def test_a_resume_before_the_break_does_nothing_to_it() -> None:
    items = ({"start_time": 15, **BREAK}, program(30))
    assert times(*items, resumes=(14.9,)) == [15, INF]
    assert times(*items, resumes=(14.9, 15)) == [15, 30]
    assert times(*items, resumes=(200, 100, 14)) == [15, 115], "the first one after it counts"


def test_every_break_needs_a_resume_of_its_own_time() -> None:
    items = ({"start_time": 10, **BREAK}, program(20), {"start_time": 30, **BREAK}, program(40))
    assert times(*items, resumes=(100,)) == [10, 110, 120, INF]
    assert times(*items, resumes=(100, 150)) == [10, 110, 120, 160]


def test_pauses_at_minus_infinity_and_zero_shift_no_negative_entry() -> None:
    items = (
        {"start_time": -INF, "pause": 100},
        program(-5),
        {"start_time": 0, "pause": 7},
        program(1),
    )
    assert times(*items) == [-INF, -5, 0, 8]


def test_a_resume_in_the_schedule_ends_the_break_before_it() -> None:
    items = ({"start_time": 15, **BREAK}, {"start_time": 20, "resume": True}, program(30))
    assert times(*items) == [15, 20, 35]


def test_a_resume_ends_one_break() -> None:
    items = (
        {"start_time": 10, **BREAK},
        {"start_time": 20, **BREAK},
        {"start_time": 30, "resume": True},
        program(40),
    )
    # The first break ends at 30, when the second one's own time is past by 20 seconds of it.
    assert times(*items) == [10, 40, 30, INF]
    assert times(*items, resumes=(100,)) == [10, 40, 30, 120]
    # Ended by a command before, it leaves the planned resume to the second break.
    assert times(*items, resumes=(15,)) == [10, 25, 35, 55]


@pytest.mark.parametrize(
    ("holds", "expected"),
    [
        ([(5, 30)], [35, 45, 60]),  # what is due at that very moment has not begun
        ([(4, 30), (6, 10)], [45, 55, 70]),  # pauses add up, however they overlap
        ([(7, INF)], [5, INF, INF]),
        ([(7, INF), (100, None)], [5, 108, 123]),
        ([(7, INF), (100, None), (110, None)], [5, 108, 123]),
        ([(7, INF), (20, 30), (100, None)], [5, 138, 153]),  # a pause within a break follows it
        ([(7, 50), (20, INF), (30, None)], [5, 65, 80]),  # a resume ends no timed pause
        ([(7, 50), (20, INF), (100, None)], [5, 108, 123]),  # a break within one begins after it
        ([(0, INF), (0, None)], [5, 15, 30]),  # before time 0
        ([(-INF, None), (7, INF)], [5, INF, INF]),  # that was for a break at -inf
    ],
)
def test_what_commands_give(holds: list[tuple[float, float | None]], expected: list[float]) -> None:
    given = tuple(vmrm.Hold(*hold) for hold in holds)
    assert times(program(5), program(15), program(30), holds=given) == expected


def test_a_planned_resume_ends_no_break_that_a_command_gave() -> None:
    items = (
        program(5),
        {"start_time": 20, **BREAK},
        {"start_time": 50, "resume": True},
        program(60),
    )
    holds = (vmrm.Hold(1, INF), vmrm.Hold(101, None))
    assert times(*items, holds=holds) == [105, 120, 150, 190]
    assert times(*items, holds=holds[:1]) == [INF] * 4


def test_pauses_at_minus_infinity_delay_the_first_negative_entry() -> None:
    items = [{"start_time": -INF, "pause": 30}, {"start_time": -INF, "pause": 20}, program(-5)]
    assert vmrm.opening_delay(entries_of(*items)) == 50
    items += [{"start_time": -INF, **BREAK}] * 2
    entries = entries_of(*items)
    assert vmrm.opening_delay(entries, [vmrm.Hold(-INF, None)]) == INF
    assert vmrm.opening_delay(entries, [vmrm.Hold(-INF, None)] * 2) == 50
    assert vmrm.opening_delay(entries, [vmrm.Hold(0, None)] * 2) == INF, "those are of other breaks"


def test_entries_of_one_time_keep_their_order_and_pauses_come_last() -> None:
    entries = entries_of(
        {"start_time": 5, "pause": 1}, program(5, "b"), program(-5, "c"), program(5, "a")
    )
    assert [entry.label for entry in vmrm.in_order(entries)] == ["c", "b", "a", "pause 1"]


schedule_items = st.lists(
    st.one_of(
        st.builds(program, st.integers(1, 200)),
        st.builds(program, st.integers(-200, -1)),
        st.builds(
            lambda at, d: {"start_time": at, "pause": d},
            st.integers(0, 200),
            st.integers(1, 500) | st.just(INF),
        ),
        st.builds(lambda at: {"start_time": at, "resume": True}, st.integers(1, 200)),
    ),
    max_size=12,
)
commands = st.lists(
    st.builds(vmrm.Hold, st.floats(0, 2000), st.none() | st.just(INF) | st.integers(1, 500)),
    max_size=6,
)


@given(schedule_items, commands)
def test_order_is_kept_nothing_is_lost_and_shifts_only_grow(
    items: list[dict[str, Any]], holds: list[vmrm.Hold]
) -> None:
    entries = entries_of(*items)
    found = vmrm.Timeline(entries, holds).times
    assert found.keys() == {entry.ordinal for entry in entries}
    negative = [entry for entry in entries if entry.start_time < 0]
    assert all(found[entry.ordinal] == entry.start_time for entry in negative)
    in_order = [e for e in vmrm.in_order(entries) if not e.options.get("resume")]
    for first, second in pairwise(in_order):
        assert found[first.ordinal] <= found[second.ordinal]
    shifts = [found[entry.ordinal] - entry.start_time for entry in in_order]
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(shifts))


@given(schedule_items, commands, st.randoms(use_true_random=False))
def test_the_order_in_which_things_are_written_does_not_matter(
    items: list[dict[str, Any]], holds: list[vmrm.Hold], random: Any
) -> None:
    assume(len({item["start_time"] for item in items}) == len(items))
    assume(len({hold.time for hold in holds}) == len(holds))
    entries = entries_of(*items)
    before = vmrm.Timeline(entries, holds).times
    random.shuffle(entries)
    random.shuffle(holds)
    assert vmrm.Timeline(entries, holds).times == before


@given(schedule_items, commands, st.floats(0, 3000), st.none() | st.just(INF) | st.integers(1, 500))
def test_what_is_given_never_changes_what_happened_before(
    items: list[dict[str, Any]], holds: list[vmrm.Hold], now: float, duration: float | None
) -> None:
    """So a handler may start entries by the rows it knows: none of them is taken back."""
    entries, past = entries_of(*items), [hold for hold in holds if hold.time < now]
    before = vmrm.Timeline(entries, past)
    after = vmrm.Timeline(entries, [*past, vmrm.Hold(now, duration)])
    began = before.break_at(now)
    for entry in entries:
        old, new = before.times[entry.ordinal], after.times[entry.ordinal]
        if old < now:
            assert new == old
        elif entry.options.get("resume"):
            continue  # moves with what comes before it, and holds nothing itself
        elif duration is None and began is not None:
            assert now - 1e-6 <= new <= old + 1e-6
        elif duration is None or entry.start_time < 0:
            assert new == pytest.approx(old)  # there is nothing to end
        else:
            assert new >= old


def test_an_interval_of_0_is_refused_and_not_taken_for_none() -> None:
    entry = vmrm.ScheduleEntry(1)
    entry.add_file_transfer("/var/log", interval=0)
    with pytest.raises(ValueError, match="interval is 0"):
        vmrm.parse_schedule(vmrm.schedule_text([entry]))
