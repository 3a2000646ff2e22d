"""What must hold before anything is timed: every kernel on the device, and whole exchanges of the work itself."""

from __future__ import annotations

import torch

import anyep
from anyep.kernels.spec_device import DeviceKernels
from anyep.testing import DeviceMemory, check_device_kernels, check_kernels
from anyep.testing.kernel_exam import FUNCTIONS
from anyep.testing.kernel_exam_device import DEVICE_FUNCTIONS
from benchmarks.gpu import torch_ops
from benchmarks.gpu.contest import Contest
from benchmarks.gpu.torch_ops import Piece
from benchmarks.gpu.work import Inputs, Work


def examine(contest: Contest, kernels: DeviceKernels, rounds: int) -> None:
    """Compare every kernel with the reference, bit for bit, and note each one that differs."""
    memory = DeviceMemory(contest.stopwatch.device)
    for name in FUNCTIONS:
        with contest.noting(f"kernel {name}"):
            check_kernels(kernels, rounds=rounds, memory=memory, only=[name])
    for name in DEVICE_FUNCTIONS:
        with contest.noting(f"kernel {name}"):
            check_device_kernels(kernels, rounds=rounds, memory=memory, only=[name])


def check_dispatch(work: Work, inputs: Inputs, pieces: list[list[Piece]], received: list[anyep.Received]) -> None:
    """Compare every row and scale that arrived with torch's formulation, bit for bit. Raises AssertionError."""
    quantised = [torch_ops.quantise(x) for x in inputs.x]
    for rank, (own, got) in enumerate(zip(pieces, received, strict=True)):
        x = got.x.view(torch.uint8).view(-1, work.hidden)
        scales = got.scales.reshape(len(x), -1)
        for piece in own:
            q, s = quantised[piece.source]
            assert torch.equal(x[piece.row], q[piece.token]), f"{work.name}: rows from {piece.source} on rank {rank}"
            assert torch.equal(scales[piece.row], s[piece.token]), f"{work.name}: scales on rank {rank}"


def check_combine(expected: list[torch.Tensor], got: list[torch.Tensor], what: str) -> None:
    """Compare every sum, bit for bit. Raises AssertionError."""
    for rank, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16)), f"{what}: sums of rank {rank} differ"
