"""The command: exam, works, table, JSON. Exit code 1 where there is no GPU, or where something is wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from anyep.errors import Unavailable
from anyep.exchange.device.devices import find_device
from anyep.version import __version__
from benchmarks.gpu.correct import examine
from benchmarks.gpu.measure import Contest, Measured, Row, Stopwatch, add_copy, as_json
from benchmarks.gpu.stopwatch import GpuStopwatch
from benchmarks.gpu.work import Work

PREFILL = Work(name="prefill", layout="compact", tokens=4096)
DECODE = Work(name="decode", layout="padded", tokens=128)
COPY_BYTES = 1 << 30
WANTED = {
    "prefill": "dispatch and combine at least 0.80 of the copy; at least 5 times as fast as torch's operations",
    "decode": "dispatch and combine within 2 of the floor and the launches, in a graph; 10 times as fast as torch's",
    "host": "at most 60 us a call outside of graphs",
}


def measure(stopwatch: Stopwatch, works: list[Work], *, rounds: int, copy_bytes: int) -> list[Row]:
    """Check and time the works; all of them and the copy take turns."""
    contest = Contest(stopwatch, rounds)
    add_copy(contest, copy_bytes)
    with ExitStack() as stack:
        for work in works:
            Measured(contest, work, f"{work.name} {work.ranks} x {work.tokens}", stack)
        return contest.run()


def table(rows: list[Row]) -> str:
    """Return one line a row."""
    lines = [f"{'work':<20}{'what':<34}{'us':>12}{'min':>12}{'p90':>12}{'floor us':>12}{'of copy':>9}"]
    for row in rows:
        floor = "" if row.floor_us is None else f"{row.floor_us:.1f}"
        share = "" if row.copy_share is None else f"{row.copy_share:.2f}"
        times = f"{row.us_median:>12.1f}{row.us_min:>12.1f}{row.us_p90:>12.1f}"
        lines.append(f"{row.work:<20}{row.what:<34}{times}{floor:>12}{share:>9}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure on this machine's GPU; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=sys.modules[__package__].__doc__)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--rounds", type=int, default=30, help="times that everything is timed")
    parser.add_argument("--exam-rounds", type=int, default=20, help="random cases of each kernel before that")
    options = parser.parse_args(arguments)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA begins: a queue for each rank's stream
    try:
        device = find_device("cuda")
    except Unavailable as reason:
        print(f"benchmarks.gpu: nothing was measured and nothing is written: {reason}", file=sys.stderr)
        return 1
    examine(device.kernels, options.exam_rounds)
    print("every kernel writes the bits of the reference")
    stopwatch = GpuStopwatch()
    rows = measure(stopwatch, [PREFILL, DECODE], rounds=options.rounds, copy_bytes=COPY_BYTES)
    print("every row and every sum is right, launched and replayed\n\n" + table(rows))
    if options.json is not None:
        told = {"anyep": __version__, "machine": stopwatch.facts(), "wanted": WANTED, "rows": as_json(rows)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
