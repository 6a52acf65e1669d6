"""Guests that are paused, reset, killed and frozen at random, while commands meet their entries.

Afterwards the journal and what the guests' programs have written down must agree. Chance has a
seed, which is printed; the clocks of host and guests make each run a little different anyway.

    VMRM_TEST_DISTURBED_S=300 VMRM_TEST_SEED=7 pytest -s tests/test_disturbed.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import guests
import pytest
import tables
from lab import Lab

SECONDS = float(os.environ.get("VMRM_TEST_DISTURBED_S", "25"))
SEED = os.environ.get("VMRM_TEST_SEED") or str(time.time_ns() % 1_000_000)

# What is synced before the program goes on survives a reset.
NOTE = 'echo "$N {}" >> {}; sync {}'


def program(record: str, number: int, at: float, seconds: float, **more: Any) -> dict[str, Any]:
    """Return an entry that notes in `record`, under its number, that it begins and ends."""
    begin, end = (NOTE.format(word, record, record) for word in ("begin", "end"))
    script = f"{begin}; sleep {seconds:.2f}; echo output of $N; {end}"
    words = {"executable": "sh", "arguments": ["-c", script], "env": {"N": str(number)}}
    return {"start_time": round(at, 2), **words, **more}


def schedule(chance: random.Random, record: str) -> list[dict[str, Any]]:
    """Return entries for the whole time, in order."""
    times = sorted(chance.uniform(0.3, SECONDS - 2) for _ in range(int(SECONDS)))
    more = [{"rerun": chance.random() < 0.2} for _ in times]
    early = [program(record, n, n - 4, 0.3, ignore_failure=True, rerun=True) for n in (1, 2)]
    late = [
        program(record, n, at, chance.choice([0, 0.2, 1, 4]), **extra)
        for n, (at, extra) in enumerate(zip(times, more, strict=True), 3)
    ]
    return early + late


class Witness:
    """Looks at the journal all the while: what it has said once must stand."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.over = lab, threading.Event()
        self.faults: list[str] = []
        self.seen: dict[int, dict[str, Any]] = {}
        self.starts: set[float] = set()

    def run(self) -> None:
        while not self.over.wait(0.3):
            self.look()

    def look(self) -> None:
        """Compare the rows with those of the last look."""
        if start := tables.experiment(self.lab.db)["start_at"]:
            self.starts.add(start)
        now = {row["id"]: row for row in tables.attempts(self.lab.db)}
        for number, old in self.seen.items():
            new = now.get(number)
            if new is None:
                if old["outcome"] != "armed":
                    self.faults.append(f"a row vanished: {old}")
                continue
            stands = ["server_name", "ordinal", "attempt"]
            stands += [key for key in ("sent_at", "pid") if old[key] is not None]
            if old["ended_at"] is not None:
                stands += ["outcome", "exit_code", "ended_at", "error"]
            if changed := [key for key in stands if old[key] != new[key]]:
                self.faults.append(f"{changed} changed: {old} is now {new}")
        self.seen = now


class Commands:
    """Gives commands on the VMs, and remembers what each exec has said."""

    def __init__(self, lab: Lab, records: dict[str, str], chance: random.Random) -> None:
        self.lab, self.records, self.chance = lab, records, chance
        self.over = threading.Event()
        self.told: dict[str, tuple[str, int]] = {}  # word: VM, exit code
        self.added: Counter[str] = Counter()
        self.log: list[str] = []

    def run(self) -> None:
        kinds = [self.exec, self.exec, self.pause, self.hold, self.add, self.retry]
        while not self.over.wait(self.chance.uniform(0.2, 1.5)):
            self.chance.choice(kinds)(self.chance.choice(sorted(self.records)))

    def give(self, *words: str) -> int:
        """Give one command; return its exit code."""
        done = self.lab.run(*words, timeout=120)
        self.log.append(f"{time.time():.3f} {' '.join(words)}: {done.returncode} {done.stderr}")
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    def exec(self, name: str) -> None:
        """Run a program that notes a word of its own."""
        word, record = f"command{len(self.told) + 1}", self.records[name]
        limit = self.chance.choice(["3", "20"])
        script = f"echo {word} >> {record}; sync {record}"
        self.told[word] = (name, 255)  # whatever happens to us meanwhile
        code = self.give("exec", "--timeout", limit, name, "sh", "-c", script)
        self.told[word] = (name, code)

    def pause(self, name: str) -> None:
        """Pause it for a moment."""
        self.give("pause", name, "--duration", f"{self.chance.uniform(0.2, 2):.2f}")

    def retry(self, name: str) -> None:
        """Have what failed done again."""
        self.give("retry", name)

    def add(self, name: str) -> None:
        """Append an entry, due now or soon."""
        self.added[name] += 1
        number = 1000 + self.added[name]
        at = self.chance.uniform(0.3, SECONDS)
        path = self.lab.folder / f"more-{name}-{number}.json"
        path.write_text(json.dumps([program(self.records[name], number, at, 0.2)]))
        self.give("schedule", "add", name, str(path))

    def hold(self, name: str) -> None:
        """Hold it for a while."""
        self.give("break", name)
        self.over.wait(self.chance.uniform(0.5, 3))
        self.give("resume", name)


def disturb_machine(machine: guests.Guest, chance: random.Random) -> None:
    """Do a real VM one harm, and return when that is over."""
    match chance.choice(["pause", "pause", "reset", "freeze"]):
        case "pause":
            machine.qmp("stop")
            time.sleep(chance.choice([0.3, 1, 4, 8]))
            machine.qmp("cont")
        case "reset":
            machine.qmp("system_reset")
            time.sleep(chance.uniform(0, 6))
        case "freeze":  # by the host, as a migration or an overloaded one does
            os.kill(machine.pid, signal.SIGSTOP)
            time.sleep(chance.uniform(0.5, 3))
            os.kill(machine.pid, signal.SIGCONT)


