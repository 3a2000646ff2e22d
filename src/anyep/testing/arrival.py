"""Where rows must lie at their receiver, worked out plainly from the counts that every source announced.

The oracle of ``exchange/settle.py``, which works out the same for all ranks in compiled loops.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyep.layout.placement import IntArray

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrival:
    """A received batch before a byte of it moved.

    ``num_filled`` rows are sent or pad a group; where the number of rows is fixed they may be more than ``num_rows``,
    which the caller refuses. ``start_RB`` holds, for each source rank, the first row of each of its bins: one bin in
    the compact layout, one for every local expert in the expert layout. ``gap_begin`` and ``gap_end`` (int32 [gaps]
    each) are the row ranges nobody writes (alignment, and the tail of a fixed number of rows).
    """

    num_rows: int
    num_filled: int
    start_RB: Counts
    expert_counts: list[int]
    """rows for each local expert, without padding"""
    gap_begin: IntArray
    gap_end: IntArray


def compact_arrival(rows_R: Counts, expert_rows_RL: Counts, *, static_rows: int | None = None) -> Arrival:
    """Each token once, ordered by (source rank, source token).

    ``rows_R`` int64 [R]: rows from each source; ``expert_rows_RL`` int64 [R, L]: pairs for each local expert.

    >>> compact_arrival(np.array([2, 0, 3]), np.array([[1, 1], [0, 0], [3, 0]])).start_RB.ravel().tolist()
    [0, 2, 2]
    """
    filled = int(rows_R.sum())
    return Arrival(
        num_rows=filled if static_rows is None else static_rows,
        num_filled=filled,
        start_RB=_exclusive_sum(rows_R)[:, None],
        expert_counts=expert_rows_RL.sum(axis=0).tolist(),
        **_gaps([(filled, static_rows)] if static_rows is not None else []),
    )


def expert_arrival(expert_rows_RL: Counts, *, alignment: int = 1, static_rows: int | None = None) -> Arrival:
    """Rows grouped by local expert, each group padded to ``alignment``, ordered by (source rank, token, column).

    ``expert_rows_RL`` int64 [R, L]: rows from each source for each local expert.

    >>> a = expert_arrival(np.array([[1, 2], [2, 0]]), alignment=4)
    >>> a.num_rows, a.start_RB.tolist(), a.gap_begin.tolist(), a.gap_end.tolist()
    (8, [[0, 4], [1, 6]], [3, 6], [4, 8])
    """
    counts_L = expert_rows_RL.sum(axis=0)
    padded_L = -(-counts_L // alignment) * alignment
    slab_L = _exclusive_sum(padded_L)
    before_RL = np.cumsum(expert_rows_RL, axis=0) - expert_rows_RL
    used = int(padded_L.sum())
    gaps = [(int(b + c), int(b + p)) for b, c, p in zip(slab_L, counts_L, padded_L, strict=True)]
    if static_rows is not None:
        gaps.append((used, static_rows))
    return Arrival(
        num_rows=used if static_rows is None else static_rows,
        num_filled=used,
        start_RB=slab_L + before_RL,
        expert_counts=counts_L.tolist(),
        **_gaps(gaps),
    )


def _exclusive_sum(counts: Counts) -> Counts:
    return np.cumsum(counts) - counts


def _gaps(ranges: list[tuple[int, int]]) -> dict[str, IntArray]:
    real = [(begin, end) for begin, end in ranges if begin < end]
    return {
        "gap_begin": np.array([begin for begin, _ in real], np.int32),
        "gap_end": np.array([end for _, end in real], np.int32),
    }
