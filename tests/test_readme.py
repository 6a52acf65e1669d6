"""Everything README shows is run here, and every table in it compared with the code.

In what README shows of an output, `…` stands for anything, and blanks and rules for any number of
them. `/tmp/lab` stands for a temporary directory.
"""

from __future__ import annotations

import builtins
import configparser
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import guests
import pexpect  # type: ignore[import-untyped]
import pytest
import tables
from conftest import ROOT, Cli
from lab import VMRM

import vmrm

README = (ROOT / "README.md").read_text()
MARK = "=8="


class Block(NamedTuple):
    """A fenced block: the section it stands in, its language and its text."""

    section: str
    language: str
    text: str


def blocks() -> list[Block]:
    """Return README's fenced blocks in order."""
    found, section = [], ""
    pattern = r"^## ([^\n]*)$|^```(\w*)\n(.*?)^```$"
    for match in re.finditer(pattern, README, re.MULTILINE | re.DOTALL):
        if match[1] is not None:
            section = match[1]
        else:
            found.append(Block(section, match[2], match[3]))
    return found


def steps(console: str) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with the output that is shown."""
    if console.startswith("$ vmrm demo\n"):  # whose own output has lines with a dollar
        return [("vmrm demo", console.partition("\n")[2])]
    parts = re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]


def plain(text: str) -> str:
    """Return text with any number of blanks as one, rules likewise, and no blank lines."""
    text = re.sub("─[─ ]*", "─", text.replace("\r", ""))
    lines = (re.sub("[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def matches(shown: str, real: str) -> bool:
    """Whether a real output is what README shows."""
    lines = []
    for line in plain(shown).splitlines():
        whole = "[^\n]*".join(re.escape(part) for part in line.split("…")) + "\n"
        lines.append("(?:.*\n)?" if line == "…" else whole)
    return re.fullmatch("".join(lines), f"{plain(real)}\n".lstrip("\n"), re.DOTALL) is not None


def run_section(
    section: str, folder: Path, sockets: Mapping[str, Path] = types.MappingProxyType({})
) -> list[tuple[str, str, str]]:
    """Run the console blocks of a section in one shell; return (command, shown, real).

    `sockets` are the agents of guests that the section has booted, by their names below /tmp/lab.
    """
    lab = folder / "lab"
    lab.mkdir()
    for name, path in sockets.items():
        (lab / name).symlink_to(path)
    tool = folder / "bin" / "vmrm"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {shlex.join(VMRM)} "$@"\n')
    tool.chmod(0o755)
    todo: list[tuple[str, str]] = []
    for block in blocks():
        text = block.text.replace("/tmp/lab", str(lab))
        name = re.match(r"# (\S+)\n", text)
        if block.section == section and block.language == "console":
            todo += steps(text)
        elif block.section == section and name:
            (lab / name[1]).write_text(text)
    lines = ["exec 2>&1", "trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT"]
    for command, _ in todo:
        lines += [command, f"echo {MARK}"]
        if command.endswith("&"):  # an agent, which says when it listens
            # By exec, so that it is the agent that is killed in the end, not a shell above it.
            lines[-2:] = [f"coproc {{ exec {command[:-1]}; }}", "read -r said <&${COPROC[0]}"]
            lines += ["echo $said", f"echo {MARK}"]
    (folder / "session.sh").write_text("\n".join(lines) + "\n")
    text = _in_terminal(folder, lab)
    real = text.split(f"{MARK}\r\n")
    assert len(real) == len(todo) + 1, text
    return [(c, shown, out) for (c, shown), out in zip(todo, real, strict=False)]


def _in_terminal(folder: Path, lab: Path) -> str:
    environment = os.environ | {
        "HOME": str(folder),
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
    }
    for name in ("VMRM_DB", "XDG_STATE_HOME", "COLUMNS"):
        environment.pop(name, None)
    child = pexpect.spawn(
        "bash",
        [str(folder / "session.sh")],
        env=environment,
        cwd=str(lab),
        dimensions=(40, 160),
        encoding="utf-8",
        timeout=90,
    )
    try:
        child.expect(pexpect.EOF)
        return str(child.before)
    finally:
        child.close(force=True)


REAL = "A real guest, from nothing to a finished experiment"
SECTIONS = sorted({block.section for block in blocks() if block.language == "console"} - {REAL})


@pytest.mark.parametrize("section", SECTIONS)
def test_sessions_give_what_they_show(section: str, tmp_path: Path) -> None:
    for command, shown, real in run_section(section, tmp_path):
        assert matches(shown, real), f"$ {command}\n{real}\n--- README shows\n{shown}"


@pytest.mark.vm
def test_the_session_with_a_real_guest_gives_what_it_shows(
    micro_vm: guests.Guest, tmp_path: Path
) -> None:
    """It is a micro VM that stands for the Debian guest, whose building takes minutes."""
    for command, shown, real in run_section(REAL, tmp_path, {"web.sock": micro_vm.agent_path}):
        assert matches(shown, real), f"$ {command}\n{real}\n--- README shows\n{shown}"


# === tables ======================================================================================


def rows(*header: str) -> list[list[str]]:
    """Return the cells of README's table with that header."""
    head = "| " + " | ".join(header) + " |\n|" + "---|" * len(header) + "\n"
    assert README.count(head) == 1, f"no table, or more than one: {head}"
    lines = README.partition(head)[2].partition("\n\n")[0].splitlines()
    return [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in lines]


def named_options() -> Iterator[tuple[str, str]]:
    """Yield each command that README writes out, with each option that it gives to it."""
    command = r"vmrm (?:--quiet )?((?:pool |schedule |store )?[a-z-]+)\b"
    for words in re.findall(rf"{command}([^|`\n']*)", README.replace("\\\n", " ")):
        for option in re.findall(r" --([a-z-]+)", words[1].partition(" -- ")[0]):
            yield words[0], option


