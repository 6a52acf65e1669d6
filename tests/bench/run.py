"""Print the benchmarks' table: `python tests/bench/run.py [PART …]`.

agent      driver against a raw socket on a real qemu-ga: push, pull, ping, exec
status     `vmrm status --json` against an interpreter that does nothing
pool       acquire and release against the same transactions by plain sqlite3
viewer     CPU of the live view, while nothing changes and while much does
lateness   of due entries while others are laid out, and while a transfer looks at many files
handlers   many handlers on stand-in agents: memory, idle CPU, launch, stop, lateness

Each figure stands beside its measure and its goal; both were measured in this run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import agent_part  # (the path comes first)
import handlers_part
import lateness_part
import pool_part
import status_part
import viewer_part
from figures import Figure, table

PARTS = ("agent", "status", "pool", "viewer", "lateness", "handlers")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--size-mib", type=int, default=64, help="size of the copied file")
    parser.add_argument("--calls", type=int, default=1000, help="pings per round")
    parser.add_argument("--vms", type=int, default=200, help="VMs that status shows")
    parser.add_argument("--handlers", type=int, nargs="+", default=[100, 1000], metavar="N")
    parser.add_argument("--window", type=float, default=20, help="seconds of idling measured")
    parser.add_argument("--pool", type=int, nargs="+", default=[10, 100, 1000, 10000], metavar="N")
    parser.add_argument("--pairs", type=int, default=60, help="leases per measurement")
    parser.add_argument("--contend", type=float, default=3, help="seconds of contention per round")
    parser.add_argument("--files", type=int, default=100_000, help="that a transfer looks at")
    parser.add_argument("--entries", type=int, default=1000, help="that are laid out")
    parser.add_argument("--due", type=int, default=40, help="entries whose lateness is measured")
    parser.add_argument("--view", type=int, nargs="+", default=[200, 1000], metavar="N")
    parser.add_argument("--watch", type=float, default=10, help="seconds that the view is watched")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {min(unknown)}; there are: {', '.join(PARTS)}")
    return options


def _measure(part: str, folder: Path, options: argparse.Namespace) -> Iterator[Figure]:
    if part == "agent":
        sizes = {"size_mib": options.size_mib, "calls": options.calls, "rounds": options.rounds}
        yield from agent_part.measure(folder, **sizes)
    elif part == "status":
        yield from status_part.measure(folder, vms=options.vms, rounds=2 * options.rounds + 1)
    elif part == "pool":
        limits = {"pairs": options.pairs, "rounds": options.rounds, "seconds": options.contend}
        yield from pool_part.measure(folder, sizes=options.pool, **limits)
    elif part == "viewer":
        yield from viewer_part.measure(folder, sizes=options.view, seconds=options.watch)
    elif part == "lateness":
        work = {"files": options.files, "entries": options.entries, "due": options.due}
        yield from lateness_part.measure(folder, **work)
    else:
        for count in options.handlers:
            place = folder / str(count)
            place.mkdir()
            yield from handlers_part.measure(place, count=count, window_s=options.window)


def main() -> None:
    """Measure the parts that the command line names, and print what they gave."""
    options = _options()
    figures: list[Figure] = []
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="vmrm-bench-") as folder:
            figures += _measure(part, Path(folder), options)
    if options.json:
        rows = [{**dataclasses.asdict(figure), "ratio": figure.ratio} for figure in figures]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        sys.stdout.write(table(figures) + "\n")


if __name__ == "__main__":
    main()
