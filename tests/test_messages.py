"""What is said names the true cause, and can be read on a terminal of any width."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import connected, real_agent
from cli_lab import ended, entry, lab, plain, terminal, until
from conftest import ROOT, Cli
from lab import stand_ins

import drivers
import vmrm

FAST = {"VMRM_TIMEOUT_SCALE": "0.2"}


def one_vm(folder: Path, path: Path) -> Path:
    """Write an experiment of one VM with two entries on an agent."""
    schedule = entry(-2, "true") + entry(-1, "true")
    text = lab(folder, schedule).read_text().replace("agents/1.sock", str(path))
    file = folder / "one.toml"
    file.write_text(text)
    return file


# --- agents that refuse


@pytest.mark.qga
@pytest.mark.parametrize("live", [False, True], ids=["alone", "by a handler"])
def test_a_push_names_what_the_agent_refuses(cli: Cli, tmp_path: Path, live: bool) -> None:
    (tmp_path / "a").write_text("x")
    with real_agent(tmp_path / "qga", "guest-exec") as agent:
        with vmrm.VMMapping(db=cli.db) as mapping:
            mapping.put("u", "vm1", path=str(agent.path))
        if live:
            assert cli("run", "--detach", "--stay").code == 0
        done = cli("push", "vm1", "a", f"{tmp_path}/made/b")
        assert done.code != 0
        assert "guest-exec" in done.err
        assert "directory" not in done.err
        if live:
            cli("stop")


@pytest.mark.qga
def test_a_frozen_guest_is_told_as_frozen(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with real_agent(tmp_path / "qga", frozen=True) as agent:
        path = one_vm(tmp_path, agent.path)
        assert cli("run", path, "--detach", env=FAST).code == 0
        until(lambda: "frozen" in cli("status").out, 30)
        assert cli("stop", env=FAST).code == 0
        assert "frozen" in cli("push", "--timeout=3", "vm1", "a", "/tmp/never/b").err
        watched = cli("run", "--timeout", "4", env=FAST)
        assert watched.code == 124
        assert re.search(r"vm1: uninitialized, .*frozen", watched.err), watched.err


def test_an_agent_that_is_silent_is_told_as_such_while_it_is_waited_for(
    cli: Cli, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "mute.sock"))
        mute.listen(5)
        path = one_vm(tmp_path, tmp_path / "mute.sock")
        assert cli("run", path, "--detach", env=FAST).code == 0
        until(lambda: "does not answer" in cli("status").out, 30)
        assert json.loads(cli("status", "--json").out)[0]["state"] == "uninitialized"
        assert cli("stop", env=FAST).code == 0


def test_what_a_vm_waited_for_is_forgotten_once_it_answers(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    path = lab(tmp_path, entry(-1, "true") + entry(600, "true"))
    assert cli("run", path, "--detach", env=FAST).code == 0
    until(lambda: "waits for its agent" in cli("status").out, 30)
    with stand_ins(tmp_path / "agents", 1):
        assert cli("wait", "--timeout", "60").code == 0
        until(lambda: "waits" not in cli("status").out, 30)
        assert cli("stop", env=FAST).code == 0


def test_a_socket_without_rights_is_no_vm_that_is_off(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        path = tmp_path / "agent.sock"
        listening.bind(str(path))
        listening.listen(1)
        path.chmod(0o600)
        told, tells = os.pipe()
        child = os.fork()
        if child == 0:  # root may use every socket
            try:
                os.setuid(65534)
                with connected(path):
                    pass
            except drivers.DriverError as error:
                os.write(tells, f"{error}\n{error.hint}".encode())
            finally:
                os._exit(0)
        os.close(tells)
        with os.fdopen(told) as stream:
            text = stream.read()
        os.waitpid(child, 0)
    assert "Permission denied" in text
    assert "You may not use this socket" in text
    assert "Start the VM" not in text


# --- words and numbers


SAYS = {
    "push vm1 tree /tmp/": "'tree' is a directory",
    "push vm1 a b /tmp/": "could not consume arg: /tmp/",
    "pull vm1 /a . 5": "could not consume arg: 5",
    "info vm1 5": "could not consume arg: 5",
    "wait vm1 failed": "could not consume arg: failed",
    "pause vm1": "missing option: --duration",
    "break": "no VM is named",
    "plan lab.toml": "1 VM, 1 entry, ",
    "check": "",
}


def test_a_command_that_is_wrong_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree").mkdir()
    assert vmrm.main(["--db", "lab.db", "load", str(lab(tmp_path, entry(-1, "true")))]) == 0
    for line, says in SAYS.items():
        capsys.readouterr()
        vmrm.main(["--db", "lab.db", *line.split()])
        err = capsys.readouterr().err
        assert re.search(says, err), (line, err)
        assert "number of seconds" not in err, (line, err)


def test_one_is_told_as_one(cli: Cli, tmp_path: Path, children: None) -> None:
    with stand_ins(tmp_path / "agents", 1):
        done = cli("run", lab(tmp_path, entry(-1, "true")))
    assert done.code == 0
    assert "1 VM, 1 of 1 entry done" in done.err
    assert not re.search(r"\b1 (entries|VMs|faults|handlers|times)\b", done.err)
    with vmrm.Database(cli.db) as db:
        vmrm.put_group(db, "ci", {})
    told = cli("pool", "info").out + cli("pool", "acquire", "ci").err
    assert "0 VMs" in told
    assert not re.search(r"\b1 (entries|VMs|faults|handlers|times)\b", told)


# --- tables on terminals

LONG = "it said a great deal about what it did not find where it had looked for it, and why"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """Have a lab with something in every table: a failure that needs many words, a hold, a pool."""
    folder = tmp_path_factory.mktemp("seen")
    cli = Cli(folder / "lab.db", folder)
    failing = entry(0.01, "exit 3") + entry(0.02, f"echo {LONG}")
    with stand_ins(folder / "agents", 2):
        path = lab(folder, entry(-1, "true") + failing + entry(600, "true"), entry(-1, "true"))
        try:
            assert cli("run", path, "--detach").code == 0
            assert cli("wait", "--timeout", "60").code == 0
            until(lambda: "failed" in cli("schedule", "show", "vm1").out)
            with vmrm.Database(cli.db) as db:
                vmrm.pause_vms(db, ["vm1"])
                vmrm.resume_vms(db, ["vm1"])
                _fill_pool(db)
                vmrm.VmResourceStore(db=db).add_file_from_content("x", f"{'n' * 50}.tar.gz")
            yield cli
        finally:
            cli("stop")


def _fill_pool(db: vmrm.Database) -> None:
    vmrm.put_group(db, "ci", {"check": f"echo {LONG}; exit 1"})
    pool = vmrm.VmManager(db=db)
    for n in (1, 2):
        pool.add_vm_to_pool(f"10.0.0.{n}", f"builder-of-images-{n}", "ci")
        pool.mark_vm_check_failed(f"builder-of-images-{n}", LONG)


LISTINGS = {
    "status": ["configured", "running"],
    "schedule show vm1": ["failed", "true|sh"],
    "plan lab.toml": ["vm2"],
    "store list": ["n" * 10],
    "pool group": ["ci", "120"],
    "pool group ci": ["120"],
    "pool list": ["check_health_failed"],
    "pool history": ["got_ip"],
    "pool info builder-of-images-1": ["10.0.0.1"],
    "info vm1": ["agent"],
    "pause vm2 --duration 5": ["pause of 5 s"],
}
SCRIPT = """
import json, sys, vmrm
for line in json.loads(sys.argv[1]):
    print("$", line, flush=True)
    vmrm.main(line.split())
    sys.stdout.flush()
