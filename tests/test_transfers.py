"""Transfers pass by pass: what changed is fetched, and files that move under the reader's feet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import stand_in

import vmrm

LONG_AGO = 1_700_000_000


class Transfers:
    """Transfers that fetch `source` of a guest, and a note of what they really read."""

    def __init__(self, db: vmrm.Database, agent: Path, folder: Path) -> None:
        self.source, self.root = folder / "source", folder / "out"
        self.source.mkdir()
        self.copies = self.root.joinpath("vm", *self.source.parts[1:])
        if not db.value("SELECT 1 FROM vms"):
            vmrm.VMMapping(db=db).put("u", "vm", path=str(agent))
        self.config = vmrm.handler_config(db, "vm")
        self.reads: list[tuple[str, int]] = []
        self.before_read: Callable[[Path], object] = lambda path: None
        self.connect()

    def connect(self) -> None:
        """Connect, as each handler does."""
        handler = vmrm.VMResourceHandler(self.config)
        assert handler.connect_to_driver()
        self.driver, self.guest = handler.driver, handler.vm.guest
        self.passes = vmrm.Transfers(handler.vm)
        pull = self.driver.pull

        def noted(path: str, sink: Any, *, offset: int = 0, limit: int | None = None) -> Any:
            self.reads.append((Path(path).name, offset))
            self.before_read(Path(path))
            return pull(path, sink, offset=offset, limit=limit)

        self.driver.pull = noted  # type: ignore[method-assign, assignment]

    def write(self, name: str, data: bytes, age: float = 100) -> Path:
        """Write a file of the guest that was last changed `age` seconds ago."""
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (time.time() - age,) * 2)
        return path

    def run(self, location: Path | str | None = None) -> tuple[list[str], list[tuple[str, int]]]:
        """Make one pass; return its faults, and what was read from which offset."""
        where = str(self.source if location is None else location)
        self.reads.clear()
        faults = vmrm.run_steps(self.passes.pass_steps(where, self.root), time.sleep)
        return faults, sorted(self.reads)

    def copy(self, name: str) -> bytes:
        """Return the host's copy."""
        return (self.copies / name).read_bytes()


@pytest.fixture(params=["stand-in", pytest.param("qemu-ga", marks=pytest.mark.qga)])
def transfers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transfers]:
    """The same test with both agents."""
    with vmrm.Database(tmp_path / "lab.db") as db:
        if request.param == "qemu-ga":
            agent = request.getfixturevalue("qemu_ga")()
            yield Transfers(db, agent.path, tmp_path)
            return
        with stand_in(tmp_path / "agent") as agent:
            yield Transfers(db, agent.path, tmp_path)


def test_everything_arrives_once_but_links_and_what_is_no_file(transfers: Transfers) -> None:
    transfers.write("a/b c", b"text")
    transfers.write("empty", b"")
    (transfers.source / "hollow").mkdir()
    (transfers.source / "link").symlink_to("/etc/hostname")
    os.mkfifo(transfers.source / "pipe")
    assert transfers.run() == ([], [("b c", 0), ("empty", 0)])
    found = {str(path.relative_to(transfers.copies)) for path in transfers.copies.rglob("*")}
    assert found == {"a", "a/b c", "empty", "hollow"}
    assert (transfers.copy("a/b c"), transfers.copy("empty")) == (b"text", b"")
    assert transfers.run() == ([], [])


def test_another_handler_knows_what_is_there_already(transfers: Transfers) -> None:
    transfers.write("old", b"text")
    transfers.write("to come", b"text", age=-5000)
    transfers.run()
    transfers.driver.close()
    transfers.connect()
    before = transfers.copies.joinpath("old").stat()
    assert transfers.run() == ([], [])
    assert transfers.copies.joinpath("old").stat() == before


