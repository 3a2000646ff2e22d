"""Gradients between ranks of several hosts, played by threads: forwarded rows and straight ones alike."""

from __future__ import annotations

import pytest

from tests.nn.reference import assert_results, make_case, reference
from tests.nn.test_gradients import TOKENS, play


@pytest.mark.parametrize("straight_bytes", [0, 1 << 20], ids=["forwarded", "straight"])
@pytest.mark.parametrize("reduce", ["expert", "rank"])
@pytest.mark.parametrize(("num_ranks", "ranks_per_host"), [(2, 1), (3, 2), (4, 2)])
def test_they_are_the_dense_ones_on_several_hosts(monkeypatch, num_ranks, ranks_per_host, reduce, straight_bytes):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(ranks_per_host))
    case = make_case(TOKENS[num_ranks], seed=num_ranks)
    assert_results(play(case, reduce=reduce, options={"straight_bytes": straight_bytes}), reference(case))
