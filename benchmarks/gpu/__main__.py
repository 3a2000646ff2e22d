"""The command: exam, works, table, JSON. Exit code 1 where there is no GPU, or where something was wrong.

What is wrong is named, and all else goes on: only what was found right is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from anyep.errors import Unavailable
from anyep.exchange.device.devices import find_device
from anyep.kernels.spec_device import DeviceKernels
from anyep.version import __version__
from benchmarks.gpu.contest import Contest, Row, add_copy, add_launches, as_json
from benchmarks.gpu.correct import examine
from benchmarks.gpu.measure import Measured
from benchmarks.gpu.stopwatch import GpuStopwatch
from benchmarks.gpu.verdicts import Verdict, lines, verdicts
from benchmarks.gpu.work import Work

PREFILL = Work(name="prefill", layout="compact", tokens=4096)
DECODE = Work(name="decode", layout="padded", tokens=128)
COPY_BYTES = 1 << 30


def measure(contest: Contest, works: list[Work], kernels: DeviceKernels, *, copy_bytes: int) -> list[Row]:
    """Check and time the works; all of them, the copy and the launches take turns."""
    add_copy(contest, copy_bytes)
    add_launches(contest, kernels)
    with ExitStack() as stack:
        for work in works:
            with contest.noting(work.name):
                Measured(contest, work, stack)
        return contest.run()


def table(rows: list[Row]) -> str:
    """Return one line a row."""
    heads = f"{'floor us':>12}{'launches':>12}{'of copy':>9}"
    lines = [f"{'work':<20}{'what':<34}{'us':>12}{'min':>12}{'p90':>12}{heads}"]
    for row in rows:
        floor = "" if row.floor_us is None else f"{row.floor_us:.1f}"
        share = "" if row.copy_share is None else f"{row.copy_share:.2f}"
        times = f"{row.us_median:>12.1f}{row.us_min:>12.1f}{row.us_p90:>12.1f}"
        launch = "" if row.launch_us is None else f"{row.launch_us:.1f}"
        lines.append(f"{row.work:<20}{row.what:<34}{times}{floor:>12}{launch:>12}{share:>9}")
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
    contest = Contest(GpuStopwatch(), options.rounds)
    rows: list[Row] = []
    try:
        examine(contest, device.kernels, options.exam_rounds)
        rows = measure(contest, [PREFILL, DECODE], device.kernels, copy_bytes=COPY_BYTES)
    except Exception as error:  # all that can be said is said, and written down
        contest.problems.append(f"the device does not answer any more: {type(error).__name__}: {error}")
    told = verdicts(rows, PREFILL, DECODE)
    print("\n" + table(rows) + "\n\n" + lines(told))
    if options.json is not None:
        write(options.json, contest, rows, told)
    for problem in contest.problems:
        print(f"benchmarks.gpu: wrong: {problem}", file=sys.stderr)
    return 1 if contest.problems else 0


def write(path: Path, contest: Contest, rows: list[Row], told: list[Verdict]) -> None:
    """Write what was measured, with what, what is wanted of it, and what went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {
        "anyep": __version__,
        "machine": contest.stopwatch.facts(),
        "verdicts": [asdict(one) | {"reached": one.reached} for one in told],
        "problems": contest.problems,
        "rows": as_json(rows),
    }
    path.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
