"""Rows are cut into pieces of whole tokens, alike by who counts all tokens and by who counts those with rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anyep.layout.pieces import cut_tokens, pack_rows
from anyep.layout.regions import RowBytes


def rows_of(edges: list[int], rows_T: np.ndarray) -> list[int]:
    return [int(rows_T[a:b].sum()) for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 12))
def test_a_piece_has_as_many_rows_as_fit_or_those_of_one_token(rows, most):
    rows_T = np.array(rows, np.int64)
    edges = cut_tokens(rows_T, most)
    assert (edges[0], edges[-1]) == (0, len(rows))
    pieces = rows_of(edges, rows_T)
    assert sum(pieces) == sum(rows)
    for number, count in enumerate(pieces):
        assert count > 0 or len(pieces) == 1
        first = rows_T[edges[number] : edges[number + 1]]
        assert count <= most or np.count_nonzero(first) == 1
        if number + 1 < len(pieces):
            following = rows_T[edges[number + 1] :]
            assert count + following[following > 0][0] > most, "another token would have fitted"


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 12))
def test_tokens_without_rows_change_no_piece(rows, most):
    rows_T = np.array(rows, np.int64)
    with_rows = rows_T[rows_T > 0]
    assert rows_of(cut_tokens(rows_T, most), rows_T) == rows_of(cut_tokens(with_rows, most), with_rows) or not sum(rows)


@given(st.lists(st.integers(0, 40), min_size=5, max_size=5), st.integers(0, 20))
def test_parts_of_rows_in_a_message_do_not_overlap(sizes, num_rows):
    row = RowBytes(x=sizes[0] + 1, scales=sizes[1], topk_idx=sizes[2], topk_weights=sizes[3], token=sizes[4], y=0)
    packed = pack_rows(row, num_rows)
    parts = [(begin, size * num_rows) for begin, size in zip(packed.parts(), row.parts(), strict=True) if size]
    for (begin, num_bytes), (following, _) in pairwise(parts):
        assert begin + num_bytes <= following
    assert parts[-1][0] + parts[-1][1] <= packed.num_bytes
