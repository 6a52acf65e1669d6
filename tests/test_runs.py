"""One experiment after another on the same VMs: nothing of the former reaches the latter."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tables
from cli_lab import until
from lab import Lab, kill, stand_ins

import vmrm


def program(folder: Path, gate: str, code: int) -> dict[str, Any]:
    """Return an entry of the same name and time as all others here, which waits for a file."""
    waits = f'while [ ! -e "{folder}/{gate}" ]; do sleep 0.05; done; echo {gate} ends; exit {code}'
    script = f'echo {gate} begins; echo $$ > "{folder}/{gate}.pid"; {waits}'
    return {"start_time": 0.1, "executable": "sh", "arguments": ["-c", script]}


def outcome(lab: Lab) -> tuple[str, int | None]:
    (row,) = tables.entries(lab.db)
    return row["outcome"], row["exit_code"]


def begin(lab: Lab, gate: str, code: int) -> Any:
    """Run the experiment with such a program until that waits."""
    lab.write(lambda _: [program(lab.folder, gate, code)])
    process = lab.start("run", str(lab.folder / "lab.json"))
    until((lab.folder / f"{gate}.pid").exists)
    until(lambda: outcome(lab)[0] == "running")
    return process


def begun(lab: Lab) -> int:
    """Return how many handlers have taken up the VM's work so far."""
    return lab.logs().count("the experiment starts at")


def end(lab: Lab, gate: str) -> None:
    """Let a program end, and see that it did."""
    (lab.folder / gate).touch()
    pid = int((lab.folder / f"{gate}.pid").read_text())
    until(lambda: not Path(f"/proc/{pid}").exists())


def by_destroy(lab: Lab, code: int) -> Any:
    """Begin another experiment."""
    assert lab.run("destroy", "--yes").returncode == 0
    return begin(lab, "new", code)


def by_another_schedule(lab: Lab, code: int) -> Any:
    """Begin a new generation within the experiment."""
    with vmrm.ScheduleDb(db=lab.db) as schedules:
        schedules.destroy_one("vm1")
        schedules.put("vm1", json.dumps([program(lab.folder, "new", code)]))
    process = lab.start("run")
    until((lab.folder / "new.pid").exists)
    return process


@pytest.mark.parametrize(
    ("replace", "old", "new"), [(by_destroy, 7, 0), (by_another_schedule, 0, 7)]
)
def test_a_former_program_that_ends_late_ends_nothing_else(
    tmp_path: Path, replace: Any, old: int, new: int
) -> None:
    lab = Lab(tmp_path, start_buffer=0.1)
    with stand_ins(tmp_path / "agents", 1):
        first = begin(lab, "old", old)
        assert lab.run("stop").returncode == 0
        first.communicate(timeout=30)
        second = replace(lab, new)
        end(lab, "old")
        until(lambda: outcome(lab)[0] == "running")
        seen = begun(lab)
        for handler in lab.handler_pids():
            kill(handler)  # the next one believes what the guest's files say
        until(lambda: begun(lab) > seen)
        assert outcome(lab) == ("running", None)
        end(lab, "new")
        second.communicate(timeout=30)
        assert second.returncode == (1 if new else 0)
    assert outcome(lab) == ("failed" if new else "done", new)
    codes = sorted(path.read_text() for path in lab.guest(1).rglob("attempt.*/exit"))
    assert codes == sorted([f"{old} 0\n", f"{new} 0\n"])
    log = lab.run("logs", "vm1").stdout
    assert "new ends" in log and "old ends" not in log


def test_killed_in_destroy_the_next_run_has_all_its_output(tmp_path: Path) -> None:
    lab = Lab(tmp_path, start_buffer=0)
    out = {"executable": "sh", "start_time": 0.1}
    with stand_ins(tmp_path / "agents", 1):
        lab.write(lambda _: [out | {"arguments": ["-c", "echo a first, long line of output"]}])
        assert lab.run("run", str(tmp_path / "lab.json")).returncode == 0
        destroyed = lab.run("destroy", "--yes", VMRM_CRASH="destroyed:1")
        assert destroyed.returncode == -signal.SIGKILL
        lab.write(lambda _: [out | {"arguments": ["-c", "echo second"]}])
        assert lab.run("run", str(tmp_path / "lab.json")).returncode == 0
    log = lab.run("logs", "vm1").stdout
    assert "sh out] second\n" in log and "first" not in log
    outs = sorted(path.read_text() for path in (tmp_path / "lab.db.d").rglob("1.1.out"))
    assert outs == ["a first, long line of output\n", "second\n"]


# === Run again ===================================================================================


def counted(folder: Path, words: str) -> list[str]:
    """Return arguments of `sh` that count a run in a file of the host, then do *words*."""
    return ["-c", f'echo x >> "{folder}/count"; {words}']


def count(folder: Path) -> int:
    return len((folder / "count").read_text().splitlines())


def test_run_again_repeats_nothing_that_failed_in_positive_time(tmp_path: Path) -> None:
    lab = Lab(tmp_path, start_buffer=0)
    words = counted(tmp_path, "test -e fixed || exit 3")
    gone = {"start_time": 0.2, "transfer": [{"location": f"{lab.guest(1)}/nothing"}]}
    lab.write(
        lambda _: [
            {"start_time": 0.1, "executable": "sh", "arguments": words, "cwd": f"{tmp_path}"},
            gone,
        ]
    )
    with stand_ins(tmp_path / "agents", 1):
        assert lab.run("run", str(tmp_path / "lab.json")).returncode == 1
        before = tables.attempts(lab.db)
        again = lab.run("run", str(tmp_path / "lab.json"))
        assert (again.returncode, count(tmp_path)) == (1, 1)
        assert tables.attempts(lab.db) == before
        assert "run --retry" in again.stderr
        (tmp_path / "fixed").touch()
        (lab.guest(1) / "nothing").touch()
        assert lab.run("run", "--retry").returncode == 0
    assert count(tmp_path) == 2
    assert [row["attempt"] for row in tables.entries(lab.db)] == [2, 2]


