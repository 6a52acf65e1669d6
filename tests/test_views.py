"""Plan, trace and report: what is going to happen, and what has happened, agrees with the rows."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import threading
from collections import Counter
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tables
from cli_lab import until
from conftest import Cli
from hypothesis import given
from hypothesis import strategies as st
from lab import Lab, stand_ins
from test_handler import load, sh, vm

import vmrm

# === plan ========================================================================================

PLANNED = """
[experiment]
start_buffer = 5
[[vm]]
name = "web{n}"
count = 2
path = "{n}.sock"
[[vm.schedule]]
start_time = 30
executable = "late"
ignore_failure = true
[[vm.schedule]]
start_time = -10
executable = "setup.sh"
file = [{ location = "setup.sh", filename = "setup.sh" }]
content = [{ location = "/etc/motd", content = "höi" }]
[[vm.schedule]]
start_time = 10
pause = 5
[[vm.schedule]]
start_time = 20
transfer = [{ location = "/var/log", interval = 2, destination = "out" }]
[[vm.schedule]]
start_time = 40
pause = inf
[[vm.schedule]]
start_time = 50
executable = "held"
wait = false
[[vm.schedule]]
start_time = 60
executable = "/bin/true"
on_host = true
[[vm]]
name = "plain"
use_vm_manager = false
"""


def test_a_plan_is_what_a_run_would_do_and_touches_nothing(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "setup.sh").write_text("x" * 1234)
    (tmp_path / "lab.toml").write_text(PLANNED)
    before = sorted(tmp_path.rglob("*"))
    shown = cli("plan", "lab.toml", "--json")
    assert (shown.code, shown.err) == (
        0,
        "3 VMs, 14 entries, time 0 comes 5 s after the last VM is configured\n",
    )
    rows = json.loads(shown.out)
    mine = [row for row in rows if row["vm"] == "web2"]
    assert [[row[key] for key in ("entry", "time", "at", "what")] for row in mine] == [
        [2, "-10", "-10", "setup.sh"],
        [3, "10", "10", "pause 5"],
        [4, "20", "25", "transfer"],
        [1, "30", "35", "late"],
        [5, "40", "45", "break"],
        [6, "50", "held", "held"],
        [7, "60", "held", "true"],
    ]
    assert mine[0]["files"] == [
        {"location": "setup.sh", "bytes": 1234},
        {"location": "/etc/motd", "bytes": 4},
    ]
    out = {"location": "/var/log", "interval": 2, "destination": str(tmp_path / "out")}
    assert mine[2]["transfers"] == [out]
    assert [row["notes"] for row in mine] == [
        [],
        [],
        [],
        ["failure ignored"],
        [],
        ["not waited for"],
        ["on the host"],
    ]
    assert rows[-1]["vm"] == "plain"
    assert rows[-1]["what"] == "never contacted"
    piped = cli("plan", "lab.toml").out.splitlines()
    assert piped[0] == "web1\t2\t-10\t-10\tsetup.sh\tsetup.sh 1234, /etc/motd 4\t\t"
    assert len(piped) == 15
    assert sorted(tmp_path.rglob("*")) == before, "neither a database nor anything else"


def test_a_plan_of_a_faulty_file_tells_all_faults(cli: Cli, tmp_path: Path) -> None:
    faulty = PLANNED.replace("-10", "0").replace("5\n[[vm]]", "-5\n[[vm]]")
    (tmp_path / "lab.toml").write_text(faulty)
    shown = cli("plan", "lab.toml")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err == cli("load", "lab.toml").err
    assert "3 faults" in shown.err


# === an experiment to look at ====================================================================

HOSTILE = "</pre></script><img src=x onerror=alert(1)><!-- \x1b[31m &amp;"
REBOOT = "[ -e ../asked ] && exit 0; touch ../asked; exit 10"


def schedule() -> list[dict[str, Any]]:
    """Return entries that overlap, reboot, pause, fail, and print what no page may obey."""
    return [
        sh(-1, REBOOT),
        sh(0.1, "sleep 1"),
        sh(0.2, "sleep 0.2"),
        {"start_time": 0.3, "pause": 0.2},
        sh(0.4, f"printf '%s\\n' '{HOSTILE}'; seq 1000 >&2; exit 3"),
        sh(0.4, "exit 4", ignore_failure=True),
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Return a lab whose experiment has run to its (failed) end, with a report."""
    lab = Lab(tmp_path_factory.mktemp("ran"), count=2)
    with stand_ins(lab.folder / "agents", 2):
        agents = lab.folder / "agents"
        vms = (vm(f"vm{n}", agents / f"{n}.sock", agents / f"{n}/launch") for n in (1, 2))
        load(
            lab,
            *(one | {"schedule": schedule()[: 6 if n == 0 else 1]} for n, one in enumerate(vms)),
        )
        done = lab.run("run", "--report", str(lab.folder / "run.html"))
    assert done.returncode == 1, done.stderr
    return lab


