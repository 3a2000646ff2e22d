"""A process in which kernels are compiled, loaded and launched through Triton's own code, on a driver that only notes.

``some|all``: all forms are brought onto the device before. Prints a JSON list of what the driver noted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from anyep.kernels.gpu.kernels import GpuKernels
from anyep.kernels.gpu.launch import OnStream
from anyep.kernels.gpu.target import SM_90
from anyep.kernels.gpu.variants import call_every_variant

STREAM = 77


class _NoDevice:
    def __init__(self, device):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def play_torch():
    """Let torch tell of a device as far as Triton and the launcher ask."""
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.device = _NoDevice
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM


def main(how):
    play_torch()
    where = torch.device("cuda", 0)
    launch = OnStream(where, SM_90)
    kernels = GpuKernels(where, SM_90, launch)
    if how == "all":
        call_every_variant(GpuKernels(where, SM_90, launch.prepare))
    for _ in range(2):
        kernels.copy(1 << 40, 3 << 40, 5000)
    kernels.pack(4096, 8, 32, 1, 2, 3, 4)
    kernels.fill_rows(2**62, 7168, 3, -5, 6, 255)
    print(json.dumps(Path(os.environ["ANYEP_TEST_LAUNCHES"]).read_text().splitlines()))


if __name__ == "__main__":
    main(*sys.argv[1:])
