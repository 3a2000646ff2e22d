"""Kernel sets by name; a set is imported, and compiled where it must be, when it is first asked for."""

from __future__ import annotations

from anyep.kernels.spec import KernelSet

NAMES = ("cpu", "gpu", "reference")


def load(name: str) -> KernelSet:
    """Return the kernel set of this name, ready: nothing compiles later. ValueError lists the names.

    ``"cpu"`` compiles under a machine-wide lock on its first use on a machine and loads from a cache afterwards.
    ``"gpu"`` is for torch's current device and raises Unavailable where there is no GPU or no Triton.
    """
    if name == "reference":
        from anyep.kernels.reference import ReferenceKernels

        return ReferenceKernels()
    if name == "cpu":
        from anyep.machine import compiler

        with compiler.compiling():
            from anyep.kernels.cpu.kernels import CpuKernels

        return CpuKernels()
    if name == "gpu":
        from anyep.kernels.gpu.loading import load_gpu

        return load_gpu()
    raise ValueError(f"kernels must be one of {', '.join(NAMES)}, got {name!r}")
