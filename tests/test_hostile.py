"""An agent that answers each command wrongly in every way costs seconds and MiB, no more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agents
import hostile
import pytest
from conftest import Cli

# Seconds of a call's time-out, for behaviours that let it pass; the others never wait for it.
SHORT, LONG = 0.1, 20.0
WAITS = {"silence", "drip", "endless", "blank", "strangers"}
CLIENT = Path(__file__).with_name("hostile_client.py")


class Client:
    """The process of `hostile_client`."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, str(CLIENT), str(path)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.commands: list[str] = self._line()

    def ask(self, name: str, seconds: float = LONG) -> dict[str, Any]:
        """Have one call made, or "connect", with a time-out; return what it cost."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds} {name}\n")
        self.process.stdin.flush()
        told: dict[str, Any] = self._line()
        return told

    def _line(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the client died with {self.process.wait(10)}"
        return json.loads(line)

    def end(self) -> None:
        """Let it end."""
        self.process.communicate(timeout=10)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile.HostileAgent]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "file").write_bytes(b"content\n" * 10)
    with (
        agents.stand_in(folder / "honest") as honest,
        hostile.hostile(honest.path, folder / "agent.sock") as agent,
    ):
        yield agent


@pytest.fixture(scope="module")
def client(guest: hostile.HostileAgent) -> Iterator[Client]:
    client = Client(guest.path)
    yield client
    client.end()


@pytest.mark.parametrize("behaviour", hostile.BEHAVIOURS)
def test_each_command_answered_wrongly_costs_little(
    guest: hostile.HostileAgent, client: Client, behaviour: str
) -> None:
    """Whatever comes of the call is a value or an error of the driver."""
    dear = []
    for command in client.commands:
        guest.rules.clear()
        client.ask("connect")
        guest.rules[command] = hostile.BEHAVIOURS[behaviour]
        # A sync waits for its own answer, whatever else comes.
        waits = behaviour in WAITS or command == "guest-sync-delimited"
        cost = client.ask(command, SHORT if waits else LONG)
        if not (cost["ours"] and cost["seconds"] < 10 and cost["mib"] < 150):
            dear.append(f"{command}: {cost}")
    assert not dear, "\n".join(dear)


@pytest.fixture
def vm(cli: Cli, guest: hostile.HostileAgent, tmp_path: Path) -> Iterator[Cli]:
    """The command line on an experiment of one VM, `vm1`, at the hostile agent."""
    text = f'[[vm]]\nname = "vm1"\npath = "{guest.path}"\nlaunch_dir = "{tmp_path}/launch"\n'
    (tmp_path / "lab.toml").write_text(text)
    assert cli("load", "lab.toml").code == 0
    yield cli
    guest.rules.clear()


VERSIONS = {"deep": b"[" * 300 + b"]" * 300, "half": b'"\\ud800"', "list": b"[[1]]", "NaN": b"NaN"}


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
def test_info_of_a_hostile_guest_is_facts_or_one_line(
    guest: hostile.HostileAgent, vm: Cli, version: bytes
) -> None:
    guest.rules["guest-info"] = hostile.with_member("version", version)
    guest.rules["guest-get-host-name"] = hostile.with_member("host-name", version)
    result = vm("info", "vm1", "--json", "--timeout", "3")
    assert "Traceback" not in result.err
    if result.code:
        assert result.code in (1, 255)
        assert result.err.startswith("error: VM 'vm1': ")
        assert result.err.count("\n") <= 2  # with the hint
    else:
        facts = json.loads(result.out)
        assert isinstance(facts["agent"], str)
        assert isinstance(facts["host_name"], str)
