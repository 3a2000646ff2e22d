"""A process in which kernels are compiled, loaded and launched through Triton's own code, on a driver that only notes.

``some|all``: all forms are brought onto the device before. Prints a JSON object: what the driver noted of launches and
of a recording that was played, what it refused, and launches that a recording hands over otherwise.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from anyep.kernels.gpu.kernels import GpuKernels
from anyep.kernels.gpu.launch import OnStream
from anyep.kernels.gpu.target import SM_90
from anyep.kernels.gpu.variants import call_every_variant
from anyep.kernels.tapes import counted_from

STREAM = 77
BASES = [1 << 40, 5 << 40]


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
    torch.cuda.is_current_stream_capturing = lambda: False
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM


def lines():
    return Path(os.environ["ANYEP_TEST_LAUNCHES"]).read_text().splitlines()


def play_in_a_thread(make):
    """Make a recording and play it where nobody has touched a device yet, and on a stream that the driver refuses."""
    said = []

    def act():
        tape = make()
        tape(BASES, 5)
        try:
            tape(BASES, 13)
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    return said


def all_forms_differ(kernels):
    """Return the launches of all forms that a recording hands over otherwise than Triton: low words of numbers."""
    first = len(lines())
    call_every_variant(kernels)
    by_triton = lines()[first:]
    kernels.tape(call_every_variant)([], STREAM)
    recorded = lines()[first + len(by_triton) :]
    assert len(recorded) == len(by_triton) > 50

    def low(line):
        name, *numbers = line.split()
        return name, *(int(number) % 2**32 for number in numbers)

    return [(one, other) for one, other in zip(by_triton, recorded, strict=True) if low(one) != low(other)]


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
    told = {"launched": lines()}

    def record(tape):
        tape.copy(counted_from(1), counted_from(0) + 64, 5000)
        tape.fill_rows(counted_from(0), 7168, 3, -5, 6, 255)

    told["errors"] = play_in_a_thread(lambda: kernels.tape(record))
    kernels.tape(record)(BASES, STREAM)
    told["played"] = lines()[len(told["launched"]) :]
    told["differ"] = all_forms_differ(kernels) if how == "all" else []
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
