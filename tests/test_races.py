"""What two processes promise each other, at the instants in which it is easily broken."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import tables
from cli_lab import entry, lab, until
from conftest import Cli, HostAgent
from lab import stand_ins

import vmrm


@pytest.fixture
def running(cli: Cli, tmp_path: Path, children: None) -> Iterator[Cli]:
    """Have a VM on a stand-in agent whose handler lives and has nothing to do."""
    with stand_ins(tmp_path / "agents", 1):
        assert cli("run", lab(tmp_path, entry(-1, "true")), "--stay", "--detach").code == 0
        assert cli("wait", "--timeout", "60").code == 0
        yield cli
        cli("stop")


def handler(cli: Cli) -> int:
    """Return the pid of the VM's handler."""
    return int(tables.vms(cli.db)["vm1"]["handler_pid"])


@pytest.mark.qga
def test_a_command_that_was_begun_is_answered_when_the_link_breaks(
    cli: Cli, tmp_path: Path, qemu_ga: Callable[..., HostAgent]
) -> None:
    agent, begun, over = qemu_ga(), tmp_path / "begun", tmp_path / "over"
    path = lab(tmp_path, entry(-1, "true"))
    path.write_text(path.read_text().replace("agents/1.sock", str(agent.path)))
    assert cli("run", path, "--stay", "--detach").code == 0
    assert cli("wait", "--timeout", "60").code == 0
    watcher = handler(cli)
    script = f"touch {begun}; until [ -e {over} ]; do sleep 0.1; done"
    words = ["exec", "vm1", "sh", "-c", script]
    with subprocess.Popen(
        cli.command(*words), env=cli.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        until(begun.exists)
        agent.restart()
        try:
            assert process.wait(60) == 255
        finally:
            process.kill()
            over.touch()
        assert process.stderr is not None
        assert "it may have run" in process.stderr.read()
    assert handler(cli) == watcher, "the same handler goes on"
    assert cli("exec", "vm1", "true").code == 0
    cli("stop")


def test_a_command_past_its_deadline_is_not_carried_out(running: Cli, tmp_path: Path) -> None:
    done = tmp_path / "done"
    os.kill(handler(running), signal.SIGSTOP)
    words = ["exec", "--timeout", "3", "vm1", "touch", str(done)]
    with subprocess.Popen(
        running.command(*words), env=running.environment, stderr=subprocess.DEVNULL
    ) as process:
        until(lambda: tables.requests(running.db))
        process.send_signal(signal.SIGSTOP)  # it cannot withdraw what it asked for
        request = tables.requests(running.db)[0]
        assert request["claimed_by"] is None
        assert not request["withdrawn"]
        until(lambda: time.time() > request["deadline_at"])
        os.kill(handler(running), signal.SIGCONT)
        assert running("exec", "vm1", "true").code == 0, "the handler takes requests again"
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 255
    assert not done.exists()


SLOW_MKDIR = """\
#!/bin/sh
/bin/mkdir "$@" || exit
case "$*" in *attempt.*) touch {claimed}; until [ -e {go} ]; do sleep 0.05; done;; esac
"""


def test_a_program_that_has_claimed_and_not_yet_said_who_it_is_is_not_unknown(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    slow, claimed, go = tmp_path / "bin" / "mkdir", tmp_path / "claimed", tmp_path / "go"
    slow.write_text(SLOW_MKDIR.format(claimed=claimed, go=go))
    slow.chmod(0o755)
    # Ten seconds of grace; and the first handler dies before it has noted whom it has started.
    once = tmp_path / "died"
    faults = {"VMRM_CRASH": "exec-answered:1", "VMRM_CRASH_ONCE": str(once)}
    with monkeypatch.context() as guest:
        guest.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        agent = stand_ins(tmp_path / "agents", 1)
        agent.__enter__()
    try:
        path = lab(tmp_path, entry(-1, "sleep 0.2"))
        assert cli("run", path, "--detach", env=faults | {"VMRM_TIMEOUT_SCALE": "5"}).code == 0
        until(lambda: claimed.exists() and once.exists(), 60)
        time.sleep(3)  # for the second handler to look at the claim; then it is patient
        assert tables.attempts(cli.db)[0]["outcome"] != "unknown"
        go.touch()
        assert cli("wait", "--timeout", "60").code == 0
        assert [row["outcome"] for row in tables.attempts(cli.db)] == ["done"]
        cli("stop")
    finally:
        agent.__exit__(None, None, None)


def test_an_entry_of_a_new_schedule_never_shows_what_became_of_the_old_one(
    cli: Cli, tmp_path: Path, children: None
) -> None:
    ran = tmp_path / "ran"
    with stand_ins(tmp_path / "agents", 1):
        path = lab(tmp_path, entry(-1, f"echo x >> {ran}; exit 3", "ignore_failure = true"))
        assert cli("run", path).code == 0
        with vmrm.ScheduleDb(db=cli.db) as schedules:
            text = schedules.get("vm1")
            assert text is not None
            schedules.destroy_one("vm1")
            schedules.put("vm1", text)
        shown = tables.entries(cli.db, "vm1")
        assert [(row["outcome"], row["exit_code"]) for row in shown] == [(None, None)]
        line = tables.status(cli.db)["vm1"]
        assert (line["entries"], line["done"], line["failed"], line["unknown"]) == (1, 0, 0, 0)


def test_a_content_is_not_removed_before_its_row_exists(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "tool.sh").write_text("echo a tool\n")
    store = Path(f"{cli.db}.d") / "store"
    with vmrm.Database(cli.db) as db, closing(sqlite3.connect(cli.db)) as other:
        assert db.query("SELECT 1")
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")  # nobody writes a row until this ends
        with subprocess.Popen(
            cli.command("store", "add", "tool.sh"), env=cli.environment, cwd=tmp_path
        ) as process:
            until(lambda: [p for p in store.iterdir() if not p.name.startswith(".")], 60)
            assert "store: nothing names" in cli("check", "--fix").out
            other.execute("COMMIT")
            assert process.wait(60) == 0
    assert "tool.sh" in cli("store", "list").out
    assert cli("check").code == 0
