"""What cannot be meant is refused before anything is changed, and says whose fault it was."""

from __future__ import annotations

import ast
import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_lab import entry, lab, until
from conftest import ROOT, Cli
from lab import stand_ins

import vmrm


@pytest.fixture
def db(tmp_path: Path) -> Iterator[vmrm.Database]:
    with vmrm.Database(tmp_path / "lab.db") as opened:
        yield opened


# --- words and values given by scripts

PLACE = {"location": "/a", "content": "x"}


def _batch(**keys: object) -> Callable[[vmrm.Database], object]:
    return lambda db: vmrm.ScheduleDb(db=db).batch_put([{"server_name": "web", **keys}])  # type: ignore[dict-item]


def _put(*given: Any, **more: Any) -> Callable[[vmrm.Database], object]:
    return lambda db: vmrm.VMMapping(db=db).put(*given, **more)


def _all(**filters: Any) -> Callable[[vmrm.Database], object]:
    return lambda db: vmrm.VMMapping(db=db).get_all(**filters)


def _time(value: Any) -> Callable[[vmrm.Database], object]:
    return lambda db: vmrm.VMMapping(db=db).set_vm_time_by_uuid("u", value)


def _data(item: dict[str, Any]) -> Callable[[vmrm.Database], object]:
    def put(db: vmrm.Database) -> None:
        planned = vmrm.ScheduleEntry(5)
        planned.set_executable("true")
        planned.data.append(item)
        vmrm.ScheduleDb(db=db).put("web", vmrm.schedule_text([planned]))

    return put


def _entry(**members: Any) -> Callable[[vmrm.Database], object]:
    def put(db: vmrm.Database) -> None:
        planned = vmrm.ScheduleEntry(5)
        planned.set_executable("true")
        planned.add_content(**PLACE)
        vars(planned).update(members)
        vmrm.ScheduleDb(db=db).put("web", vmrm.schedule_text([planned]))

    return put


MEANT: dict[str, Callable[[vmrm.Database], object]] = {
    "a schedule of bytes": lambda db: vmrm.ScheduleDb(db=db).put("web", b"[]"),  # type: ignore[arg-type]
    "a schedule of None": lambda db: vmrm.ScheduleDb(db=db).put("web", None),  # type: ignore[arg-type]
    "an address of bytes": lambda db: vmrm.ScheduleDb(db=db).put("web", "[]", b"10.0.0.1"),  # type: ignore[arg-type]
    "a batch of bytes": _batch(text=b"[]"),
    "a batch with an unknown key": _batch(text="[]", vm_resources_ip="10.0.0.1"),
    "a batch without a text": _batch(),
    "a batch of texts": lambda db: vmrm.ScheduleDb(db=db).batch_put(["web"]),  # type: ignore[list-item]
    "a VM's uuid of bytes": _put(b"u2", "web2"),
    "a VM's uuid that is a number": _put(7, "web2"),
    "a VM's address of bytes": _put("u2", "web2", server_address=b"10.0.0.1"),
    "a VM's path that is a path": _put("u2", "web2", path=Path("/a")),
    "a VM's path of None": _put("u2", "web2", path=None),
    "a VM's time that is none": _put("u2", "web2", current_time="soon"),
    "a VM's time of None": _put("u2", "web2", current_time=None),
    "a VM that is a text": lambda db: vmrm.VMMapping(db=db).batch_put(["web"]),  # type: ignore[list-item]
    "a VM's switch that is a word": lambda db: vmrm.VMMapping(db=db).batch_put(
        [{"server_uuid": "u2", "server_name": "web2", "set_time": "no"}]
    ),
    "a time of None": _time(None),
    "a time of bytes": _time(b"5"),
    "a time that is a switch": _time(True),
    "a time that is no number": _time(math.nan),
    "a time that is a word": _time("configured"),
    "a filter by an unknown state": _all(filter_state="configurd"),
    "a filter by a state in capitals": _all(filter_state="CONFIGURED", length=True),
    "a filter by an empty state": _all(filter_state=""),
    "a filter by a time that is none": _all(filter_time="soon"),
    "a projection to an unknown key": _all(project_dict={"colour": 1}),
    "states of VMs in an unknown one": lambda db: vmrm.get_vm_states(
        "ready", vmrm.VMMapping(db=db)
    ),
    "times of VMs at none": lambda db: vmrm.get_vm_times("soon", vmrm.VMMapping(db=db)),  # type: ignore[arg-type]
    "the pool's VMs in an unknown state": lambda db: vmrm.VmManager(
        db=db
    ).get_vm_by_group_and_state_list(None, ["ready", "redy"]),
    "a data item of no kind": _data({"location": "/a"}),
    "a data item of two kinds": _data({**PLACE, "filename": "f"}),
    "a data item with an unknown key": _data({**PLACE, "mode": "755"}),
    "a pause with an unknown key": _data({"pause": 5, "until": 7}),
    "a switch that is a word": _entry(ignore_failure="no"),
    "a program without a name": _entry(executable=""),
    "an option that is none": _entry(options={"colour": "red"}),
}


