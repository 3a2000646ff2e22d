"""The compiled bookkeeping against the plain one of ``testing/arrival.py``: every rank comes to the same places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyep.exchange.ledger import COUNTS, LANDING_TOO_SMALL, SETTLED, STATIC_TOO_SMALL, LedgerShape
from anyep.exchange.opening import BODY
from anyep.exchange.setup import load_books
from anyep.layout.placement import Placement, mapped_placement
from anyep.testing.arrival import Arrival, compact_arrival, expert_arrival

ROOM = 1 << 30


class Settled:
    """One rank's ledger after every rank has announced ``rank_rows`` [R, R] and ``expert_rows`` [R, E]."""

    def __init__(self, placement: Placement, rank: int, rank_rows: np.ndarray, expert_rows: np.ndarray, **options):
        defaults = {"by_expert": False, "alignment": 1, "block_rows": 0, "static_rows": -1}
        capacity = options.pop("capacity", ROOM)
        self.shape = LedgerShape(placement, rank, **defaults | options)
        ranks, experts = expert_rows.shape
        opened = np.full((ranks, BODY + COUNTS + (ranks + experts + 2) // 2), -1, np.int64)
        opened[:, BODY + 1] = capacity
        opened.view(np.int32)[:, 2 * (BODY + COUNTS) :][:, : ranks + experts + 1] = np.hstack(
            [rank_rows, expert_rows, np.arange(ranks).reshape(-1, 1)]
        )
        self.memory = torch.full((self.shape.num_words,), -1, dtype=torch.int32)
        self.by_source, self.by_expert = np.zeros(ranks, np.int64), np.zeros(self.shape.num_local, np.int64)
        self.found = load_books().settle(
            opened,
            BODY,
            self.shape.dims,
            self.shape.offsets,
            torch.from_numpy(placement.expert_rank_E).data_ptr(),
            torch.from_numpy(placement.expert_local_E).data_ptr(),
            self.memory.data_ptr(),
            self.by_source,
            self.by_expert,
        )

    def __getitem__(self, name: str) -> list[int]:
        return self.memory[self.shape.words_at[name]].tolist()

    def gaps(self) -> list[tuple[int, int]]:
        count, *edges = self["gaps"]
        most = len(edges) // 2
        return list(zip(edges[:count], edges[most : most + count], strict=True))


@st.composite
def announcements(draw: st.DrawFn) -> tuple[Placement, np.ndarray, np.ndarray]:
    ranks, experts = draw(st.integers(1, 7)), draw(st.integers(1, 20))
    placement = mapped_placement(draw(st.lists(st.integers(0, ranks - 1), min_size=experts, max_size=experts)), ranks)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    return placement, rng.integers(0, 9, (ranks, ranks)), rng.integers(0, 9, (ranks, experts))


def arrivals(placement, rank_rows, expert_rows, **options) -> list[Arrival]:
    """What the plain bookkeeping says of every receiver."""
    found = []
    for rank in range(placement.num_ranks):
        local = expert_rows[:, placement.expert_rank_E == rank]
        by_expert = options.get("by_expert", False)
        static = options.get("static_rows")
        if by_expert:
            found.append(expert_arrival(local, alignment=options["alignment"], static_rows=static))
        else:
            found.append(compact_arrival(rank_rows[:, rank], local, static_rows=static))
    return found


@settings(max_examples=200, deadline=None)
@given(announcements(), st.sampled_from([1, 4, 7]), st.booleans(), st.booleans())
def test_every_rank_settles_to_the_plain_places(announced, alignment, by_expert, fixed):
    placement, rank_rows, expert_rows = announced
    options = {"by_expert": by_expert, "alignment": alignment}
    plain = arrivals(placement, rank_rows, expert_rows, **options)
    if fixed:
        options["static_rows"] = max(one.num_rows for one in plain) + 3
        plain = arrivals(placement, rank_rows, expert_rows, **options)
    for rank, mine in enumerate(plain):
        settled = Settled(placement, rank, rank_rows, expert_rows, **options)
        assert settled.found == SETTLED
        assert settled["batch_rows"] == [one.num_rows for one in plain]
        assert settled["filled_rows"] == [one.num_filled for one in plain]
        assert settled["recv_start"] == mine.start_RB.ravel().tolist()
        assert settled["counts"] == mine.expert_counts == settled.by_expert.tolist()
        assert settled["source_entries"] == settled.by_source.tolist()
        assert settled.gaps() == list(zip(mine.gap_begin.tolist(), mine.gap_end.tolist(), strict=True))
        if by_expert:
            owner, local = placement.expert_rank_E, placement.expert_local_E
            starts = [int(plain[owner[e]].start_RB[rank, local[e]]) for e in range(placement.num_experts)]
            entries = [int(expert_rows[rank, owner == d].sum()) for d in range(placement.num_ranks)]
        else:
            starts = [int(one.start_RB[rank, 0]) for one in plain]
            entries = rank_rows[rank].tolist()
        assert settled["send_start"] == starts
        assert settled["rank_entries"] == entries
        assert settled["source_rows"] == rank_rows[:, rank].tolist()


@settings(max_examples=100, deadline=None)
@given(announcements())
def test_blocks_of_the_padded_layout(announced):
    placement, rank_rows, expert_rows = announced
    block = max(1, int(expert_rows.sum(axis=0).max()))
    for rank in range(placement.num_ranks):
        settled = Settled(placement, rank, rank_rows, expert_rows, by_expert=True, block_rows=block)
        before = np.cumsum(expert_rows, axis=0) - expert_rows
        assert settled.found == SETTLED
        assert settled["send_start"] == (placement.expert_local_E * block + before[rank]).tolist()
        totals = expert_rows.sum(axis=0)
        for expert, owner in enumerate(placement.expert_rank_E):
            earlier = (placement.expert_rank_E == owner) & (np.arange(placement.num_experts) < expert)
            assert settled["dense_start"][expert] == totals[earlier].sum() + before[rank, expert]
        assert settled["block_start"] == [local * block for local in range(settled.shape.num_local)]
        assert settled.gaps() == []


def test_a_row_too_many_is_seen_by_every_rank():
    placement = mapped_placement([0, 1], 2)
    rank_rows, expert_rows = np.array([[3, 1], [0, 1]]), np.array([[3, 1], [0, 1]])
    for rank in range(2):
        assert Settled(placement, rank, rank_rows, expert_rows, static_rows=2).found == STATIC_TOO_SMALL
        small = Settled(placement, rank, rank_rows, expert_rows, capacity=[3, 1])
        assert small.found == LANDING_TOO_SMALL, "rank 1 offers room for 1 row, and 2 will come"
        assert small["batch_rows"] == [3, 2], "all is settled but where"


@pytest.mark.parametrize("capacity", [-1, 0])
def test_no_memory_is_too_little_even_for_no_rows(capacity):
    nothing = np.zeros((1, 1), np.int64)
    settled = Settled(mapped_placement([0], 1), 0, nothing, nothing, capacity=capacity)
    assert settled.found == (SETTLED if capacity == 0 else LANDING_TOO_SMALL)


@settings(max_examples=50, deadline=None)
@given(announcements())
def test_every_rank_keeps_how_many_tokens_each_has_and_sends_to_each(announced):
    placement, rank_rows, expert_rows = announced
    for rank in range(placement.num_ranks):
        settled = Settled(placement, rank, rank_rows, expert_rows)
        assert settled["pair_rows"] == rank_rows.flatten().tolist()
        assert settled["source_tokens"] == list(range(placement.num_ranks))
