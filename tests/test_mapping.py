"""VMMapping: what may be put, what comes back, and what is refused."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tables
from hypothesis import given
from hypothesis import strategies as st
from lab import living_handler

import vmrm
from vmrm import VMMapping


@pytest.fixture
def mapping(tmp_path: Path) -> Iterator[VMMapping]:
    with VMMapping(db=tmp_path / "lab.db") as opened:
        yield opened


def test_what_is_put_comes_back(mapping: VMMapping) -> None:
    mapping.put(
        "u", "web", "configuring", "-10", "10.0.0.1", path="/run/w.sock", launch_dir="/opt/l"
    )
    assert mapping.get("u") == {
        "server_uuid": "u",
        "server_name": "web",
        "state": "configuring",
        "current_time": "-10",
        "control_ip": "10.0.0.1",
        "path": "/run/w.sock",
        "engine": "QemuVM",
        "launch_dir": "/opt/l",
    }


def test_the_least_that_can_be_put_gets_the_documented_defaults(mapping: VMMapping) -> None:
    mapping.batch_put([{"server_uuid": "u", "server_name": "web"}])
    row = mapping.get("u")
    assert (row["state"], row["current_time"], row["control_ip"]) == ("uninitialized", "", "")


def test_putting_a_uuid_again_replaces_that_vm_in_its_place(mapping: VMMapping) -> None:
    mapping.put("u", "web", state="configuring")
    mapping.put("v", "db")
    mapping.put("u", "web2")
    assert [row["server_name"] for row in rows(mapping)] == ["web2", "db"]
    assert mapping.get("u")["state"] == "uninitialized"


def rows(mapping: VMMapping, **filters: Any) -> list[dict[str, Any]]:
    """Return `get_all` as the list that it is without length."""
    found = mapping.get_all(**filters)
    assert isinstance(found, list)
    return found


FAULTY: dict[str, dict[str, Any]] = {
    "no uuid": {"server_name": "web"},
    "empty uuid": {"server_uuid": "", "server_name": "web"},
    "no name": {"server_uuid": "u"},
    "name with a slash": {"server_uuid": "u", "server_name": "a/b"},
    "name with a newline": {"server_uuid": "u", "server_name": "web\n"},
    "name that looks like an option": {"server_uuid": "u", "server_name": "--help"},
    "name too long": {"server_uuid": "u", "server_name": "w" * 65},
    "name that is a number": {"server_uuid": "u", "server_name": 7},
    "unknown state": {"server_uuid": "u", "server_name": "web", "state": "ready"},
    "no state": {"server_uuid": "u", "server_name": "web", "state": None},
    "unknown key": {"server_uuid": "u", "server_name": "web", "colour": "red"},
    "no address": {"server_uuid": "u", "server_name": "web", "control_ip": None},
    "no time for the agent": {"server_uuid": "u", "server_name": "web", "agent_timeout_s": 0},
}


@pytest.mark.parametrize("entry", FAULTY.values(), ids=FAULTY)
def test_a_faulty_entry_is_refused_and_nothing_of_its_batch_is_written(
    mapping: VMMapping, entry: dict[str, Any]
) -> None:
    good = {"server_uuid": "g", "server_name": "good"}
    with pytest.raises(ValueError, match=r"VM|name|state"):
        mapping.batch_put([good, entry])
    assert mapping.get_all(length=True) == 0


@pytest.mark.parametrize("name", ["web", "WEB", "Web"])
def test_a_name_is_unique_without_regard_to_case(mapping: VMMapping, name: str) -> None:
    mapping.put("u", "web")
    with pytest.raises(ValueError, match=f"VM '{name}' cannot be added"):
        mapping.put("v", name)
    assert mapping.get_all(length=True) == 1


@given(name=st.text(max_size=70))
def test_python_and_sql_agree_on_names(name: str) -> None:
    fits = vmrm.NAME_PATTERN.fullmatch(name) is not None
    assert _sql_takes(name) == fits


def _sql_takes(name: str) -> bool:
    """Return whether schema.sql's CHECK of VM names lets a name pass."""
    script = Path(vmrm.__file__).with_name("schema.sql").read_text()
    check = script.partition("server_name TEXT NOT NULL UNIQUE COLLATE NOCASE CHECK (")[2]
    check = check.partition("*'),")[0] + "*'"
    with sqlite3.connect(":memory:") as connection:
        sql = f"SELECT {check} FROM (SELECT ? AS server_name)"  # noqa: S608 (our own text)
        taken = bool(connection.execute(sql, (name,)).fetchone()[0])
    connection.close()
    return taken


