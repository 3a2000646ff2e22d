"""Low latency: blocks, FP8 scales, hooks, statistics, weighted sums, the zero-copy buffer."""

from __future__ import annotations

import pytest
import torch

from anyep.compat.deep_ep.utils.math import per_token_cast_back
from tests.compat.v1_oracle import E, K, make_inputs, on_ranks, same_bits, send

H, TMAX = 256, 24
TOKENS = [[23], [9, 24], [20, 0, 13], [5, 24, 12, 8]]
LL = {"low_latency_mode": True}


def quantised(row, power_of_two):
    """One row as the reference has it: per 128 channels, FP32 throughout."""
    groups = row.float().view(-1, 128)
    amax = groups.abs().amax(1, keepdim=True).clamp_min(1e-4)
    scale = amax / 448
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
        q = groups / scale
    else:
        q = groups * (torch.full_like(amax, 448) / amax)  # 448 / amax would be a reciprocal
    return q.clamp(-448, 448).to(torch.float8_e4m3fn).view(-1), scale.view(-1)


def pairs(given, expert):
    """(source, token) of every row of an expert, in our order."""
    return [
        (source, token)
        for source, one in enumerate(given)
        for token, row in enumerate(one.topk_idx.tolist())
        for chosen in row
        if chosen == expert
    ]


def low(buffer, given, num_experts=E, **options):
    mine = given[buffer.rank]
    return buffer.low_latency_dispatch(mine.x, mine.topk_idx, TMAX, num_experts, **options)


def check_rows(given, rank, rows, count, handle, expected_row, num_experts=E):
    """Every valid row, where it comes from, and what the handle says."""
    ranks, local = len(given), num_experts // len(given)
    src_info, ranges, most, hidden, experts = handle
    assert (most, hidden, experts) == (TMAX, H, num_experts)
    assert (src_info.dtype, src_info.shape) == (torch.int32, (local, ranks * TMAX))
    assert (ranges.dtype, ranges.shape) == (torch.int64, (local, ranks))
    assert count.dtype == torch.int32
    for expert in range(local):
        wanted = pairs(given, rank * local + expert)
        assert count[expert] == len(wanted)
        assert src_info[expert, : len(wanted)].tolist() == [token for _, token in wanted]
        for source in range(ranks):
            begin, many = int(ranges[expert, source]) >> 32, int(ranges[expert, source]) & 0xFFFFFFFF
            assert [s for s, _ in wanted[begin : begin + many]] == [source] * many
            assert many == sum(s == source for s, _ in wanted)
        for row, (source, token) in enumerate(wanted):
            assert same_bits(rows[expert, row], expected_row(given[source].x[token]))


