"""V1 on a device: normal and low-latency calls, events and hooks, over a native buffer whose tensors lie there."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import anyep
from anyep.compat import deep_ep
from anyep.compat.deep_ep import layout
from anyep.compat.deep_ep.domains import Domain
from tests.compat.test_v1_handles import (
    REMAKES,
    check_another_buffer,
    check_copies_serve,
    check_that_members_belong_together,
)
from tests.compat.test_v1_masks import SHRINK, check_going_on, check_silence, step, without
from tests.compat.v1_oracle import E, H, K, arrival, make_inputs, on_ranks, rows_of, same_bits, send, summed

BATCHES = [[23], [9, 31], [20, 0, 13], [5, 33, 12, 8]]


pytestmark = pytest.mark.usefixtures("device")


def outputs_of(given):
    """Return what experts of each rank return, a row for each that was received."""
    made = []
    for rank in range(len(given)):
        rows = len(arrival(given, rank).token)
        made.append(torch.randn(rows, H, generator=torch.Generator().manual_seed(rank)).bfloat16())
    return made


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("tokens", BATCHES)
def test_normal_calls_have_the_bits_of_the_host(tokens, waits):
    given = make_inputs(tokens)
    outputs = outputs_of(given)

    def rank_main(buffer):
        mine, there = given[buffer.rank], arrival(given, buffer.rank)
        x, idx, weights, counts, handle, event = send(buffer, mine, async_finish=not waits)
        assert (event.event is None) == waits
        if not waits:
            event.current_stream_wait()
        assert same_bits(x, rows_of(given, buffer.rank, lambda one: one.x))
        assert same_bits(idx, there.topk_idx)
        assert same_bits(weights, there.topk_weights)
        assert counts == there.counts
        bias = torch.ones_like(mine.x)
        out, sent_weights, event = buffer.combine(
            outputs[buffer.rank], handle, topk_weights=weights, bias=bias, async_finish=not waits
        )
        assert (event.event is None) == waits
        there_again, *nothing, _ = buffer.dispatch(mine.x * 2, handle=handle, async_finish=not waits)
        assert nothing == [None] * 4
        assert same_bits(there_again, rows_of(given, buffer.rank, lambda one: one.x * 2))
        served = torch.where(mine.topk_idx >= 0, mine.topk_weights, 0)
        assert same_bits(sent_weights, served)
        return out

    for rank, out in enumerate(on_ranks(len(tokens), rank_main)):
        assert same_bits(out, summed(given, outputs, rank, [torch.ones_like(given[rank].x)], 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_rows_of_one_byte_travel_with_their_scales(dtype):
    given = make_inputs([6, 11])

    def rank_main(buffer):
        mine = given[buffer.rank]
        q, scales = mine.x.float().to(torch.float8_e4m3fn), torch.arange(len(mine.x) * 3).view(-1, 3).to(dtype)
        (x, got), *_ = send(buffer, mine, (q, scales))
        there = arrival(given, buffer.rank)
        assert same_bits(x, rows_of(given, buffer.rank, lambda one: one.x.float().to(torch.float8_e4m3fn)))
        every = [torch.arange(len(one.x) * 3).view(-1, 3).to(dtype) for one in given]
        assert same_bits(got, torch.stack([every[s][t] for s, t in zip(there.source, there.token, strict=True)]))

    on_ranks(2, rank_main)


def test_a_fixed_number_of_rows_needs_no_count_and_has_a_defined_tail():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        x, idx, weights, counts, handle, _ = send(buffer, given[buffer.rank], num_worst_tokens=100)
        there, rows = arrival(given, buffer.rank), len(arrival(given, buffer.rank).token)
        assert [len(one) for one in (x, idx, weights)] == [100] * 3
        assert counts == []
        assert same_bits(idx[:rows], there.topk_idx)
        assert (idx[rows:] == -1).all()
        assert not x[rows:].any()
        assert not weights[rows:].any()
        y = torch.zeros(100, H, dtype=torch.bfloat16)
        y[:rows] = outputs_of(given)[buffer.rank]
        return buffer.combine(y, handle)[0]

    for rank, out in enumerate(on_ranks(2, rank_main)):
        assert same_bits(out, summed(given, outputs_of(given), rank, [], 8))


def on_low_latency(num_ranks, rank_main):
    def act(member):
        buffer = deep_ep.Buffer(member, low_latency_mode=True, explicitly_destroy=True)
        try:
            return rank_main(buffer)
        finally:
            buffer.destroy()

    return anyep.local_group(num_ranks).run(act)


def end_of(event, hook):
    """Wait for a call's second half, however that is done."""
    if hook is not None:
        hook()
    if event.event is not None:
        event.current_stream_wait()


