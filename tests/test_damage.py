"""A database that is damaged, or no longer there, is told as such; nothing is copied as sound."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import tables
from cli_lab import until
from conftest import unavailable
from lab import VMRM, Lab, stand_ins

PAGE = 4096


def made(folder: Path, pause: str = "0.5", count: int = 40) -> Lab:
    """Return a lab that has been loaded, all of whose rows are in the database file."""
    lab = Lab(folder, start_buffer=0)
    words = ["-c", f"sleep {pause}"]
    entry = {"executable": "sh", "arguments": words}
    lab.write(lambda _: [entry | {"start_time": 0.1 * n} for n in range(1, count + 1)])
    assert lab.run("load", str(folder / "lab.json")).returncode == 0
    return lab


def overwrite(lab: Lab) -> None:
    """Overwrite the page where the journal's tables begin, with what is not a page."""
    with closing(sqlite3.connect(lab.db)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        sql = "SELECT rootpage FROM sqlite_schema WHERE name = 'attempts'"
        root = db.execute(sql).fetchone()[0]
    with lab.db.open("r+b") as file:
        file.seek((root - 1) * PAGE)
        file.write(os.urandom(PAGE))


def truncate(lab: Lab) -> None:
    os.truncate(lab.db, 3 * PAGE)


def told(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that one line says that the database is at fault, and a hint what helps."""
    assert done.returncode == 3, done
    lines = done.stderr.splitlines()
    assert any(line.startswith("error: ") for line in lines), done.stderr
    assert "Traceback" not in done.stderr
    assert "nothing is lost" not in done.stderr
    assert "--fix" not in done.stderr
    assert "backup" in done.stderr


@pytest.mark.parametrize("damage", [overwrite, truncate])
def test_damage_is_told_and_never_copied(tmp_path: Path, damage: Callable[[Lab], None]) -> None:
    lab = made(tmp_path)
    damage(lab)
    told(lab.run("backup", str(tmp_path / "copy.db")))
    assert not list(tmp_path.glob("copy.db*"))
    told(lab.run("check"))
    told(lab.run("check", "--fix"))
    told(lab.run("run"))


def remove(lab: Lab) -> None:
    lab.db.unlink()


def replace(lab: Lab) -> None:
    """Put another database of vmrm in its place."""
    other = Lab(lab.folder / "other")
    other.folder.mkdir()
    assert other.run("pool", "group", "ci").returncode == 0
    other.db.rename(lab.db)


@pytest.mark.parametrize("damage", [remove, replace, truncate])
def test_a_database_that_goes_during_a_run_ends_it_with_a_word(
    tmp_path: Path, damage: Callable[[Lab], None]
) -> None:
    lab = made(tmp_path, pause="5")
    with stand_ins(tmp_path / "agents", 1), lab.start("run") as run:
        until(lambda: any(row["outcome"] == "running" for row in tables.attempts(lab.db)))
        pids = [*lab.handler_pids(), lab.supervisor_pid()]
        damage(lab)
        out, err = run.communicate(timeout=60)
        told(subprocess.CompletedProcess([], run.returncode, out, err))
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    if damage is remove:
        assert not lab.db.exists(), "nobody has made an empty one in its place"
        assert lab.run("status").returncode == 2


def test_a_new_database_beside_old_files_mixes_nothing_with_them(tmp_path: Path) -> None:
    lab = made(tmp_path, pause="0", count=1)
    with stand_ins(tmp_path / "agents", 1):
        assert lab.run("run").returncode == 0
        for path in tmp_path.glob("lab.db*"):
            if path.is_file():
                path.unlink()
        assert lab.run("run", str(tmp_path / "lab.json")).returncode == 0
    assert lab.run("check", "--fix").returncode == 0
    logs = [path.name for path in sorted((tmp_path / "lab.db.d").glob("logs.*"))]
    assert logs == ["logs.1", "logs.2"]
    assert "entry 1" in (tmp_path / "lab.db.d/logs.1/vm1.log").read_text()


def test_no_fix_is_advised_for_what_it_cannot_help(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    (tmp_path / "hello").write_text("content\n")
    assert lab.run("store", "add", str(tmp_path / "hello")).returncode == 0
    (content,) = (tmp_path / "lab.db.d/store").iterdir()
    content.write_text("damaged\n")
    done = lab.run("check")
    assert (done.returncode, "--fix" in done.stderr) == (1, False)
    (tmp_path / "lab.db.d/store/left").touch()
    assert "--fix" in lab.run("check").stderr
    mended = lab.run("check", "--fix")
    assert (mended.returncode, "--fix" in mended.stderr) == (1, False)
    assert not (tmp_path / "lab.db.d/store/left").exists()


@pytest.mark.parametrize("words", [["status"], ["run"]])
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, words: list[str]) -> None:
    lab = made(tmp_path)
    bind = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 99; exec "$@"'
    name = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", bind, str(tmp_path)]
    if subprocess.run([*name, "true"], capture_output=True).returncode:
        unavailable("a read-only directory needs a mount namespace of our own")
    command = [*name, *VMRM, "--db", str(lab.db), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (2, 75), done
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) <= 2
