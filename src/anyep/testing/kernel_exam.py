"""The exam of a kernel set: every function, bit for bit against the reference, on hundreds of awkward cases.

``check_kernels(MyKernels())`` raises KernelExamError with the function, its arguments and the first wrong byte.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

import numpy as np

from anyep.kernels.spec import Element, KernelSet, ScaleFormat
from anyep.testing.kernel_case import STRETCH_BYTES, Case, KernelExamError
from anyep.testing.kernel_exam_logfmt import exam_all_logfmt_inputs, exam_logfmt_encode, exam_reduce_logfmt
from anyep.testing.kernel_exam_numbers import (
    exam_all_codes,
    exam_all_inputs,
    exam_dequantise,
    exam_quantise_scatter,
    exam_reduce,
    exam_reduce_weights,
)
from anyep.testing.kernel_exam_packing import exam_expand, exam_gather, exam_pack, exam_transpose_scales, exam_unpack
from anyep.testing.kernel_exam_rows import (
    exam_copy,
    exam_fill_rows,
    exam_place,
    exam_route,
    exam_scatter,
    exam_scatter_routing,
)
from anyep.testing.kernel_memory import ExamMemory

__all__ = ["FUNCTIONS", "KernelExamError", "check_kernels"]


_EXAMS: dict[str, Callable[[Case], None]] = {
    "route": exam_route,
    "place": exam_place,
    "scatter": exam_scatter,
    "scatter_routing": exam_scatter_routing,
    "quantise_scatter": exam_quantise_scatter,
    "dequantise": exam_dequantise,
    "reduce": exam_reduce,
    "reduce_weights": exam_reduce_weights,
    "copy": exam_copy,
    "fill_rows": exam_fill_rows,
    "unpack": exam_unpack,
    "pack": exam_pack,
    "expand": exam_expand,
    "transpose_scales": exam_transpose_scales,
    "gather": exam_gather,
    "logfmt_encode": exam_logfmt_encode,
    "reduce_logfmt": exam_reduce_logfmt,
}
FUNCTIONS = tuple(_EXAMS)
"""What is examined; ``fence`` after every call of another."""


def check_kernels(
    kernels: KernelSet,
    *,
    seed: int = 0,
    rounds: int = 60,
    only: Collection[str] = FUNCTIONS,
    all_inputs: bool = True,
    memory: ExamMemory | None = None,
) -> None:
    """Compare every function of ``kernels`` with the reference on ``rounds`` random cases each, and all codes.

    ``only`` names some of the functions; ``all_inputs=False`` leaves out that every number of 16 bits is encoded and
    every code decoded, for sets that run very slowly. ``memory`` is where kernels find the cases: host memory, or
    :class:`~anyep.testing.kernel_memory.DeviceMemory`.

    Raises KernelExamError at the first difference: a wrong bit, or a byte written outside the named rows. The same seed
    draws the same cases. ValueError names the functions where ``only`` names none of them.
    """
    if unknown := sorted(set(only) - set(FUNCTIONS)):
        raise ValueError(f"only must name functions of a kernel set, {', '.join(FUNCTIONS)}; got {unknown[0]!r}")
    for number, (name, exam) in enumerate(_EXAMS.items()):
        for case in range(rounds if name in only else 0):
            exam(Case(kernels, np.random.default_rng([seed, number, case]), memory=memory))
    for name, exam, num_bytes in _all_inputs() if all_inputs else ():
        if name in only:
            exam(Case(kernels, np.random.default_rng(seed), num_bytes, memory))


def _all_inputs() -> Iterator[tuple[str, Callable[[Case], None], int]]:
    """Yield (function, exam, bytes of its stretch) for the exams that go through all numbers of a format."""
    yield "logfmt_encode", exam_all_logfmt_inputs, STRETCH_BYTES
    for element in Element:
        for form in ScaleFormat:
            yield "dequantise", partial(exam_all_codes, element=element, scale_format=form), STRETCH_BYTES
            if element is not Element.FP32:
                inputs = partial(exam_all_inputs, element=element, scale_format=form)
                yield "quantise_scatter", inputs, 16 << 20
