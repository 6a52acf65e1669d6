"""Drivers that other people bring, in files that $VMRM_DRIVERS names, and their faults."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Cli, Result

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
        ("import drivers\nclass D(drivers.AbstractDriver): pass", "D lacks _write, close, connect"),
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


@pytest.fixture
def local(cli: Cli, tmp_path: Path) -> Callable[..., Result]:
    """Run command lines with the driver of `local_driver.py` plugged in."""
    driver = tmp_path / "plug" / "local.py"
    driver.parent.mkdir(mode=0o700)
    driver.write_text((Path(__file__).parent / "local_driver.py").read_text())
    driver.chmod(0o600)

    def run(*words: str | Path) -> Result:
        result = cli(*words, env={"VMRM_DRIVERS": str(driver), "VMRM_TIMEOUT_SCALE": "0.2"})
        assert "Traceback" not in result.err
        return result

    return run


EXPERIMENT = """
[experiment]
start_buffer = 0.2
[[vm]]
name = "vm1"
engine = "LocalVM"
path = "{folder}/guest"
launch_dir = "{folder}/launch"
[[vm.schedule]]
start_time = -2
executable = "./once.sh"
content = [{{ location = "once.sh", content = "[ -e again ] || {{ touch again; exit 10; }}" }}]
[[vm.schedule]]
start_time = -1
executable = "sh"
arguments = ["-c", "echo prepared; echo it failed >&2; exit 3"]
ignore_failure = true
[[vm.schedule]]
start_time = 0.2
executable = "sh"
arguments = ["-c", "echo $VMRM_VM; seq 20000 > {folder}/made"]
[[vm.schedule]]
start_time = 1.5
transfer = [{{ location = "{folder}/made", destination = "{folder}/out" }}]
"""


def test_a_driver_that_does_what_the_contract_says_runs_an_experiment(
    local: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "lab.toml").write_text(EXPERIMENT.format(folder=tmp_path))
    boot = tmp_path / "guest.boot"
    boot.write_text("first\n")
    result = local("run", "lab.toml", "--timeout", "60")
    assert result.code == 0, result
    assert boot.read_text() != "first\n"
    entries = json.loads(local("schedule", "show", "vm1", "--json").out)
    assert [entry["outcome"] for entry in entries] == ["done", "failed", "done", "done"], entries
    assert "prepared" in local("logs", "vm1").out
    made = (tmp_path / "made").read_text()
    assert (tmp_path / "out" / "vm1" / f"{tmp_path}/made".lstrip("/")).read_text() == made


@pytest.mark.parametrize("handled", [False, True], ids=["alone", "handler"])
def test_a_driver_that_does_what_the_contract_says_serves_commands(
    local: Callable[..., Result], tmp_path: Path, handled: bool
) -> None:
    place = f'engine = "LocalVM"\npath = "{tmp_path}/guest"\nlaunch_dir = "{tmp_path}/launch"\n'
    (tmp_path / "lab.toml").write_text(f'[[vm]]\nname = "vm1"\n{place}')
    (tmp_path / "note").write_text("a note\n")
    assert local("load", "lab.toml").code == 0
    if handled:
        assert local("run", "--stay", "--detach").code == 0
        assert local("wait", "--timeout", "30").code == 0
    try:
        done = local("exec", "vm1", "sh", "-c", "echo out; echo err >&2; exit 7")
        assert done == ("out\n", "err\n", 7)
        assert local("exec", "vm1", "no-such-program").code == 127
        assert local("push", "vm1", "note", tmp_path / "there").code == 0
        assert local("pull", "vm1", tmp_path / "there", "back").code == 0
        assert (tmp_path / "back").read_text() == "a note\n"
        assert local("pull", "vm1", tmp_path / "nothing", "back").code == 1
        before = json.loads(local("info", "vm1", "--json").out)
        assert (before["os"], before["health"]) == ("this host", "ok")
        after = json.loads(local("reboot", "vm1", "--json").out)["boot"]
        assert after != before["boot_id"]
    finally:
        if handled:
            assert local("stop", "--kill").code == 0
