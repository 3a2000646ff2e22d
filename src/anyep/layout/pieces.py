"""How rows are cut into the pieces in which they cross between hosts, and what pieces take. Pure integers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyep.layout.regions import RowBytes, aligned, row_region

CHUNK_BYTES = 1 << 20
"""Rows cross in pieces of at most this size, or of one token where that is more; at 1 Gbit/s one takes 8 ms. Each
piece costs both ends as much as some hundred KiB do: a decode step cut in quarters takes half as long again."""
WINDOW = 2
"""Pieces of a pair of ranks on their way: one crosses while the other is packed, or unpacked."""


def rows_a_piece(row_bytes: int, chunk_bytes: int) -> int:
    """Return how many rows cross in one piece."""
    return max(1, chunk_bytes // max(1, row_bytes))


def cut_tokens(rows_T: NDArray[np.int64], most_rows: int) -> list[int]:
    """Return the first token of each piece, then T: whole tokens, ``most_rows`` rows or one token's, no piece empty.

    ``rows`` [T]: rows that each token has. Tokens without rows change no piece: whoever does not count them cuts alike.

    >>> cut_tokens(np.array([1, 0, 1, 3, 1, 0]), 2), cut_tokens(np.array([1, 1, 3, 1]), 2)
    ([0, 3, 4, 6], [0, 2, 3, 4])
    >>> cut_tokens(np.zeros(3, np.int64), 2)
    [0, 3]
    """
    before = np.concatenate([[0], np.cumsum(rows_T)])
    edges = [0]
    while (begun := before[edges[-1]]) < before[-1]:
        most = int(np.searchsorted(before, begun + most_rows, side="right")) - 1
        if before[most] == begun:  # the next token alone has more rows
            most = int(np.searchsorted(before, begun, side="right"))
        edges.append(most)
    return [*edges[:-1], len(rows_T)] if len(edges) > 1 else [0, len(rows_T)]


class Packed(NamedTuple):
    """Where the parts of rows begin that travel in one message: x at 0, then these."""

    scales: int
    topk_idx: int
    topk_weights: int
    token: int
    num_bytes: int

    def parts(self) -> list[int]:
        """Return the offsets of the five parts, in the order in which they lie."""
        return [0, *self[:4]]


def pack_rows(row: RowBytes, num_rows: int) -> Packed:
    """Lay out rows in one message.

    >>> pack_rows(RowBytes(x=100, scales=4, topk_idx=0, topk_weights=8, token=4, y=0), 3)
    Packed(scales=384, topk_idx=512, topk_weights=512, token=640, num_bytes=652)
    """
    region = row_region(row, num_rows)
    routing = aligned(region.data_bytes) if region.routing_bytes else region.data_bytes
    return Packed(
        scales=region.scales_offset,
        topk_idx=routing,
        topk_weights=routing + region.weights_offset,
        token=routing + region.token_offset,
        num_bytes=routing + region.routing_bytes,
    )