@pytest.mark.parametrize("how", ["at once", "hook", "event"])
@pytest.mark.parametrize("use_fp8", [False, True])
def test_low_latency_calls_bring_what_the_host_brings(how, use_fp8, twice):
    given, most = make_inputs([7, 12], hidden=256), 12

    def rank_main(buffer):
        mine = given[buffer.rank]
        asked = {"return_recv_hook": how == "hook", "async_finish": how == "event"}
        stats = torch.zeros(E // 2, dtype=torch.int32)
        recv_x, count, handle, *ends = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, most, E, cumulative_local_expert_recv_stats=stats, use_fp8=use_fp8, **asked
        )
        end_of(*ends)
        assert torch.equal(stats, count)
        rows, scales = recv_x if use_fp8 else (recv_x, None)
        src, ranges, *sizes = handle
        assert sizes == [most, 256, E]
        y = torch.zeros(rows.shape, dtype=torch.bfloat16)
        filled = [(expert, slice(number)) for expert, number in enumerate(count.tolist())]
        for expert, some in filled:
            y[expert, some] = src[expert, some].unsqueeze(1) + 0.5
        taken_apart = (src, ranges, *sizes)
        out, *ends = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, taken_apart, **asked)
        end_of(*ends)
        bits = [part[place].clone() for place in filled for part in (rows, src) + (() if scales is None else (scales,))]
        return [count, ranges.clone(), out, *bits]

    for ours, theirs in twice(lambda: on_low_latency(2, rank_main)):
        assert all(same_bits(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("use_fp8", "most"), [(False, 128), (True, 256)])
def test_low_latency_rows_have_left_when_the_call_returns(use_fp8, most):
    given, everybody = make_inputs([3, 2], hidden=7168), threading.Barrier(2)

    def rank_main(buffer):
        mine = given[buffer.rank]
        received = []
        for overwritten in (False, True):
            x = mine.x.clone()
            rows, count, _, _, hook = buffer.low_latency_dispatch(
                x, mine.topk_idx, most, E, use_fp8=use_fp8, return_recv_hook=True
            )
            everybody.wait()
            if overwritten:
                x.fill_(-1)
            everybody.wait()
            hook()
            rows = rows[0] if use_fp8 else rows
            received.append([rows[expert, :number].clone() for expert, number in enumerate(count.tolist())])
        assert all(same_bits(one, other) for one, other in zip(*received, strict=True))

    on_low_latency(2, rank_main)


def test_the_zero_copy_buffer_is_read_where_it_lies():
    given = make_inputs([7, 12])

    def rank_main(buffer):
        mine = given[buffer.rank]
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 12, E, use_fp8=False)
        there = buffer.get_next_low_latency_combine_buffer(handle)
        there[:] = recv_x
        out, *_ = buffer.low_latency_combine(there, mine.topk_idx, mine.topk_weights, handle, zero_copy=True)
        plain, *_ = buffer.low_latency_combine(recv_x, mine.topk_idx, mine.topk_weights, handle)
        assert same_bits(out, plain)

    on_low_latency(2, rank_main)


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("tokens", BATCHES)
def test_without_topk_ranks_are_those_of_is_token_in_rank_and_counts_the_callers(tokens, alignment, twice):
    given = make_inputs(tokens)
    outputs = outputs_of(given)

    def rank_main(buffer):
        mine = given[buffer.rank]
        per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(mine.topk_idx, E)
        layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": inside, "num_tokens_per_expert": per_expert}
        x, idx, weights, counts, handle, event = buffer.dispatch(
            mine.x, **layout, expert_alignment=alignment, async_finish=True
        )
        event.current_stream_wait()
        assert idx is None
        assert weights is None
        again = buffer.dispatch(mine.x + 1, handle=handle)[0]
        return [t.clone() for t in (x, again, torch.tensor(counts), buffer.combine(outputs[buffer.rank], handle)[0])]

    for ours, theirs in twice(lambda: on_ranks(len(tokens), rank_main)):
        assert all(same_bits(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("use_logfmt", [False, True])
def test_copies_of_a_low_latency_handle_serve(use_logfmt):
    given = make_inputs([7, 12], hidden=256)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, count, handle, *_ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 12, E, use_fp8=False)
        y = torch.zeros(x.shape, dtype=torch.bfloat16)
        for expert, rows in enumerate(count.tolist()):
            y[expert, :rows] = x[expert, :rows] * (1 + expert + buffer.rank)
        copies = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in handle)
        first = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle, use_logfmt)[0].clone()
        for _ in range(2):
            again, *_ = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, copies, use_logfmt)
            assert same_bits(again, first)

    on_low_latency(2, rank_main)


