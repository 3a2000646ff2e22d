"""Rows that everybody can make again: windows of one random tape.

Row n of rank r begins where a hash of (kind, r, n) says. So every row is another, a byte at a wrong place is a wrong
byte, and any rank can make any other rank's rows without having seen them.
"""

from __future__ import annotations

import torch

_LENGTH = 1 << 20
_RUN = 512
"""Channels that share a power of two, so that groups of channels differ in their scale."""

SENT, OUTPUT, PEER_OUTPUT = 1, 2, 3
"""Kinds of rows: what tokens hold, what experts return, what experts of a comparison return."""


class Tape:
    """Rows of ``hidden`` channels of ``dtype``; the same in every process. ``exponent``: times a power of two."""

    def __init__(self, hidden: int, dtype: torch.dtype, *, exponent: int = 0) -> None:
        self.hidden = hidden
        generator = torch.Generator().manual_seed(0)
        length = -(-(_LENGTH + hidden) // _RUN) * _RUN
        values = torch.randn(length // _RUN, _RUN, generator=generator)
        exponents = torch.randint(-4, 5, (length // _RUN, 1), generator=generator) + exponent
        self._values = (values * 2.0**exponents).flatten().to(dtype)

    def rows(self, kind: int, rank: int, numbers: torch.Tensor) -> torch.Tensor:
        """Return rows ``numbers`` (int64 [n]) of a rank: [n, H]."""
        out = torch.empty(len(numbers), self.hidden, dtype=self._values.dtype)
        self.fill(out, kind, rank, numbers)
        return out

    def fill(self, out: torch.Tensor, kind: int, rank: int, numbers: torch.Tensor) -> None:
        """Write rows ``numbers`` to ``out`` [n, H]."""
        for row, begin in zip(out, _begins(kind, rank, numbers), strict=True):
            row.copy_(self._values[begin : begin + self.hidden])


def _begins(kind: int, rank: int, numbers: torch.Tensor) -> list[int]:
    """Hash to [0, LENGTH): the multiply and xor-shift steps of splitmix64, in wrapping int64."""
    mixed = numbers + (kind << 56) + (rank << 40)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((mixed >> 20) & (_LENGTH - 1)).tolist()