@pytest.mark.parametrize("meant", MEANT.values(), ids=MEANT)
def test_what_a_script_cannot_mean_is_refused_and_never_stored(
    db: vmrm.Database, meant: Callable[[vmrm.Database], object]
) -> None:
    mapping, schedules = vmrm.VMMapping(db=db), vmrm.ScheduleDb(db=db)
    mapping.put("u", "web", current_time="-5")
    with pytest.raises(ValueError, match=r"\w"):
        meant(db)
    assert [(row["server_name"], row["current_time"]) for row in mapping.get_all()] == [  # type: ignore[union-attr]
        ("web", "-5")
    ]
    assert schedules.list_all() == []


def test_a_filter_by_time_compares_numbers(db: vmrm.Database) -> None:
    mapping = vmrm.VMMapping(db=db)
    mapping.put("u", "web", current_time="10.0")
    mapping.put("v", "new")
    mapping.put("w", "old", current_time=-math.inf)  # type: ignore[arg-type]
    assert mapping.get_all(filter_time=10, length=True) == 1
    assert vmrm.get_vm_times("10", mapping) == {"web": "10.0"}  # type: ignore[arg-type]
    assert mapping.get_all(filter_time=0, length=True) == 0


# --- files that are no database


def test_a_file_that_cannot_be_opened_costs_no_descriptor(tmp_path: Path) -> None:
    text, old = tmp_path / "text.db", tmp_path / "old.db"
    text.write_text("no database at all\n" * 100)
    with vmrm.Database(old) as made:
        made.write("PRAGMA user_version = 99")
    assert (tmp_path / "old.db.d").is_dir()
    (tmp_path / "text.db.d").mkdir()
    for path in (text, old):
        opened = vmrm.Database(path)
        for turn in range(20):
            with pytest.raises(vmrm.SchemaError):
                opened.query("SELECT 1")
            if turn == 0:
                before = len(list(Path("/proc/self/fd").iterdir()))
        assert len(list(Path("/proc/self/fd").iterdir())) <= before


# --- whose fault it was


@pytest.mark.parametrize("fault", [ValueError("odd"), OSError(errno.EBADF, "odd"), KeyError("odd")])
def test_a_fault_of_ours_is_told_as_such(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Exception,
) -> None:
    def broken(*_: object) -> None:
        raise fault

    monkeypatch.setattr(vmrm, "load_experiment", broken)
    path = lab(tmp_path, entry(-1, "true"))
    assert vmrm.main(["--db", str(tmp_path / "lab.db"), "load", str(path)]) == 1
    told = capsys.readouterr().err
    assert f"error: internal error: {type(fault).__name__}: " in told
    assert "in broken" in told, "the traceback says where"


USERS = {
    "store add nothing.txt": "'nothing.txt': no such file or directory",
    "store add .": "'.' is a directory",
    "pool add vm1 ci --path tcp:nowhere": "'tcp:nowhere' is not a path",
    "pool group -x --max-vm-total 3": "options are not abbreviated: -x",
    "pool group --max-vm-total 3": "settings of which group?",
    "pool group ci --colour red": "unknown key 'colour'",
    "load nothing.toml": "cannot read 'nothing.toml'",
    "backup nowhere/copy.db": "'nowhere/copy.db': no such file or directory",
    "wait --state ready": "unknown state 'ready'; one of uninitialized, ",
}


@pytest.mark.parametrize("line", USERS)
def test_a_wrong_request_is_one_line_and_no_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with vmrm.Database(tmp_path / "lab.db") as db:
        vmrm.put_group(db, "ci", {})
    code = vmrm.main(["--db", str(tmp_path / "lab.db"), *line.split()])
    told = capsys.readouterr()
    assert (code, told.out) == (2, ""), told
    assert USERS[line] in told.err
    assert "Traceback" not in told.err


# --- a run that is going on


def test_options_that_come_too_late_are_refused(cli: Cli, tmp_path: Path) -> None:
    with stand_ins(tmp_path / "agents", 1):
        path = lab(tmp_path, entry(-1, "true") + entry(600, "true"))
        assert cli("run", path, "--detach").code == 0
        until(lambda: cli("status").code == 0)
        for words in (["--allow-host"], ["--stay"], ["--late", "skip"]):
            refused = cli("run", "--detach", *words)
            assert refused.code == 2, words
            assert f"too late for {words[0]}" in refused.err
        assert (
            cli("run", "--detach", "--late", "start", "--start-buffer", "0").code == 0
        )  # as it is
        refused = cli("handle", "vm1", "--allow-host")
        assert (refused.code, "too late for --allow-host" in refused.err) == (2, True)
        assert cli("stop").code == 0