def test_a_change_within_the_second_that_was_seen_is_noticed(transfers: Transfers) -> None:
    path = transfers.write("now", b"one", age=0)
    at = path.stat().st_mtime
    assert transfers.run() == ([], [("now", 0)])
    path.write_bytes(b"two")
    os.utime(path, (at, at))
    transfers.run()
    assert transfers.copy("now") == b"two"
    os.utime(path, (LONG_AGO, LONG_AGO))
    transfers.run()
    assert transfers.copies.joinpath("now").stat().st_mtime == LONG_AGO


def test_of_a_file_that_has_grown_the_rest_is_fetched(transfers: Transfers) -> None:
    size = vmrm.SMALL_BYTES + 1000
    transfers.write("log", b"x" * size)
    transfers.run()
    transfers.write("log", b"x" * size + b"more", age=50)
    assert transfers.run() == ([], [("log", size)])
    assert transfers.copy("log") == b"x" * size + b"more"
    transfers.write("log", b"y" * size + b"other and longer", age=40)
    assert transfers.run() == ([], [("log", 0)])
    assert transfers.copy("log") == b"y" * size + b"other and longer"


def test_a_file_that_is_written_while_it_is_read_is_a_beginning_at_first(
    transfers: Transfers,
) -> None:
    path = transfers.write("log", b"begin")
    transfers.before_read = lambda path: path.write_bytes(b"begin and more")
    assert transfers.run()[0] == []
    assert transfers.copy("log") == b"begin"
    transfers.before_read = lambda path: None
    assert transfers.run() == ([], [("log", 0)])
    assert transfers.copy("log") == path.read_bytes()


def test_a_file_that_shrinks_while_it_is_read_is_right_after_the_next_pass(
    transfers: Transfers,
) -> None:
    transfers.write("log", b"z" * 5000)
    transfers.before_read = lambda path: path.write_bytes(b"short")
    assert transfers.run()[0] == []
    assert transfers.copy("log") == b"short"
    transfers.before_read = lambda path: path.write_bytes(b"")
    transfers.run()
    transfers.before_read = lambda path: None
    transfers.run()
    assert transfers.copy("log") == b""


def test_what_vanishes_is_no_fault_unless_it_was_asked_for(transfers: Transfers) -> None:
    path = transfers.write("gone", b"text")
    transfers.write("kept", b"text")
    transfers.before_read = lambda read: read == path and path.unlink()
    assert transfers.run()[0] == []
    assert transfers.copy("kept") == b"text"
    path = transfers.write("gone", b"text")
    (fault,) = transfers.run(path)[0]
    assert "gone" in fault
    (fault,) = transfers.run(path)[0]
    assert fault.startswith(f"the VM has no file at {str(path)!r}")
    assert not list(transfers.root.rglob(".vmrm-*"))


def test_a_directory_in_a_files_place_is_told_and_keeps_nothing_else_back(
    transfers: Transfers,
) -> None:
    path = transfers.write("change", b"text")
    transfers.run()
    path.unlink()
    transfers.write("change/inside", b"text")
    transfers.write("other", b"text")
    faults, reads = transfers.run()
    assert reads == [("other", 0)]
    named = sorted(fault.partition(": ")[0] for fault in faults)  # without a time: told once
    assert named == [repr(f"{path}"), repr(f"{path}/inside")]
    assert all("Not a directory" in fault for fault in faults)
    assert transfers.copy("change") == b"text"


def test_a_guest_without_sha256sum_is_asked_for_the_whole_file(transfers: Transfers) -> None:
    size = vmrm.SMALL_BYTES + 1000
    transfers.write("log", b"x" * size)
    transfers.run()
    transfers.write("log", b"x" * size + b"more", age=50)
    argv = transfers.guest.argv
    transfers.guest.argv = lambda verb, *words: (  # type: ignore[method-assign]
        ["/bin/sh", "-c", "exit 127"] if verb == "hash" else argv(verb, *words)
    )
    assert transfers.run() == ([], [("log", 0)])
    assert transfers.copy("log") == b"x" * size + b"more"
