"""An experiment over four real guests: qemu-ga behind virtio-serial, the guests' own shells."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import guests
import pytest
import tables
from lab import Lab
from test_views import check_slices, checked, processes

pytestmark = pytest.mark.vm

# Each must reach the program as one argument, exactly.
HARD = [
    "a b",
    "$HOME",
    "it's",
    '"quoted"',
    "a;b",
    "*",
    "back\\slash",
    "new\nline",
    "",
    "ünï ☃",
    "-n",
]
ODD_NAME = 'it\'s a "file" ünï $HOME;*.txt'
ODD_CONTENT = 'snow ☃ it\'s "$HOME"\nno newline at the end'

# Writes its arguments one by one, each ended by a NUL byte, which no argument can hold.
SHOW_ARGUMENTS = "#!/bin/sh\nfor word; do printf '%s\\0' \"$word\"; done > /var/arguments\n"
NOTE = 'echo "{} $(cat /proc/sys/kernel/random/boot_id)" >> /var/record'


def sh(at: float, words: str, **more: Any) -> dict[str, Any]:
    return {"start_time": at, "executable": "sh", "arguments": ["-c", words], **more}


def schedules() -> list[list[dict[str, Any]]]:
    """Return the schedule of each of the four guests."""
    odd = [
        {"location": f"/var/{ODD_NAME}", "filename": "odd file ☃.txt"},
        {"location": "/var/content", "content": ODD_CONTENT},
        {"location": "show.sh", "content": SHOW_ARGUMENTS, "executable": True},
    ]
    first = [
        {
            "start_time": -3,
            "executable": "show.sh",
            "arguments": HARD,
            "file": odd[:1],
            "content": odd[1:],
        },
        sh(1, "pwd; id -un; echo $GREETING", cwd="/var", user="tester", env={"GREETING": "it's"}),
    ]
    reboots = [
        sh(-9, NOTE.format("before")),
        sh(-8, NOTE.format("beside")),
        sh(-8, NOTE.format("asks") + "; [ -e /var/asked ] && exit 0; touch /var/asked; exit 10"),
        sh(-7, NOTE.format("by-file") + "; [ -e /var/asked2 ] || touch /var/asked2 reboot"),
        sh(0.5, NOTE.format("after")),
    ]
    slow = [sh(-1, "sleep 3"), sh(0.5, "date +%s.%N > /var/stamp")]
    transfers = [
        sh(-1, "mkdir -p /var/data/empty; head -c 100000 /dev/urandom > '/var/data/a b'"),
        {"start_time": 0.5, "transfer": [{"location": "/var/data", "destination": "out"}]},
        sh(1, "echo one; echo two >&2; exit 3"),
        sh(1.2, "kill -9 $$"),
        {"start_time": 1.4, "executable": "/no/such/program"},
        sh(1.6, "exit 4", ignore_failure=True),
    ]
    return [first, reboots, slow, transfers]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Any, list[guests.Guest]]]:
    """Run the experiment once; yield the lab, the finished command and the guests, still up."""
    guests.require_guests()
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "odd file ☃.txt").write_bytes(bytes(range(256)) * 300)
    with guests.guests(4, folder / "guests") as machines:
        lab = Lab(folder, count=4)
        vms = [
            {"name": f"vm{n}", "path": str(machine.agent_path), "schedule": schedule}
            for n, (machine, schedule) in enumerate(zip(machines, schedules(), strict=True), 1)
        ]
        text = json.dumps({"experiment": {"start_buffer": 2}, "vm": vms}, ensure_ascii=False)
        (folder / "lab.json").write_text(text)
        done = lab.run("run", str(folder / "lab.json"), timeout=300, VMRM_TIMEOUT_SCALE="1")
        yield lab, done, machines


def in_guest(machine: guests.Guest, *words: str) -> str:
    with machine.agent() as agent:
        return agent.run(*words).out.decode()


def test_report_and_exit_code_say_what_happened(ran: tuple[Lab, Any, list[guests.Guest]]) -> None:
    lab, done, _ = ran
    assert done.returncode == 1, done.stderr + lab.logs()
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:6] for row in rows] == [
        ["vm1", "configured", "2", "2", "0", "0"],
        ["vm2", "configured", "5", "5", "0", "0"],
        ["vm3", "configured", "2", "2", "0", "0"],
        ["vm4", "configured", "6", "2", "4", "0"],
    ]
    faults = [line.strip() for line in done.stderr.splitlines() if "vm4, entry" in line]
    assert faults == [
        "vm4, entry 3 (1 sh): failed: exit code 3",
        "vm4, entry 4 (1.2 sh): failed: exit code 137",
        "vm4, entry 5 (1.4 program): failed: exit code 127",
    ]


def test_a_trace_of_real_guests_agrees_with_the_journal(
    ran: tuple[Lab, Any, list[guests.Guest]],
) -> None:
    lab, _, _ = ran
    events = checked(lab.run("trace").stdout)
    check_slices(lab, events)
    reboots = [e for e in processes(events)["vm2"] if e["ph"] == "i" and e["cat"] == "reboot"]
    assert len(reboots) == 2


def test_files_and_arguments_arrive_exactly(ran: tuple[Lab, Any, list[guests.Guest]]) -> None:
    lab, _, machines = ran
    assert in_guest(machines[0], "cat", "/var/arguments").split("\0") == [*HARD, ""]
    assert in_guest(machines[0], "cat", "/var/content") == ODD_CONTENT
    arrived = in_guest(machines[0], "base64", f"/var/{ODD_NAME}")
    assert base64.b64decode(arrived) == (lab.folder / "odd file ☃.txt").read_bytes()


def test_user_directory_and_environment(ran: tuple[Lab, Any, list[guests.Guest]]) -> None:
    lab, _, _ = ran
    out = lab.folder / "lab.db.d" / "logs.1" / "vm1" / "2.1.out"
    assert out.read_text() == "/var\ntester\nit's\n"


def test_a_reboot_reruns_only_what_asked(ran: tuple[Lab, Any, list[guests.Guest]]) -> None:
    lab, _, machines = ran
    record = [line.split() for line in in_guest(machines[1], "cat", "/var/record").splitlines()]
    names = [name for name, _ in record]
    assert sorted(names[1:3]) == ["asks", "beside"]
    assert [names[0], *names[3:]] == ["before", "asks", "by-file", "by-file", "after"]
    boots = [boot for _, boot in record]
    assert len(set(boots)) == 3
    assert boots[0] == boots[1] == boots[2] != boots[3] == boots[4] != boots[5] == boots[6]
    attempts = Counter(row["ordinal"] for row in tables.attempts(lab.db, "vm2"))
    assert attempts == {1: 1, 2: 1, 3: 2, 4: 2, 5: 1}


def test_nothing_positive_was_sent_before_the_barrier(
    ran: tuple[Lab, Any, list[guests.Guest]],
) -> None:
    lab, _, _ = ran
    start = tables.experiment(lab.db)["start_at"]
    configured = [r["at"] for r in tables.history(lab.db) if r["new_state"] == "configured"]
    assert start >= max(configured) + 2
    assert start == int(start)
    positive = [row for row in tables.entries(lab.db) if row["start_time"] > 0]
    assert len(positive) == 8
    for row in positive:
        assert row["sent_at"] >= start + row["start_time"], row
        assert row["planned_at"] == pytest.approx(start + row["start_time"], abs=0.01)


def test_each_claim_and_result_is_in_its_guest(ran: tuple[Lab, Any, list[guests.Guest]]) -> None:
    lab, _, machines = ran
    for number, machine in enumerate(machines, 1):
        found = in_guest(machine, "find", "/var/launch", "-path", "*/attempt.*/exit")
        ran_here = [r for r in tables.attempts(lab.db, f"vm{number}") if r["pid"] is not None]
        assert len(found.splitlines()) == len(ran_here)


def test_transfer_brings_files_and_empty_directories(
    ran: tuple[Lab, Any, list[guests.Guest]],
) -> None:
    lab, _, machines = ran
    out = lab.folder / "out" / "vm4" / "var" / "data"
    assert (out / "empty").is_dir()
    there = base64.b64decode(in_guest(machines[3], "base64", "/var/data/a b"))
    assert (out / "a b").read_bytes() == there
    assert not (out / "a b").stat().st_mode & 0o002


def test_output_is_kept_apart_and_in_the_log(ran: tuple[Lab, Any, list[guests.Guest]]) -> None:
    lab, _, _ = ran
    logs = lab.folder / "lab.db.d" / "logs.1"
    assert (logs / "vm4" / "3.1.out").read_text() == "one\n"
    assert (logs / "vm4" / "3.1.err").read_text() == "two\n"
    text = (logs / "vm4.log").read_text()
    assert "[1 sh out] one" in text
    assert "[1 sh err] two" in text


def test_commands_reach_a_real_guest(ran: tuple[Lab, Any, list[guests.Guest]]) -> None:
    lab, _, machines = ran
    done = lab.run("exec", "vm1", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 7)
    (lab.folder / "data").write_bytes(bytes(range(256)) * 5000)
    assert lab.run("push", "vm1", str(lab.folder / "data"), "/var/new dir/it's").returncode == 0
    assert lab.run("pull", "vm1", "/var/new dir/it's", str(lab.folder / "back")).returncode == 0
    assert (lab.folder / "back").read_bytes() == (lab.folder / "data").read_bytes()
    facts = json.loads(lab.run("info", "vm1", "--json").stdout)
    assert facts["health"] == "ok"
    boot = in_guest(machines[0], "cat", "/proc/sys/kernel/random/boot_id").strip()
    assert facts["boot_id"] == boot


def test_failed_entries_are_retried_and_nothing_else(
    ran: tuple[Lab, Any, list[guests.Guest]],
) -> None:
    lab, _, machines = ran
    before = in_guest(machines[1], "cat", "/var/record")
    done = lab.run("run", "--retry", timeout=120, VMRM_TIMEOUT_SCALE="1")
    assert done.returncode == 1, done.stderr
    again = [row for row in tables.attempts(lab.db) if row["attempt"] == 2]
    assert [
        (row["server_name"], row["ordinal"]) for row in again if row["server_name"] != "vm2"
    ] == [
        ("vm4", 3),
        ("vm4", 4),
        ("vm4", 5),
    ]
    assert in_guest(machines[1], "cat", "/var/record") == before


@pytest.mark.parametrize("has_date", [True, False])
def test_a_clock_is_set_without_hwclock_or_said_to_be_wrong(
    tmp_path: Path, micro_vm: guests.Guest, has_date: bool
) -> None:
    lab, away = Lab(tmp_path), ["/sbin/hwclock", *([] if has_date else ["/bin/date"])]
    vm = {"name": "vm1", "path": str(micro_vm.agent_path), "launch_dir": "/var/clock"}
    vm["schedule"] = [{"start_time": -1, "executable": "true"}]
    (tmp_path / "lab.json").write_text(json.dumps({"experiment": {"start_buffer": 0}, "vm": [vm]}))
    with micro_vm.agent() as agent:
        agent.run(
            "/bin/sh", "-c", "date -s @1000000000; " + "".join(f"mv {p} {p}x; " for p in away)
        )
    try:
        # An agent looks for hwclock at its first guest-set-time, and remembers: one that has seen
        # it sets the clock before it fails to start it. So this one must not have been asked yet.
        micro_vm.kill_agent()
        assert lab.run("run", str(tmp_path / "lab.json")).returncode == 0
        with micro_vm.agent() as agent:
            off = agent.call("guest-get-time") / 1e9 - time.time()
        told = "its clock is off" in lab.run("status").stdout
        assert (abs(off) < 60, told) == (has_date, not has_date)
    finally:
        with micro_vm.agent() as agent:
            back = "".join(f"mv {p}x {p}; " for p in away)
            agent.run("/bin/sh", "-c", f"{back} date -s @{time.time():.0f}")
        micro_vm.kill_agent()  # this one remembers that there is none
