"""News reaches who waits for it: at once when it is woken, and by and by when it is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tables
from cli_lab import until
from keepers import served
from lab import ROOT, Lab, entry, stand_ins
from test_handler import load, outcomes, states, vm
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
ASLEEP = {"VMRM_TIMEOUT_SCALE": "0.2,look=5000,watch=5000,heartbeat=5000"}


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
            ok("pull", "vm1", str(lab.guest(1) / "pushed"), str(tmp_path / "pulled"))
            ok("info", "vm1")
            with vmrm.Database(lab.db) as db:
                third = [entry(1, -1), {"start_time": 0.1, "pause": "inf"}]
                vmrm.ScheduleDb(db=db).put("vm3", json.dumps(third))
                launch = f"{lab.guest(3)}/launch"
                vmrm.VMMapping(db=db).put("u3", "vm3", path=address(3), launch_dir=launch)
            until(lambda: states(lab)["vm3"] in ("configured", "testing"))
            ok("reboot", "vm3")
            ok("resume", "vm3")
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


def test_a_start_time_that_is_given_and_a_stop_are_noticed_at_once(tmp_path: Path) -> None:
    lab = Lab(tmp_path, count=2)
    with stand_ins(tmp_path / "agents", 2):
        paths = [tmp_path / "agents" / f"{n}.sock" for n in (1, 2)]
        load(
            lab,
            vm("vm1", paths[0], lab.guest(1) / "launch", entry(1, -1), entry(2, 0.1, "sleep 60")),
            vm("vm2", paths[1], lab.guest(2) / "launch", entry(1, -1, "exit 3")),
            on_failure="wait",
        )
        with running(lab, **ASLEEP) as run:
            until(lambda: states(lab) == {"vm1": "configured", "vm2": "failed"})
            with vmrm.ExperimentStart(db=lab.db) as start:
                start.add_start_time()
            until(lambda: [row[1] for row in outcomes(lab)][-1:] == ["running"])
            assert lab.run("stop").returncode == 0
            assert run.wait(60) == 1


def test_every_change_of_the_pool_is_noticed_at_once_by_keeper_and_waiters(tmp_path: Path) -> None:
    lab, broken = Lab(tmp_path), tmp_path / "broken"
    hooks = {"check": "true", "terminate": f"test ! -e {broken}"}
    waiting: list[subprocess.Popen[str]] = []

    def ok(*words: str) -> None:
        done = lab.run("pool", *words)
        assert done.returncode == 0, done.stderr

    def wait(group: str, owner: str) -> None:
        before = len(tables.pool_waiters(lab.db))
        words = ("pool", "acquire", group, "--owner", owner, "--wait", "--lease", "900")
        one = lab.start(*words, **ASLEEP)
        waiting.append(one)
        until(lambda: len(tables.pool_waiters(lab.db)) > before or one.poll() is not None)

    def served_all() -> bool:
        return [one.wait(60) for one in waiting] == [0] * len(waiting)

    def ready(group: str) -> list[str]:
        rows = tables.pool_vms(lab.db).items()
        return [n for n, row in rows if (row["group"], row["state"]) == (group, "ready")]

    with vmrm.VmManager(db=lab.db) as pool:
        vmrm.put_group(pool.db, "own", {**hooks, "release": "true", "release_cleans": True})
        limits = {"max_vm_total": 2, "min_ready": 0, "vm_spawn_min_interval": 0}
        vmrm.put_group(pool.db, "made", {**hooks, "spawn": "echo IP=10.0.0.1", **limits})
        with served(lab.db, **ASLEEP) as keeper:
            until(lambda: tables.keeper_runs(lab.db))
            # machines that are there
            ok("add", "a", "own")
            until(lambda: ready("own"))
            pool.acquire_vm(["own"], "me", "", os.getpid())
            wait("own", "you")
            ok("release", "a", "--force")  # the keeper runs the release hook
            assert served_all()
            wait("own", "you")
            ok("add", "b", "own")
            assert served_all()
            with wants_both(lab) as other:  # a is kept for it until it gives up
                until(lambda: tables.pool_waiters(lab.db))
                ok("release", "a", "--force")
                until(lambda: ready("own"))
                wait("own", "them")
                assert waiting[-1].poll() is None
                other.send_signal(signal.SIGINT)
                assert served_all()
            ok("terminate", "a", "--force")
            until(lambda: "a" not in tables.pool_vms(lab.db))
            # machines that are made
            wait("made", "you")
            assert served_all()
            (first,) = (n for n, row in tables.pool_vms(lab.db).items() if row["group"] == "made")
            ok("group", "made", "--min_ready", "1")
            (second,) = until(lambda: ready("made"))
            ok("hold", first, "1s", "--force")
            until(lambda: first not in tables.pool_vms(lab.db))
            pool.acquire_vm(["made"], "me", "", os.getpid())
            until(lambda: ready("made"))
            ok("group", "made", "--max_vm_per_user", "0")
            wait("made", "you")
            ok("group", "made", "--max_vm_per_user", "none")
            assert served_all()
            broken.touch()
            ok("terminate", second, "--force")
            until(lambda: "hook" in tables.pool_vms(lab.db)[second]["reason"])
            ok("remove", second)
            until(lambda: ready("made"))
            keeper.terminate()
            keeper.wait(60)
        assert keeper.returncode == 0


BOTH = """
import os, sys, vmrm
with vmrm.VmManager(db=sys.argv[1]) as pool:
    both = vmrm.Request((("own",), ("own",)), "us", "", vmrm.Process.of())
    pool.acquire(both, wait=600)
"""


def wants_both(lab: Lab) -> subprocess.Popen[bytes]:
    """Start a process that waits for two machines of a group at once."""
    env = os.environ | ASLEEP | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", BOTH, str(lab.db)]
    return subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)
