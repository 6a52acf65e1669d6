"""A client in a process of its own: makes calls to a hostile agent and tells what each cost.

`hostile_client.py SOCKET` reads lines `<time-out> <command>` and answers each with a line of JSON:
what came of it and whether that is a value or an error of the driver, seconds, and the process's
peak in MiB.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import drivers


def peak_mib() -> float:
    """Return the highest memory since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Let the peak count from now on (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def calls(driver: drivers.QemuGuestAgentDriver, folder: Path) -> dict[str, Callable[[], object]]:
    """Return what is called, by the command that it is about."""
    return {
        "guest-sync-delimited": lambda: driver.sync(driver.timeout),
        "guest-ping": lambda: driver.call("guest-ping"),
        "guest-info": driver.info,
        "guest-get-osinfo": driver.get_os,
        "guest-get-time": driver.get_time,
        "guest-network-get-interfaces": driver.network_get_interfaces,
        "guest-exec": lambda: driver.start(["/bin/true"]),
        "guest-exec-status": lambda: driver.run(["/bin/echo", "hello"], timeout=driver.timeout),
        "guest-file-open": lambda: driver.read_bytes(str(folder / "file"), limit=100),
        "guest-file-read": lambda: driver.read_bytes(str(folder / "file"), limit=100),
        "guest-file-seek": lambda: driver.read_bytes(str(folder / "file"), limit=9, offset=1),
        "guest-file-close": lambda: driver.read_bytes(str(folder / "file"), limit=100),
        "guest-file-write": lambda: list(driver.push(io.BytesIO(b"x" * 99), str(folder / "new"))),
        "guest-file-flush": lambda: list(driver.push(io.BytesIO(b"x" * 99), str(folder / "new"))),
        "guest-fsfreeze-status": lambda: driver.health(driver.timeout),
    }


def main() -> None:
    """Answer lines until there are none."""
    path = Path(sys.argv[1])
    logging.disable(logging.CRITICAL)
    driver = drivers.QemuGuestAgentDriver({"path": str(path)}, logging.getLogger("client"))
    there = calls(driver, path.parent)
    print(json.dumps(sorted(there)), flush=True)
    for line in sys.stdin:
        seconds, name = line.split()
        driver.timeout, ours, value = float(seconds), True, ""
        forget_peak()
        began = time.monotonic()
        try:
            value = repr(driver.connect() if name == "connect" else there[name]())
            value.encode()
        except Exception as error:
            ours = isinstance(error, drivers.DriverError) and str(error).isprintable()
            value = repr(error)
        told = {"found": value[:300], "ours": ours, "seconds": time.monotonic() - began}
        print(json.dumps({**told, "mib": peak_mib()}), flush=True)


if __name__ == "__main__":
    main()
