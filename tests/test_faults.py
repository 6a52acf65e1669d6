"""The fault table: whatever dies, stops or fills up, nothing is lost and nothing runs in silence.

After each fault the experiment is continued, and what the guests' programs wrote down is compared
with the journal (`Lab.audit_vm`). The rows of `TABLE` need real guests; these are booted once and
take the rows side by side, each row with a launch directory of its own.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import guests
import pytest
from lab import REBOOT_ONCE, Lab, entry
from test_handler import until

PATIENT = {"VMRM_TIMEOUT_SCALE": "1"}
HASTY = {"VMRM_TIMEOUT_SCALE": "0.1"}  # a call takes three seconds at most
GUESTS = 3


@dataclass
class Row:
    """One row of the table at work: a lab of its own on a guest it has for itself."""

    lab: Lab
    guest: guests.Guest

    @property
    def launch(self) -> str:
        """The launch directory in the guest."""
        return f"/var/{self.lab.folder.name}"

    def load(self, *schedule: dict[str, Any], **more: Any) -> None:
        """Store the experiment of one VM."""
        vm = {"name": "vm1", "path": str(self.guest.agent_path), "launch_dir": self.launch}
        text = {"experiment": {"start_buffer": 0}, "vm": [vm | {"schedule": schedule} | more]}
        path = self.lab.folder / "lab.json"
        path.write_text(json.dumps(text))
        done = self.lab.run("load", str(path))
        assert done.returncode == 0, done.stderr

    def run(self, *codes: int, **env: str) -> None:
        """Run the experiment once for each exit code that it is to end with."""
        for code in codes:
            done = self.lab.run("run", **(PATIENT | env))
            assert done.returncode == code, f"{done.stderr}\n{self.lab.logs()}"

    def began(self, ordinal: int, *outcomes: str) -> Callable[[], bool]:
        """Return whether an entry has an attempt with one of these outcomes, as a condition."""
        sql = "SELECT outcome FROM attempts WHERE ordinal = ? ORDER BY id DESC LIMIT 1"
        return lambda: any(row["outcome"] in outcomes for row in self.lab.query(sql, ordinal))

    def failed(self) -> bool:
        """Return whether the VM is failed."""
        return self.lab.query("SELECT state FROM vms") == [{"state": "failed"}]

    def outcomes(self) -> list[tuple[int, str]]:
        """Return ordinal and outcome of every attempt."""
        rows = self.lab.query("SELECT ordinal, outcome FROM attempts ORDER BY id")
        return [(row["ordinal"], row["outcome"]) for row in rows]

    def sh(self, words: str) -> str:
        """Run words in the guest, by its shell."""
        with self.guest.agent() as agent:
            return agent.run("/bin/sh", "-c", words).out.decode()

    def when(self, condition: str, words: str) -> None:
        """Have the guest run words once a condition holds, whatever becomes of its agent."""
        script = f"cd /; until {condition}; do usleep 20000; done; {words}"
        with self.guest.agent() as agent:
            agent.call("guest-exec", path="/bin/sh", arg=["-c", script])

    def audit(self, lossy: bool = False) -> None:
        """Compare the guest's record with the journal; everything has come to a good end."""
        record = self.sh(f"cat {self.launch}/record 2>/dev/null").splitlines()
        claims = len(self.sh(f"ls -d {self.launch}/*/*/attempt.*").split())
        self.lab.audit_vm("vm1", record, claims, lossy)
        rows = self.lab.query("SELECT entries, done, state FROM vm_status")
        assert rows[0]["entries"] == rows[0]["done"], self.lab.logs()
        assert rows[0]["state"] == "configured"


def life(slow: str = "sleep 0.3", at: float = 0.6) -> list[dict[str, Any]]:
    """Return a schedule with all of an entry's life: a file, negative and positive times."""
    placed = [{"location": "note.txt", "content": "here\n"}]
    return [
        entry(1, -2, "grep -q here note.txt", content=placed),
        entry(2, -1, slow),
        entry(3, at, slow),
    ]


# --- the rows


def handler_killed(label: str, row: Row) -> None:
    row.load(*life())
    once = row.lab.folder / "crashed"
    row.run(0, VMRM_CRASH=f"{label}:1", VMRM_CRASH_ONCE=str(once))
    assert once.exists()
    row.audit()


def handler_killed_at_a_reboot(row: Row) -> None:
    row.load(entry(1, -2, REBOOT_ONCE), entry(2, -1))
    row.run(0, VMRM_CRASH="rebooted:1", VMRM_CRASH_ONCE=str(row.lab.folder / "crashed"))
    row.audit()


def supervisor_killed(label: str, row: Row) -> None:
    row.load(*life())
    once = {"VMRM_CRASH_ONCE": str(row.lab.folder / "crashed"), "VMRM_CRASH_PARENT": "1"}
    row.run(1, VMRM_CRASH=f"{label}:1", **once)
    row.run(0)
    row.audit()


def agent_killed(condition: str, row: Row, **env: str) -> None:
    schedule = life("sleep 1")
    (row.lab.folder / "large").write_bytes(bytes(range(256)) * 4000)
    schedule[0]["file"] = [{"location": "large", "filename": "large"}]
    row.load(*schedule)
    row.when(condition.format(row.launch), "kill -9 $(pidof qemu-ga); touch /run/killed")
    row.run(0, **env)
    assert row.sh("rm /run/killed && echo it was") == "it was\n"
    row.audit()
    assert row.outcomes() == [(1, "done"), (2, "done"), (3, "done")]