def test_a_vm_without_a_path_that_comes_during_a_run_fails_once(cli: Cli, tmp_path: Path) -> None:
    with stand_ins(tmp_path / "agents", 1):
        path = lab(tmp_path, entry(-1, "true") + entry(600, "true"))
        assert cli("run", path, "--detach").code == 0
        assert cli("wait", "--timeout", "30").code == 0
        with vmrm.VMMapping(db=tmp_path / "lab.db") as mapping:
            mapping.put("u", "late")
            until(lambda: mapping.get("u")["state"] == "failed")
        told = cli("status").out
        assert "no path to a guest agent" in told
        assert "died" not in told + (tmp_path / "lab.db.d/logs.1/supervisor.log").read_text()
        assert cli("stop").code == 0


# --- an interpreter that will not do

SOURCES = [ROOT / "vmrm.py", ROOT / "drivers.py"]


def _bare(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a Python that has no packages but its own library."""
    return subprocess.run(
        [sys.executable, "-S", *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("words", ["status", "load lab.toml", "--help", "demo"])
def test_missing_packages_are_one_line_that_says_what_to_install(
    tmp_path: Path, words: str
) -> None:
    done = _bare(SOURCES[0], "--db", tmp_path / "lab.db", *words.split())
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error.endswith("lacks 'sqlite-utils' and 'rich' and 'fire'")
    assert hint.startswith(f"hint: Install: {sys.executable} -m pip install ")
    assert not list(tmp_path.iterdir())


def test_a_script_without_the_packages_can_use_what_needs_none(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import vmrm
with vmrm.Database({str(tmp_path / "lab.db")!r}) as db:
    vmrm.VMMapping(db=db).put("u", "web")
    try:
        db.utils
    except ImportError as error:
        print(error, error.hint)
"""
    done = _bare("-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert "lacks 'sqlite-utils'" in done.stdout
    assert "pip install 'sqlite-utils>=4.0'" in done.stdout


def test_what_pip_installs_is_what_is_looked_for() -> None:
    wanted = (ROOT / "setup.cfg").read_text().partition("install_requires =")[2]
    named = [line.strip() for line in wanted.partition("\n\n")[0].splitlines() if line.strip()]
    done = _bare(SOURCES[0], "status")
    assert all(name.partition(">")[0] in done.stderr and name in done.stderr for name in named)


@pytest.mark.parametrize("name", ["__main__", "vmrm"])
def test_an_older_python_is_one_line(name: str) -> None:
    for source in SOURCES:  # whose grammar must get as far as the line that says so
        ast.parse(source.read_text(), feature_version=(3, 8))
    script = f"""
import runpy, sys
sys.version_info, sys.version = (3, 10, 1), "3.10.1 (main)"
runpy.run_path({str(SOURCES[0])!r}, run_name={name!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "vmrm needs Python 3.11 or later, and this is 3.10.1" in done.stderr
    assert ("Traceback" in done.stderr) == (name == "vmrm")


def test_a_file_is_read_as_it_is_meant_or_refused(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    text = '[[vm]]\nname = "vm1"\npath = "/x"\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert cli("plan", path).code == 0, "editors of Windows write so"
    path.write_text(f"{text}agent_timeout = {'9' * 4000}\n")
    done = cli("plan", path)
    assert (done.code, "agent_timeout is 999" in done.err, len(done.err) < 600) == (2, True, True)
    path = tmp_path / "lab.json"
    path.write_text('{"vm": [{"name": "vm1", "path": "/x", "name": "vm2"}]}')
    done = cli("load", path)
    assert (done.code, "'name' comes twice" in done.err) == (2, True), done
    assert not cli.db.exists()


def test_what_is_no_database_is_told_as_such_and_left_alone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        done = cli("status", "--db", tmp_path / name)
        assert (done.code, "is not a file" in done.err) == (2, True), done
    assert not list(tmp_path.glob("*.d"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_database_without_rights_is_told_as_such(cli: Cli, tmp_path: Path) -> None:
    assert cli("pool", "group", "ci").code == 0
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    copy = tmp_path / "copy.db"
    assert cli("backup", copy).code == 0
    # Whoever it is may not be able to read this Python: what is imported late is imported before.
    call = """import os, sys, fire, rich, sqlite_utils, vmrm
database, uid = sys.argv[1:]
vmrm.main(["--db", database, "status"])
os.setgroups([])
os.setuid(int(uid))
sys.exit(vmrm.main(["--db", database.replace("lab.db", "copy.db"), "status"]))"""
    for mode in (0o600, 0o644):
        copy.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", call, str(cli.db), "65534"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=cli.environment,
            check=False,
        )
        assert (done.returncode, "cannot open" in done.stderr) == (2, True), done
    assert not (tmp_path / "copy.db.d").exists()


def test_the_locale_decides_nothing(cli: Cli) -> None:
    other = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = cli("pool", "group", "ci", env=other)
    assert done.code == 0, done
    assert cli("pool", "group", env=other).code == 0
