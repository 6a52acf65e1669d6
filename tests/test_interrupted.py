"""Commands that are ended in the middle leave nothing behind, and take back what they had begun."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tables
from cli_lab import entry, lab, until
from conftest import Cli
from lab import stand_ins


@pytest.fixture(scope="module", params=["alone", "by a handler"])
def vm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """Have one VM on a stand-in agent, with a live handler or without."""
    folder = tmp_path_factory.mktemp("lab")
    cli = Cli(folder / "lab.db", folder)
    with stand_ins(folder / "agents", 1):
        path = lab(folder, entry(-1, "true"))
        assert cli("load", path).code == 0
        if request.param == "by a handler":
            assert cli("run", "--stay", "--detach").code == 0
            assert cli("wait", "--timeout", "60").code == 0
        yield cli
        cli("stop")


def left(cli: Cli) -> list[str]:
    """Return what commands have in the state directory."""
    state = Path(f"{cli.db}.d")
    sockets = [path.name for path in (state / "wake").glob("[cw]*-*")]
    return sockets + [path.name for path in (state / "requests").iterdir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_interrupted_exec_leaves_nothing(vm: Cli, number: signal.Signals) -> None:
    begun, go = vm.folder / f"begun-{number}", vm.folder / f"go-{number}"
    words = ["exec", "vm1", "sh", "-c", f"touch {begun}; until [ -e {go} ]; do sleep 0.05; done"]
    with subprocess.Popen(
        vm.command(*words), env=vm.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        until(begun.exists)
        assert left(vm)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    go.touch()
    until(lambda: not left(vm))  # a handler's part goes when it is done with it
    assert vm("exec", "vm1", "true").code == 0, "the VM is free again"
    assert vm("check").code == 0


def test_what_a_killed_exec_leaves_is_named_and_removed(vm: Cli) -> None:
    begun, go = vm.folder / "begun-9", vm.folder / "go-9"
    words = ["exec", "vm1", "sh", "-c", f"touch {begun}; until [ -e {go} ]; do sleep 0.05; done"]
    with subprocess.Popen(vm.command(*words), env=vm.environment) as process:
        until(begun.exists)
        process.kill()
    if not tables.vms(vm.db)["vm1"]["handler_pid"]:  # else its handler may be faster
        named = vm("check")
        assert (named.code, "vm1" in named.out) == (1, True), named
    else:  # which goes on with what it has begun
        assert vm("check", "--fix").code == 0
        assert left(vm)
    go.touch()
    until(lambda: vm("check", "--fix").code == 0 and not left(vm), 30)
    assert vm("check").code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_ended_while_waiting_for_a_vm_of_the_pool_leaves_the_queue(
    tmp_path: Path, number: signal.Signals
) -> None:
    cli = Cli(tmp_path / "lab.db", tmp_path)
    assert cli("pool", "group", "ci").code == 0
    words = ["pool", "acquire", "ci", "--wait"]
    with subprocess.Popen(
        cli.command(*words), env=cli.environment, stderr=subprocess.DEVNULL
    ) as process:
        until(lambda: "1 waiting" in cli("pool", "info").out)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert "waiting" not in cli("pool", "info").out
    assert left(cli) == []


DOOMED = """
import os, signal, time
import drivers

class Doomed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGNAL)

class Slow(drivers.QemuGuestAgentDriver):
    @staticmethod
    def get_engine():
        return "SlowVM"

    def connect(self):
        Doomed()
        time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_in_a_destructor_is_not_lost(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = Cli(tmp_path / "lab.db", tmp_path)
    driver = tmp_path / "slow.py"
    driver.write_text(DOOMED.replace("SIGNAL", number.name))
    driver.chmod(0o644)
    monkeypatch.setenv("VMRM_DRIVERS", str(driver))
    (tmp_path / "lab.toml").write_text(
        '[[vm]]\nname = "vm1"\npath = "/nowhere"\nengine = "SlowVM"\n'
    )
    assert cli("load", "lab.toml").code == 0
    for words in (["info", "vm1"], ["handle", "vm1"]):
        with subprocess.Popen(cli.command(*words), env=cli.environment) as process:
            try:
                assert process.wait(20) == 128 + number, words
            finally:
                process.kill()