def iso(at: float) -> str:
    """Write an instant as vmrm does: UTC, with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def attempts(lab: Lab, experiment: int = 1) -> list[dict[str, Any]]:
    return [row for row in tables.attempts(lab.db) if row["experiment_id"] == experiment]


# === trace =======================================================================================

# What the description of the Chrome trace event format wants of the three kinds that are used.
COMMON = {"ph", "name", "pid", "tid"}
NEEDED = {
    "M": COMMON | {"args"},
    "X": COMMON | {"cat", "ts", "dur", "args"},
    "i": COMMON | {"cat", "ts", "s"},
}
METADATA = {
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
# catapult: tracing/tracing/base/color_scheme.html
COLOURS = {"good", "bad", "terrible", "grey", "yellow", "generic_work"}


def checked(text: str) -> list[dict[str, Any]]:
    """Return the events of a trace file that keeps to the format in every point."""
    trace = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert trace.keys() <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    events: list[dict[str, Any]] = trace["traceEvents"]
    for event in events:
        needed = NEEDED[event["ph"]]
        assert needed <= event.keys() <= needed | {"args", "cname"}, event
        assert type(event["pid"]) is type(event["tid"]) is int, event
        assert event["pid"] > 0, "process 0 is the idle one"
        assert event["name"], event
        if event["ph"] == "M":
            key, kind = METADATA[event["name"]]
            assert event["args"].keys() == {key}, event
            assert type(event["args"][key]) is kind, event
            continue
        assert event["cat"], event
        assert type(event["ts"]) is int, event
        assert event["ts"] >= 0, event
        assert type(event.get("dur", 0)) is int, event
        assert event.get("dur", 0) >= 0, event
        assert event.get("s", "t") in ("g", "p", "t"), event
        assert event.get("cname", "good") in COLOURS, event
    check_names(events)
    check_nesting(events)
    return events


def check_names(events: list[dict[str, Any]]) -> None:
    """Every process and thread has one name, and a thread one process."""
    named = [e for e in events if e["ph"] == "M"]
    threads = {(e["pid"], e["tid"]) for e in events}
    for name, numbers in (
        ("process_name", {pid for pid, _ in threads}),
        ("thread_name", {tid for _, tid in threads}),
    ):
        key = name.split("_")[0][0] + "id"
        count = Counter(e[key] for e in named if e["name"] == name)
        assert count == Counter(dict.fromkeys(numbers, 1)), name
    assert len(threads) == len({tid for _, tid in threads})


def check_nesting(events: list[dict[str, Any]]) -> None:
    """Complete events of one thread are apart or inside each other, never in part."""
    stacks: dict[int, list[int]] = {}
    spans = sorted((e["ts"], -e["dur"], e["tid"]) for e in events if e["ph"] == "X")
    for begin, minus, tid in spans:
        ends = stacks.setdefault(tid, [])
        while ends and ends[-1] <= begin:
            ends.pop()
        assert not ends or begin - minus <= ends[-1], (tid, begin, minus)
        ends.append(begin - minus)


def processes(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return events by the name of their process."""
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in events:
        found[names[event["pid"]]].append(event)
    return found


