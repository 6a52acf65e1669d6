"""A command is killed after any of its COMMITs: what it left can be removed, or it can be repeated.

What it commits is followed by work on files, as a rule: of the store, of former experiments, of
requests.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_lab import until
from lab import Lab, stand_ins
from test_runs import left, with_files
from test_sql_faults import fault


def killed(lab: Lab, words: Sequence[str], number: int) -> bool:
    """Run a command that dies after the COMMIT of that number; return whether it has so many."""
    failed = lab.folder / "killed"
    failed.unlink(missing_ok=True)
    done = lab.run(*words, **fault("command", number, failed, "KILL"))
    assert done.returncode == (-signal.SIGKILL if failed.exists() else 0), done.stderr
    return failed.exists()


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lab whose experiment has been run, with files of every kind left by it."""
    folder = tmp_path_factory.mktemp("lab")
    return with_files(folder)


REPEATED = {  # the command, and how many contents the store has in the end
    "load": (["load", "lab.json"], 1),
    "remove": (["store", "remove", "more"], 0),
    "entry": (["schedule", "add", "vm1", "more.json"], 2),
    "purge": (["destroy", "--yes", "--purge"], 0),
}


def prepared(run_once: Lab, folder: Path, what: str) -> Lab:
    """Return a copy of a lab to which a command is new."""
    shutil.copytree(run_once.folder, folder, ignore=shutil.ignore_patterns("agents", "wake"))
    lab = Lab(folder)
    (folder / "more").write_text("of the store\n")
    item = {"location": "more", "filename": "more"}
    entry = {"start_time": 9, "executable": "true", "file": [item]}
    (folder / "more.json").write_text(json.dumps([entry]))
    if what in ("load", "remove"):
        lab.db.unlink()
        shutil.rmtree(f"{lab.db}.d")
    if what == "remove":
        assert lab.run("store", "add", str(folder / "more")).returncode == 0
    return lab


@pytest.mark.parametrize("what", list(REPEATED))
def test_a_command_that_was_killed_after_a_commit_can_be_repeated(
    run_once: Lab, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepared(run_once, tmp_path / "before", what)
    words, contents = REPEATED[what]
    for number in itertools.count(1):
        lab = Lab(tmp_path / str(number))
        shutil.copytree(before.folder, lab.folder)
        monkeypatch.chdir(lab.folder)
        if not killed(lab, words, number):
            break
        assert lab.run("check", "--fix").returncode == 0
        lab.run(*words)  # which may say that nothing is left to do
        assert lab.run("check").returncode == 0
        assert sum("/store/" in path for path in left(lab)) == contents
        assert left(lab) == [] or what not in ("remove", "purge")
    assert number > 1, "it was never killed"


def test_a_command_that_was_killed_after_its_request_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lab, guest = Lab(tmp_path), tmp_path / "agents/1"
    lab.write(lambda _: [{"start_time": -1, "executable": "true"}])
    with stand_ins(tmp_path / "agents", 1):
        run = lab.run("run", "lab.json", "--stay", "--detach")
        assert run.returncode == 0
        try:
            assert lab.run("wait", "--timeout", "60").returncode == 0
            (guest / "f").write_text("content\n")
            for words in (["exec", "vm1", "true"], ["pull", "vm1", f"{guest}/f", "g"]):
                number = 1
                while killed(lab, words, number):
                    number += 1
                    until(lambda: lab.run("check", "--fix").returncode == 0)
                    assert lab.run("check").returncode == 0
                    assert list((tmp_path / "lab.db.d/requests").iterdir()) == []
                assert number > 1
        finally:
            lab.run("stop")
