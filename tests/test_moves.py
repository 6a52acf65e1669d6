"""Which moves a VM may make: one table, every pair of states, nothing else decides."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import tables

import vmrm
from vmrm import VM_MOVES, VMState

# What is decided, written down a second time: from each state, where to.
DECIDED = {
    "uninitialized": {"configuring", "n/a", "failed", "testing"},
    "configuring": {"configured", "failed"},
    "configured": {"failed"},
    "failed": {"configuring", "configured"},
    "testing": {"uninitialized", "configuring", "configured", "failed", "n/a"},
    "n/a": set(),
}
PAIRS = list(product(DECIDED, DECIDED))


@pytest.fixture
def mapping(tmp_path: Path) -> Iterator[vmrm.VMMapping]:
    with vmrm.VMMapping(db=tmp_path / "lab.db") as opened:
        yield opened


def test_exactly_the_decided_moves_are_made(mapping: vmrm.VMMapping) -> None:
    for old, new in PAIRS:
        mapping.put("u", "web", state=old)
        if new == old or new in DECIDED[old]:
            assert mapping.set_vm_state_by_uuid("u", new)["state"] == new
        else:
            with pytest.raises(ValueError, match=f"cannot move from '{old}' to '{new}'"):
                mapping.set_vm_state_by_uuid("u", new)
        expected = new if new in DECIDED[old] else old
        assert mapping.get("u")["state"] == expected, (old, new)


def test_an_unknown_word_is_refused_and_named() -> None:
    for old, word in product(DECIDED, ["ready", "", "CONFIGURED", "configured ", "n/A"]):
        with pytest.raises(ValueError, match=f"unknown VM state {word!r} \\(from {old!r}\\)"):
            vmrm.checked_move(old, word)


def test_every_state_is_in_the_table_and_can_be_reached() -> None:
    assert set(VM_MOVES) == set(VMState) == set(DECIDED)
    reached, todo = set[VMState](), [VMState.UNINITIALIZED]
    while todo:
        state = todo.pop()
        if state not in reached:
            reached.add(state)
            todo += VM_MOVES[state]
    assert reached == set(VMState)


def test_only_a_vm_that_is_not_managed_stays_so_for_ever() -> None:
    assert [state for state, targets in VM_MOVES.items() if not targets - {state}] == ["n/a"]


def test_the_present_state_again_is_no_move(mapping: vmrm.VMMapping) -> None:
    mapping.put("u", "web", state="configuring")
    mapping.set_vm_state_by_uuid("u", "failed", reason="no disk")
    before = tables.vms(mapping.db.path)
    mapping.set_vm_state_by_uuid("u", "failed")
    assert tables.vms(mapping.db.path) == before
    assert len(tables.history(mapping.db.path)) == 2


def test_a_refused_move_changes_no_row(mapping: vmrm.VMMapping) -> None:
    mapping.put("u", "web")
    before = tables.vms(mapping.db.path)
    with pytest.raises(ValueError, match="cannot move"):
        mapping.set_vm_state_by_uuid("u", "configured")
    assert tables.vms(mapping.db.path) == before
