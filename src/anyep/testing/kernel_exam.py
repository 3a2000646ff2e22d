"""The exam of a kernel set: every function, bit for bit against the reference, on hundreds of awkward cases.

``check_kernels(MyKernels())`` raises KernelExamError with the function, its arguments and the first wrong byte.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from anyep.kernels.spec import Element, KernelSet, ScaleFormat
from anyep.testing.kernel_case import Case, KernelExamError
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

__all__ = ["KernelExamError", "check_kernels"]


def check_kernels(kernels: KernelSet, *, seed: int = 0, rounds: int = 60) -> None:
    """Compare every function of ``kernels`` with the reference on ``rounds`` random cases each, and all codes.

    Raises KernelExamError at the first difference: a wrong bit, or a byte written outside the named rows. The same seed
    draws the same cases.
    """
    for number, exam in enumerate(_EXAMS):
        for case in range(rounds):
            exam(Case(kernels, np.random.default_rng([seed, number, case])))
    exam_all_logfmt_inputs(Case(kernels, np.random.default_rng(seed)))
    for element in Element:
        for scale_format in ScaleFormat:
            exam_all_codes(Case(kernels, np.random.default_rng(seed)), element, scale_format)
            if element is not Element.FP32:
                exam_all_inputs(Case(kernels, np.random.default_rng(seed), 16 << 20), element, scale_format)


_EXAMS: tuple[Callable[[Case], None], ...] = (
    exam_route,
    exam_place,
    exam_scatter,
    exam_scatter_routing,
    exam_quantise_scatter,
    exam_dequantise,
    exam_reduce,
    exam_reduce_weights,
    exam_copy,
    exam_fill_rows,
    exam_unpack,
    exam_pack,
    exam_expand,
    exam_transpose_scales,
    exam_gather,
    exam_logfmt_encode,
    exam_reduce_logfmt,
)
