"""A guest that is busy without getting on becomes `failed`, and holds up nobody's time 0."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostile
import lab
import pytest
from conftest import Cli

AGENT_TIMEOUT = 3.0


@dataclass
class Stuck:
    """How a guest does not get on, and what is said of it; `at` is when its entry is due."""

    rules: Callable[[], dict[str, hostile.Behaviour]]
    why: str
    at: float = -10
    more: dict[str, Any] = field(default_factory=dict)


def _programs(*words: str) -> Callable[[], dict[str, hostile.Behaviour]]:
    def rules() -> dict[str, hostile.Behaviour]:
        return dict.fromkeys(("guest-exec", "guest-exec-status"), hostile.never_exits(*words))

    return rules


FETCH = {"transfer": [{"location": "@/big"}]}
PLACE = {"content": [{"location": "big", "content": "x" * 300_000}]}
GUESTS = {
    "listing": Stuck(_programs("find -H"), "does not end.*/big", more=FETCH),
    "listing-timeout": Stuck(_programs("find -H"), "timed out", more=FETCH | {"timeout": 0.5}),
    "listing-later": Stuck(_programs("find -H"), "does not end.*/big", at=0.1, more=FETCH),
    "every-program": Stuck(_programs(), "does not end.*stage|no progress through the agent"),
    "layout": Stuck(_programs("/.stage"), "does not end.*stage"),
    "reboot-check": Stuck(
        _programs("exit 0; IFS="),
        "no progress through the agent",
        more={"arguments": ["-c", "exit 10"]},
    ),
    "other-boots": Stuck(lambda: {"guest-file-read": hostile.other_boot()}, "rebooted"),
    "read-crumbs": Stuck(lambda: {"guest-file-read": hostile.crumbs}, "crumbs", more=FETCH),
    "write-crumbs": Stuck(lambda: {"guest-file-write": hostile.crumbs}, "crumbs", more=PLACE),
    "slow-output": Stuck(
        lambda: {"guest-file-read": hostile.slow(0.05)},
        "timed out",
        more={"arguments": ["-c", "head -c 20000000 /dev/zero"], "timeout": 1},
    ),
    "drip": Stuck(lambda: {"guest-exec-status": hostile.drip}, "no progress through the agent"),
    "silence": Stuck(lambda: {"guest-exec": hostile.silence}, "no progress through the agent"),
}


@pytest.fixture
def stuck(tmp_path: Path) -> Any:
    """Yield after an experiment was written: a guest for each of GUESTS, and an honest one."""
    with ExitStack() as stack:
        folder = tmp_path / "agents"
        stack.enter_context(lab.stand_ins(folder, len(GUESTS) + 1))
        vms = []
        for number, (name, guest) in enumerate(GUESTS.items(), 1):
            place, path = folder / str(number), folder / f"h{number}.sock"
            (place / "big").write_bytes(b"x" * 300_000)
            agent = stack.enter_context(hostile.hostile(folder / f"{number}.sock", path))
            agent.rules.update(guest.rules())
            entry = {"start_time": guest.at, "executable": "sh", "arguments": ["-c", "true"]}
            text = json.dumps(entry | guest.more).replace("@", str(place))
            vms.append(_vm(name, path, place, [json.loads(text)]))
        entries = [{"start_time": at, "executable": "true"} for at in (-1, 0.1)]
        vms.append(_vm("honest", folder / f"{number + 1}.sock", folder / str(number + 1), entries))
        experiment = {"start_buffer": 0.2, "on_failure": "drop"}
        (tmp_path / "lab.json").write_text(json.dumps({"experiment": experiment, "vm": vms}))
        yield


def _vm(name: str, path: Path, place: Path, schedule: list[dict[str, Any]]) -> dict[str, Any]:
    place = {"path": str(path), "launch_dir": f"{place}/launch"}
    return {"name": name, "agent_timeout": AGENT_TIMEOUT, "schedule": schedule, **place}


def test_a_guest_that_does_not_get_on_fails_and_holds_nobody(cli: Cli, stuck: None) -> None:
    result = cli(
        "run", "lab.json", "--timeout", "60", env={"VMRM_TIMEOUT_SCALE": "0.05"}, timeout=90
    )
    told = {vm["vm"]: vm for vm in json.loads(cli("status", "--json").out)}
    assert result.code == 1, result.err
    assert told["honest"]["state"] == "configured"
    for name, guest in GUESTS.items():
        assert told[name]["state"] == "failed", name
        assert re.search(guest.why, told[name]["reason"]), told[name]
    done = cli("schedule", "show", "honest", "--json").out
    assert done.count('"done"') == 2, done
