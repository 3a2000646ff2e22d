"""V1 on devices of several hosts, which are played: tensors pass through the host's memory, bits are the host's."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.compat.test_v1_handles import REMAKES, check_copies_serve
from tests.compat.test_v1_masks import SHRINK, check_going_on, step, without
from tests.compat.v1_oracle import E, make_inputs, on_ranks, same_bits, send

SHAPES = [([5, 33, 12, 8], 2), ([0, 7, 0, 3], 2), ([9, 4, 6], 2), ([9, 4], 1)]


pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def assert_as_on_the_host(twice):
    """Compares bits of a device's calls and the host's."""

    def compare(num_ranks, rank_main, **options):
        for ours, theirs in twice(lambda: on_ranks(num_ranks, rank_main, **options)):
            assert len(ours) == len(theirs)
            assert all(same_bits(one, other) for one, other in zip(ours, theirs, strict=True))

    return compare


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(("tokens", "per_host"), SHAPES)
def test_normal_calls_and_every_member_of_a_handle_are_those_of_the_host(
    tokens, per_host, waits, assert_as_on_the_host, monkeypatch
):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    given = make_inputs(tokens)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, idx, weights, counts, handle, event = send(buffer, mine, async_finish=not waits)
        assert (event.event is None) == waits
        sums = buffer.combine(x, handle, weights, bias=mine.x)[:2]
        again = buffer.dispatch(mine.x * 2, handle=handle)[0]
        assert len(handle) == 10
        return [one.clone() for one in (x, idx, weights, torch.tensor(counts), *sums, again, *handle)]

    assert_as_on_the_host(len(tokens), rank_main)


@pytest.mark.parametrize("how", REMAKES)
@pytest.mark.parametrize("worst", [0, 100])
def test_copies_of_a_handle_serve_when_the_first_one_is_gone(how, worst, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    check_copies_serve([9, 31, 0, 5], how, 10, worst=worst)


@pytest.mark.parametrize("how", ["at once", "hook", "event"])
@pytest.mark.parametrize("use_fp8", [False, True])
def test_low_latency_calls_bring_what_the_host_brings(how, use_fp8, assert_as_on_the_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    given = make_inputs([7, 12, 0, 3], hidden=256)

    def rank_main(buffer):
        mine = given[buffer.rank]
        asked = {"return_recv_hook": how == "hook", "async_finish": how == "event"}
        stats = torch.zeros(E // 4, dtype=torch.int32)
        recv_x, count, handle, event, hook = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, 12, E, cumulative_local_expert_recv_stats=stats, use_fp8=use_fp8, **asked
        )
        assert (hook is not None, event.event is not None) == (how == "hook", how == "event")
        if hook is not None:
            hook()
            hook()
        if event.event is not None:
            event.current_stream_wait()
        assert torch.equal(stats, count)
        rows = recv_x[0] if use_fp8 else recv_x
        y = torch.zeros(rows.shape, dtype=torch.bfloat16)
        filled = [(expert, slice(number)) for expert, number in enumerate(count.tolist())]
        for expert, some in filled:
            y[expert, some] = handle[0][expert, some].unsqueeze(1) + 0.5
        copies = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in handle)
        sums = []
        for known in (handle, copies):
            out, event, hook = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, known, **asked)
            if hook is not None:
                hook()
            if event.event is not None:
                event.current_stream_wait()
            sums.append(out.clone())
        parts = (rows, handle[0], *(recv_x[1:] if use_fp8 else ()))
        return [count.clone(), handle[1].clone(), *sums, *(part[place].clone() for place in filled for part in parts)]

    assert_as_on_the_host(4, rank_main, low_latency_mode=True)


@pytest.mark.parametrize("per_host", ["1", "2"])
@pytest.mark.parametrize("away", [0, 1, 2])
def test_the_others_go_on_without_a_rank_that_is_masked(away, per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", per_host)
    check_going_on(make_inputs([9, 24, 5], hidden=128), away)


@pytest.mark.parametrize("how", ["the handle", "copies"])
def test_masks_set_between_calls_hold_for_the_combine_and_can_be_cleaned(how, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    given = make_inputs([9, 24, 5], hidden=128)
    rested = threading.Barrier(3)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, *_ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 24, E, use_fp8=False)
        if how == "copies":
            handle = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in handle)
        rested.wait(60)
        if buffer.rank != 1:
            buffer.low_latency_update_mask_buffer(1, True)
            if how == "copies":
                out, *_ = buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle)
                assert same_bits(out, without(given, buffer.rank, [1]))
            assert same_bits(step(buffer, mine)[3], without(given, buffer.rank, [1]))
            status = torch.zeros(3, dtype=torch.int32)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0, 1, 0]
            buffer.low_latency_clean_mask_buffer()
            buffer.low_latency_query_mask_buffer(status)
            assert not status.any()
        rested.wait(60)

    on_ranks(3, rank_main, **SHRINK)
