"""What a person at a terminal sees: the live view, bars, no pager, and what Ctrl-C does."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pexpect  # type: ignore[import-untyped]
import pytest
import tables
from cli_lab import ended, entry, lab, plain, terminal, until
from conftest import Cli
from lab import stand_ins


@pytest.fixture
def two(cli: Cli, tmp_path: Path, children: None) -> Iterator[Path]:
    """Have two VMs on stand-in agents, each with a second's work; return their file."""
    with stand_ins(tmp_path / "agents", 2):
        yield lab(tmp_path, entry(-1, "sleep 1"), entry(-1, "true") + entry(1, "sleep 1"))


def test_the_live_view_has_a_line_per_vm_and_ends_with_the_report(cli: Cli, two: Path) -> None:
    with terminal(cli, "run", two) as child:
        text, code = ended(child)
    assert code == 0
    assert "\x1b[" in text
    shown = plain(text)
    assert re.search(r"vm1 +configuring +-1 +·+ +0/1 .* sh", shown)
    assert re.search(r"vm2 +configured +1 +█+·+ +1/2", shown)
    assert "waiting for all VMs to be configured" in shown
    assert re.search(r"time \+[01] s", shown)
    report = shown[shown.rindex("late p50 ms") :]
    assert re.search(r"vm1 +configured +1 +1 +0 +0", report)
    assert re.search(r"vm2 +configured +2 +2 +0 +0", report)
    assert "2 VMs, 3 of 3 entries done" in report


def test_no_color_is_honoured(cli: Cli, two: Path) -> None:
    cli("load", two)
    with terminal(cli, "status") as child:
        coloured, _ = ended(child)
    with terminal(cli, "status", NO_COLOR="1") as child:
        shown, code = ended(child)
    assert code == 0
    assert re.search(r"\x1b\[[0-9;]*2m", coloured)  # uninitialized is dim
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown)
    assert "vm1" in shown
    with terminal(cli, "status", TERM="dumb") as child:
        assert "\x1b" not in ended(child)[0]


@pytest.mark.parametrize("words", ["", "--help", "run --help", "store", "-- --completion"])
def test_help_never_opens_a_pager(cli: Cli, words: str) -> None:
    with terminal(cli, *words.split(), PAGER="false", LESS="") as child:
        text, code = ended(child)
    assert code == 0
    assert "vmrm" in text
    assert "(END)" not in text


def test_many_vms_do_not_scroll_the_view(cli: Cli, tmp_path: Path, children: None) -> None:
    with (
        stand_ins(tmp_path / "agents", 30),
        terminal(cli, "run", lab(tmp_path, *[entry(-1, "sleep 1")] * 30)) as child,
    ):
        text, code = ended(child)
    assert code == 0
    assert re.search(r"… and \d+ more", text)
    assert "30 VMs, 30 of 30 entries done" in text


def endless(folder: Path) -> Path:
    return lab(folder, entry(-1, f"echo $$ > {folder}/pid; while :; do sleep 0.1; done"))


def test_ctrl_c_stops_cleanly_with_130(cli: Cli, tmp_path: Path, children: None) -> None:
    with stand_ins(tmp_path / "agents", 1), terminal(cli, "run", endless(tmp_path)) as child:
        until((tmp_path / "pid").exists)
        child.sendintr()
        text, code = ended(child)
        assert code == 130
        assert "stopping; the programs in the VMs go on" in text
        assert "Traceback" not in text
        result = cli("stop")
        assert "the experiment is not running" in result.err
        pid = int((tmp_path / "pid").read_text())
        assert Path(f"/proc/{pid}").exists()
        assert cli("status").out.startswith("vm1\tconfiguring\t-1\t1\t0\t0\t0\t1")


def test_a_second_ctrl_c_does_not_wait_for_anybody(
    cli: Cli, tmp_path: Path, children: None
) -> None:
    with stand_ins(tmp_path / "agents", 1), terminal(cli, "run", endless(tmp_path)) as child:
        until((tmp_path / "pid").exists)
        handler = tables.vms(cli.db)["vm1"]["handler_pid"]
        os.kill(handler, signal.SIGSTOP)  # it cannot leave
        child.sendintr()
        child.expect("again: at once")
        child.sendintr()
        text, code = ended(child)
        os.kill(handler, signal.SIGKILL)
        assert code == 130
        assert "Traceback" not in text
        until(lambda: cli("stop").code == 2)
        assert cli("stop", "--kill").code == 0  # what has no handler any more
        pid = int((tmp_path / "pid").read_text())
        until(lambda: not Path(f"/proc/{pid}").exists())


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open: vmrm its database, once it heeds signals."""
    return any(link.is_symlink() and link.readlink() == path for link in open_files(pid))


def open_files(pid: int) -> Iterator[Path]:
    """List a process's descriptors."""
    return Path(f"/proc/{pid}/fd").iterdir()


def test_ctrl_c_in_a_waiting_command(cli: Cli, tmp_path: Path, children: None) -> None:
    with stand_ins(tmp_path / "agents", 1):
        assert cli("run", endless(tmp_path), "--detach").code == 0
        until((tmp_path / "pid").exists)
        for words in ("wait", "logs vm1 --follow", "exec vm1 sleep 20"):
            with terminal(cli, *words.split()) as child:
                until(lambda child=child: has_open(child.pid, cli.db))  # type: ignore[misc]
                with pytest.raises(pexpect.TIMEOUT):
                    child.expect(pexpect.EOF, timeout=1)
                child.sendintr()
                text, code = ended(child)
            assert code == 130, words
            assert "Traceback" not in text
            assert cli("status").out.startswith("vm1\tconfiguring")
        assert cli("stop", "--kill").code == 0


def test_ctrl_c_ends_an_agent_and_removes_its_socket(cli: Cli, tmp_path: Path) -> None:
    with terminal(cli, "agent", tmp_path / "a.sock", "--root", tmp_path) as child:
        child.expect("listening")
        child.sendintr()
        text, code = ended(child)
    assert "Traceback" not in text
    assert code in (0, 130)
    assert not (tmp_path / "a.sock").exists()


def test_push_and_pull_show_a_bar(cli: Cli, tmp_path: Path, children: None) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(48 << 20))
    with stand_ins(tmp_path / "agents", 1):
        cli("load", lab(tmp_path))
        with terminal(cli, "push", "vm1", big, f"{tmp_path}/agents/1/big") as child:
            pushed, code = ended(child)
        assert code == 0
        with terminal(cli, "pull", "vm1", f"{tmp_path}/agents/1/big", "back") as child:
            pulled, code = ended(child)
        assert code == 0
    assert re.search(r"[1-9][0-9.]*/50\.3 MB", plain(pushed))
    assert re.search(r"[1-9][0-9.]*/\? ?[kM]?B|[1-9][0-9.]* [kM]B", plain(pulled))
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
