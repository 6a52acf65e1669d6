"""The figures of a report: what a first attempt tells of the plan, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tables
from cli_lab import until
from lab import Lab, kill, stand_ins

import vmrm


def program(at: float, script: str) -> dict[str, Any]:
    return {"start_time": at, "executable": "sh", "arguments": ["-c", script]}


def outcomes(lab: Lab) -> list[str]:
    return [row["outcome"] for row in tables.entries(lab.db) if row["outcome"]]


def lateness(lab: Lab) -> tuple[float, float]:
    """Return the median and the worst lateness of the one VM, in milliseconds."""
    done = lab.run("run", "--json")
    row = json.loads(done.stdout)["vms"][0]
    return row["late_p50_ms"], row["late_worst_ms"]


def test_a_cleared_start_time_stays_cleared(tmp_path: Path) -> None:
    with vmrm.Database(tmp_path / "lab.db") as db:
        mapping, start = vmrm.VMMapping(db=db), vmrm.ExperimentStart(db=db)
        mapping.put("u1", "web1", "configured")
        start.set_launch_time()
        assert start.get_start_time() is not None
        start.clear_start_time()
        mapping.put("u2", "web2", "configured")
        mapping.set_vm_state_by_uuid("u1", "failed")
        mapping.set_vm_state_by_uuid("u1", "configured")
        mapping.destroy_one("u2")
        assert start.get_start_time() is None
        start.set_launch_time()
        assert start.get_start_time() is not None, "a new launch sets it anew"
        start.clear_start_time()
        assert start.add_start_time() == start.get_start_time()


def test_a_retry_and_an_outage_do_not_count_as_lateness(tmp_path: Path) -> None:
    lab = Lab(tmp_path, start_buffer=0)
    gate = f'test -e "{tmp_path}/fixed" || exit 3'
    waits = f'while [ ! -e "{tmp_path}/go" ]; do sleep 0.05; done'
    due = 5.0
    lab.write(lambda _: [program(0.1, gate), program(0.2, waits), program(due, "true")])
    assert lab.run("load", str(tmp_path / "lab.json")).returncode == 0
    with stand_ins(tmp_path / "agents", 1):
        with lab.start("run") as first:
            until(lambda: outcomes(lab)[:2] == ["failed", "running"])
            for pid in filter(None, [lab.supervisor_pid(), *lab.handler_pids()]):
                kill(pid)  # at once: `stop` may take until the third is due
            first.communicate(timeout=30)
        start = tables.experiment(lab.db)["start_at"]
        sent = [row for row in tables.attempts(lab.db) if row["sent_at"]]
        late = max(row["sent_at"] - row["planned_at"] for row in sent) * 1000
        until(lambda: time.time() > start + due + 1)
        for name in ("fixed", "go"):
            (tmp_path / name).touch()
        assert lab.run("run", "--retry").returncode == 0
        worst = lateness(lab)[1]
    assert worst <= round(late, 1) + 0.1
    again, _, overdue = (row["sent_at"] for row in tables.entries(lab.db))
    assert min(again - start - 0.1, overdue - start - due) > 0.9, "they did begin late"


def test_a_continued_transfer_keeps_the_time_when_it_was_sent(tmp_path: Path) -> None:
    lab = Lab(tmp_path, start_buffer=0)
    again = {"location": f"{lab.guest(1)}/launch/*", "interval": 0.2}
    wait = f'while [ ! -e "{tmp_path}/go" ]; do sleep 0.05; done'
    lab.write(lambda _: [program(0.1, wait), {"start_time": 0.2, "transfer": [again]}])
    assert lab.run("load", str(tmp_path / "lab.json")).returncode == 0
    with stand_ins(tmp_path / "agents", 1):
        with lab.start("run") as first:
            until(
                lambda: (
                    lab.db.exists()
                    and [row["outcome"] for row in tables.attempts(lab.db)] == ["running"] * 2
                )
            )
            assert lab.run("stop").returncode == 0
            first.communicate(timeout=30)
        sent = [row["sent_at"] for row in tables.attempts(lab.db)]
        (tmp_path / "go").touch()
        assert lab.run("run").returncode == 0
    assert [row["sent_at"] for row in tables.attempts(lab.db)] == sent


# Sets the wall clock of the very process that imports it by an hour, once a file is there.
STEPPED = """
import os, sys, time, vmrm
real, step, mark = vmrm.Clock.wall, float(os.environ["STEP"]), os.environ["MARK"]
vmrm.Clock.wall = staticmethod(lambda: real() + (step if os.path.exists(mark) else 0.0))
sys.exit(vmrm.main(sys.argv[1:]))
"""


def test_a_step_of_the_clock_is_no_lateness_and_no_negative_time(tmp_path: Path) -> None:
    for step in (-3600, 3600):
        lab = Lab(tmp_path / f"{step}", start_buffer=0)
        lab.folder.mkdir()
        mark = lab.folder / "mark"
        script = f'touch "{mark}"'
        lab.write(lambda _, script=script: [program(0.1, script), program(2.5, "true")])
        assert lab.run("load", str(lab.folder / "lab.json")).returncode == 0
        vmrm_db = vmrm.Database(lab.db)
        with vmrm_db, stand_ins(lab.folder / "agents", 1):
            vmrm.launch(vmrm_db)
            environment = os.environ | {"STEP": f"{step}", "MARK": f"{mark}"}
            command = [sys.executable, "-c", STEPPED, "_supervise", str(lab.db)]
            folder = Path(vmrm.__file__).parent
            done = subprocess.run(command, env=environment, cwd=folder, timeout=60, check=False)
            assert done.returncode == 0
            row = vmrm.report_of(vmrm.read_run(vmrm_db))
        worst = row.rows[0]["late_worst_ms"]
        assert abs(worst) < 600_000, "not the hour of the step"
        total = float(row.summary.rpartition(", ")[2].split()[0])
        assert 0 < total < 600