def agent_gone(row: Row) -> None:
    row.load(*life("sleep 1"), agent_timeout=3)
    gone = (
        "mv /usr/sbin/qemu-ga /gone; kill -9 $(pidof qemu-ga); sleep 8; mv /gone /usr/sbin/qemu-ga"
    )
    row.when(f"[ -e {row.launch}/-1/sh/attempt.1/pid ]", gone)
    row.run(1, **HASTY)
    assert row.failed()
    reason = row.lab.query("SELECT reason FROM vms")[0]["reason"]
    assert "does not answer" in reason, reason
    row.guest.wait_agent()
    row.run(0)
    row.audit()
    assert row.outcomes() == [(1, "done"), (2, "done"), (3, "done")]


def guest_reset(ordinal: int, outcome: str, row: Row) -> None:
    row.load(*life("sleep 2", at=3))
    with row.lab.start("run", **PATIENT) as run:
        until(row.began(ordinal, outcome))
        row.guest.qmp("system_reset")
        run.communicate(timeout=120)
        assert run.returncode == 1, row.lab.logs()
    assert (ordinal, "unknown") in row.outcomes()
    row.run(0)
    row.audit(lossy=True)
    boots = row.lab.query("SELECT DISTINCT boot_id FROM attempts")
    assert len(boots) == 2


def guest_paused_past_every_timeout(ordinal: int, outcome: str, row: Row) -> None:
    row.load(*life("sleep 2", at=2), agent_timeout=4)
    with row.lab.start("run", **HASTY) as run:
        until(row.began(ordinal, outcome))
        row.guest.qmp("stop")
        run.communicate(timeout=120)
        assert run.returncode == 1, row.lab.logs()
    assert row.failed()
    row.guest.qmp("cont")
    row.guest.wait_agent()
    row.run(0)
    row.audit()
    assert row.outcomes() == [(1, "done"), (2, "done"), (3, "done")]


def guest_paused_for_a_while(row: Row) -> None:
    row.load(*life("sleep 2"))
    with row.lab.start("run", **HASTY) as run:
        until(row.began(2, "running"))
        row.guest.qmp("stop")
        log = row.lab.folder / "lab.db.d" / "logs" / "vm1.log"
        until(lambda: "trouble with the agent" in log.read_text())
        row.guest.qmp("cont")
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err + row.lab.logs()
    row.audit()
    assert row.outcomes() == [(1, "done"), (2, "done"), (3, "done")]


def guest_disk_full(row: Row) -> None:
    fill = "cat /dev/zero > ../../fill 2>/dev/null; echo lost; exit 0"
    row.load(
        entry(1, -2, f'printf "1 end\\n" >> ../../record; {fill}'), entry(2, -1), entry(3, 0.3)
    )
    row.run(1)
    assert row.outcomes() == [(1, "done"), (2, "failed")]
    assert "No space" in row.lab.query("SELECT reason FROM vms")[0]["reason"]
    row.sh(f"rm {row.launch}/fill")
    row.run(0)
    row.audit()


STEPS = [
    "files-loaded", "armed", "exec-answered", "running-recorded", "before-journal",
    "journal-closed", "before-configured", "configured", "start-seen",
]  # fmt: skip

# The slowest rows come first, so that all guests end together.
TABLE: dict[str, Callable[[Row], None]] = {
    "agent-killed-while-files-are-loaded": partial(
        agent_killed, "ls {}/.stage/*.part 2>/dev/null", **HASTY
    ),
    "agent-killed-when-an-entry-began": partial(agent_killed, "[ -d {}/-1/sh/attempt.1 ]"),
    "agent-killed-while-a-program-runs": partial(agent_killed, "[ -s {}/-1/sh/attempt.1/pid ]"),
    "agent-killed-when-a-program-ended": partial(agent_killed, "[ -e {}/-2/sh/attempt.1/exit ]"),
    "agent-killed-for-good": agent_gone,
    "guest-reset-while-a-program-runs": partial(guest_reset, 2, "running"),
    "guest-reset-before-a-program-is-sent": partial(guest_reset, 3, "armed"),
    "guest-paused-while-a-program-runs": partial(guest_paused_past_every_timeout, 2, "running"),
    "guest-paused-before-a-program-is-sent": partial(guest_paused_past_every_timeout, 3, "armed"),
    "guest-paused-for-a-while": guest_paused_for_a_while,
    "guest-disk-full": guest_disk_full,
    **{f"handler-killed-at-{label}": partial(handler_killed, label) for label in STEPS},
    "handler-killed-at-a-reboot": handler_killed_at_a_reboot,
    "supervisor-killed-at-exec-answered": partial(supervisor_killed, "exec-answered"),
    "supervisor-killed-at-configured": partial(supervisor_killed, "configured"),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, BaseException | None]]:
    """Play every row; yield what each of them raised."""
    guests.require_guests()
    folder = tmp_path_factory.mktemp("faults")
    with guests.guests(GUESTS, folder / "guests") as machines:
        free: queue.Queue[guests.Guest] = queue.Queue()
        for machine in machines:
            free.put(machine)
        with ThreadPoolExecutor(GUESTS) as pool:
            played = {name: pool.submit(play, folder / name, name, free) for name in TABLE}
        yield {name: future.exception() for name, future in played.items()}


def play(folder: Path, name: str, free: queue.Queue[guests.Guest]) -> None:
    folder.mkdir()
    machine, started = free.get(), time.monotonic()
    try:
        TABLE[name](Row(Lab(folder), machine))
    finally:
        print(f"{name}: {time.monotonic() - started:.1f} s")
        free.put(machine)


@pytest.mark.vm
@pytest.mark.parametrize("name", TABLE)
def test_row(table: dict[str, BaseException | None], name: str) -> None:
    if error := table[name]:
        raise error
