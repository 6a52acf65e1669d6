"""What pip installs: three files and a command that works anywhere, on each Python at hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT, Result, unavailable

pytestmark = pytest.mark.slow

SOURCES = [
    *("vmrm.py", "drivers.py", "schema.sql", "README.md"),
    *("setup.cfg", "pyproject.toml", ".gitignore", "tests"),
]
OTHERS = ("3.12", "3.13")


def _run(words: Sequence[str | Path], folder: Path) -> Result:
    """Run a program that can find nothing of the checkout: not by path, not by environment."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VMRM", "VIRTUAL"))}
    done = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=keep | {"XDG_STATE_HOME": str(folder), "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Result(done.stdout, done.stderr, done.returncode)


def _succeed(words: Sequence[str | Path], folder: Path) -> str:
    done = _run(words, folder)
    assert done.code == 0, f"{words}: {done.out}{done.err}"
    return done.out


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the sources, so that building puts nothing into the real ones."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns(".*", "__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel in a git repository of the copy, as after a clone."""
    if shutil.which("git"):
        _succeed(["git", "init", "-q"], checkout)
        _succeed(["git", "add", "-A"], checkout)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    _succeed([*command, checkout], folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_our_three_files_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    ours = {name for name in names if ".dist-info/" not in name}
    assert ours == {"vmrm.py", "drivers.py", "schema.sql"}


def test_building_leaves_nothing_that_git_would_track(wheel: Path, checkout: Path) -> None:
    if not shutil.which("git"):
        unavailable("git is not installed")
    assert (checkout / "build").exists(), "pip built elsewhere, so this test would prove nothing"
    status = _succeed(["git", "status", "--porcelain"], checkout).splitlines()
    assert [line for line in status if not line.startswith("A  ")] == []


def _other_python(version: str) -> str | None:
    """Find a Python by its version on PATH or among pyenv's; a shim that leads nowhere is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [str(p) for p in sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)]
    if on_path := shutil.which(f"python{version}"):
        found.append(on_path)
    code = "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for program in found:
        done = subprocess.run([program, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return program
    return None


@pytest.fixture(scope="module", params=["this", *OTHERS])
def installed(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Install the wheel, with what it needs, in a fresh environment; return its bin folder."""
    python = sys.executable if request.param == "this" else _other_python(request.param)
    if python is None:
        pytest.skip(f"no Python {request.param} here")  # a second Python is welcome, not required
    folder = tmp_path_factory.mktemp("environment")
    _succeed([python, "-m", "venv", folder / "venv"], folder)
    binaries = folder / "venv" / "bin"
    command = [str(binaries / "pip"), "install", "-q", "--disable-pip-version-check"]
    _succeed([*command, wheel], folder)
    return binaries


def test_the_schema_stands_beside_the_module(installed: Path, tmp_path: Path) -> None:
    code = "import vmrm, drivers; print(vmrm.__file__); print(drivers.__file__)"
    module, driver = map(Path, _succeed([installed / "python", "-c", code], tmp_path).split())
    assert module.is_relative_to(installed.parent)
    assert driver.parent == module.parent
    assert module.with_name("schema.sql").read_text() == (ROOT / "schema.sql").read_text()


def test_the_command_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    help_text = _run([installed / "vmrm", "--help"], tmp_path)
    assert help_text.code == 0
    assert "demo" in help_text.out + help_text.err
    (tmp_path / "lab.toml").write_text('[[vm]]\nname = "web"\npath = "web.sock"\n')
    command = [str(installed / "vmrm"), "--db", "new.db"]
    _succeed([*command, "load", "lab.toml"], tmp_path)
    assert [
        row["vm"] for row in json.loads(_succeed([*command, "status", "--json"], tmp_path))
    ] == ["web"]


def test_the_demo_runs_from_another_directory(installed: Path, tmp_path: Path) -> None:
    report = _succeed([installed / "vmrm", "demo"], tmp_path)
    assert "configured" in report
    assert list(tmp_path.iterdir()) == [], "the demo belongs in a temporary directory"
