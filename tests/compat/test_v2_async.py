"""Asynchronous V2 calls: they return before other ranks have called, and their event brings what was promised."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from tests.compat.v2_world import World, same_bits

WORLD = World()
SHAPES = [
    {},
    {"do_expand": True, "expert_alignment": 4},
    {"do_cpu_sync": False},
    {"do_expand": True, "do_cpu_sync": False},
    {"do_handle_copy": False},
]
ASYNC = {"async_with_compute_stream": True}


def dispatch(buffer, i, **options):
    return buffer.dispatch(i.x, i.idx, i.weights, num_experts=8, **options)


def tensors_of(batch):
    """Return everything that a dispatch brings, its handle's fields included."""
    x, idx, weights, handle, _ = batch
    found = [x, idx, weights, *(value for _, value in sorted(vars(copy.copy(handle)).items()))]
    return [value for value in found if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("per_host", [4, 2])
@pytest.mark.parametrize("options", SHAPES)
def test_what_the_event_brings_is_what_a_synchronous_call_returns(monkeypatch, options, per_host):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    expand = options.get("do_expand", False)

    def rank_main(buffer, i):
        plain = dispatch(buffer, i, **options)
        expected = buffer.combine(plain[0], plain[3], plain[2], bias=i.bias)
        late = dispatch(buffer, i, **options, **ASYNC)
        late[4].current_stream_wait()
        again = buffer.dispatch(i.x, handle=late[3], topk_weights=i.weights, do_expand=expand, **ASYNC)
        combined, weights, event = buffer.combine(late[0], late[3], late[2], bias=i.bias, **ASYNC)
        event.current_stream_wait()  # out of order: the older cached dispatch is still on its way
        again[4].current_stream_wait()
        pairs = [*zip(tensors_of(plain), tensors_of(late), strict=True), (again[0], plain[0])]
        return all(same_bits(a, b) for a, b in [*pairs, (combined, expected[0]), (weights, expected[1])])

    assert all(WORLD.run(rank_main))


def test_a_call_with_known_sizes_returns_before_others_have_called():
    began = threading.Event()

    def rank_main(buffer, i):
        x, _, _, handle, _ = dispatch(buffer, i)
        if buffer.rank_idx:
            assert began.wait(20)
        again = buffer.dispatch(i.x, handle=handle, **ASYNC)
        combined, _, event = buffer.combine(x, handle, **ASYNC)
        began.set()
        event.current_stream_wait()
        again[4].current_stream_wait()
        return same_bits(again[0], x) and same_bits(combined, buffer.combine(x, handle)[0])

    assert all(WORLD.run(rank_main))


def test_fields_that_wait_for_rows_wait_when_they_are_looked_at():
    def rank_main(buffer, i):
        expected = dispatch(buffer, i)[3].recv_src_metadata
        handle = dispatch(buffer, i, **ASYNC)[3]  # its event is never waited for
        return same_bits(handle.recv_src_metadata, expected)

    assert all(WORLD.run(rank_main))


def test_any_number_of_calls_may_be_under_way():
    def rank_main(buffer, i):
        expected = dispatch(buffer, i)[0]
        batches = [dispatch(buffer, i, **ASYNC) for _ in range(9)]
        for batch in reversed(batches):
            batch[4].current_stream_wait()
        return all(same_bits(batch[0], expected) for batch in batches)

    assert all(WORLD.run(rank_main))


def test_a_refused_call_leaves_nothing_under_way():
    def rank_main(buffer, i):
        bad = {"num_max_tokens_per_rank": 9 + buffer.rank_idx, "do_cpu_sync": False}
        with pytest.raises(ValueError, match="ranks disagree"):
            dispatch(buffer, i, **bad, **ASYNC)
        return same_bits(dispatch(buffer, i)[0], dispatch(buffer, i)[0])

    assert all(WORLD.run(rank_main))
