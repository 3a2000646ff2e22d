"""Lines of DeepEP's reference that no other test holds: what is accepted, kept, or answered in passing."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep.compat import deep_ep
from tests.compat.v1_oracle import E, arrival, make_inputs, on_ranks, rows_of, same_bits, send
from tests.compat.v2_world import MIB2, World

WORLD = World()


def test_an_event_without_release_stays_and_one_of_nothing_has_nothing():
    event = deep_ep.EventOverlap(deep_ep.EventHandle(), (torch.ones(2),))
    with event(release_handle=False):
        pass
    assert isinstance(event.event, deep_ep.EventHandle)
    event.current_stream_wait()
    assert isinstance(event.event, deep_ep.EventHandle)
    event.current_stream_wait(release_handle=True)
    assert event.event is None
    nothing = deep_ep.EventOverlap()
    assert (nothing.event, nothing.extra_tensors, nothing.hook_after_wait) == (None, None, None)
    assert nothing() is nothing


@pytest.mark.parametrize("previous", [deep_ep.EventOverlap, deep_ep.EventHandle])
def test_calls_of_the_first_version_take_an_event_or_its_wrapper(previous):
    given = make_inputs([9, 4])

    def rank_main(buffer):
        before = buffer.capture()
        before = before if previous is deep_ep.EventOverlap else before.event
        options = {"previous_event": before, "async_finish": True, "allocate_on_comm_stream": True}
        x, *_, handle, event = send(buffer, given[buffer.rank], **options)
        event.current_stream_wait()
        assert same_bits(x, rows_of(given, buffer.rank, lambda one: one.x))
        out, _, event = buffer.combine(x, handle, **options)
        event.current_stream_wait()
        return out

    on_ranks(2, rank_main)


def test_a_config_of_no_multiprocessors_describes_one_channel():
    given = make_inputs([9, 4])

    def rank_main(buffer):
        handle = send(buffer, given[buffer.rank], config=deep_ep.Config(0))[4]
        assert handle[1].shape == handle[2].shape == (2, 1)

    on_ranks(2, rank_main)


@pytest.mark.parametrize("positional", [(24, 8, 256), (24, 8, 256, 6, 128)])
def test_a_config_of_other_channels_serves_cached_calls_and_combines(positional):
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, *_, handle, _ = send(buffer, mine, config=deep_ep.Config(4))
        config = deep_ep.Config(*positional)
        assert same_bits(buffer.dispatch(mine.x, handle=handle, config=config)[0], x)
        assert same_bits(buffer.combine(x, handle, config=config)[0], buffer.combine(x, handle)[0])
        assert handle[1].shape == (2, 2)

    on_ranks(2, rank_main)


@pytest.mark.parametrize("per_host", [8, 1])
def test_no_call_writes_to_a_handles_members(per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, weights, _, handle, _ = send(buffer, mine)
        before = [one.clone() for one in handle]
        for _ in range(3):
            buffer.combine(x, handle, weights)
            buffer.dispatch(mine.x, handle=handle)
        assert all(same_bits(one, other) for one, other in zip(handle, before, strict=True))

    on_ranks(2, rank_main)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_sizes_and_modes_that_upstreams_constructor_refuses_are_taken(num_ranks):
    given = make_inputs([4] * num_ranks)
    sizes = {"num_nvl_bytes": 1 << 33, "num_rdma_bytes": 1 << 34}  # neither 2 GiB, nor network memory on one host

    def rank_main(buffer):
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == tuple(sizes.values())
        assert len(send(buffer, given[buffer.rank])[0]) == len(arrival(given, buffer.rank).token)

    on_ranks(num_ranks, rank_main, **sizes)


def test_tokens_that_go_nowhere_at_all_are_an_empty_batch_and_zeros():
    def rank_main(buffer):
        idx, weights = torch.full((5, 3), -1), torch.ones(5, 3)
        per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(idx, E)
        x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            torch.ones(5, 16).bfloat16(), None, per_rank, None, inside, per_expert, idx, weights
        )
        assert (x.shape, recv_idx.shape, recv_weights.shape) == ((0, 16), (0, 3), (0, 3))
        assert counts == [0] * (E // 2)
        out, back, _ = buffer.combine(x, handle, recv_weights)
        assert not out.any()
        assert not back.any()
        assert not inside.any()
        low, count, low_handle, _, _ = buffer.low_latency_dispatch(
            torch.ones(5, 128).bfloat16(), idx, 5, E, use_fp8=False
        )
        assert not count.any()
        assert not buffer.low_latency_combine(low, idx, weights, low_handle)[0].any()

    on_ranks(2, rank_main, low_latency_mode=True)


def test_statistics_are_added_to_over_calls_and_hooks():
    given = make_inputs([9, 24], hidden=128)

    def rank_main(buffer):
        mine, received = given[buffer.rank], torch.full((E // 2,), 100, dtype=torch.int32)
        counts = []
        for hooked in (False, True, True):
            _, count, _, _, hook = buffer.low_latency_dispatch(
                mine.x, mine.topk_idx, 24, E, received, use_fp8=False, return_recv_hook=hooked
            )
            if hook is not None:
                hook()
            counts.append(count)
        assert torch.equal(received, 100 + sum(counts))

    on_ranks(2, rank_main, low_latency_mode=True)


def test_the_result_is_written_to_out_itself():
    given = make_inputs([9, 24], hidden=128)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 24, E, use_fp8=False)
        out = torch.full_like(mine.x, 7)
        returned, event, hook = buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle, out=out)
        assert returned.data_ptr() == out.data_ptr()
        assert (event.event, hook) == (None, None)
        assert same_bits(out, buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle)[0])

    on_ranks(2, rank_main, low_latency_mode=True)


def test_options_without_effect_change_no_result():
    def rank_main(buffer, given):
        found = []
        for sms, qps in ((0, 0), (2, 1), (32, 9)):
            asked = {"num_sms": sms, "num_qps": qps}
            x, idx, weights, handle, _ = buffer.dispatch(given.x, given.idx, given.weights, num_experts=8, **asked)
            found.append([one.clone() for one in (x, idx, weights, buffer.combine(x, handle, **asked)[0])])
        return found

    settings = {"sl_idx": 5, "num_gpu_timeout_secs": 7, "prefer_overlap_with_compute": False}
    for plain, other in zip(WORLD.run(rank_main), WORLD.run(rank_main, **settings), strict=True):
        for results in (*plain, *other):
            assert all(same_bits(one, first) for one, first in zip(results, plain[0], strict=True))


def test_an_event_before_the_epilogue_is_waited_for():
    def rank_main(buffer, given):
        asked = []
        first, second = (deep_ep.EventHandle.of(lambda name=name: asked.append(name)) for name in "ab")
        x, _, _, handle, _ = buffer.dispatch(given.x, given.idx, num_experts=8, previous_event_before_epilogue=first)
        buffer.combine(x, handle, previous_event_before_epilogue=second)
        return asked

    assert WORLD.run(rank_main) == [["a", "b"]] * WORLD.num_ranks


def test_destroying_twice_is_once_and_attributes_stay():
    def rank_main(member):
        buffer = deep_ep.ElasticBuffer(member, num_bytes=MIB2, explicitly_destroy=True)
        assert buffer.explicitly_destroy
        buffer.destroy()
        buffer.destroy()
        return buffer.runtime, buffer.num_bytes

    assert anyep.local_group(2).run(rank_main) == [(None, MIB2)] * 2
