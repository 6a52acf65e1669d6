"""The fault table: whatever dies, stops or fills up, nothing is lost and nothing runs in silence.

After each fault the experiment is continued, and what the guests' programs wrote down is compared
with the journal (`Lab.audit_vm`). The rows of `TABLE` need real guests; these are booted once and
take the rows side by side, each row with a launch directory of its own.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import queue
import re
import resource
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import guests
import pytest
import tables
from cli_lab import until
from lab import REBOOT_ONCE, Lab, entry, kill, stand_ins
from test_handler import load, outcomes, sh, vm

import vmrm

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

        def holds() -> bool:
            mine = [row for row in tables.attempts(self.lab.db) if row["ordinal"] == ordinal]
            return bool(mine) and mine[-1]["outcome"] in outcomes

        return holds

    def failed(self) -> bool:
        """Return whether the VM is failed."""
        return tables.states(self.lab.db) == {"vm1": "failed"}

    def outcomes(self) -> list[tuple[int, str]]:
        """Return ordinal and outcome of every attempt."""
        return [(row["ordinal"], row["outcome"]) for row in tables.attempts(self.lab.db)]

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
        row = tables.status(self.lab.db)["vm1"]
        assert row["entries"] == row["done"], self.lab.logs()
        assert row["state"] == "configured"


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
    row.when(f"[ -e {row.launch}/-1/sh/attempt.1.*/pid ]", gone)
    row.run(1, **HASTY)
    assert row.failed()
    reason = tables.vms(row.lab.db)["vm1"]["reason"]
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
    if ordinal == 3:  # of positive time, which nobody repeats unasked
        row.run(1)
        assert row.lab.run("retry", "vm1").returncode == 0
    row.run(0)
    row.audit(lossy=True)
    boots = {attempt["boot_id"] for attempt in tables.attempts(row.lab.db)}
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
        log = row.lab.folder / "lab.db.d" / "logs.1" / "vm1.log"
        until(lambda: "trouble with the agent" in log.read_text())
        row.guest.qmp("cont")
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err + row.lab.logs()
    row.audit()
    assert row.outcomes() == [(1, "done"), (2, "done"), (3, "done")]


def guest_frozen(row: Row) -> None:
    """A backup freezes the guest's file systems for a moment."""
    row.load(*life())
    with row.guest.agent() as agent:
        agent.call("guest-fsfreeze-freeze")
    with row.lab.start("run", **PATIENT) as run:
        log = row.lab.folder / "lab.db.d" / "logs.1" / "vm1.log"
        until(lambda: log.exists() and "trouble with the agent" in log.read_text())
        with row.guest.agent() as agent:  # its turn comes when the handler hangs up
            agent.call("guest-fsfreeze-thaw")
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err + row.lab.logs()
    row.audit()


def guest_disk_full(row: Row) -> None:
    # A sync gives back what was set aside for writing; then that is filled, too, to the last.
    fill = (
        "full=0; mkdir ../../dirs; : > ../../fill; "
        "while [ $full -lt 3 ]; do had=$(wc -c < ../../fill); "
        "cat /dev/zero >> ../../fill 2>/dev/null; sync; "
        '[ "$(wc -c < ../../fill)" = "$had" ] && full=$((full + 1)); done; echo lost; '
        # A directory may find room where a file does not; what is given back later is taken again.
        "exec 3>> ../../fill 2> /dev/null; n=0; "
        "more() { while mkdir ../../dirs/$n; do n=$((n + 1)); done; cat /dev/zero >&3; sync; }; "
        "more; { while [ -e ../../fill ]; do sleep 0.2; more; done; } > /dev/null & exit 0"
    )
    row.load(
        entry(1, -2, f'printf "1 end\\n" >> ../../record; {fill}'), entry(2, -1), entry(3, 0.3)
    )
    try:
        row.run(1)
    finally:
        row.sh(f"rm {row.launch}/fill; sleep 1; rm -r {row.launch}/dirs")
    assert row.outcomes() == [(1, "done"), (2, "failed")]
    assert "No space" in tables.vms(row.lab.db)["vm1"]["reason"]
    row.run(0)
    row.audit()


