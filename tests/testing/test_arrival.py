"""Where rows lie at their receiver, from counts alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anyep.testing.arrival import compact_arrival, expert_arrival

counts_RL = st.integers(1, 9).flatmap(
    lambda ranks: st.integers(0, 6).flatmap(
        lambda local: st.lists(
            st.lists(st.integers(0, 50), min_size=local, max_size=local), min_size=ranks, max_size=ranks
        ).map(lambda rows: np.array(rows, np.int64).reshape(ranks, local))
    )
)


@given(counts_RL, st.integers(1, 16), st.one_of(st.none(), st.integers(0, 3000)))
def test_expert_rows_and_gaps_partition_the_batch(counts, alignment, static_rows):
    arrival = expert_arrival(counts, alignment=alignment, static_rows=static_rows)
    taken = np.zeros(max(arrival.num_rows, arrival.num_filled), int)
    for source, row in enumerate(counts):
        for expert, count in enumerate(row):
            begin = arrival.start_RB[source, expert]
            taken[begin : begin + count] += 1
    for begin, end in zip(arrival.gap_begin, arrival.gap_end, strict=True):
        taken[begin:end] += 1
    assert (taken == 1).all()
    assert arrival.expert_counts == counts.sum(axis=0).tolist()
    if static_rows is None:
        assert arrival.num_rows == arrival.num_filled


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(0, 600))
def test_compact_rows_follow_source_ranks(rows, static_rows):
    rows_R = np.array(rows, np.int64)
    arrival = compact_arrival(rows_R, rows_R[:, None])
    assert arrival.num_rows == sum(rows)
    assert arrival.start_RB[:, 0].tolist() == [sum(rows[:i]) for i in range(len(rows))]
    fixed = compact_arrival(rows_R, rows_R[:, None], static_rows=static_rows)
    assert fixed.num_rows == static_rows
    assert fixed.num_filled == sum(rows)
    tail = int((fixed.gap_end - fixed.gap_begin).sum())
    assert tail == max(0, static_rows - sum(rows))


def test_expert_slabs_begin_aligned():
    arrival = expert_arrival(np.array([[1, 0, 5], [2, 0, 1]]), alignment=4)
    assert arrival.start_RB.tolist() == [[0, 4, 4], [1, 4, 9]]
    assert arrival.num_rows == 12
    assert arrival.gap_begin.tolist() == [3, 10]
    assert arrival.gap_end.tolist() == [4, 12]