def test_run_again_repeats_nothing_that_is_unknown(tmp_path: Path) -> None:
    lab = Lab(tmp_path, start_buffer=0)
    words = counted(tmp_path, "echo $PPID > pid; exec sleep 60")
    program = {"start_time": 0.1, "executable": "sh", "arguments": words, "cwd": f"{tmp_path}"}
    lab.write(lambda _: [program])
    command = "run", str(tmp_path / "lab.json")
    with stand_ins(tmp_path / "agents", 1), lab.start(*command) as first:
        until((tmp_path / "pid").exists)
        until(lambda: outcome(lab)[0] == "running")
        assert lab.run("stop").returncode == 0
        first.communicate(timeout=30)
    with suppress(ProcessLookupError):  # the stand-in may have taken it along
        os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    with stand_ins(tmp_path / "agents", 1):  # which knows nothing of it
        for _ in range(2):
            assert lab.run("run").returncode == 1
            assert outcome(lab) == ("unknown", None)
    assert count(tmp_path) == 1


def test_run_again_repeats_what_keeps_a_vm_from_time_0_and_says_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path, start_buffer=0)
    negative = {"start_time": -1, "executable": "sh", "cwd": f"{tmp_path}"}
    lab.write(
        lambda _: [
            negative | {"arguments": counted(tmp_path, "test -e fixed || exit 3")},
            {"start_time": 0.1, "executable": "true"},
        ]
    )
    with stand_ins(tmp_path / "agents", 1):
        assert lab.run("run", str(tmp_path / "lab.json")).returncode == 1
        (tmp_path / "fixed").touch()
        again = lab.run("run")
        assert again.returncode == 0
        assert "vm1, entry 1" in again.stderr
    assert count(tmp_path) == 2


# === What is left on the host ====================================================================


def with_files(folder: Path) -> Lab:
    """Return a lab whose experiment has been run, and has left files of every kind."""
    lab = Lab(folder, start_buffer=0)
    (folder / "hello").write_text("a file of the experiment\n")
    item = {"location": "hello", "filename": "hello"}
    words = ["-c", "cat hello; : > ../../log"]
    program = {"start_time": 0.1, "executable": "sh", "arguments": words, "file": [item]}
    on_host = {"start_time": 0.2, "executable": "/bin/true", "on_host": True}

    def schedule(guest: str) -> list[dict[str, Any]]:
        return [
            program,
            on_host,
            {"start_time": 1, "transfer": [{"location": f"{guest}/launch/log"}]},
        ]

    lab.write(schedule)
    with stand_ins(folder / "agents", 1):
        done = lab.run("run", str(folder / "lab.json"), "--allow-host")
    assert done.returncode == 0, done.stderr
    return lab


def left(lab: Lab) -> list[str]:
    """Return the files that lie in the state directory and belong to an experiment."""
    kinds = ("logs.*", "transfers.*", "host/*", "store")
    found = [path for kind in kinds for path in (lab.folder / "lab.db.d").glob(f"{kind}/**/*")]
    return [str(path) for path in found if path.is_file()]


def test_destroy_leaves_no_content_that_nothing_names(tmp_path: Path) -> None:
    lab = with_files(tmp_path)
    assert lab.run("destroy", "--yes").returncode == 0
    assert lab.run("check").returncode == 0
    assert not list((tmp_path / "lab.db.d/store").iterdir())
    assert left(lab), "logs and transfers are kept"


def test_a_purge_that_was_killed_is_named_and_can_be_finished(tmp_path: Path) -> None:
    lab = with_files(tmp_path)
    killed = lab.run("destroy", "--yes", "--purge", VMRM_CRASH="destroyed:1")
    assert killed.returncode == -signal.SIGKILL
    named = lab.run("check")
    assert named.returncode == 1
    for word in ("logs.1", "transfers.1", "store"):
        assert word in named.stdout
    assert lab.run("check", "--fix").returncode == 0
    assert left(lab) == []
    assert lab.run("check").returncode == 0


def test_a_store_remove_that_was_killed_is_named_and_can_be_finished(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    (tmp_path / "hello").write_text("content\n")
    assert lab.run("store", "add", str(tmp_path / "hello")).returncode == 0
    killed = lab.run("store", "remove", "hello", VMRM_CRASH="store-removed:1")
    assert killed.returncode == -signal.SIGKILL
    assert lab.run("check").returncode == 1
    assert lab.run("check", "--fix").returncode == 0
    assert left(lab) == []


def test_a_load_that_was_killed_can_be_repeated(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    (tmp_path / "hello").write_text("content\n")
    item = {"location": "hello", "filename": "hello"}
    lab.write(lambda _: [{"start_time": 1, "executable": "true", "file": [item]}])
    killed = lab.run("load", str(tmp_path / "lab.json"), VMRM_CRASH="store-before-rename:1")
    assert killed.returncode == -signal.SIGKILL
    assert lab.run("check").returncode == 1
    assert lab.run("load", str(tmp_path / "lab.json")).returncode == 0
    assert lab.run("check", "--fix").returncode == 0
    (kept,) = (tmp_path / "lab.db.d/store").iterdir()
    assert kept.read_text() == "content\n"
