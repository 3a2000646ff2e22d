"""The ElasticBuffer itself: constructor, ends, events, refusals, and what torch's global state does not change."""

from __future__ import annotations

import gc
import inspect
import weakref
from contextlib import ExitStack

import pytest
import torch

import anyep
from anyep.compat.deep_ep import ElasticBuffer, EventHandle, EventOverlap
from anyep.compat.deep_ep.native import Natives
from tests.compat.v2_world import MIB2, World, poisoned, same_bits  # noqa: F401

WORLD = World()
ONE = World(num_tokens=(3,))


def dispatch(buffer, inputs, **options):
    return buffer.dispatch(inputs.x, inputs.idx, inputs.weights, num_experts=8, **options)


def test_signatures_and_defaults_are_upstreams():
    def defaults(function):
        return {n: p.default for n, p in inspect.signature(function).parameters.items() if n != "self"}

    none, empty = None, inspect.Parameter.empty
    assert list(defaults(ElasticBuffer.__init__).items()) == [
        *[("group", empty), ("num_bytes", none), ("num_cpu_bytes", 0), ("num_max_tokens_per_rank", 0), ("hidden", 0)],
        *[("num_topk", 0), ("use_fp8_dispatch", False), ("deterministic", False), ("allow_hybrid_mode", True)],
        *[("allow_multiple_reduction", True), ("prefer_overlap_with_compute", True), ("sl_idx", 3)],
        *[("num_allocated_qps", 0), ("num_cpu_timeout_secs", 300), ("num_gpu_timeout_secs", 100)],
        ("explicitly_destroy", False),
    ]
    assert list(defaults(ElasticBuffer.dispatch).items()) == [
        *[("x", empty), ("topk_idx", none), ("topk_weights", none), ("cumulative_local_expert_recv_stats", none)],
        *[("num_experts", none), ("num_max_tokens_per_rank", none), ("expert_alignment", none), ("num_sms", 0)],
        *[("num_qps", 0), ("previous_event", none), ("previous_event_before_epilogue", none)],
        *[("async_with_compute_stream", False), ("allocate_on_comm_stream", False), ("handle", none)],
        *[("do_handle_copy", True), ("do_cpu_sync", none), ("do_expand", False), ("do_zero_padding", False)],
        ("use_tma_aligned_col_major_sf", False),
    ]
    assert list(defaults(ElasticBuffer.combine).items()) == [
        *[("x", empty), ("handle", empty), ("topk_weights", none), ("bias", none), ("num_sms", 0), ("num_qps", 0)],
        *[("previous_event", none), ("previous_event_before_epilogue", none), ("async_with_compute_stream", False)],
        ("allocate_on_comm_stream", False),
    ]
    assert list(defaults(ElasticBuffer.barrier).values()) == [True, False, True]


def test_attributes_tell_where_a_rank_stands(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    for rank, b in enumerate(WORLD.run(lambda buffer, _: buffer, num_max_tokens_per_rank=7)):
        assert (b.rank_idx, b.num_ranks, b.num_max_tokens_per_rank) == (rank, 4, 7)
        assert (b.num_scaleout_ranks, b.num_scaleup_ranks) == (b.num_rdma_ranks, b.num_nvlink_ranks) == (2, 2)
        assert (b.scaleout_rank_idx, b.scaleup_rank_idx) == divmod(rank, 2)
        assert b.get_physical_domain_size() == b.get_logical_domain_size() == (2, 2)
        assert (b.allow_hybrid_mode, b.allow_multiple_reduction, b.prefer_overlap_with_compute) == (True,) * 3
        assert (b.deterministic, b.explicitly_destroy) == (False, False)
        assert b.group.rank == rank


def test_bytes_that_are_asked_for_are_echoed_and_not_taken():
    assert ONE.run(lambda buffer, _: buffer.num_bytes, num_bytes=1 << 40, num_cpu_bytes=1 << 39) == [1 << 40]


def test_without_bytes_they_follow_from_the_sizes():
    options = {"num_max_tokens_per_rank": 4096, "hidden": 512, "num_topk": 8}
    hint = ElasticBuffer.get_buffer_size_hint(anyep.local_group(1)[0], *options.values())
    assert ONE.run(lambda buffer, _: buffer.num_bytes, num_bytes=None, **options) == [hint]


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (AssertionError, {"num_bytes": None}),
        (AssertionError, {"num_bytes": None, "hidden": 8, "num_max_tokens_per_rank": 0}),
        (RuntimeError, {"num_bytes": 0}),
        (RuntimeError, {"num_bytes": MIB2 + 1}),
        (RuntimeError, {"num_cpu_bytes": 1}),
        (RuntimeError, {"num_cpu_bytes": 2 * MIB2}),
    ],
)
def test_impossible_sizes_are_refused_by_the_constructor(error, options):
    with pytest.raises(error, match=r"num_(cpu_)?bytes"):
        ONE.run(lambda buffer, _: None, **options)


