"""What a rank knows of a dispatch in numbers: who sends how many rows where, and where they begin.

Every rank announces all its counts to all others, so each knows where its own rows begin at every destination, what it
receives, and whether it fits, without asking. ``layout/arrival.py`` says the same slowly and plainly; a test compares.

A *ledger* is one int32 array a dispatch; :class:`LedgerShape` says what lies where. It stays with the handle.

Legend: R ranks, E experts, L local experts, B bins of a sender (R, or E where rows are grouped by expert), C bins of a
source at its receiver (1, or L).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from anyep.layout.placement import Placement

FIELDS = (
    "rank_rows",  # [R] tokens that go to each rank, each counted once
    "expert_rows",  # [E] (token, column) pairs of each expert
    "num_tokens",  # [1] T; these three are what a rank announces
    "send_start",  # [B] first row of this rank's rows in each bin
    "dense_start",  # [E] the same where rows lie without gaps (padded layout)
    "rank_entries",  # [R] rows that go to each rank
    "source_rows",  # [R] tokens that come from each rank
    "source_entries",  # [R] rows that come from each rank
    "source_tokens",  # [R] T of each rank
    "pair_rows",  # [R, R] tokens that each rank sends each rank: row = source
    "recv_rows",  # [R, C] rows from each source in each bin
    "recv_start",  # [R, C] where they begin
    "counts",  # [L] rows of each local expert, without padding
    "block_start",  # [L] first row of each local expert
    "filled_rows",  # [R] rows of each rank's batch, its padding included
    "batch_rows",  # [R] the same, or the fixed number
    "gaps",  # [1 + 2 (L + 1)] how many, where each begins, where each ends
    "scratch",  # [R + E]
)
"""In the order in which they lie in a ledger; ``F_*`` are their numbers, ``D_*`` those of a shape's ``dims``."""
(
    F_RANK_ROWS,
    F_EXPERT_ROWS,
    F_NUM_TOKENS,
    F_SEND_START,
    F_DENSE_START,
    F_RANK_ENTRIES,
    F_SOURCE_ROWS,
    F_SOURCE_ENTRIES,
    F_SOURCE_TOKENS,
    F_PAIR_ROWS,
    F_RECV_ROWS,
    F_RECV_START,
    F_COUNTS,
    F_BLOCK_START,
    F_FILLED_ROWS,
    F_BATCH_ROWS,
    F_GAPS,
    F_SCRATCH,
) = range(len(FIELDS))
NUM_FIELDS = len(FIELDS)

D_RANK, D_RANKS, D_EXPERTS, D_LOCAL, D_BY_EXPERT, D_ALIGNMENT, D_BLOCK_ROWS, D_STATIC_ROWS = range(8)
PARTS = 5
"""Arrays of a row: x, scales | topk_idx, topk_weights, source token; the line parts the two blocks they lie in."""
WAY, CAPACITY, DATA_SEGMENT, DATA_OFFSET, ROUTING_SEGMENT, ROUTING_OFFSET, COUNTS = range(7)
"""Words of a body: 1 if this pair's rows came along (between hosts: how many tokens are forwarded, or STRAIGHT), rows
that fit the offered blocks, where those lie, the counts."""
NEAR = -1
"""Instead of a number of tokens that cross to another host: this rank shares memory."""
STRAIGHT = -2
"""The same, and every smaller number: rows for other hosts go straight to their ranks, none is forwarded."""
COMES_STRAIGHT, GOES_STRAIGHT = 1, 2
"""Bits of a rank of another host, in a combine: its rows come from it straight; this rank's go to it straight."""
EAGER_ROWS, DIRECT_ROWS, NUM_TO, NUM_FROM, NUM_ROWS, FAR_ROWS, LIMIT_ROWS, NUM_GAPS, NUM_TALLY = range(9)
"""Numbers that the bookkeeping leaves in a tally, and how many these are."""
SETTLED, STATIC_TOO_SMALL, BLOCK_TOO_SMALL, LANDING_TOO_SMALL, UNKNOWN_PLACE = range(5)
"""What settle found; the last: where a peer has put a batch is not known here yet."""
ALL_FOUND, DISAGREE = -1, -2
"""What finding a combine's rows comes to, but for a segment that is to be looked up; the last also a dispatch's."""


class LedgerShape:
    """Sizes and offsets of the ledgers of one layout; the same for every dispatch of a buffer."""

    def __init__(
        self, placement: Placement, rank: int, *, by_expert: bool, alignment: int, block_rows: int, static_rows: int
    ) -> None:
        ranks, experts = placement.num_ranks, placement.num_experts
        self.num_local = int(placement.experts_per_rank_R[rank])
        self.num_bins = experts if by_expert else ranks
        self.num_recv_bins = self.num_local if by_expert else 1
        self.by_expert = by_expert
        self.block_rows = block_rows
        self.static_rows = static_rows
        sizes = {
            "rank_rows": ranks,
            "expert_rows": experts,
            "num_tokens": 1,
            "send_start": self.num_bins,
            "dense_start": experts if block_rows else 0,
            "rank_entries": ranks,
            "source_rows": ranks,
            "source_entries": ranks,
            "source_tokens": ranks,
            "pair_rows": ranks * ranks,
            "recv_rows": ranks * self.num_recv_bins,
            "recv_start": ranks * self.num_recv_bins,
            "counts": self.num_local,
            "block_start": self.num_local,
            "filled_rows": ranks,
            "batch_rows": ranks,
            "gaps": 1 + 2 * (self.num_local + 1),
            "scratch": ranks + experts,
        }
        starts = np.cumsum([0, *(sizes[name] for name in FIELDS)])
        self.num_words = int(starts[-1] + starts[-1] % 2)  # what lies behind it is aligned to 8 bytes
        self.offsets = 4 * starts[:-1].astype(np.int64)
        self.bytes_at = {name: int(offset) for name, offset in zip(FIELDS, self.offsets, strict=True)}
        edges = pairwise(starts.tolist())
        self.tokens_word = int(starts[F_NUM_TOKENS])
        self.words_at = {name: slice(begin, end) for name, (begin, end) in zip(FIELDS, edges, strict=True)}
        self.dims = np.array(
            [rank, ranks, experts, self.num_local, by_expert, alignment, block_rows, static_rows], np.int64
        )
