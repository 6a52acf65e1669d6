"""The fixtures that watch over the other tests do notice, and the real agent is real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from agents import DANGEROUS
from conftest import HostAgent
from guests import RawAgent

LEAVES_A_CHILD = """
import subprocess
def test_it():
    subprocess.Popen(["sleep", "60"])
"""
LEAVES_A_ZOMBIE = """
import os
def test_it():
    if os.fork() == 0:
        os._exit(0)
"""
LEAVES_AN_ORPHAN = """
import subprocess
def test_it(tmp_path):
    subprocess.run(["sh", "-c", "sleep 60 &"], env={"HERE": str(tmp_path)}, check=True)
"""
LEAVES_A_CHILD_THAT_ENDS = """
import subprocess
def test_it():
    process = subprocess.Popen(["sleep", "0.3"])
    import threading
    threading.Thread(target=process.wait).start()
"""


def _run(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run one test under our fixtures in a pytest of its own."""
    (tmp_path / "test_it.py").write_text(text)
    words = ["-p", "conftest", "-c", os.devnull, "-p", "no:cacheprovider", "-q", "test_it.py"]
    words += ["--rootdir", str(tmp_path), "--basetemp", str(tmp_path / "base")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("text", [LEAVES_A_CHILD, LEAVES_A_ZOMBIE], ids=["alive", "zombie"])
def test_a_child_left_behind_fails_the_test(tmp_path: Path, text: str) -> None:
    done = _run(tmp_path, text)
    assert done.returncode == 1
    assert "the test left child processes" in done.stdout


def test_a_child_that_ends_by_itself_is_no_fault(tmp_path: Path) -> None:
    done = _run(tmp_path, LEAVES_A_CHILD_THAT_ENDS)
    assert done.returncode == 0, done.stdout


def test_an_orphan_fails_the_run(tmp_path: Path) -> None:
    done = _run(tmp_path, LEAVES_AN_ORPHAN)
    found = re.search(r"the run left processes: (\d+) ", done.stdout)
    assert found, done.stdout
    assert done.returncode == 1
    os.kill(int(found[1]), signal.SIGKILL)


@pytest.mark.qga
def test_the_real_agent_answers_and_comes_back(qemu_ga: Callable[..., HostAgent]) -> None:
    agent = qemu_ga("-b", "guest-exec")
    first = agent.pid
    with RawAgent(agent.path) as client:
        commands = client.call("guest-info")["supported_commands"]
    enabled = {c["name"] for c in commands if c["enabled"]}
    assert "guest-file-open" in enabled
    assert not enabled & {"guest-exec", *DANGEROUS}
    agent.restart()
    assert agent.pid != first
    with RawAgent(agent.path) as client:
        assert client.call("guest-ping") == {}
    agent.kill(signal.SIGTERM)
    with pytest.raises(OSError, match=r"refused|No such file"):
        RawAgent(agent.path)


@pytest.mark.qga
def test_two_real_agents_have_nothing_in_common(qemu_ga: Callable[..., HostAgent]) -> None:
    one, two = qemu_ga(), qemu_ga(retry=False)
    assert one.path != two.path
    with RawAgent(one.path) as first, RawAgent(two.path) as second:
        opened = [a.call("guest-file-open", path="/dev/null", mode="r") for a in (first, second)]
        assert opened == [1000, 1000]