def test_filters_and_projections_narrow_what_comes_back(mapping: VMMapping) -> None:
    mapping.put("a", "web1", "configured", "-5")
    mapping.put("b", "web2", "configured", "10")
    mapping.put("c", "web3", "failed", "10")
    names = lambda found: [row["server_name"] for row in found]  # noqa: E731
    assert names(rows(mapping)) == ["web1", "web2", "web3"]
    assert names(rows(mapping, filter_state="configured")) == ["web1", "web2"]
    assert names(rows(mapping, filter_time=10)) == ["web2", "web3"]
    assert names(rows(mapping, filter_time=10, filter_state="failed")) == ["web3"]
    assert names(rows(mapping, filter_time=11)) == []
    assert mapping.get_all(filter_time=10, length=True) == 2
    projected = rows(mapping, project_dict={"server_name": 1, "state": True, "path": 0})
    assert projected[0] == {"server_name": "web1", "state": "configured"}


def test_not_ready_is_what_is_neither_configured_nor_unmanaged(mapping: VMMapping) -> None:
    for number, state in enumerate(vmrm.VMState):
        mapping.put(f"u{number}", f"vm{number}", state)
    assert mapping.get_count_vm_not_ready() == len(vmrm.VMState) - 2


def test_a_time_is_recorded_as_text(mapping: VMMapping) -> None:
    mapping.put("u", "web")
    assert mapping.set_vm_time_by_uuid("u", "-3.5")["current_time"] == "-3.5"
    assert mapping.set_vm_time_by_uuid("u", 10)["current_time"] == "10"  # type: ignore[arg-type]


def test_a_uuid_is_required_and_must_be_known(mapping: VMMapping) -> None:
    for missing in (None, ""):
        with pytest.raises(ValueError, match="server_uuid is required"):
            mapping.get(missing)
    for ask in (
        lambda: mapping.get("nobody"),
        lambda: mapping.set_vm_state_by_uuid("nobody", "failed"),
        lambda: mapping.set_vm_time_by_uuid("nobody", "1"),
    ):
        with pytest.raises(vmrm.NotFound, match="no VM 'nobody'"):
            ask()


def test_destroying_removes_one_or_all_and_asks_nothing_of_what_is_not_there(
    mapping: VMMapping,
) -> None:
    mapping.put("u", "web")
    mapping.put("v", "db")
    mapping.destroy_one("nobody")
    mapping.destroy_one("u")
    assert [row["server_name"] for row in rows(mapping)] == ["db"]
    mapping.destroy_all()
    mapping.destroy_all()
    assert rows(mapping) == []


def test_an_ordinal_is_never_used_again(mapping: VMMapping) -> None:
    mapping.put("u", "web")
    mapping.destroy_all()
    mapping.put("u", "web")
    assert tables.vms(mapping.db.path)["web"]["ordinal"] == 2


def test_nothing_is_destroyed_while_a_handler_lives(mapping: VMMapping) -> None:
    mapping.put("u", "web")
    with living_handler(mapping.db):
        for destroy in (lambda: mapping.destroy_one("u"), mapping.destroy_all):
            with pytest.raises(vmrm.Conflict, match=r"refused while 1 handler lives \(web\)"):
                destroy()
        assert vmrm.live_handlers(mapping.db) == ["web"]
    mapping.destroy_all()
    assert rows(mapping) == []


def is_open(path: Path) -> bool:
    """Return whether this process has a file open."""
    files = Path("/proc/self/fd").iterdir()
    return any(os.path.realpath(file) == str(path) for file in files)


def test_a_borrowed_database_stays_open_and_an_own_one_is_closed(tmp_path: Path) -> None:
    with vmrm.Database(tmp_path / "lab.db") as db:
        with VMMapping(db=db) as borrowing:
            borrowing.put("u", "web")
        assert is_open(db.path)
    assert not is_open(db.path)
    own = VMMapping(db=tmp_path / "lab.db")
    assert own.get_all(length=True) == 1
    assert is_open(own.db.path)
    own.close()
    assert not is_open(own.db.path)
