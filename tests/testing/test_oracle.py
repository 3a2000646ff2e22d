"""The oracle against numbers worked out by hand: everything else is judged by it."""

from __future__ import annotations

import pytest
import torch

from anyep.testing.oracle import Exchange, Routing, as_bytes, expected_rows
from anyep.testing.oracle_sums import expected_sum, terms

# two ranks; experts 0 and 1 on rank 0, experts 2 and 3 on rank 1
IDX = [torch.tensor([[0, 3], [1, 0], [-1, 2]]), torch.tensor([[3, 3], [2, 0]])]
WEIGHTS = [torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), torch.tensor([[0.7, 0.8], [0.9, 1.0]])]


def exchange(**options):
    routing = [Routing(topk_idx=idx, topk_weights=weights) for idx, weights in zip(IDX, WEIGHTS, strict=True)]
    return Exchange(**{"routing": routing, "expert_rank": [0, 0, 1, 1], **options})


def numbered(rank, rows):
    """Row n of rank r holds [100 r + n, -(100 r + n)]."""
    values = 100.0 * rank + rows.float()
    return torch.stack([values, -values], dim=1)


def test_compact_rows_stand_once_a_rank_by_source_and_token():
    first, second = exchange().arrivals
    assert (first.source.tolist(), first.token.tolist()) == ([0, 0, 1], [0, 1, 1])
    assert first.topk_idx.tolist() == [[0, -1], [1, 0], [-1, 0]]
    torch.testing.assert_close(first.topk_weights, torch.tensor([[0.1, 0], [0.3, 0.4], [0, 1.0]]), rtol=0, atol=0)
    assert first.counts == [3, 1]
    assert (second.source.tolist(), second.token.tolist()) == ([0, 0, 1, 1], [0, 2, 0, 1])
    assert second.topk_idx.tolist() == [[-1, 1], [-1, 0], [1, 1], [0, -1]]
    assert second.counts == [2, 3]


