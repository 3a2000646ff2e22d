"""Host time of a device's calls without a device: Triton's compiler, loader and launches, on a driver that only notes.

python -m benchmarks.gpu_host_time [--rounds N]; needs torch, triton, numba and a C compiler. Host memory stands for the
device's, so that torch's streams, events and allocator are not in it; rows are short (256 channels). One rank, 128
tokens, top-8 of 256 experts. Two trees are compared by running it in each in turns: single runs differ by 5 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "tests" / "gpu" / "driver_stub.c"
TOKENS, HIDDEN, EXPERTS, TOPK = 128, 256, 256, 8
WARM_UP = 30
STREAM = 77
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "33000000", "MALLOC_TOP_PAD_": "268435456"}
"""Large blocks are kept, as a device's allocator does."""


def main() -> int:
    """Compile the driver, then measure in a process that finds it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300, help="calls of each kind that are timed")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.rounds)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, DRIVER], check=True)
        (Path(folder) / "libcuda.so").symlink_to(library)
        found = {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        environment = os.environ | STEADY | found | {"PYTHONPATH": path}
        again = [sys.executable, "-m", "benchmarks.gpu_host_time", "--measure", "--rounds", str(options.rounds)]
        return subprocess.run(again, env=environment, cwd=ROOT).returncode


def measure(rounds: int) -> None:
    """Print a line for each kind of call."""
    import torch

    import anyep
    from anyep.kernels.gpu.kernels import GpuKernels
    from anyep.kernels.gpu.launch import OnStream
    from anyep.kernels.gpu.target import SM_90
    from anyep.testing.pretend_device import PretendDevice, pretended
    from tests.gpu.launched import play_torch

    warnings.simplefilter("ignore")
    play_torch()
    torch.set_num_threads(1)
    where = torch.device("cuda", 0)
    kernels = GpuKernels(where, SM_90, OnStream(where, SM_90))
    device = PretendDevice(kernels)
    device.kernels, device.tape = kernels, kernels.tape
    device.play = lambda tape, bases, stream: tape(bases, STREAM)

    def rank_main(member: object, how: str, *, concurrent: bool) -> None:
        x, weights = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.rand(TOKENS, TOPK)
        idx = torch.rand(TOKENS, EXPERTS).topk(TOPK, dim=1).indices
        sizes = {"hidden": HIDDEN, "num_experts": EXPERTS, "num_topk": TOPK, "max_tokens_per_rank": TOKENS}
        options = {"wire": "fp8", "static_rows": TOKENS, "device": "cuda", "concurrent": concurrent}
        with anyep.Buffer(member, **sizes, **options) as ep:
            for layout in ("compact", "padded"):
                got = ep.dispatch(x, idx, weights, layout=layout)
                y = torch.zeros(got.x.shape, dtype=torch.bfloat16)
                calls = {
                    "dispatch": lambda layout=layout: ep.dispatch(x, idx, weights, layout=layout),
                    "by a handle": lambda got=got: ep.dispatch(x, None, weights, handle=got.handle),
                    "combine": lambda got=got, y=y: ep.combine(y, got.handle),
                }
                for name, call in calls.items():
                    show(f"{how}, {layout}, {name}", times_of(call, rounds))

    with pretended(device):
        for concurrent in (False, True):
            how = "concurrent" if concurrent else "one stream"
            anyep.local_group(1).run(lambda member, how=how, on=concurrent: rank_main(member, how, concurrent=on))


def times_of(call: Callable[[], object], rounds: int) -> list[float]:
    """Return microseconds, ascending; results die outside of what is timed."""
    for _ in range(WARM_UP):
        call()
    us = []
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        result = call()
        us.append((time.perf_counter_ns() - begin) / 1e3)
        del result
    return sorted(us)


def show(name: str, us: list[float]) -> None:
    print(f"{name:36}{statistics.median(us):8.1f} us  min {us[0]:6.1f}  p90 {us[len(us) * 9 // 10]:6.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