def test_destroying_needs_to_be_announced():
    with pytest.raises(AssertionError, match="explicitly_destroy"):
        ONE.run(lambda buffer, _: buffer.destroy())


def test_a_destroyed_buffer_is_gone_and_what_it_brought_stays():
    def rank_main(buffer, i):
        x, _, _, handle, _ = dispatch(buffer, i)
        kept = x.clone()
        buffer.destroy()
        buffer.destroy()
        assert buffer.runtime is None
        with pytest.raises(anyep.ClosedError, match="destroyed"):
            buffer.combine(x, handle)
        return same_bits(x, kept)

    assert all(WORLD.run(rank_main, explicitly_destroy=True))


def test_a_dropped_buffer_ends_by_itself():
    def rank_main(buffer, i):
        dispatch(buffer, i)
        return weakref.ref(buffer.runtime)

    for reference in WORLD.run(rank_main):
        gc.collect()
        natives = reference()
        assert natives is None or not natives._buffers


def test_a_barrier_waits_before_and_after_the_first_exchange():
    def rank_main(buffer, i):
        buffer.barrier()
        dispatch(buffer, i)
        buffer.barrier(use_comm_stream=False, with_cpu_sync=True, sequential=False)
        return True

    assert all(WORLD.run(rank_main))


def test_one_native_buffer_serves_every_kind_of_row():
    def rank_main(buffer, i):
        for _ in range(2):
            x, _, _, handle, _ = dispatch(buffer, i, num_max_tokens_per_rank=9)
            dispatch(buffer, i, num_max_tokens_per_rank=4000, do_expand=True, expert_alignment=8)
            buffer.combine(x, handle)
        assert isinstance(buffer.runtime, Natives)
        return len(buffer.runtime._buffers)

    assert WORLD.run(rank_main) == [1] * 4


def test_synchronous_calls_have_no_event_and_asynchronous_ones_an_event_that_can_be_waited_for():
    def rank_main(buffer, i):
        x, _, _, handle, event = dispatch(buffer, i)
        assert isinstance(event, EventOverlap)
        assert event.event is None
        with pytest.raises(AssertionError, match="synchronous"):
            event.current_stream_wait()
        plain = buffer.combine(x, handle)[0]
        before = buffer.capture()
        assert isinstance(before, EventHandle)
        options = {"async_with_compute_stream": True, "allocate_on_comm_stream": True, "previous_event": before}
        *_, handle, event = dispatch(buffer, i, previous_event_before_epilogue=buffer.capture(), **options)
        event.current_stream_wait()
        combined, _, event = buffer.combine(x, handle, **options)
        with event(release_handle=True):
            pass
        return event.event is None and same_bits(plain, combined)

    assert all(WORLD.run(rank_main))


def test_a_previous_event_is_waited_for_before_inputs_are_read():
    def rank_main(buffer, i):
        x = torch.zeros_like(i.x)
        event = EventHandle.of(lambda: x.copy_(i.x))
        rows = buffer.dispatch(x, i.idx, num_experts=8, previous_event=event, allocate_on_comm_stream=True)[0]
        return same_bits(rows, dispatch(buffer, i)[0])

    assert all(WORLD.run(rank_main))


