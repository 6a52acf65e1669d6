"""One client at a time talks to an agent: who comes second waits, and whoever may use it can."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import agents
from cli_lab import until
from conftest import Cli


def _load(cli: Cli, path: Path) -> None:
    text = f'[[vm]]\nname = "vm"\npath = "{path}"\nlaunch_dir = "{cli.folder}/launch"\n'
    (cli.folder / "lab.toml").write_text(text)
    assert cli("load", "lab.toml").code == 0


def test_a_second_command_waits_within_its_time_out(cli: Cli, tmp_path: Path) -> None:
    began, done = tmp_path / "began", tmp_path / "done"
    with agents.stand_in(tmp_path / "agent") as agent:
        _load(cli, agent.path)
        script = f"touch {began}; sleep 2; touch {done}"
        words = cli.command("exec", "vm", "sh", "-c", script)
        with subprocess.Popen(words, env=cli.environment) as first:
            until(began.exists)
            late = cli("exec", "--timeout", "0.2", "vm", "true")
            assert late.code == 255
            assert f"held by process {first.pid}" in late.err
            second = cli("exec", "--timeout", "50", "vm", "test", "-e", done)
        assert (first.returncode, second.code) == (0, 0), second.err


def test_a_socket_that_is_not_there_yet_is_waited_for(cli: Cli, tmp_path: Path) -> None:
    _load(cli, tmp_path / "agent" / "agent.sock")
    words = cli.command("exec", "--timeout", "50", "vm", "true")
    with subprocess.Popen(words, env=cli.environment) as client:
        time.sleep(1)
        assert client.poll() is None
        with agents.stand_in(tmp_path / "agent"):
            assert client.wait(60) == 0


def test_a_command_that_waits_goes_through_a_handler_that_comes(cli: Cli, tmp_path: Path) -> None:
    """The handler has the agent for as long as it lives; the command must not wait for its end."""
    began, go = tmp_path / "began", tmp_path / "go"
    with agents.stand_in(tmp_path / "agent") as agent:
        _load(cli, agent.path)
        script = f"touch {began}; until [ -e {go} ]; do sleep 0.1; done"
        words = cli.command("exec", "vm", "sh", "-c", script)
        waits = cli.command("exec", "--timeout", "50", "vm", "true")
        with (
            subprocess.Popen(words, env=cli.environment) as first,
            subprocess.Popen(waits, env=cli.environment) as second,
        ):
            until(began.exists)
            assert cli("run", "--stay", "--detach").code == 0
            time.sleep(1)
            go.touch()
            assert first.wait(60) == 0
            assert second.wait(60) == 0
        assert cli("wait", "--timeout", "30").code == 0
        assert cli("stop", "--kill").code == 0