STEPS = [
    "files-loaded", "armed", "exec-answered", "running-recorded", "before-journal",
    "journal-closed", "configured", "start-seen",
]  # fmt: skip

# The slowest rows come first, so that all guests end together.
TABLE: dict[str, Callable[[Row], None]] = {
    "agent-killed-while-files-are-loaded": partial(
        agent_killed, "ls {}/.stage/*.part 2>/dev/null", **HASTY
    ),
    "agent-killed-when-an-entry-began": partial(agent_killed, "[ -d {}/-1/sh/attempt.1.* ]"),
    "agent-killed-while-a-program-runs": partial(agent_killed, "[ -s {}/-1/sh/attempt.1.*/pid ]"),
    "agent-killed-when-a-program-ended": partial(agent_killed, "[ -e {}/-2/sh/attempt.1.*/exit ]"),
    "agent-killed-for-good": agent_gone,
    "guest-reset-while-a-program-runs": partial(guest_reset, 2, "running"),
    "guest-reset-before-a-program-is-sent": partial(guest_reset, 3, "armed"),
    "guest-paused-while-a-program-runs": partial(guest_paused_past_every_timeout, 2, "running"),
    "guest-paused-before-a-program-is-sent": partial(guest_paused_past_every_timeout, 3, "armed"),
    "guest-paused-for-a-while": guest_paused_for_a_while,
    "guest-frozen-for-a-moment": guest_frozen,
    "guest-disk-full": guest_disk_full,
    **{f"handler-killed-at-{label}": partial(handler_killed, label) for label in STEPS},
    "handler-killed-at-a-reboot": handler_killed_at_a_reboot,
    "supervisor-killed-at-exec-answered": partial(supervisor_killed, "exec-answered"),
}


@pytest.fixture(scope="module")
def table(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, BaseException | None]]:
    """Play every row that was asked for; yield what each of them raised."""
    guests.require_guests()
    asked = {item.name for item in request.session.items}
    names = [name for name in TABLE if f"test_row[{name}]" in asked]
    folder = tmp_path_factory.mktemp("faults")
    with guests.guests(GUESTS, folder / "guests") as machines:
        free: queue.Queue[guests.Guest] = queue.Queue()
        for machine in machines:
            free.put(machine)
        with ThreadPoolExecutor(GUESTS) as pool:
            played = {name: pool.submit(play, folder / name, name, free) for name in names}
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


