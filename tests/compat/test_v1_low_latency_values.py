"""Low latency where values are special: tiny ones, experts named twice, what nobody may read, LogFMT's groups."""

from __future__ import annotations

import pytest
import torch

from anyep.compat.deep_ep.utils.math import calc_diff
from tests.compat.test_v1_low_latency import LL, TMAX, H, apply_experts, check_rows, low, quantised, weighted
from tests.compat.v1_oracle import E, Inputs, make_inputs, on_ranks, same_bits


@pytest.mark.parametrize("round_scale", [False, True])
def test_groups_of_tiny_numbers_have_the_scale_of_a_ten_thousandth(round_scale):
    given = make_inputs([9, 24], hidden=H)
    for one in given:
        one.x[0] = 0
        one.x[1, :128] = 2e-5
        one.x[2, 128:] = -1e-4
        one.x[3, 7] = 3e38
        one.x[4] = torch.where(torch.arange(H) % 2 == 0, 448.0, -448.0)

    def rank_main(buffer):
        (x, scales), count, handle, _, _ = low(buffer, given, round_scale=round_scale)
        check_rows(given, buffer.rank, x, count, handle, lambda row: quantised(row, round_scale)[0])
        check_rows(given, buffer.rank, scales, count, handle, lambda row: quantised(row, round_scale)[1])

    on_ranks(2, rank_main, **LL)
    assert quantised(given[0].x[0], False)[1].tolist() == pytest.approx([1e-4 / 448] * 2)


def test_an_expert_named_twice_gets_two_rows_and_both_are_summed():
    idx = torch.tensor([[1, 1, 7], [-1, 11, 11], [0, -1, 0]])
    given = [
        Inputs(x=torch.randn(3, H, generator=torch.Generator().manual_seed(rank)).bfloat16(), topk_idx=idx.clone(),
               topk_weights=torch.rand(3, 3, generator=torch.Generator().manual_seed(9 + rank)))
        for rank in range(3)
    ]  # fmt: skip

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, count, handle, *_ = low(buffer, given, use_fp8=False)
        check_rows(given, buffer.rank, x, count, handle, lambda row: row)
        out = buffer.low_latency_combine(apply_experts(buffer, x), idx, mine.topk_weights, handle)[0]
        assert same_bits(out, weighted(given, buffer.rank, mine.topk_weights))

    on_ranks(3, rank_main, **LL)


@pytest.mark.parametrize("options", [{}, {"zero_copy": True}, {"use_logfmt": True}])
def test_rows_that_nobody_sent_and_weights_of_no_expert_are_not_read(options):
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, count, handle, *_ = low(buffer, given, use_fp8=False)
        y = apply_experts(buffer, x)
        valid = torch.arange(y.shape[1]) < count.view(-1, 1)
        weights = mine.topk_weights.masked_fill(mine.topk_idx < 0, float("nan"))

        def total(rows):
            if "zero_copy" in options:
                buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
            return buffer.low_latency_combine(rows, mine.topk_idx, weights, handle, **options)[0]

        clean = total(y.masked_fill(~valid.unsqueeze(-1), 0))
        assert same_bits(total(y.masked_fill(~valid.unsqueeze(-1), float("nan"))), clean)
        assert "use_logfmt" in options or same_bits(clean, weighted(given, buffer.rank, mine.topk_weights))

    on_ranks(2, rank_main, **LL)


def test_a_zero_copy_combine_still_checks_the_shape_of_x():
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, *_ = low(buffer, given, use_fp8=False)
        room = buffer.get_next_low_latency_combine_buffer(handle)
        room.copy_(apply_experts(buffer, x))
        for bad in (x[:, 1:], x[1:], x.float(), x[..., 1:]):
            with pytest.raises(RuntimeError, match="x must be"):
                buffer.low_latency_combine(bad, mine.topk_idx, mine.topk_weights, handle, zero_copy=True)
        out = buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle, zero_copy=True)[0]
        assert same_bits(out, weighted(given, buffer.rank, mine.topk_weights))

    on_ranks(2, rank_main, **LL)


def test_logfmt_keeps_large_groups_constant_ones_and_zeros_and_upstreams_tolerance():
    """One row a token and weights of 1, so that the sum is the row that travelled."""
    given = make_inputs([9, 24], hidden=4 * 128, topk=1)
    for one in given:
        one.topk_weights.fill_(1)
        one.x[:, 128:] *= 0.2
        one.x[:, 0] = 1  # the first group reaches 1
        one.x[:, 128:256] = 0.375  # the second is one number
        one.x[:, 300] = 0

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, *_ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, TMAX, E, use_fp8=False)
        out = buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle, use_logfmt=True)[0]
        wanted = mine.x.masked_fill(mine.topk_idx < 0, 0)
        assert same_bits(out[:, :256].contiguous(), wanted[:, :256].contiguous())
        assert not out[:, 300].any()
        assert 0 < calc_diff(out[:, 256:], wanted[:, 256:]) < 1e-5

    on_ranks(2, rank_main, **LL)


def test_results_are_of_the_caller_whatever_is_called_later():
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        held = [low(buffer, given, use_fp8=False) for _ in range(6)]
        outs = [
            buffer.low_latency_combine(apply_experts(buffer, x), mine.topk_idx, mine.topk_weights, handle)[0]
            for x, _, handle, *_ in reversed(held)
        ]
        low(buffer, make_inputs([24, 1], hidden=H), use_fp8=False)
        for x, count, handle, *_ in held:
            check_rows(given, buffer.rank, x, count, handle, lambda row: row)
        assert all(same_bits(out, weighted(given, buffer.rank, mine.topk_weights)) for out in outs)
        assert len({one.data_ptr() for one in [*outs, *(x for x, *_ in held)]}) == 12

    on_ranks(2, rank_main, **LL)
