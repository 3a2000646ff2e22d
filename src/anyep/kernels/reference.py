"""The oracle: every kernel as the plainest NumPy and torch that says what the spec says. Slow, portable, complete.

Memory is read by copy and written by copy, so that a kernel touches exactly the bytes that its lines name.
"""

from __future__ import annotations

from anyep.kernels.reference_numbers import ReferenceNumbers
from anyep.kernels.reference_rows import ReferenceRows


class ReferenceKernels(ReferenceRows, ReferenceNumbers):
    """A :class:`~anyep.kernels.spec.KernelSet`; its docstrings are the spec's."""

    name = "reference"
