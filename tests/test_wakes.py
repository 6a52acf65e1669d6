"""News reaches who waits for it: at once when it is woken, and by and by when it is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, entry, stand_ins
from test_handler import outcomes, until
from test_lives import running
from test_review import only


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with one stand-in, nothing loaded."""
    with stand_ins(tmp_path / "agents", 1):
        yield Lab(tmp_path)


# --- the safety net


def deafen(lab: Lab) -> None:
    """Have every wake-up from now on go to nobody."""
    for path in (lab.folder / "lab.db.d" / "wake").iterdir():
        path.unlink()


def test_with_every_wake_up_lost_the_last_vms_handler_sees_its_own_start_time(lab: Lab) -> None:
    only(lab, entry(1, -1, "sleep 1"), entry(2, 0.1))
    with running(lab) as run:
        until(lambda: outcomes(lab))
        deafen(lab)
        until(lambda: run.poll() is not None, 30)
    assert run.returncode == 0, lab.logs()
    lab.audit()