def check_slices(lab: Lab, events: list[dict[str, Any]]) -> None:
    """Assert that there is one slice for each attempt of the journal, and that it says the same."""
    launched = tables.experiment(lab.db)["launched_at"]
    slices = {
        (name, e["args"]["entry"], e["args"]["attempt"]): e
        for name, mine in processes(events).items()
        for e in mine
        if e["ph"] == "X"
    }
    rows = {(row["server_name"], row["ordinal"], row["attempt"]): row for row in attempts(lab)}
    assert slices.keys() == rows.keys()
    assert len(slices) == sum(e["ph"] == "X" for e in events)
    for key, row in rows.items():
        said = slices[key]["args"]
        assert slices[key]["ts"] == round((row["sent_at"] - launched) * 1e6)
        assert slices[key]["ts"] + slices[key]["dur"] == round((row["ended_at"] - launched) * 1e6)
        for name in ("outcome", "exit_code", "pid"):
            assert said.get(name) == row[name]
        assert (said.get("boot_id", ""), said.get("error", "")) == (row["boot_id"], row["error"])
        planned = row["planned_at"] and iso(row["planned_at"])
        assert said.get("planned") == planned


def test_a_trace_keeps_to_the_format_and_agrees_with_the_journal(ran: Lab, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert ran.run("trace", str(file)).returncode == 0
    assert file.stat().st_mode & 0o777 == 0o600
    events = checked(file.read_text())
    found = processes(events)
    launched, start = (tables.experiment(ran.db)[key] for key in ("launched_at", "start_at"))
    microseconds = lambda at: round((at - launched) * 1e6)  # noqa: E731
    check_slices(ran, events)
    assert Counter(row["server_name"] for row in attempts(ran)) == {"vm1": 6, "vm2": 2}
    labels = {e["args"]["entry"]: e["name"] for e in found["vm1"] if e["ph"] == "X"}
    assert labels == {1: "-1 sh", 2: "0.1 sh", 3: "0.2 sh", 5: "0.4 sh", 6: "0.4 sh"}
    instants = [(e["cat"], e["name"], e["ts"]) for e in found["vm1"] if e["ph"] == "i"]
    history = tables.history(ran.db)
    moves = [row for row in history if row["server_name"] == "vm1" and row["at"] >= launched]
    assert [i for i in instants if i[0] == "state"] == [
        ("state", row["new_state"], microseconds(row["at"])) for row in moves
    ]
    assert [i[1] for i in instants if i[0] == "reboot"] == ["rebooted"]
    assert ("pause", "pause 0.2", microseconds(start + 0.3)) in instants
    everybody = [e for e in events if e["ph"] == "i" and e["s"] == "g"]
    assert [(e["name"], e["ts"]) for e in everybody] == [
        ("launch", 0),
        ("start time", microseconds(start)),
    ]


def test_a_trace_of_a_running_experiment_ends_now(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    with stand_ins(tmp_path / "agents", 1):
        long = vm("vm1", tmp_path / "agents/1.sock", lab.guest(1) / "launch", sh(0.1, "sleep 60"))
        load(lab, long)
        early = lab.run("trace")
        assert (early.returncode, early.stdout) == (2, "")
        assert "not been launched" in early.stderr
        assert lab.run("run", "--detach").returncode == 0
        until(lambda: [a for a in attempts(lab) if a["outcome"] == "running"])
        first, page, second = (lab.run(name).stdout for name in ("trace", "report", "trace"))
        assert lab.run("stop", "--kill").returncode == 0
    (a,), (b,) = ([e for e in checked(text) if e["ph"] == "X"] for text in (first, second))
    assert a["args"]["outcome"] == "running"
    assert "ended" not in a["args"]
    assert (a["ts"], a["dur"] < b["dur"]) == (b["ts"], True)
    assert ">running</span>" in page


def test_what_exists_is_not_overwritten(ran: Lab, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for words in (["trace"], ["report"], ["run", "--report"]):
        done = ran.run(*words, str(taken))
        assert (done.returncode, done.stdout) == (2, "")
        assert "exists already" in done.stderr
        nowhere = ran.run(*words, str(tmp_path / "no" / "file"))
        assert nowhere.returncode == 2, nowhere.stderr
        assert nowhere.stderr.startswith("error: ")
    assert ran.run("run", "--detach", "--report", str(tmp_path / "new")).returncode == 2
    assert taken.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [taken]


def test_a_clock_that_was_set_back_and_a_removed_schedule_break_nothing(tmp_path: Path) -> None:
    with vmrm.Database(tmp_path / "lab.db") as db:
        vmrm.VMMapping(db=db).put("u", "web", path="/nowhere")
        vmrm.ScheduleDb(db=db).put("WEB", '[{"start_time": 1, "executable": "a"}]')
        vmrm.launch(db)
        attempt = vmrm.Journal(db, "web").arm({1: 2e9}, "boot")[1]
        tables.put(db.path, "attempts", {"sent_at": 1000.0})
        vmrm.Journal(db, "web").ended(attempt, vmrm.Outcome.UNKNOWN, error="<b>")
        vmrm.ScheduleDb(db=db).destroy_one("web")
        run = vmrm.read_run(db)
        (only,) = (e for e in checked(json.dumps(vmrm.trace(run))) if e["ph"] == "X")
        assert (only["ts"], only["name"]) == (0, "1 a")
        assert "entry 1 (1 a), attempt 1: unknown: &lt;b&gt;" in vmrm.report_page(db, run)
        assert vmrm.report_of(run).rows[0]["entries"] == 0


spans = st.tuples(st.integers(0, 50), st.integers(0, 20)).map(
    lambda span: {"begin": span[0], "end": span[0] + span[1]}
)


@given(st.lists(spans, max_size=30))
def test_lanes_hold_everything_without_overlap_and_are_as_few_as_can_be(
    attempts: list[dict[str, int]],
) -> None:
    dealt = vmrm.lanes(attempts, lambda at: at)
    assert sorted(map(id, attempts)) == sorted(id(a) for lane in dealt for a in lane)
    for lane in dealt:
        for before, after in itertools.pairwise(lane):
            assert before["end"] <= after["begin"]
    at_once = [sum(a["begin"] <= at["begin"] < a["end"] for a in attempts) or 1 for at in attempts]
    assert len(dealt) <= max(at_once, default=0) + 1
    assert len(dealt) >= max((n for n in at_once if n > 1), default=0)


# === report ======================================================================================


class Page(HTMLParser):
    """What a page holds: elements with their attributes, and the text of some."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data))

    def within(self, tag: str) -> list[str]:
        """Return the texts of all elements of a kind."""
        return [text for name, text in self.texts if name == tag]


def refers_to_nothing(page: Page) -> None:
    """Assert that a page loads nothing, runs nothing and leads nowhere."""
    allowed = {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "i", "div"),
        *("svg", "text", "line", "rect", "ul", "li", "details", "summary", "pre", "footer"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    assert {tag for tag, _ in page.elements} <= allowed
    for _, attributes in page.elements:
        assert not [name for name in attributes if re.match("on|src|href|action|data", name)]
    (style,) = page.within("style")
    assert not re.search(r"url\(|@import", style)


def test_a_report_says_what_the_journal_says(ran: Lab) -> None:
    page = Page((ran.folder / "run.html").read_text())
    refers_to_nothing(page)
    shown = page.within("td")
    for row in tables.status(ran.db).values():
        at = shown.index(row["server_name"])
        wanted = [row[key] for key in ("state", "entries", "done", "failed", "unknown")]
        assert shown[at + 1 : at + 6] == list(map(str, wanted))
    bars = [a for tag, a in page.elements if tag == "rect" and a["class"] in vmrm.TRACE_COLOURS]
    assert Counter(a["class"] for a in bars) == Counter(a["outcome"] for a in attempts(ran))
    hovers = page.within("title")
    for row in attempts(ran):
        mine = [
            text
            for text in hovers
            if f"{row['server_name']}, entry {row['ordinal']}:" in text
            and iso(row["sent_at"]) in text
        ]
        assert len(mine) == 1, (row, hovers)
        assert f"{row['outcome']}, exit code {row['exit_code']}\n" in mine[0]
        if row["planned_at"]:
            late = round(row["sent_at"] - row["planned_at"], 6) * 1000  # as views round it
            assert f"late {late:.1f} ms" in mine[0]
    assert [a for tag, a in page.elements if tag == "line" and a["class"] == "start"]
    assert page.within("li") == ["vm1, entry 5 (0.4 sh): failed: exit code 3"]
    summaries = page.within("summary")
    assert [re.sub(" .*attempt 1:", "", text) for text in summaries] == [
        "vm1, failed: exit code 3",
        "vm1, failed, ignored: exit code 4",
    ]


def test_what_a_guest_prints_stays_text(ran: Lab) -> None:
    page = Page((ran.folder / "run.html").read_text())
    out, err = page.within("pre")
    assert out == HOSTILE.replace("\x1b", "\\u001b") + "\n" or out == HOSTILE.replace(
        "\x1b", "\\u001b"
    )
    assert err.split() == ["…", *map(str, range(981, 1001))], "the end of it"


def test_what_was_destroyed_can_still_be_seen(ran: Lab, tmp_path: Path) -> None:
    """The last test of this lab: it destroys the experiment and loads another."""
    before = json.loads(ran.run("trace").stdout)
    assert ran.run("destroy", "--yes").returncode == 0
    gone = ran.run("trace")
    assert gone.returncode == 2
    assert "--experiment 1" in gone.stderr
    load(ran, vm("vm1", tmp_path / "a", tmp_path / "b", sh(-1, "another one")))
    again = json.loads(ran.run("trace", "--experiment", "1").stdout)
    assert again == before
    old = Page((ran.folder / "run.html").read_text())
    new = Page(ran.run("report", "--experiment", "1").stdout)
    for tag in ("pre", "td", "li", "summary", "title"):
        assert new.within(tag) == old.within(tag), tag
    assert ran.run("report", "--experiment", "7").returncode == 2


# === the view of a running experiment ============================================================


def test_the_view_reads_rows_only_when_somebody_has_changed_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def change() -> None:
        with vmrm.Database(tmp_path / "lab.db") as other:
            vmrm.VMMapping(db=other).set_vm_state_by_uuid("u1", "configuring")

    with vmrm.Database(tmp_path / "lab.db") as db:
        vms = [{"server_uuid": f"u{n}", "server_name": f"vm{n}"} for n in range(3)]
        vmrm.VMMapping(db=db).batch_put(vms)
        changer = threading.Timer(1.5, change)
        db.connection.set_trace_callback(asked.append)
        with subprocess.Popen(["sleep", "3"]) as process:
            changer.start()
            with pytest.raises(vmrm.VmrmError, match="died"):  # it was no supervisor
                vmrm.Viewer(db, vmrm.Screen()).watch(process)
        changer.join()
        db.connection.set_trace_callback(None)
    looks = sum("FROM vm_status" in sql for sql in asked)
    assert 2 <= looks <= 6, looks  # at first, at the change, at the end, and every 5 s
    told = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("vm1: uninitialized") for line in told) == 1
    assert sum(line.startswith("vm1: configuring") for line in told) == 1
