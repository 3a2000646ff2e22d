"""One case of the kernel exam: both sets make the same call on the same memory, and every byte is compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anyep.kernels.reference import ReferenceKernels
from anyep.kernels.spec import KernelSet
from anyep.testing.kernel_cases import Entries, Stretch, draw_entries, draw_range
from anyep.testing.kernel_memory import ExamMemory

STRETCH_BYTES = 2 << 20


class KernelExamError(AssertionError):
    """A kernel wrote other bytes than the reference, or bytes that are none of its business."""


class Case:
    """One call of one function, made by both sets on the same bytes: in the same memory, or in that of a device."""

    oracle: type[ReferenceKernels] = ReferenceKernels

    def __init__(
        self,
        kernels: KernelSet,
        rng: np.random.Generator,
        num_bytes: int = STRETCH_BYTES,
        memory: ExamMemory | None = None,
    ) -> None:
        self.kernels = kernels
        self.memory = memory
        self.rng = rng
        self.stretch = Stretch(rng, num_bytes)

    def run(self, function: str, *arguments: int) -> int | None:
        """Call both sets and compare the result and all memory. Raises KernelExamError."""
        before = self.stretch.memory.copy()
        expected = getattr(self.oracle(), function)(*arguments)
        expected_memory = self.stretch.memory.copy()
        self.stretch.memory[:] = before
        result = self._examined(function, arguments)
        name = f"{self.kernels.name}.{function}{arguments}"
        if result != expected:
            raise KernelExamError(f"{name} returned {result}, expected {expected}")
        difference = self.stretch.difference(expected_memory)
        if difference is not None:
            raise KernelExamError(f"{name}: {difference}")
        return result

    def _examined(self, function: str, arguments: tuple[int, ...]) -> int | None:
        """Call the set that is examined where its memory is, and bring what it wrote back."""
        call = getattr(self.kernels, function)
        if self.memory is None:
            result: int | None = call(*arguments)
            self.kernels.fence()
            return result
        stretch = self.stretch
        distance = self.memory.place(stretch.memory.size, like=stretch.memory.ctypes.data) - stretch.memory.ctypes.data
        self.memory.write(stretch.moved(stretch.memory, distance))
        result = call(*(one + distance if stretch.holds(one) else one for one in arguments))
        self.kernels.fence()
        stretch.memory[:] = stretch.moved(self.memory.read(), -distance)
        return result


def draw_experts(rng: np.random.Generator, T: int, K: int, E: int) -> NDArray[np.signedinteger]:
    idx_TK = rng.integers(-1, E, (T, K))
    if rng.random() < 0.3:
        idx_TK[:] = rng.integers(0, E) if rng.random() < 0.5 else -1
    return idx_TK.astype(np.int32 if rng.random() < 0.5 else np.int64)


def draw_case_entries(case: Case, max_tokens: int = 12) -> tuple[Entries, int, int]:
    rng = case.rng
    T, W, R = (int(n) for n in (rng.integers(0, max_tokens + 1), rng.integers(1, 18), rng.integers(1, 10)))
    entries = draw_entries(rng, T, W, R, compact=bool(rng.random() < 0.5))
    return (entries, *draw_range(rng, T))