# --- on stand-ins: what needs no kernel of its own


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with one stand-in, nothing loaded."""
    with stand_ins(tmp_path / "agents", 1):
        yield Lab(tmp_path)


def only(lab: Lab, *schedule: dict[str, Any]) -> None:
    """Load one VM, on the agent in the folder `agents` beside its lab."""
    load(lab, vm("vm1", lab.folder / "agents/1.sock", lab.guest(1) / "launch", *schedule))


def pid_in(lab: Lab) -> int:
    """Return the pid that the script of the only entry notes."""
    until(lambda: list(lab.guest(1).glob("launch/*/*/attempt.1.*/pid")))
    return int(next(lab.guest(1).glob("launch/*/*/attempt.1.*/pid")).read_text().split()[0])


def test_a_probe_misses_no_end(tmp_path: Path) -> None:
    """Between any two steps of the probe the program may write its exit code and go."""
    lines = vmrm.Guest(cast(Any, None)).argv("probe")[2].splitlines()
    for moment in range(1, len(lines)):
        here = tmp_path / f"attempt.{moment}"
        here.mkdir()
        with subprocess.Popen(["sleep", "60"]) as program:
            (here / "pid").write_text(f"{program.pid} {vmrm.process_started(program.pid)}\n")
            ending = f'echo "3 0" > {here}/exit; kill -9 {program.pid} 2>/dev/null; sleep 0.05'
            script = "\n".join([*lines[:moment], ending, *lines[moment:]])
            command = ["/bin/sh", "-c", script, "sh", str(here)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            program.kill()
        if done.returncode == 0:  # else the moment is no place for a command
            found = vmrm.parse_found(done.stdout.strip())
            assert found.alive or found.exit_code == 3, (moment, done.stdout)


def test_a_guest_without_proc_can_tell_who_lives(tmp_path: Path) -> None:
    script = vmrm.Guest(cast(Any, None)).argv("probe")[2].replace("/proc/", "/no-proc/")
    with subprocess.Popen(["sleep", "60"]) as program:
        (tmp_path / "pid").write_text(f"{program.pid} \n")
        command = ["/bin/sh", "-c", script, "sh", str(tmp_path)]
        alive = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        program.kill()
    gone = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [vmrm.parse_found(line.strip()).alive for line in (alive, gone)] == [True, False]


@pytest.mark.parametrize("label", ["exec-answered", "running-recorded"])
def test_stop_kill_ends_what_a_dead_handler_has_left(lab: Lab, label: str) -> None:
    only(lab, sh(-1, "[ -e ../../killed ] && exit 0; sleep 4321 & wait"))
    assert lab.run("handle", "vm1", VMRM_CRASH=f"{label}:1").returncode == -signal.SIGKILL
    pid = pid_in(lab)
    assert vmrm.process_started(pid)
    done = lab.run("stop", "--kill")
    assert done.returncode == 0, done.stderr + lab.logs()
    until(lambda: vmrm.process_started(pid) is None)
    assert outcomes(lab) == [(1, "failed", None, "killed by stop --kill")]
    (lab.guest(1) / "launch" / "killed").touch()
    assert lab.run("run").returncode == 0
    assert [row[:2] for row in outcomes(lab)] == [(1, "failed"), (1, "done")]


def test_stop_kill_keeps_what_was_not_begun_from_beginning(lab: Lab) -> None:
    only(lab, entry(1, -1))
    assert lab.run("handle", "vm1", VMRM_CRASH="armed:1").returncode == -signal.SIGKILL
    assert lab.run("stop", "--kill").returncode == 0
    error = "killed by stop --kill: it did not begin"
    assert [row[1:] for row in outcomes(lab)] == [("failed", 125, error)]
    script = lab.guest(1) / "launch" / "-1" / "sh" / "call_arguments.sh"
    token = re.search(r'"\$2" != (\S+) \]', script.read_text())
    assert token
    (claim,) = script.parent.glob("attempt.1.*")
    words = ["/bin/sh", script, claim.name, token[1]]
    late = subprocess.run(words, capture_output=True, check=False)
    assert late.returncode == vmrm.CLAIM_FAILED
    assert not (lab.guest(1) / "launch" / "record").exists()
    assert lab.run("run").returncode == 0
    lab.audit()


def test_stop_kill_names_whom_it_could_not_reach(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    with stand_ins(tmp_path / "agents", 1):
        only(lab, sh(-1, "sleep 4321"))
        crash = {"VMRM_CRASH": "running-recorded:1"}
        assert lab.run("handle", "vm1", **crash).returncode == -signal.SIGKILL
    done = lab.run("stop", "--kill")
    assert done.returncode == 1
    assert "programs of 1 VM could not be ended: vm1" in done.stderr


def test_of_two_starts_of_one_attempt_the_one_that_runs_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest is so slow that the next handler finds no claim and starts the attempt again."""
    lab, slow = Lab(tmp_path), tmp_path / "bin" / "mkdir"
    slow.parent.mkdir()
    claim = f"if /bin/mkdir {tmp_path}/first 2>/dev/null; then sleep 1; else sleep 2; fi"
    slow.write_text(f'#!/bin/sh\ncase $1 in attempt.*) {claim};; esac\nexec /bin/mkdir "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    with stand_ins(tmp_path / "agents", 1):
        only(lab, entry(1, -1, "sleep 3"))
        once = {"VMRM_CRASH_ONCE": str(tmp_path / "crashed")}
        done = lab.run("run", VMRM_CRASH="exec-answered:1", **once)
    assert done.returncode == 0, done.stderr + lab.logs()
    assert outcomes(lab) == [(1, "done", 0, "")]
    lab.audit()


def test_a_handler_killed_while_its_request_is_on_the_way(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    with stand_ins(tmp_path / "agents", 1) as agent:
        only(lab, entry(1, 2))
        with lab.start("run") as run:
            planned = until(lambda: tables.attempts(lab.db))[0]["planned_at"]
            os.kill(agent.pid, signal.SIGSTOP)
            until(lambda: time.time() > planned + 0.3)  # it was sent, and nobody reads it
            pids = lab.handler_pids()
            for pid in pids:
                kill(pid)
            os.kill(agent.pid, signal.SIGCONT)
            assert run.wait(60) == 0, lab.logs()
    assert len(pids) == 1
    assert outcomes(lab) == [(1, "done", 0, "")]
    lab.audit()


def test_contents_cut_short_by_a_reset_are_sent_again(lab: Lab) -> None:
    note = [{"location": "note.txt", "content": "here\n"}]
    only(lab, sh(-2, "true"), sh(-1, "cat note.txt", content=note))
    assert lab.run("handle", "vm1", VMRM_CRASH="armed:1").returncode == -signal.SIGKILL
    staged = [path for path in (lab.guest(1) / "launch/.stage").iterdir() if path.is_file()]
    assert staged
    for path in staged:
        path.chmod(0o600)
        path.write_bytes(b"")
    assert lab.run("run").returncode == 0
    assert (lab.folder / "lab.db.d/logs.1/vm1/2.1.out").read_text() == "here\n"


def test_a_timeout_outlasts_a_clock_that_is_set_back(lab: Lab) -> None:
    only(lab, sh(-1, "sleep 4321", timeout=1))
    crash = {"VMRM_CRASH": "running-recorded:1"}
    assert lab.run("handle", "vm1", **crash).returncode == -signal.SIGKILL
    tables.set_clock_back(lab.db, 3600)
    assert lab.run("run").returncode == 1
    assert outcomes(lab)[0][3] == "timed out after 1 s and was killed"


# --- no room on the host


@dataclass
class Disk:
    """A way to let the host's disk fill up for the supervisor and its handlers."""

    folder: Path
    limited: list[int] = field(default_factory=list)
    reader: sqlite3.Connection | None = None

    def fill(self, *pids: int) -> None:
        """Leave no room: on a small file system, or by the limit of file sizes of processes."""
        if self.folder.is_mount():
            # An empty WAL must grow; who reads what is in it keeps it from being written over.
            reader = self.reader = sqlite3.connect(self.folder / "lab.db", isolation_level=None)
            until(lambda: reader.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM attempts").fetchall()
            with contextlib.suppress(OSError), (self.folder / "filler").open("wb") as filler:
                while True:
                    filler.write(b"x" * 4096)
                    filler.flush()
            return
        self.limited = list(pids)
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))

    def close(self) -> None:
        """Make room again."""
        if self.folder.is_mount():
            (self.folder / "filler").unlink(missing_ok=True)
        if self.reader:
            self.reader.close()
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        for pid in self.limited:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk that can be filled; a tmpfs where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limit":
        yield Disk(folder)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "vmrm-test", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("end", ["wait", "stop"])
def test_a_full_disk_loses_no_outcome(disk: Disk, tmp_path: Path, end: str) -> None:
    lab, agents = Lab(disk.folder), tmp_path / "agents"
    words = "until [ -e ../../full ]; do sleep 0.02; done; head -c 3000000 /dev/zero | tr '\\0' x"
    with stand_ins(agents, 1):
        launch = agents / "1" / "launch"
        load(lab, vm("vm1", agents / "1.sock", launch, sh(-1, words), sh(0.2, "true")))
        with lab.start("run") as run, contextlib.closing(disk):
            until(lambda: [row[1] for row in outcomes(lab)] == ["running"])
            handler, supervisor = until(lab.handler_pids)[0], until(lab.supervisor_pid)
            asking = lab.start("exec", "vm1", "sleep", "61")
            until(lambda: any(row["claimed_by"] for row in tables.requests(lab.db)))
            disk.fill(handler, supervisor)
            (launch / "full").touch()
            until(lambda: list(launch.glob("-1/sh/attempt.1.*/exit")))
            if end == "stop":
                stop(lab, disk, run)
            else:
                spent = cpu_seconds(handler) + cpu_seconds(supervisor)
                time.sleep(1.5)
                assert cpu_seconds(handler) + cpu_seconds(supervisor) - spent < 0.5
                assert lab.handler_pids() == [handler]
                assert [row[1] for row in outcomes(lab)] == ["running"]
                disk.close()
                assert run.wait(60) == 0, lab.logs()
        assert asking.communicate(timeout=60) and asking.returncode == 255  # it may have run
        if end == "stop":
            assert lab.run("run").returncode == 0, lab.logs()
    assert outcomes(lab) == [(1, "done", 0, ""), (2, "done", 0, "")]
    assert (lab.folder / "lab.db.d/logs.1/vm1/1.1.out").stat().st_size == 3000000
    if end == "wait":
        assert "can be used again" in (lab.folder / "lab.db.d/logs.1/vm1.log").read_text()


def stop(lab: Lab, disk: Disk, run: subprocess.Popen[str]) -> None:
    """End an experiment whose database cannot say so, and make room again."""
    if disk.folder.is_mount():
        more = lab.folder.parent / "more.json"
        more.write_text(json.dumps([sh(9, "x" * 100)]))
        refused = lab.run("schedule", "add", "vm1", str(more))
        assert refused.returncode == 75, refused.stderr
        assert "the database cannot be used now" in refused.stderr
        assert lab.run("stop").returncode == 0
    else:  # only these two have no room
        os.kill(lab.supervisor_pid() or 0, signal.SIGTERM)
    assert run.wait(60) == 1
    until(lambda: not lab.handler_pids())
    disk.close()


def test_a_database_that_may_not_grow_is_told_from_a_wrong_request(tmp_path: Path) -> None:
    with vmrm.Database(tmp_path / "a.db") as db:
        schedules = vmrm.ScheduleDb(db=db)
        schedules.put("vm1", "[]")
        db.connection.execute(f"PRAGMA max_page_count = {db.value('PRAGMA page_count')}")
        large = json.dumps([sh(1, "x" * 200_000)])
        with pytest.raises(vmrm.Unwritable, match="full") as caught:
            schedules.put("vm1", large)
        assert caught.value.code == 75
        assert schedules.get("vm1") == "[]"
        assert not db.connection.in_transaction
        db.connection.execute("PRAGMA max_page_count = 1000000")
        schedules.put("vm1", large)
        assert schedules.get("vm1") == large


def test_output_that_finds_no_room_is_noted_and_the_outcome_kept(lab: Lab) -> None:
    only(lab, sh(-1, "echo lost"), sh(0.1, "echo kept"))
    logs = lab.folder / "lab.db.d" / "logs.1" / "vm1"
    logs.mkdir(parents=True)
    (logs / "1.1.out").symlink_to("/dev/full")
    assert lab.run("run").returncode == 0
    note = "its output is incomplete: No space left on device"
    assert outcomes(lab) == [(1, "done", 0, note), (2, "done", 0, "")]
    assert (logs / "2.1.out").read_text() == "kept\n"


def test_a_log_without_room_breaks_nothing_and_says_so_later(tmp_path: Path) -> None:
    path, logger = tmp_path / "log", logging.Logger("test")
    vmrm.log_to(logger, path)
    path.symlink_to("/dev/full")
    logger.info("one")
    logger.info("two")
    path.unlink()
    logger.info("three")
    lines = path.read_text().splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "error   2 records lost here",
        "info    three",
    ]


def test_a_host_without_room_for_processes_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def refuse() -> int:
        asked.append(time.monotonic())
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    with vmrm.Database(tmp_path / "a.db") as db:
        vmrm.VMMapping(db=db).put("u1", "vm1", path="/a.sock")
        assert vmrm.Supervisor(db).run() == 0
    gc.unfreeze()
    assert asked[1] > asked[0] + 0.9
    assert caplog.text.count("cannot start the handler of vm1: ") == 2