def test_every_option_that_is_shown_is_one_of_its_command(cli: Cli) -> None:
    shown: dict[str, set[str]] = {}
    for command, option in named_options():
        shown.setdefault(command, set()).add(option)
    assert {"run", "pool acquire", "pool group", "pool hold"} <= shown.keys()
    settings = {cells[0].strip("`") for cells in rows("setting", "default", "means")}
    for command, wanted in shown.items():
        told = cli(*command.split(), "--help")
        known = set(re.findall(r"--(\w+)", told.out + told.err))
        if command == "pool group":  # its options are the settings, and then vmrm's hooks'
            known |= settings
        assert wanted <= {name.replace("_", "-") for name in known}, command


def test_every_key_of_experiment_files_is_in_a_table() -> None:
    for header, keys in (
        ("[experiment]", vmrm.EXPERIMENT_KEYS),
        ("[[vm]]", vmrm.VM_KEYS),
        ("[[vm.schedule]]", vmrm.ENTRY_KEYS),
    ):
        table = {row[0].strip("`"): row[1] for row in rows(header, "must be", "means")}
        wanted = {key: text for key, (_, text) in keys.items()}
        if header == "[[vm.schedule]]":
            wanted |= dict.fromkeys(vmrm.DATA_KEYS, "a list of tables")
        assert table == wanted


def test_every_setting_of_a_group_is_in_a_table_with_its_default(tmp_path: Path) -> None:
    with vmrm.Database(tmp_path / "lab.db") as db:
        vmrm.put_group(db, "g", {})
        row = tables.pool_groups(db.path)[0]
        known = vmrm.group_settings(db)
    expected = {name: row[column] for name, column in known.items()}
    shown = {cells[0].strip("`"): cells[1] for cells in rows("setting", "default", "means")}
    assert shown == {
        name: "none" if value in (None, "") else f"{value:g}" for name, value in expected.items()
    }


def test_the_parts_of_files_contents_and_transfers_are_named() -> None:
    table = {row[0].strip("`"): row[2] for row in rows("[[vm.schedule]]", "must be", "means")}
    for kind, keys in vmrm.DATA_KEYS.items():
        for key in keys.keys() - {"sha256"}:  # which loading adds
            assert f"`{key}`" in table[kind], (kind, key)


def test_the_table_of_states_is_that_of_the_code() -> None:
    expected = [
        [f"`{state}`", ", ".join(f"`{to}`" for to in vmrm.VMState if to in moves and to != state)]
        for state, moves in vmrm.VM_MOVES.items()
    ]
    assert [row[:2] for row in rows("state", "may become", "means")] == expected


def test_the_exit_codes_are_those_of_the_code() -> None:
    def family(error: type[vmrm.VmrmError]) -> set[int]:
        return {error.code}.union(*map(family, error.__subclasses__()))

    documented = {int(code) for row in rows("exit code", "means") for code in row[0].split(", ")}
    assert documented == family(vmrm.VmrmError) | {0, 126, 127, 130, 255}


# === other blocks ================================================================================


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert {block.language for block in blocks()} == {"console", "toml", "python", "sh"}
    for block in blocks():
        if block.language in ("toml", "python"):  # runs as a file of its section, or is loaded
            assert re.match(r"# \S+\.(toml|py)\n", block.text), block.text


def test_every_experiment_file_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(next(b.text for b in blocks() if b.text.startswith("# traced.py")))
    monkeypatch.setenv("VMRM_DRIVERS", str(driver))
    found = [block.text for block in blocks() if block.language == "toml"]
    assert len(found) == 2
    used: set[str] = set()
    for text in found:
        path = tmp_path / "shown.toml"
        path.write_text(text)
        assert vmrm.read_experiment(path).vms
        used |= set(re.findall(r"^(\w+) =", text, re.MULTILINE))
    keys = {*vmrm.EXPERIMENT_KEYS, *vmrm.VM_KEYS, *vmrm.ENTRY_KEYS, *vmrm.DATA_KEYS}
    # Those that no session can show: what is refused, or needs a file beside this one.
    assert keys - used == {"schedule", "resume", "file"}


def test_shell_blocks_are_commands_of_this_project() -> None:
    """`pip install` is run by test_package, QEMU's options by every micro VM."""
    text = "".join(block.text for block in blocks() if block.language == "sh")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for path in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / path).is_file(), path
    extras = re.findall(r"pip install '\.\[(\w+)\]'", text)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert extras
    assert all(extra in setup["options.extras_require"] for extra in extras)
    real = (ROOT / "tests" / "guests.py").read_text()
    for option in ("virtio-serial-pci", "virtserialport", "server=on,wait=off", "-chardev"):
        assert option in text
        assert option in real
    assert guests.PORT == "org.qemu.guest_agent.0"
    assert f"name={guests.PORT}" in text


def test_the_numbers_of_the_text_are_those_of_the_code() -> None:
    assert f"({vmrm.MAX_REBOOTS} times at most)" in README
    assert f"exit code {vmrm.REBOOT_EXIT_CODE}, or leaves" in README
    assert f"up to {vmrm.MAX_OUTPUT_BYTES >> 20} MiB per entry" in README
    assert f"### {vmrm.__version__}\n" in README


def test_names_in_the_text_exist() -> None:
    section = README.partition("## From Python")[2].partition("## How it works")[0]
    for name in re.findall(r"`([A-Z]\w+)`", section):
        assert hasattr(vmrm, name) or hasattr(builtins, name), name