REFUSED = {
    "previous_event": (RuntimeError, lambda b, i: dispatch(b, i, previous_event=b.capture())),
    "do_expand": (RuntimeError, lambda b, i: dispatch(b, i, do_zero_padding=True)),
    "num_qps": (AssertionError, lambda b, i: dispatch(b, i, num_qps=1000)),
    "num_experts": (AssertionError, lambda b, i: b.dispatch(i.x, i.idx)),
    "num_max_tokens_per_rank=2": (RuntimeError, lambda b, i: dispatch(b, i, num_max_tokens_per_rank=2)),
    "topk_idx must be given": (AssertionError, lambda b, i: b.dispatch(i.x, num_experts=8)),
    r"topk_idx must be \[T, K\]": (RuntimeError, lambda b, i: b.dispatch(i.x, i.idx[:1], num_experts=8)),
    "topk_idx must be int64": (RuntimeError, lambda b, i: b.dispatch(i.x, i.idx.short(), num_experts=8)),
    "experts are 0 to 7": (ValueError, lambda b, i: b.dispatch(i.x, i.idx + 8, num_experts=8)),
    "topk_weights must be float32": (
        RuntimeError,
        lambda b, i: b.dispatch(i.x, i.idx, i.weights.double(), num_experts=8),
    ),
    r"x must be \[T, H\]": (RuntimeError, lambda b, i: b.dispatch(i.x[0], i.idx, num_experts=8)),
    "scales must be": (RuntimeError, lambda b, i: b.dispatch((i.x, i.x), i.idx, num_experts=8)),
    "expert_alignment must be at least 1": (RuntimeError, lambda b, i: dispatch(b, i, expert_alignment=0)),
    "cumulative_local": (
        RuntimeError,
        lambda b, i: dispatch(b, i, cumulative_local_expert_recv_stats=torch.zeros(3).int()),
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_bad_dispatch_is_refused_by_name_and_the_buffer_goes_on(text):
    error, call = REFUSED[text]

    def rank_main(buffer, i):
        with pytest.raises(error, match=text):
            call(buffer, i)
        return len(dispatch(buffer, i)[0])

    assert ONE.run(rank_main) == [len(ONE.arrivals(0))]


REFUSED_SUMS = {
    "x must be bfloat16": lambda b, x, h: b.combine(x.float(), h),
    "x must have the 3 rows": lambda b, x, h: b.combine(x[:1], h),
    "bias must be bfloat16": lambda b, x, h: b.combine(x, h, bias=x[:1]),
    "topk_weights must be float32": lambda b, x, h: b.combine(x, h, torch.zeros(3)),
    "previous_event": lambda b, x, h: b.combine(x, h, previous_event=b.capture()),
}


@pytest.mark.parametrize("text", REFUSED_SUMS)
def test_a_bad_combine_is_refused_by_name(text):
    def rank_main(buffer, i):
        x, _, _, handle, _ = dispatch(buffer, i)
        with pytest.raises(RuntimeError, match=text):
            REFUSED_SUMS[text](buffer, x, handle)

    ONE.run(rank_main)


def test_three_biases_and_too_many_queue_pairs_are_assertions():
    def rank_main(buffer, i):
        x, _, _, handle, _ = dispatch(buffer, i)
        with pytest.raises(AssertionError, match="2 tensors"):
            buffer.combine(x, handle, bias=(i.x, i.x, i.x))
        with pytest.raises(AssertionError, match="num_qps"):
            buffer.combine(x, handle, num_qps=1000)

    ONE.run(rank_main)


def test_weights_of_expanded_rows_need_several_sums():
    def rank_main(buffer, i):
        x, _, weights, handle, _ = dispatch(buffer, i, do_expand=True)
        with pytest.raises(RuntimeError, match="allow_multiple_reduction"):
            buffer.combine(x, handle, weights)

    ONE.run(rank_main, allow_multiple_reduction=False)


def test_experts_that_ranks_cannot_share_evenly_are_refused():
    with pytest.raises(RuntimeError, match="multiple of the number of ranks"):
        WORLD.run(lambda b, i: b.dispatch(i.x, i.idx, num_experts=9, num_sms=4))


def test_tensors_of_another_device_are_refused_with_the_reason():
    def rank_main(buffer, i):
        with pytest.raises(anyep.Unavailable, match="x is on meta"):
            buffer.dispatch(i.x.to("meta"), i.idx, num_experts=8)
        with pytest.raises(anyep.Unavailable, match="communication stream"):
            buffer.get_comm_stream()

    ONE.run(rank_main)


def exchange(buffer, i):
    """Return everything that a step brings, in both layouts."""
    found = []
    for expand in (False, True):
        x, idx, weights, handle, _ = dispatch(buffer, i, do_expand=expand, expert_alignment=4)
        found += [x, idx, weights, *buffer.combine(x, handle, weights, bias=i.bias)[:2]]
        found += [value for value in vars(handle).values() if isinstance(value, torch.Tensor)]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("state", ["dtype", "device", "deterministic", "inference", "grad", "threads"])
def test_torchs_global_state_changes_no_result(state):
    inputs = WORLD.inputs  # drawn before the state changes
    plain = WORLD.run(exchange)

    def rank_main(buffer, i):
        with ExitStack() as stack:
            if state == "inference":
                stack.enter_context(torch.inference_mode())
            if state == "device":
                stack.enter_context(torch.device("meta"))
            if state == "grad":
                i.x.requires_grad_(True)
                stack.callback(i.x.requires_grad_, False)
            return exchange(buffer, i)

    with ExitStack() as stack:
        if state == "dtype":
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, torch.float32)
        elif state == "deterministic":
            torch.use_deterministic_algorithms(True)
            stack.callback(torch.use_deterministic_algorithms, False)
            torch.utils.deterministic.fill_uninitialized_memory = False
            stack.callback(setattr, torch.utils.deterministic, "fill_uninitialized_memory", True)
        elif state == "threads":
            torch.set_num_threads(2)
            stack.callback(torch.set_num_threads, 1)
        changed = WORLD.run(rank_main)
    assert len(inputs) == len(plain)
    for before, after in zip(plain, changed, strict=True):
        assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
        assert not any(tensor.requires_grad for tensor in after)


def test_deterministic_algorithms_that_fill_memory_are_an_assertion():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(AssertionError, match="fill_uninitialized_memory"):
            ONE.run(lambda b, i: dispatch(b, i))
    finally:
        torch.use_deterministic_algorithms(False)
