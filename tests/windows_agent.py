"""The stand-in agent as that of a Windows guest: `python tests/windows_agent.py DIR`.

It listens at DIR/1.sock; drive X: is the folder DIR/1/X. Its programs are those that
`windows_player` plays. What vmrm asks of PowerShell is known by its text, and played by a name.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import windows_player

import drivers
import vmrm

NAMES = {scripts[1]: verb for verb, scripts in vmrm._SCRIPTS.items()} | {
    drivers._EXISTS[1]: "exists",
    drivers._MKDIR[1]: "mkdir",
    drivers._DELETE[1]: "delete",
    drivers._BOOT_PS: "boot",
}
ONE_WORD = re.compile("(?:, )?'((?:[^'\u2018-\u201b]|(['\u2018-\u201b])\\2)*)'")


def played_script(encoded: str) -> list[str]:
    """Return the name and the words of an encoded PowerShell command."""
    script = base64.b64decode(encoded).decode("utf-16-le").removeprefix("$w = @(")
    words: list[str] = []
    while match := ONE_WORD.match(script):
        words.append(re.sub("(['\u2018-\u201b])\\1", r"\1", match[1]))
        script = script[match.end() :]
    name = NAMES.get(script.removeprefix("); "), f"not played: {script[:200]}")
    return [name, *words]


def played(root: Path, boot: str, argv: Sequence[str]) -> list[str]:
    """Return the host's words that play a program of the guest. Raises OSError if it is not there.

    The agent itself joins what it is given to one string, by the rules of the C run time.
    """
    program, *words = argv
    if program == "powershell.exe":
        words = played_script(words[-1])
    return windows_player.Windows(root, boot).argv(boot, program, *words)


def is_being_written(path: str) -> bool:
    """Whether a process has a file open for writing: Windows then lets the agent not read it."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if str(link.readlink()) == path and int(link.parent.parent.name) != os.getpid():
                flags = Path(link.parent.parent, "fdinfo", link.name).read_text().split()[3]
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False


class WindowsAgent(drivers.StandInAgent):
    """An agent for Windows: its paths, its programs, its rules for open files."""

    root: Path

    def guest_get_osinfo(self) -> dict[str, Any]:
        return {"id": "mswindows", "pretty-name": "Windows, played", "version-id": "10"}

    def guest_exec(self, path: str, arg: Sequence[str] = (), **options: Any) -> dict[str, Any]:
        path, *arg = played(self.root, self.boot, [path, *arg])
        return super().guest_exec(path, arg, **options)

    def host_path(self, path: str) -> str:
        return super().host_path(windows_player.Windows(self.root).host(path))

    def guest_file_open(self, path: str, mode: str = "r") -> int:
        if mode == "ab":
            raise ValueError("invalid file open mode 'ab'")
        if is_being_written(self.host_path(path)):
            raise OSError(errno.EACCES, "The process cannot access the file: sharing violation")
        return super().guest_file_open(path, mode)

    def guest_file_read(self, handle: int, count: int = 4096) -> dict[str, Any]:
        reply = super().guest_file_read(handle, count)
        return {**reply, "eof": not reply["count"]}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "1" / "C").mkdir(parents=True)
    say = functools.partial(print, "listening", flush=True)
    drivers.serve_agents({f"{folder}/1.sock": f"{folder}/1"}, kind=WindowsAgent, ready=say)
