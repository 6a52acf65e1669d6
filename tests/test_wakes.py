"""News reaches who waits for it: at once when it is woken, and by and by when it is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, entry, stand_ins
from test_handler import load, outcomes, states, until, vm
from test_lives import running
from test_review import only

import vmrm


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with one stand-in, nothing loaded."""
    with stand_ins(tmp_path / "agents", 1):
        yield Lab(tmp_path)


# --- the safety net


def deafen(lab: Lab) -> None:
    """Have every wake-up from now on go to nobody."""
    for path in (lab.folder / "lab.db.d" / "wake").iterdir():
        path.unlink()


def test_with_every_wake_up_lost_the_last_vms_handler_sees_its_own_start_time(lab: Lab) -> None:
    only(lab, entry(1, -1, "sleep 1"), entry(2, 0.1))
    with running(lab) as run:
        until(lambda: outcomes(lab))
        deafen(lab)
        until(lambda: run.poll() is not None, 30)
    assert run.returncode == 0, lab.logs()
    lab.audit()


# --- every wake-up

# Nobody looks without being woken.
ASLEEP = {"VMRM_TIMEOUT_SCALE": "0.2,look=5000,watch=5000"}


def test_every_command_is_noticed_at_once_by_those_whom_it_concerns(tmp_path: Path) -> None:
    lab = Lab(tmp_path, count=3)
    go, more = tmp_path / "go", tmp_path / "more.json"
    more.write_text(json.dumps([entry(3, 0.2)]))

    def address(n: int) -> str:
        return str(tmp_path / "agents" / f"{n}.sock")

    def noted(words: str, n: int = 1) -> bool:
        record = lab.guest(n) / "launch" / "record"
        return record.exists() and words in record.read_text()

    def logged(words: str) -> bool:
        return words in lab.logs(whole=True)

    def ok(*words: str) -> None:
        done = lab.run(*words)
        assert done.returncode == 0, done.stderr

    waits = f"while [ ! -e {go} ]; do sleep 0.1; done"
    first = [entry(1, -1, "sleep 0.5"), entry(2, 0.1, waits), {"start_time": 0.2, "pause": "inf"}]
    second = [entry(1, -1, "sleep 1"), entry(2, 0.1)]
    with stand_ins(tmp_path / "agents", 3):
        load(
            lab,
            vm("vm1", Path(address(1)), lab.guest(1) / "launch", *first),
            vm("vm2", Path(address(2)), lab.guest(2) / "launch", *second),
        )
        with running(lab, **ASLEEP) as run:
            until(lambda: noted("2 begin") and noted("2 begin", 2))  # both have seen the start
            ok("schedule", "add", "vm1", str(more))
            ok("resume", "vm1")
            until(lambda: logged("resume at"))
            until(lambda: noted("3 begin"))
            ok("pause", "vm1", "--duration", "0.1")
            until(lambda: logged("pause of"))
            ok("break", "vm1")
            until(lambda: logged("break at"))
            ok("resume", "vm1")
            ok("exec", "vm1", "true")
            ok("push", "vm1", str(more), str(lab.guest(1) / "pushed"))
            with vmrm.Database(lab.db) as db:
                vmrm.ScheduleDb(db=db).put("vm3", json.dumps([entry(1, -1)]))
                launch = f"{lab.guest(3)}/launch"
                vmrm.VMMapping(db=db).put("u3", "vm3", path=address(3), launch_dir=launch)
            until(lambda: noted("1 begin", 3))
            go.touch()
            until(lambda: run.poll() is not None)
        assert run.returncode == 0, lab.logs()


def test_a_retry_and_a_stop_are_noticed_at_once(lab: Lab) -> None:
    go = lab.folder / "go"
    only(lab, entry(1, -1, f"test -e {go} || exit 1"), entry(2, 0.1, "sleep 60"), on_failure="wait")
    with running(lab, **ASLEEP) as run:
        until(lambda: "failed" in states(lab).values())
        go.touch()
        assert lab.run("retry", "vm1").returncode == 0
        until(lambda: [row[1] for row in outcomes(lab)][-1:] == ["running"])
        with lab.start("stop", "--kill") as stop:
            until(lambda: stop.poll() is not None and run.poll() is not None)
    assert stop.returncode == 0
