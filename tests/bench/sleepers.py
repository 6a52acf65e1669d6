"""Processes that sleep until one instant and then send one datagram: what this host can do.

`python sleepers.py COUNT INSTANT` prints by how many milliseconds each was late, as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import socket
import sys
import time
from typing import NoReturn


def _sleep_and_send(sock: socket.socket, instant: float) -> NoReturn:
    time.sleep(max(0.0, instant - time.time()))
    sent = time.time()
    sock.send(str((sent - instant) * 1e3).encode())
    os._exit(0)


def main(count: int, instant: float) -> list[float]:
    """Return the milliseconds by which each of *count* processes was late for *instant*."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.freeze()
    receivers = []
    for _ in range(count):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        if os.fork() == 0:
            _sleep_and_send(theirs, instant)
        theirs.close()
        receivers.append(ours)
    if time.time() >= instant:
        raise RuntimeError(f"{count} processes were not ready in time")
    for _ in range(count):
        os.wait()
    return [float(receiver.recv(64)) for receiver in receivers]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]), float(sys.argv[2]))))
