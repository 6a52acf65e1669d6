"""The least that talks to a guest agent: no deadlines, no checks, no resynchronising.

What vmrm's driver costs beyond this is the price of being safe.
"""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path
from typing import Any, Self


class RawAgent:
    """A blocking socket to a guest agent at *path*."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb", 1 << 20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._sock.close()

    def send(self, command: str, **arguments: object) -> None:
        """Send a request."""
        request = {"execute": command, "arguments": arguments}
        self._sock.sendall(json.dumps(request).encode())

    def reply(self) -> Any:
        """Return what the next reply returns."""
        return json.loads(self._lines.readline())["return"]

    def call(self, command: str, **arguments: object) -> Any:
        """Send a request and return what it returns."""
        self.send(command, **arguments)
        return self.reply()

    def run(self, program: str) -> int:
        """Run a program and return its exit code, asking for it without a pause."""
        pid = self.call("guest-exec", path=program, **{"capture-output": True})["pid"]
        while not (status := self.call("guest-exec-status", pid=pid))["exited"]:
            pass
        return int(status["exitcode"])

    def push(self, source: Path, target: Path, chunk: int) -> None:
        """Copy a file into the guest: one write under way while the next one is prepared."""
        handle = self.call("guest-file-open", path=str(target), mode="w")
        head = f'{{"execute":"guest-file-write","arguments":{{"handle":{handle},"buf-b64":"'
        with source.open("rb") as stream:
            data = base64.b64encode(stream.read(chunk))
            while data:
                self._sock.sendall(head.encode() + data + b'"}}')
                data = base64.b64encode(stream.read(chunk))
                self.reply()
        self.call("guest-file-close", handle=handle)

    def pull(self, source: Path, target: Path, chunk: int) -> None:
        """Copy a file out of the guest, one read ahead."""
        handle = self.call("guest-file-open", path=str(source), mode="r")
        self.send("guest-file-read", handle=handle, count=chunk)
        with target.open("wb") as stream:
            eof = False
            while not eof:
                self.send("guest-file-read", handle=handle, count=chunk)
                reply = self.reply()
                stream.write(base64.b64decode(reply["buf-b64"]))
                eof = reply["eof"]
        self.reply()  # to the read ahead, past the end
        self.call("guest-file-close", handle=handle)