"""


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_table_is_wider_than_its_terminal(seen: Cli, width: int) -> None:
    script = [sys.executable, "-c", SCRIPT, json.dumps(list(LISTINGS))]
    with terminal(seen, command=script, columns=width, PYTHONPATH=str(ROOT)) as child:
        text = plain(ended(child)[0])
    assert "Traceback" not in text
    shown = dict(part.split("\r\n", 1) for part in re.split(r"^\$ ", text, flags=re.M)[1:])
    for line, holds in LISTINGS.items():
        rows = shown[line].split("\r\n")
        wide = [row for row in rows if len(row.rstrip()) > width and "time 0 comes" not in row]
        assert not wide, (line, width, wide)
        for word in holds:  # whole, and never cut or folded
            assert re.search(word, shown[line]), (line, width, shown[line])
        assert not re.search(r"\d\.\d{4}", shown[line]), (line, shown[line])
    words = re.sub(r"\s+", " ", shown["pool list"])
    assert LONG.split()[-1] in words, words


def test_the_live_view_keeps_to_its_width(seen: Cli) -> None:
    with terminal(seen, "run", "--timeout", "1", columns=60) as child:
        rows = re.split(r"[\r\n]+", plain(ended(child)[0]))
    assert any(re.search(r"vm1 +configured +", row) for row in rows), rows
    assert not [row for row in rows if len(row.rstrip()) > 60 and "error" not in row]


def test_a_wrong_word_is_named_on_a_terminal_too(cli: Cli, children: None) -> None:
    with terminal(cli, "status", "--nope") as child:
        assert "could not consume arg: --nope" in ended(child)[0]