def disturb_agent(agent: Any, chance: random.Random) -> None:
    """Do a real agent on this host one harm, and return when that is over."""
    frozen = agent.state / "qga.state.isfrozen"
    match chance.choice(["stop", "stop", "restart", "freeze"]):
        case "stop":
            os.kill(agent.pid, signal.SIGSTOP)
            time.sleep(chance.choice([0.3, 1, 4, 8]))
            os.kill(agent.pid, signal.SIGCONT)
        case "restart":
            agent.kill()
            time.sleep(chance.uniform(0, 2))
            agent.start()
        case "freeze":  # as for a backup; thawed by its successor
            frozen.touch()
            agent.restart()
            time.sleep(chance.uniform(0.5, 3))
            frozen.unlink(missing_ok=True)
            agent.restart()


def disturbed(
    harm: Callable[[Any, random.Random], None], whom: Any, until: float, chance: random.Random
) -> None:
    """Do harm again and again, with pauses in which something can get on."""
    while time.monotonic() < until:
        time.sleep(chance.uniform(0.5, 6))
        harm(whom, chance)


def agree(lab: Lab, name: str, record: list[str], commands: Commands) -> list[str]:
    """Return where a VM's journal and its own record differ."""
    faults, counts = [], Counter(record)
    per_entry: dict[int, list[dict[str, Any]]] = {}
    for row in tables.attempts(lab.db, name):
        per_entry.setdefault(row["ordinal"], []).append(row)
    for entry in tables.entries(lab.db, name):
        number = json.loads(entry["entry"])["env"]["N"]
        tried = per_entry.get(entry["ordinal"], [])
        outcomes = Counter(row["outcome"] for row in tried)
        missed = sum("did not begin" in row["error"] for row in tried)
        sure = outcomes["done"] + outcomes["failed"] - missed
        begun, ended = counts[f"{number} begin"], counts[f"{number} end"]
        fine = (
            tried
            and not outcomes["armed"] + outcomes["running"]
            and sure <= begun <= len(tried)
            and outcomes["done"] <= ended <= begun
        )
        if not fine:
            faults.append(f"{name} entry {number}: {begun} begun, {ended} ended, {tried}")
    for word, (where, code) in commands.told.items():
        if where == name and (counts[word] > 1 or (code == 0 and counts[word] != 1)):
            faults.append(f"{name} {word}: exit code {code}, noted {counts[word]} times")
    return faults


@pytest.mark.vm
@pytest.mark.qga
@pytest.mark.slow
def test_journal_and_guests_agree_whatever_is_done_to_them(
    tmp_path: Path, micro_vm: guests.Guest, children: None, qemu_ga: Callable[..., Any]
) -> None:
    print(f"seed {SEED}, {SECONDS:g} s")
    chance = [random.Random(f"{SEED} {n}") for n in range(4)]
    agent, lab = qemu_ga("-b", "guest-set-time", retry=False), Lab(tmp_path)
    records = {"vm1": "/var/disturbed/record", "vm2": str(tmp_path / "record")}
    with micro_vm.agent() as raw:
        raw.run("/bin/sh", "-c", "rm -rf /var/disturbed; mkdir /var/disturbed; sync")
    places = {"vm1": (micro_vm.agent_path, "/var/disturbed"), "vm2": (agent.path, str(tmp_path))}
    vms = [
        {
            "name": name,
            "path": str(path),
            "launch_dir": f"{folder}/launch",
            "agent_timeout": 120,
            "schedule": schedule(chance[0], records[name]),
        }
        for name, (path, folder) in places.items()
    ]
    (tmp_path / "lab.json").write_text(
        json.dumps({"experiment": {"start_buffer": 1, "on_failure": "wait"}, "vm": vms})
    )
    assert lab.run("load", str(tmp_path / "lab.json")).returncode == 0
    witness, commands = Witness(lab), Commands(lab, records, chance[1])
    with lab.start("run", VMRM_TIMEOUT_SCALE="0.5") as run:
        give_up = time.monotonic() + 60
        while not lab.handler_pids():
            assert time.monotonic() < give_up and run.poll() is None, "it does not begin"
            time.sleep(0.1)
        until = time.monotonic() + SECONDS
        with ThreadPoolExecutor() as pool:
            watching, commanding = pool.submit(witness.run), pool.submit(commands.run)
            harming = pool.submit(disturbed, disturb_machine, micro_vm, until, chance[2])
            try:
                # Here, since the agent dies with the thread that starts it.
                disturbed(disturb_agent, agent, until, chance[3])
                harming.result()
                commands.over.set()
                commanding.result()
                lab.run("resume", "vm1", "vm2")
                _, err = run.communicate(timeout=400)
            except subprocess.TimeoutExpired:
                run.kill()
                log = "\n".join(commands.log)
                pytest.fail(f"seed {SEED}: no end: {lab.run('status').stdout}\n{log}\n{lab.logs()}")
            finally:
                commands.over.set()
                witness.over.set()
                lab.run("stop", "--kill")
        watching.result()
    witness.look()
    micro_vm.wait_agent()
    with micro_vm.agent() as raw:
        noted = raw.run("/bin/cat", records["vm1"]).out.decode()
    faults = witness.faults + agree(lab, "vm1", noted.splitlines(), commands)
    faults += agree(lab, "vm2", Path(records["vm2"]).read_text().splitlines(), commands)
    report = "\n".join([f"seed {SEED}", *faults, err, *commands.log])
    assert not faults, report
    assert len(witness.starts) == 1, report
    assert run.returncode in (0, 1), report
    assert commands.told, report
