"""The exit code of `exec` is the program's, or says as a shell and ssh do why there is none."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import agents
import hostile
import pytest
from cli_lab import until
from conftest import Cli


@dataclass
class Guests:
    """VMs vm (real agent), noexec (may run nothing), frozen, and odd (what it answers is ours)."""

    cli: Cli
    agent: agents.Agent
    odd: hostile.HostileAgent

    def code(self, *words: str | Path, vm: str = "vm") -> int:
        """Return the exit code of `exec`; what it says is at most one line and a hint."""
        result = self.cli("exec", "--timeout", "10", vm, *words)
        assert "Traceback" not in result.err
        assert result.code < 128 or len(result.err.splitlines()) <= 2, result.err
        return result.code


@pytest.fixture(params=["alone", "handlers"], scope="module")
def guests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guests]:
    """Run the agents, without and with live handlers."""
    folder = tmp_path_factory.mktemp(request.param)
    with (
        agents.real_agent(folder / "vm") as agent,
        agents.real_agent(folder / "noexec", "guest-exec") as noexec,
        agents.real_agent(folder / "frozen", frozen=True) as frozen,
        agents.stand_in(folder / "odd") as honest,
        hostile.hostile(honest.path, folder / "odd.sock") as odd,
    ):
        paths = {"vm": agent.path, "noexec": noexec.path, "frozen": frozen.path, "odd": odd.path}
        text = "".join(
            f'[[vm]]\nname = "{name}"\npath = "{path}"\nlaunch_dir = "{folder}/launch-{name}"\n'
            for name, path in paths.items()
        )
        (folder / "lab.toml").write_text(text)
        cli = Cli(folder / "lab.db", folder)
        assert cli("load", "lab.toml").code == 0
        if request.param == "handlers":
            assert cli("run", "--stay", "--detach").code == 0
            assert cli("wait", "--timeout", "30").code == 0
        yield Guests(cli, agent, odd)
        cli("stop", "--kill")


def test_a_program_gives_its_own_code_or_its_signals(guests: Guests) -> None:
    assert guests.code("true") == 0
    assert guests.code("sh", "-c", "exit 7") == 7
    assert guests.code("sh", "-c", "kill -9 $$") == 128 + 9
    assert guests.code("sh", "-c", "kill -15 $$") == 128 + 15


def test_what_is_not_found_is_127_and_what_cannot_be_run_126(
    guests: Guests, tmp_path: Path
) -> None:
    plain, wild = tmp_path / "plain", tmp_path / "wi*ld '$x"
    plain.write_text("no program\n")
    wild.write_text("#!/no/such/interpreter\n")
    wild.chmod(0o755)
    assert guests.code("no-such-program") == 127
    assert guests.code(tmp_path / "nothing") == 127
    assert guests.code(plain) == 126
    assert guests.code(tmp_path) == 126
    assert guests.code(wild) == 126
    assert guests.code("true", vm="noexec") == 126


def test_an_agent_that_is_frozen_or_was_lost_is_255(guests: Guests) -> None:
    """Also one that forgot the program: it was restarted behind a connection that stayed."""
    assert guests.code("true", vm="frozen") == 255
    forgot = hostile.error({"class": "GenericError", "desc": "Invalid parameter 'pid'"})
    for command, rule in (
        ("guest-exec-status", forgot),
        ("guest-exec-status", hostile.hang_up),
        ("guest-exec", hostile.missing_members),
    ):
        guests.odd.rules[command] = rule
        assert guests.code("true", vm="odd") == 255
        guests.odd.rules.clear()


def test_an_agent_restarted_in_the_middle_is_255(cli: Cli, tmp_path: Path) -> None:
    began = tmp_path / "began"
    with agents.real_agent(tmp_path / "vm") as agent:
        (tmp_path / "lab.toml").write_text(f'[[vm]]\nname = "vm"\npath = "{agent.path}"\n')
        assert cli("load", "lab.toml").code == 0
        words = cli.command("exec", "vm", "sh", "-c", f"echo $$ > {began}; exec sleep 30")
        with subprocess.Popen(words, env=cli.environment, stderr=subprocess.PIPE) as client:
            until(lambda: began.exists() and began.read_text())
            agent.kill()
            _, said = client.communicate(timeout=30)
        os.kill(int(began.read_text()), signal.SIGKILL)
    assert client.returncode == 255
    assert b"it may have run" in said


def test_a_code_that_no_process_can_have_is_not_taken_for_0(guests: Guests) -> None:
    exit_256 = hostile.with_member("exitcode", b"256")
    guests.odd.rules["guest-exec-status"] = exit_256
    assert guests.code("true", vm="odd") == 1
    guests.odd.rules.clear()