def test_expert_rows_are_grouped_and_padded():
    first, second = exchange(layout="expert", expert_alignment=4).arrivals
    # expert 0: (0, 0, column 0), (0, 1, column 1), (1, 1, column 1), one padding; expert 1: (0, 1, column 0), three
    assert first.source.tolist() == [0, 0, 1, -1, 0, -1, -1, -1]
    assert first.token.tolist() == [0, 1, 1, -1, 1, -1, -1, -1]
    assert first.column.tolist() == [0, 1, 1, -1, 0, -1, -1, -1]
    assert first.topk_idx.tolist() == [[0, -1], [-1, 0], [-1, 0], [-1, -1], [1, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert first.topk_weights[2].tolist() == [0, 1.0]
    assert first.topk_weights[3].tolist() == [0, 0]
    assert second.source.tolist() == [0, 1, -1, -1, 0, 1, 1, -1]
    assert second.column.tolist() == [1, 0, -1, -1, 1, 0, 1, -1]
    assert second.counts == [2, 3]


def test_a_fixed_number_of_rows_has_a_padded_tail():
    first, second = exchange(static_rows=5).arrivals
    assert (first.num_rows, second.num_rows) == (5, 5)
    assert first.source.tolist() == [0, 0, 1, -1, -1]
    assert first.topk_idx[3:].tolist() == [[-1, -1], [-1, -1]]
    assert first.counts == [3, 1]
    with pytest.raises(ValueError, match="4 rows arrive and static_rows is 3"):
        _ = exchange(static_rows=3).arrivals


def test_experts_may_live_anywhere():
    first, second = exchange(expert_rank=[1, 0, 0, 1]).arrivals
    assert first.topk_idx.tolist() == [[0, -1], [-1, 1], [1, -1]]  # experts 1 and 2 are rank 0's 0 and 1
    assert second.topk_idx.tolist() == [[0, 1], [-1, 0], [1, 1], [-1, 0]]


def test_rows_come_from_their_source_and_padding_is_zero():
    there = exchange(static_rows=5).arrivals[0]
    rows = expected_rows(there, numbered, wire="fp32", rows=slice(1, 5))
    assert rows[:, 0].tolist() == [1, 101, 0, 0]


def test_fp8_rows_are_quantised_row_by_row():
    there = exchange(static_rows=4).arrivals[0]
    q, scales = expected_rows(there, numbered, wire="fp8", rows=slice(0, 4))
    assert q.dtype == torch.float8_e4m3fn
    assert scales[:, 0].tolist() == pytest.approx([1e-4 / 448, 1 / 448, 101 / 448, 0])
    assert q.float()[:, 0].tolist() == [0, 448, 448, 0]
    assert as_bytes(q)[3].tolist() == [0, 0]


def test_rows_that_are_quantised_already_travel_as_they_are():
    there = exchange().arrivals[0]
    q, scales = expected_rows(
        there, lambda rank, rows: (numbered(rank, rows), rows[:, None].float()), wire="fp8", rows=slice(None)
    )
    assert q[:, 0].tolist() == [0, 1, 101]
    assert scales[:, 0].tolist() == [0, 1, 1]


def test_a_sum_adds_what_lies_at_every_rank():
    # rank 0's token 0 is row 0 at rank 0 and row 0 at rank 1, token 1 is row 1 at rank 0, token 2 is row 1 at rank 1
    out = expected_sum(exchange(), 0, numbered, dtype=torch.float32)
    assert out[:, 0].tolist() == [0 + 100, 1, 101]
    # rank 1's token 0 is row 2 at rank 1, token 1 is row 2 at rank 0 and row 3 at rank 1
    assert expected_sum(exchange(), 1, numbered, dtype=torch.float32)[:, 0].tolist() == [102, 2 + 103]
    assert expected_sum(exchange(), 0, numbered, dtype=torch.float32, tokens=slice(1, 3))[:, 0].tolist() == [1, 101]


def order_of(reduce, bias=()):
    """One token with columns on ranks 1, 1 and 0 that hold 2, 2 and 2 ** 25, beside which a single 2 is lost."""
    routing = [Routing(topk_idx=torch.tensor([[2, 3, 0]])), Routing(topk_idx=torch.zeros(0, 3, dtype=torch.int64))]
    by_expert = Exchange(routing=routing, expert_rank=[0, 0, 1, 1], layout="expert")
    value = [2.0**25, 2.0]

    def outputs(rank, rows):
        return torch.full((len(rows), 1), value[rank])

    order = [(term.destination, term.column) for term in terms(by_expert, 0, reduce=reduce) if len(term.row)]
    return order, expected_sum(by_expert, 0, outputs, dtype=torch.float32, reduce=reduce, bias=bias).item()


def test_sums_have_an_order():
    assert order_of("rank") == ([(0, 2), (1, 0), (1, 1)], 2.0**25)
    assert order_of("expert") == ([(1, 0), (1, 1), (0, 2)], 2.0**25 + 4)
    bias = torch.tensor([[-(2.0**25)]])
    assert order_of("rank", bias=[bias])[1] == 4.0


def test_biases_come_first_and_rounding_last():
    bias = [torch.full((3, 2), 1.0, dtype=torch.bfloat16), torch.full((3, 2), 2.0**-8, dtype=torch.bfloat16)]
    out = expected_sum(
        exchange(), 0, lambda rank, rows: torch.full((len(rows), 2), 2.0**-9), dtype=torch.bfloat16, bias=bias
    )
    # 1 + 2 ** -8 + 2 ** -9 rounds up to 1 + 2 ** -7; rounding after each addition would stay at 1
    assert out[1].tolist() == [1 + 2.0**-7] * 2


def test_a_token_without_experts_gets_its_bias_or_zero():
    routing = [Routing(topk_idx=torch.tensor([[-1], [0]]))]
    lonely = Exchange(routing=routing, expert_rank=[0])
    minus_zero = expected_sum(lonely, 0, lambda rank, rows: torch.full((len(rows), 1), -0.0), dtype=torch.float32)
    assert as_bytes(minus_zero).tolist() == [[0, 0, 0, 0], [0, 0, 0, 0x80]]  # nothing is 0, a sum of -0 is -0
    with_bias = expected_sum(
        lonely, 0, lambda rank, rows: torch.ones(len(rows), 1), dtype=torch.float32, bias=[torch.full((2, 1), 5.0)]
    )
    assert with_bias.flatten().tolist() == [5.0, 6.0]


def test_a_rank_without_tokens_or_experts_takes_part():
    empty = torch.zeros(0, 2, dtype=torch.int32)
    routing = [Routing(topk_idx=empty), Routing(topk_idx=torch.tensor([[0, 0]], dtype=torch.int32))]
    first, second = Exchange(routing=routing, expert_rank=[0]).arrivals
    assert (first.num_rows, second.num_rows) == (1, 0)
    assert first.topk_idx.dtype == torch.int32
    assert second.counts == []