@pytest.mark.parametrize("tokens", TOKENS)
def test_bf16_rows_stand_in_their_experts_block_with_where_they_come_from(tokens):
    given = make_inputs(tokens, hidden=H)

    def rank_main(buffer):
        x, count, handle, event, hook = low(buffer, given, use_fp8=False)
        assert x.shape == (E // len(tokens), len(tokens) * TMAX, H)
        assert event.event is None
        assert hook is None
        check_rows(given, buffer.rank, x, count, handle, lambda row: row)

    on_ranks(len(tokens), rank_main, **LL)


@pytest.mark.parametrize("round_scale", [False, True])
def test_fp8_rows_have_a_scale_for_128_channels_in_column_major_blocks(round_scale):
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        (x, scales), count, handle, _, _ = low(buffer, given, round_scale=round_scale)
        block = 2 * TMAX
        assert x.dtype == torch.float8_e4m3fn
        assert scales.dtype == torch.float32
        assert scales.shape == (E // 2, block, H // 128)
        assert scales.stride() == (H // 128 * block, 1, block)
        check_rows(given, buffer.rank, x, count, handle, lambda row: quantised(row, round_scale)[0])
        check_rows(given, buffer.rank, scales, count, handle, lambda row: quantised(row, round_scale)[1])

    on_ranks(2, rank_main, **LL)


def test_ue8m0_scales_are_four_exponents_to_a_word_lowest_first():
    hidden = 1024
    given = make_inputs([9, 24], hidden=hidden)

    def rank_main(buffer):
        (x, scales), _count, _, _, _ = low(buffer, given, round_scale=True, use_ue8m0=True)
        block = 2 * TMAX
        assert scales.dtype == torch.int32
        assert scales.shape == (E // 2, block, hidden // 512)
        assert scales.stride() == (hidden // 512 * block, 1, block)
        for expert in range(E // 2):
            for row, (source, token) in enumerate(pairs(given, buffer.rank * (E // 2) + expert)):
                q, scale = quantised(given[source].x[token], power_of_two=True)
                exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
                assert same_bits(scales[expert, row].contiguous().view(torch.uint8), exponents)
                assert same_bits(x[expert, row], q)

    on_ranks(2, rank_main, **LL)


@pytest.mark.parametrize("use_fp8", [False, True])
def test_what_a_hook_promises_becomes_valid_in_place_views_included(use_fp8):
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        x, count, handle, event, hook = low(buffer, given, use_fp8=use_fp8, return_recv_hook=True)
        assert event.event is None
        rows, scales = x if use_fp8 else (x, None)
        views = rows[1], count[1:], handle[0][1], handle[1][1]
        pointers = [one.data_ptr() for one in views]
        hook()
        assert [one.data_ptr() for one in (rows[1], count[1:], handle[0][1], handle[1][1])] == pointers
        check_rows(given, buffer.rank, rows, count, handle, lambda row: quantised(row, False)[0] if use_fp8 else row)
        if use_fp8:
            check_rows(given, buffer.rank, scales, count, handle, lambda row: quantised(row, False)[1])
        wanted = pairs(given, buffer.rank * (E // 2) + 1)
        assert views[2][: len(wanted)].tolist() == [token for _, token in wanted]
        hook()  # twice is once

    on_ranks(2, rank_main, **LL)


def weighted(given, rank, weights):
    """The sum over columns in order, fp32, each product rounded, where an expert's output is its index + 1 times x."""
    x, idx = given[rank].x, given[rank].topk_idx
    out = torch.zeros(x.shape)
    for token in range(len(x)):
        for column in range(idx.shape[1]):
            expert = int(idx[token, column])
            if expert >= 0:
                row = (x[token].float() * (expert + 1)).bfloat16().float()
                out[token] = out[token] + row * weights[token, column]
    return out.bfloat16()


def apply_experts(buffer, x):
    local = x.shape[0]
    factor = torch.arange(1, local + 1).view(-1, 1, 1) + buffer.rank * local
    return (x.float() * factor).bfloat16()


@pytest.mark.parametrize("how", ["plain", "out", "hook", "async", "zero-copy"])
@pytest.mark.parametrize("tokens", [[23], [20, 0, 13], [5, 24, 12, 8]])
def test_sums_are_weighted_in_column_order_however_they_are_asked_for(tokens, how):
    given = make_inputs(tokens, hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, _, _ = low(buffer, given, use_fp8=False)
        y, options = apply_experts(buffer, x), {}
        if how == "zero-copy":
            room = buffer.get_next_low_latency_combine_buffer(handle)
            assert (room.dtype, room.shape) == (torch.bfloat16, x.shape)
            room.copy_(y)
            y, options = torch.zeros_like(y), {"zero_copy": True}
        elif how == "out":
            options = {"out": torch.full_like(mine.x, float("nan"))}
        elif how == "hook":
            options = {"return_recv_hook": True}
        elif how == "async":
            options = {"async_finish": True}
        out, event, hook = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle, **options)
        assert (hook is not None) == (how == "hook")
        assert (event.event is not None) == (how == "async")
        if hook is not None:
            hook()
        if event.event is not None:
            event.current_stream_wait()
        assert out is options.get("out", out)
        assert same_bits(out, weighted(given, buffer.rank, mine.topk_weights))

    on_ranks(len(tokens), rank_main, **LL)


def test_weights_are_those_of_the_combine_and_a_zero_copy_buffer_serves_once():
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, _, _ = low(buffer, given, use_fp8=False)
        buffer.get_next_low_latency_combine_buffer(handle).copy_(apply_experts(buffer, x))
        other = torch.rand(mine.topk_weights.shape, generator=torch.Generator().manual_seed(1))
        out, _, _ = buffer.low_latency_combine(x, mine.topk_idx, other, handle, zero_copy=True)
        assert same_bits(out, weighted(given, buffer.rank, other))
        with pytest.raises(RuntimeError, match="get_next_low_latency_combine_buffer"):
            buffer.low_latency_combine(x, mine.topk_idx, other, handle, zero_copy=True)

    on_ranks(2, rank_main, **LL)


def test_logfmt_rows_lose_little():
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, _, _ = low(buffer, given, use_fp8=False)
        y = (x.float() * 0.2).bfloat16()
        exact, _, _ = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle)
        coded, _, _ = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle, use_logfmt=True)
        assert coded.dtype == torch.bfloat16
        error = (coded.float() - exact.float()).norm() / exact.float().norm()
        assert 0 < error < 0.03

    on_ranks(2, rank_main, **LL)


def test_hooks_of_several_calls_may_be_open_and_end_in_any_order():
    given = make_inputs([9, 24, 3], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        first, second = (low(buffer, given, use_fp8=False, return_recv_hook=True) for _ in range(2))
        third = low(buffer, given, return_recv_hook=True)
        third[4]()
        second[4]()
        y = apply_experts(buffer, second[0])
        out, _, hook = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, second[2], return_recv_hook=True)
        first[4]()
        hook()
        assert same_bits(out, weighted(given, buffer.rank, mine.topk_weights))
        check_rows(given, buffer.rank, first[0], first[1], first[2], lambda row: row)
        many = [low(buffer, given, use_fp8=False, return_recv_hook=True) for _ in range(7)]
        for x, count, handle, _, last in reversed(many):
            last()
            check_rows(given, buffer.rank, x, count, handle, lambda row: row)

    on_ranks(3, rank_main, **LL)


def test_a_combine_before_the_hook_finishes_the_dispatch_first():
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, count, handle, _, _ = low(buffer, given, use_fp8=False, async_finish=True)
        buffer.low_latency_combine(torch.zeros_like(x), mine.topk_idx, mine.topk_weights, handle)
        check_rows(given, buffer.rank, x, count, handle, lambda row: row)

    on_ranks(2, rank_main, **LL)


def test_statistics_grow_by_what_was_received_and_waited_for():
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        stats = torch.full((E // 2,), 100, dtype=torch.int32)
        waits, back = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        x, count, handle, _, hook = low(
            buffer,
            given,
            use_fp8=False,
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=waits,
            return_recv_hook=True,
        )
        assert (stats == 100).all()
        hook()
        assert torch.equal(stats, 100 + count)
        buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle, combine_wait_recv_cost_stats=back)
        assert (waits >= 0).all()
        assert (back >= 0).all()
        return int(waits.sum() + back.sum())

    assert sum(on_ranks(2, rank_main, **LL)) > 0


@pytest.mark.parametrize(("hidden", "topk"), [(1, 1), (130, 12), (300, 5)])
def test_hidden_sizes_and_topk_that_upstream_does_not_take(hidden, topk):
    given = make_inputs([3, 24], hidden=hidden, topk=topk)

    def rank_main(buffer):
        mine = given[buffer.rank]
        (q, scales), count, handle, _, _ = low(buffer, given)
        y = torch.zeros(q.shape, dtype=torch.bfloat16)
        for expert, rows in enumerate(count.tolist()):
            y[expert, :rows] = per_token_cast_back(q[expert, :rows], scales[expert, :rows])
        out, _, _ = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle)
        reach = mine.topk_weights.masked_fill(mine.topk_idx < 0, 0).sum(1, keepdim=True)
        assert torch.allclose(out.float(), mine.x.float() * reach, rtol=0.09, atol=0.02)

    on_ranks(2, rank_main, **LL)


def test_one_buffer_serves_normal_and_low_latency_calls_by_turns():
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        for _ in range(2):
            rows, *_, handle, _ = send(buffer, mine)
            x, count, low_handle, _, hook = low(buffer, given, use_fp8=False, return_recv_hook=True)
            out, _, _ = buffer.combine(rows, handle)
            hook()
            check_rows(given, buffer.rank, x, count, low_handle, lambda row: row)
            reach = handle[4].sum(1, keepdim=True)
            assert torch.equal(out, (mine.x.float() * reach).bfloat16())
            buffer.clean_low_latency_buffer(TMAX, H, E)

    on_ranks(2, rank_main, **LL)


def test_decode_batches_of_another_size_need_no_cleaning():
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        for most in (24, 40, 31):
            x, count, _, _, _ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, most, E, use_fp8=False)
            assert x.shape[1] == 2 * most
            assert count.sum() == sum(len(pairs(given, buffer.rank * 6 + expert)) for expert in range(6))

    on_ranks(2, rank_main, **LL)


DISPATCH = {
    "too many tokens": ({"num_max_dispatch_tokens_per_rank": 3}, "num_max_dispatch_tokens_per_rank"),
    "experts that do not divide": ({"num_experts": 13}, "multiple"),
    "float rows": ({"x": torch.zeros(9, H)}, "bfloat16"),
    "int32 indices": ({"topk_idx": torch.zeros(9, K, dtype=torch.int32)}, "topk_idx"),
    "ue8m0 without rounding": ({"use_ue8m0": True}, "round_scale"),
    "hook and event": ({"async_finish": True, "return_recv_hook": True}, "exclude"),
    "statistics of another size": ({"cumulative_local_expert_recv_stats": torch.zeros(5, dtype=torch.int32)}, "stats"),
    "waits of another dtype": ({"dispatch_wait_recv_cost_stats": torch.zeros(2)}, "stats"),
}


@pytest.mark.parametrize("case", DISPATCH)
def test_bad_dispatches_are_runtime_errors_and_cost_nothing(case):
    options, text = DISPATCH[case]
    given = make_inputs([9, 9], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        good = {
            "x": mine.x, "topk_idx": mine.topk_idx, "num_max_dispatch_tokens_per_rank": TMAX, "num_experts": E
        }  # fmt: skip
        with pytest.raises(RuntimeError, match=text):
            buffer.low_latency_dispatch(**good | options)
        buffer.low_latency_dispatch(**good)

    on_ranks(2, rank_main, **LL)


def test_bad_combines_are_runtime_errors_and_cost_nothing():
    given = make_inputs([9, 9], hidden=H)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, _, _ = low(buffer, given, use_fp8=False)
        good = {"x": x, "topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights, "handle": handle}
        bad = [
            ({"x": x.float()}, "bfloat16"),
            ({"x": x[:, 1:]}, "L, R"),
            ({"topk_idx": mine.topk_idx.flip(1) + 0}, "low_latency_dispatch"),
            ({"topk_weights": mine.topk_weights[1:]}, "T, K"),
            ({"handle": handle[:4]}, "handle"),
            ({"out": torch.zeros(9, H)}, "out"),
            ({"use_logfmt": True, "zero_copy": True}, "exclude"),
            ({"zero_copy": True}, "get_next"),
            ({"async_finish": True, "return_recv_hook": True}, "exclude"),
        ]
        for options, text in bad:
            with pytest.raises(RuntimeError, match=text):
                buffer.low_latency_combine(**good | options)
        buffer.low_latency_combine(**good)

    on_ranks(2, rank_main, **LL)


def test_low_latency_calls_need_the_mode():
    given = make_inputs([9], hidden=H)

    def rank_main(buffer):
        with pytest.raises(RuntimeError, match="low_latency_mode"):
            low(buffer, given)

    on_ranks(1, rank_main)


def test_what_is_under_way_when_the_buffer_ends_is_finished():
    given = make_inputs([9, 24], hidden=H)

    def rank_main(buffer):
        x, count, handle, _, hook = low(buffer, given, use_fp8=False, return_recv_hook=True)
        buffer.destroy()
        hook()
        check_rows(given, buffer.rank, x, count, handle, lambda row: row)
        with pytest.raises(RuntimeError, match="destroyed"):
            buffer.low_latency_combine(x, given[buffer.rank].topk_idx, given[buffer.rank].topk_weights, handle)

    on_ranks(2, rank_main, **LL)


def test_fifty_turns_of_everything_with_several_calls_under_way_give_the_same_bits():
    given = make_inputs([9, 24, 0], hidden=H)

    def turn(buffer, number):
        mine, late = given[buffer.rank], bool(number % 2)
        rows, *_, handle, event = send(buffer, mine, async_finish=late)
        _, count, first, _, hook = low(buffer, given, use_fp8=number % 3 == 0, return_recv_hook=True)
        y, _, second, low_event, _ = low(buffer, given, use_fp8=False, async_finish=True)
        if late:
            event.current_stream_wait()
        out, _, _ = buffer.combine(rows, handle)
        low_event.current_stream_wait()
        summed, _, last = buffer.low_latency_combine(
            apply_experts(buffer, y), mine.topk_idx, mine.topk_weights, second, return_recv_hook=True
        )
        hook()
        last()
        assert same_bits(summed, weighted(given, buffer.rank, mine.topk_weights))
        return [rows, out, count, first[1], summed]

    def rank_main(buffer):
        expected = turn(buffer, 0)
        for number in range(1, 50):
            assert all(same_bits(a, b) for a, b in zip(turn(buffer, number), expected, strict=True))

    on_ranks(3, rank_main, **LL)
