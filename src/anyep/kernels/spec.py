"""What a kernel set is: loops over rows that know addresses and sizes, and no groups.

Legend: T tokens, H hidden, K top-k, E experts, R ranks, W entries a token, G scale groups (ceil(H / 128)),
L local experts, S sources, P peers, B bins.

Every argument is an integer (an enumeration as ``int(element)``: Numba looks 10 us at an IntEnum). ``*_addr`` is the
address of a dense row-major array; its dtype and shape stand beside it. A *peer table* is an int64 [R] array of
addresses, one a rank: where that rank's array begins as seen from here. 0 in a table: ``scatter``, ``scatter_routing``
and ``quantise_scatter`` skip the entries that name this rank, and do not even read a token all of whose entries they
skip; for the others it means that no entry names it.

*Entries* say where a token's rows lie: ``entry_rank`` and ``entry_row`` are int32 [T, W]; entry ``j`` of token
``t`` is row ``entry_row[t, j]`` of rank ``entry_rank[t, j]``, and rank -1 means no row.

- *compact* (W = min(K, R)): one entry a distinct destination rank, ascending, packed to the front.
- *expert* (W = K): entry ``j`` belongs to top-k column ``j``; -1 where the column names no expert.

Rows of bytes may lie anywhere; arrays of numbers are aligned to their number. A NaN that arithmetic makes is the
canonical one of its type: 0x7fc0 (bf16), 0x7e00 (fp16), 0x7fc00000 (fp32), 0x7f (FP8). What is moved keeps its bits.

Kernels trust their arguments: whoever calls them has checked shapes and ranges, except where a function says that it
checks. They write the rows that are named and nothing else. The examples in the docstrings stand in tests/kernels too.
"""

from __future__ import annotations

from typing import Protocol

from anyep.kernels.spec_numbers import NumberKernels
from anyep.kernels.spec_rows import RowKernels
from anyep.numerics.formats import Element, ScaleFormat

__all__ = ["Element", "KernelSet", "ScaleFormat"]


class KernelSet(RowKernels, NumberKernels, Protocol):
    """The loops every device brings. ``anyep.testing.check_kernels`` is the exam."""

    name: str
