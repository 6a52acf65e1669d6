"""Drivers that other people bring: files in $VMRM_DRIVERS, entry points, and their faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import drivers
import vmrm

TRACED = """
import drivers

class Traced(drivers.QemuGuestAgentDriver):
    @staticmethod
    def get_engine():
        return "Traced"
"""


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the path of a driver file that $VMRM_DRIVERS names."""
    path = tmp_path / "traced.py"
    path.write_text(TRACED)
    path.chmod(0o644)
    monkeypatch.setenv("VMRM_DRIVERS", str(path))
    return path


def engine_fault(engine: str = "Traced") -> str:
    with pytest.raises(vmrm.UsageError) as caught:
        vmrm.driver_of(engine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_driver_file_brings_its_engine(plugged: Path) -> None:
    assert vmrm.driver_of("Traced").__name__ == "Traced"
    assert set(vmrm.plug_ins()) == {"QemuVM", "Traced"}


def test_our_own_engine_needs_no_plug_in(plugged: Path) -> None:
    plugged.write_text("raise SystemExit(5)")
    assert vmrm.driver_of("QemuVM") is drivers.QemuGuestAgentDriver


def test_an_unknown_engine_names_the_known(plugged: Path) -> None:
    assert engine_fault("Xen") == "unknown engine 'Xen'; one of QemuVM, Traced"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("class Traced(:", "SyntaxError: invalid syntax"),
        ("import no_such_thing", "ModuleNotFoundError"),
        ("import sys; sys.exit('x')", "SystemExit"),
        ("x = 1", "no subclass of AbstractDriver"),
        (TRACED.replace("Traced(", "_Traced("), "no subclass of AbstractDriver"),
        (TRACED.replace('"Traced"', '"QemuVM"'), "another driver has the engine 'QemuVM'"),
        (TRACED.replace('"Traced"', "None"), "gives None"),
        (TRACED + TRACED.replace("Traced(", "Again("), "the engine 'Traced' already"),
        ("import drivers\nclass D(drivers.AbstractDriver): pass", "D lacks _write, boot_id, call"),
        (TRACED + "    boot_id = None\n", "Traced lacks boot_id"),
        ("\0", "source code"),
    ],
)
def test_a_faulty_driver_file_is_told_in_one_line(plugged: Path, text: str, told: str) -> None:
    plugged.write_text(text)
    fault = engine_fault()
    assert fault.startswith(f"driver file {str(plugged)!r}: ")
    assert told in fault


def test_a_file_that_others_can_write_is_not_run(plugged: Path) -> None:
    for path, mode in ((plugged, 0o646), (plugged, 0o664), (plugged.parent, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        assert "others can write it" in engine_fault()
        path.chmod(before)
    plugged.parent.chmod(0o1777)
    assert vmrm.driver_of("Traced")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_somebody_else_is_not_run(plugged: Path) -> None:
    os.chown(plugged, 65534, 0)
    assert "others can write it" in engine_fault()


@pytest.mark.parametrize("path", ["traced.py", "/no/such/file.py"])
def test_a_driver_file_is_named_by_its_whole_path(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMRM_DRIVERS", f":{path}")
    assert f"driver file {path!r}: " in engine_fault()


@pytest.mark.parametrize(("value", "told"), [("traced:Traced", ""), ("traced:x", "'traced:x'")])
def test_an_entry_point_brings_its_engine(
    plugged: Path, monkeypatch: pytest.MonkeyPatch, value: str, told: str
) -> None:
    """A real distribution on the path, as pip would leave it."""
    plugged.write_text(TRACED.replace("Traced", f"Traced{bool(told)}"))
    monkeypatch.delenv("VMRM_DRIVERS")
    monkeypatch.syspath_prepend(str(plugged.parent))
    folder = plugged.parent / "traced-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: traced\nVersion: 1.0\n")
    value = value.replace("Traced", "TracedFalse")
    (folder / "entry_points.txt").write_text(f"[vmrm.drivers]\nany = {value}\n")
    assert metadata.entry_points(group="vmrm.drivers")
    if told:
        assert told in engine_fault("TracedTrue")
    else:
        assert vmrm.driver_of("TracedFalse").__name__ == "TracedFalse"