CHANNELS = 3


@pytest.mark.parametrize("worst", [0, 100])
@pytest.mark.parametrize("tokens", [*BATCHES, [5, 0, 3, 0], [0, 0]])
def test_members_of_a_handle_are_those_of_the_host(tokens, worst, twice):
    given = make_inputs(tokens)

    def rank_main(buffer):
        *_, handle, _ = send(
            buffer, given[buffer.rank], num_worst_tokens=worst, config=deep_ep.Config(2 * CHANNELS), async_finish=True
        )
        return handle

    def members():
        return [[one.clone() for one in handle] for handle in on_ranks(len(tokens), rank_main)]

    for rank, (ours, theirs) in enumerate(twice(members)):
        rows = len(arrival(given, rank).token)
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            last = rows if place == 3 else None  # what stands behind the rows of a fixed number is nobody's
            assert same_bits(one[:last], other[:last])


@pytest.mark.parametrize("worst", [0, 100])
@pytest.mark.parametrize("how", REMAKES)
@pytest.mark.parametrize("tokens", [*BATCHES, [5, 0, 3, 0]])
def test_copies_of_a_handle_serve_when_the_first_one_is_gone(tokens, how, worst):
    check_copies_serve(tokens, how, 6, worst=worst)


def test_members_that_do_not_belong_together_are_refused():
    check_that_members_belong_together()


def test_a_handle_serves_on_another_buffer_of_the_same_ranks():
    check_another_buffer()


def test_copies_on_some_ranks_only_are_refused_on_all():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given[buffer.rank])
        mixed = copy.deepcopy(handle) if buffer.rank else handle
        with pytest.raises(ValueError, match="ranks disagree"):
            buffer.combine(x, mixed)
        return buffer.combine(x, handle)[0]

    on_ranks(2, rank_main)


@pytest.mark.parametrize("most", [24, 3000])
@pytest.mark.parametrize("away", [0, 1, 2])
def test_the_others_go_on_without_a_rank_that_is_masked(away, most):
    steps = 2 * 8  # each board, slot and mailbox several times
    check_going_on(make_inputs([9, 24, 5], hidden=128), away, most=most, steps=steps)


def test_masks_set_between_calls_hold_for_the_combine_and_can_be_cleaned():
    given = make_inputs([9, 24, 5], hidden=128)
    rested = threading.Barrier(3)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, *_ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 24, E, use_fp8=False)
        if buffer.rank != 1:
            buffer.low_latency_update_mask_buffer(1, True)
            out, *_ = buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle)
            assert same_bits(out, without(given, buffer.rank, [1]))
            copies = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in handle)
            out, *_ = buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, copies)
            assert same_bits(out, without(given, buffer.rank, [1]))
        rested.wait(60)

    on_ranks(3, rank_main, **SHRINK)

    def cleaned(buffer):
        mine = given[buffer.rank]
        step(buffer, mine)
        if buffer.rank < 2:
            buffer.low_latency_update_mask_buffer(1 - buffer.rank, True)
            buffer.low_latency_clean_mask_buffer()
        status = torch.ones(2, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 0]
        assert same_bits(step(buffer, mine)[3], without(given[:2], buffer.rank, []))

    on_ranks(2, cleaned, **SHRINK)


@pytest.mark.parametrize("where", ["dispatch", "combine"])
def test_a_silent_rank_is_masked_when_time_is_up_and_learns_it_when_it_calls(where, monkeypatch):
    check_silence(where, monkeypatch)


@pytest.mark.parametrize(("ranks", "per_host"), [(1, 8), (3, 8), (4, 2), (6, 4)])
def test_layouts_counted_on_a_device_are_those_of_the_host(ranks, per_host):
    for given in make_inputs([23, 1, 0], experts=12, topk=K):
        domain = Domain(num_ranks=ranks, per_host=per_host)
        ours, theirs = layout.count_on_device(given.topk_idx, 12, domain), layout.count(given.topk_idx, 12, domain)
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or same_bits(one, other)
