"""One life per handler: a guest that is paused and goes on meets one handler, not two."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tables
from cli_lab import until
from lab import ROOT, Lab, entry, kill, stand_ins
from test_handler import load, outcomes, vm
from test_review import only

import vmrm

SABOTAGE = str(ROOT / "tests" / "sabotage")
IMPATIENT = {"VMRM_TIMEOUT_SCALE": "0.05"}  # a call to the agent ends after 1.5 s


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with one stand-in, nothing loaded."""
    with stand_ins(tmp_path / "agents", 1):
        yield Lab(tmp_path)


@pytest.fixture(params=["standin", pytest.param("qemu-ga", marks=pytest.mark.qga)])
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A lab, its agent's address, and the pid to stop and continue it."""
    lab = Lab(tmp_path)
    if request.param == "qemu-ga":
        real = request.getfixturevalue("qemu_ga")()
        lab.guest(1).mkdir(parents=True)
        yield lab, real.path, real.pid
    else:
        with stand_ins(tmp_path / "agents", 1) as agent:
            yield lab, tmp_path / "agents" / "1.sock", agent.pid


@contextmanager
def running(lab: Lab, agent: int = 0, *words: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Run the experiment; whatever the block raises, the agent goes on and the run ends."""
    with lab.start("run", *words, **env) as run:
        try:
            yield run
        finally:
            if agent:
                os.kill(agent, signal.SIGCONT)
            if run.poll() is None:
                lab.run("stop")


def told(lab: Lab) -> dict[tuple[str, str], int]:
    """Return how often the handler's log tells of each entry that it started, or ended."""
    found = re.findall(r"entry (\d+) \([^)]*\) (started|done|failed|unknown)", lab.logs(whole=True))
    return Counter(found)


def test_a_guest_that_was_paused_while_news_came_is_met_by_one_handler(
    frozen: tuple[Lab, Path, int], tmp_path: Path
) -> None:
    lab, path, agent = frozen
    due = [entry(n, 0.5 * n) for n in range(2, 14)]
    launch = lab.guest(1) / "launch"
    load(lab, vm("vm1", path, launch, entry(1, 0.1, "sleep 9"), *due, agent_timeout=60))
    more = tmp_path / "more.json"
    with running(lab, agent, **IMPATIENT) as run:
        record = launch / "record"
        until(lambda: record.exists() and "3 begin" in record.read_text())
        for n in range(14, 16):
            log = len(lab.logs(whole=True))
            os.kill(agent, signal.SIGSTOP)
            until(lambda seen=log: "connecting anew" in lab.logs(whole=True)[seen:])
            more.write_text(json.dumps([entry(n, 6 + n / 10)]))
            assert lab.run("schedule", "add", "vm1", str(more)).returncode == 0
            assert lab.run("pause", "vm1", "--duration", "0.3").returncode == 0
            with lab.start("exec", "vm1", "true") as asked:
                until(lambda: tables.requests(lab.db) or asked.poll() is not None)
                os.kill(agent, signal.SIGCONT)
                assert asked.wait(60) in (0, 255)
        assert run.wait(60) == 0, lab.logs()
    lab.audit()
    assert set(told(lab).values()) == {1}, lab.logs()
    assert [row[1:] for row in outcomes(lab)] == [("done", 0, "")] * 15
    first = next(row for row in tables.attempts(lab.db) if row["ordinal"] == 1)
    assert first["ended_at"] - first["sent_at"] > 8.9


# --- stop --kill

STUBBORN = "trap 'echo \"$N term\" >> ../../record' TERM; for n in $(seq 80); do sleep 0.1; done"


def kill_meanwhile(lab: Lab, *meanwhile: Callable[[], object]) -> list[str]:
    """Run, stop with --kill once entry 1 runs; return what the guest has recorded after TERM.

    Args:
        lab: Loaded; its entry 1 notes the TERM and goes on until it is killed.
        meanwhile: What to do after TERM, while the handler waits for entry 1 to end.
    """
    record = lab.guest(1) / "launch" / "record"
    noted = lambda word: record.exists() and word in record.read_text()  # noqa: E731
    with running(lab, 0, "--allow-host", VMRM_TIMEOUT_SCALE="1") as run:
        until(lambda: noted("1 begin"))
        with lab.start("stop", "--kill") as stop:
            until(lambda: noted("1 term"))
            for act in meanwhile:
                act()
            assert stop.wait(60) == 0, lab.logs()
        assert run.wait(60) == 1
    lines = record.read_text().splitlines()
    return lines[lines.index("1 term") + 1 :]


def test_after_stop_kill_no_entry_starts_that_falls_due_in_the_grace(lab: Lab) -> None:
    path, launch = lab.folder / "agents" / "1.sock", lab.guest(1) / "launch"
    note = {"arguments": ["-c", f"echo host begin >> {launch}/record"], "on_host": True}
    began = time.monotonic()
    assert lab.run("pool", "group", "any").returncode == 0
    soon = 2 + 2 * (time.monotonic() - began)  # about when a `stop` has come, on this host
    host = [{"start_time": soon + n, "executable": "/bin/sh", **note} for n in range(4)]
    due = [entry(n, soon + 0.1 * n) for n in range(2, 34)]
    load(lab, vm("vm1", path, launch, entry(1, 0.1, STUBBORN), *due, *host))
    after = kill_meanwhile(lab)
    assert not [line for line in after if line.endswith("begin")], lab.logs()
    assert lab.run("run", "--allow-host").returncode == 1, "entry 1 was killed, and nothing else"
    record = (launch / "record").read_text().splitlines()
    begun = [line for line in record if line.endswith("begin")]
    assert sorted(begun) == sorted([*(f"{n} begin" for n in range(1, 34)), *["host begin"] * 4])


def test_after_stop_kill_nothing_starts_by_another_command(lab: Lab, tmp_path: Path) -> None:
    launch, more = lab.guest(1) / "launch", tmp_path / "more.json"
    more.write_text(json.dumps([entry(3, 0.2)]))
    only(lab, entry(2, -2, "exit 3", ignore_failure=True), entry(1, -1, STUBBORN), entry(4, 0.5))
    late: list[subprocess.Popen[str]] = []
    note = ["sh", "-c", f"echo exec begin >> {launch}/record"]
    after = kill_meanwhile(
        lab,
        lambda: late.append(lab.start("exec", "--timeout", "2", "vm1", *note)),
        lambda: lab.run("retry", "vm1", "2"),
        lambda: lab.run("schedule", "add", "vm1", str(more)),
    )
    late[0].communicate(timeout=60)
    assert not [line for line in after if line.endswith("begin")], lab.logs()


def test_a_handler_killed_in_the_grace_is_followed_by_one_that_starts_nothing(lab: Lab) -> None:
    only(lab, entry(1, 0.1, STUBBORN), *(entry(n, 0.3 * n) for n in range(2, 30)))
    after = kill_meanwhile(lab, lambda: [kill(pid) for pid in lab.handler_pids()])
    assert not [line for line in after if line.endswith("begin")], lab.logs()


def test_a_run_that_races_with_stop_kill_is_refused(lab: Lab) -> None:
    only(lab, entry(1, 0.1, "sleep 4321"), entry(2, 60))
    record = lab.guest(1) / "launch" / "record"
    with lab.start("run") as run:
        until(record.exists)
        for pid in filter(None, [lab.supervisor_pid(), *lab.handler_pids()]):
            kill(pid)
        run.wait(60)
    slow = {"PYTHONPATH": SABOTAGE, "VMRM_SLOW_START": "_supervise:3"}
    with lab.start("stop", "--kill", **slow) as stop:
        until(lambda: tables.experiment(lab.db)["halt"] == "kill")
        refused = lab.run("run")
        assert (refused.returncode, stop.wait(60)) == (75, 0)
    assert "stop --kill" in refused.stderr
    assert record.read_text() == "1 begin\n"
    assert lab.run("run", "--detach").returncode == 0
    assert lab.run("stop", "--kill").returncode == 0


def test_a_stop_kill_that_was_killed_can_be_repeated(lab: Lab) -> None:
    only(lab, entry(1, 0.1, STUBBORN))
    record = lab.guest(1) / "launch" / "record"
    with lab.start("run", VMRM_TIMEOUT_SCALE="1") as run:
        until(record.exists)
        with lab.start("stop", "--kill") as stop:
            until(lambda: "1 term" in record.read_text())
            for pid in filter(None, [stop.pid, lab.supervisor_pid(), *lab.handler_pids()]):
                kill(pid)
        run.wait(60)
    assert lab.run("run").returncode == 75
    assert lab.run("stop", "--kill").returncode == 0
    assert lab.run("run").returncode == 1, "its entry has failed, and is not repeated"
    assert record.read_text().count("begin") == 1


def suspended(lab: Lab) -> bool:
    """Stop the handler; return whether that was not in the middle of a transaction."""
    (handler,) = lab.handler_pids()
    os.kill(handler, signal.SIGSTOP)
    try:
        with vmrm.Database(lab.db, timeouts=vmrm.Timeouts(writer=1)) as db, db.transaction():
            return True
    except vmrm.Busy:
        os.kill(handler, signal.SIGCONT)
        return False


def pending(lab: Lab, end: Callable[[], object]) -> subprocess.CompletedProcess[str]:
    """Ask a handler that does not take it for an exec, and have that handler end meanwhile."""
    only(lab, entry(1, 0.1, "sleep 4321", wait=False), entry(2, 600))
    record = lab.guest(1) / "launch" / "record"
    with running(lab):
        until(record.exists)
        until(lambda: suspended(lab))
        note = f"echo exec >> {record}"
        with lab.start("exec", "--timeout", "500", "vm1", "sh", "-c", note) as asked:
            until(lambda: tables.requests(lab.db))
            end()
            out, err = asked.communicate(timeout=60)
        assert ("exec" in record.read_text()) == (asked.returncode == 0)
    return subprocess.CompletedProcess(asked.args, asked.returncode, out, err)


def test_a_request_that_a_stopped_handler_did_not_take_is_answered(lab: Lab) -> None:
    done = pending(lab, lambda: lab.run("stop"))
    assert done.returncode == 75
    assert "stopped before it took the request" in done.stderr


def test_a_request_that_a_dead_handler_did_not_take_is_done_all_the_same(lab: Lab) -> None:
    victims = lambda: filter(None, [lab.supervisor_pid(), *lab.handler_pids()])  # noqa: E731
    done = pending(lab, lambda: [kill(pid) for pid in victims()])
    assert done.returncode == 0, done.stderr
