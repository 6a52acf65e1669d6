"""A driver that implements what `AbstractDriver` demands and nothing else; its guest is this host.

Loaded by `$VMRM_DRIVERS`. Beside the VM's path lies `<path>.boot`, the guest's boot id.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import drivers

BOOT_ID = "/proc/sys/kernel/random/boot_id"


class LocalDriver(drivers.AbstractDriver):
    """Runs a guest's programs here, with the parameters that the reference documents."""

    def __init__(self, config: Mapping[str, Any], log: Any) -> None:
        super().__init__(config, log)
        self.boot = Path(f"{config['path']}.boot")
        self.programs: dict[int, tuple[subprocess.Popen[bytes], Any, Any]] = {}

    @staticmethod
    def get_engine() -> str:
        return "LocalVM"

    def connect(self) -> int:
        if not self.boot.exists():
            self.boot.write_text(f"{uuid.uuid4()}\n")
        self.target_os = "this host"
        return 1

    def close(self) -> None:
        pass

    def sync(self, timeout: float = 5) -> int | None:
        return 1

    def ping(self, timeout: float = 10) -> bool:
        return True

    def execute(
        self,
        path: str,
        arg: str | Sequence[str] | None = None,
        env: Sequence[str] | None = None,
        input_data: str | bytes | None = None,
        capture_output: bool = True,
    ) -> int | None:
        words = [path, *([arg] if isinstance(arg, str) else arg or [])]
        variables = None if env is None else dict(item.split("=", 1) for item in env)
        out, err, given = (tempfile.TemporaryFile() for _ in range(3))  # noqa: SIM115
        given.write(input_data.encode() if isinstance(input_data, str) else input_data or b"")
        given.seek(0)
        try:
            program = subprocess.Popen(
                words, stdin=given, stdout=out, stderr=err, env=variables, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.log.error("%s", error)
            return None
        self.programs[program.pid] = program, out, err
        return program.pid

    def exec_status(self, pid: int) -> dict[str, Any]:
        if pid not in self.programs:
            raise drivers.UnknownPid("GenericError", "no such program", "exec_status")
        program, out, err = self.programs[pid]
        reply: dict[str, Any] = {"exited": program.poll() is not None}
        if reply["exited"]:
            del self.programs[pid]
            reply["signal" if program.returncode < 0 else "exitcode"] = abs(program.returncode)
            for name, file in (("stdout", out), ("stderr", err)):
                file.seek(0)
                reply[name] = file.read().decode(errors="replace")
        self.store_captured_output(pid, reply)
        return reply

    def store_captured_output(self, pid: int, output: Mapping[str, Any]) -> None:
        self.output_cache[pid] = dict(output)

    def file_flush(self, handle: int) -> None:
        pass

    def _write(self, filename: str, data: str | bytes, mode: str = "w") -> bool:
        with Path(filename).open(f"{mode}b") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        return True

    def write_from_file(
        self, filename: str, local_filename: str | os.PathLike[str], mode: str = "w"
    ) -> bool:
        try:
            return self._write(filename, Path(local_filename).read_bytes(), mode)
        except OSError:
            return False

    def read_file(
        self, filename: str, local_destination: str | os.PathLike[str], mode: str = "rb"
    ) -> bool:
        try:
            shutil.copyfile(self.boot if filename == BOOT_ID else filename, local_destination)
        except OSError:
            return False
        return True

    def get_os(self) -> str:
        return self.target_os

    def get_time(self) -> int:
        return time.time_ns()

    def set_time(self, now_ns: int | None = None) -> None:
        pass

    def set_user_password(self, username: str, password: str) -> None:
        raise drivers.AgentError("GenericError", "not here", "set_user_password")

    def network_get_interfaces(self) -> list[dict[str, Any]]:
        return []

    def reboot(self) -> None:
        self.boot.write_text(f"{uuid.uuid4()}\n")
