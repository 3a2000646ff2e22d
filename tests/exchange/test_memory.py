"""A rank without memory: every rank refuses together, the rank itself also hears its arena's advice, all go on."""

from __future__ import annotations

import pytest

import anyep
from tests.exchange.rounds import assert_same, open_buffer
from tests.exchange.test_behaviour import CASE


class Exhausted:
    """A transport whose arena is full, over one that is not."""

    def __init__(self, transport):
        self._transport = transport

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def allocate(self, num_bytes):
        raise anyep.CapacityError(f"an arena that is full needs {num_bytes} bytes: use fewer tokens")


def refused(ep, operation, victim):
    """Run an operation while the victim has no memory; return what this rank raised."""
    healthy = ep._end.transport
    if ep.rank == victim:
        object.__setattr__(ep._end, "transport", Exhausted(healthy))
        for geometry in ep._end.geometries.values():
            geometry.spare_landings.clear()  # memory that was offered before, and not needed
    try:
        with pytest.raises(anyep.CapacityError, match=rf"rank {victim} could not allocate") as caught:
            operation()
    finally:
        object.__setattr__(ep._end, "transport", healthy)
    return caught.value


@pytest.mark.parametrize("layout", ["compact", "expert", "padded"])
@pytest.mark.parametrize("eager_bytes", [0, 1 << 20])
def test_a_dispatch_without_memory_is_refused_by_all(layout, eager_bytes):
    def rank_main(member):
        batch = CASE.batches[member.rank]
        idx = batch.topk_idx.sort(dim=1).values if layout != "padded" else batch.topk_idx.clone()
        if layout == "padded":
            idx[:, 1:] = -1  # each expert once
        with open_buffer(CASE, member, eager_bytes=eager_bytes) as ep:
            error = refused(ep, lambda: ep.dispatch(batch.x, idx, layout=layout), victim=1)
            assert (error.__cause__ is not None) == (member.rank == 1)
            received = ep.dispatch(batch.x, idx, layout=layout)
            combined = ep.combine(received.x, received.handle)
            cached = refused_cached(ep, batch, received)
            assert_same("combined", ep.combine(cached.x, cached.handle), combined)
            return ep.stats().refused

    def refused_cached(ep, batch, received):
        refused(ep, lambda: ep.dispatch(batch.x, handle=received.handle), victim=2)
        return ep.dispatch(batch.x, handle=received.handle)

    assert anyep.local_group(3).run(rank_main) == [2, 2, 2]


@pytest.mark.parametrize("layout", ["compact", "expert"])
def test_a_combine_without_memory_for_a_copy_is_refused_by_all(layout):
    def rank_main(member):
        batch = CASE.batches[member.rank]
        with open_buffer(CASE, member, eager_bytes=0) as ep:
            received = ep.dispatch(batch.x, batch.topk_idx, layout=layout)
            outside = received.x.clone()
            error = refused(ep, lambda: ep.combine(outside, received.handle), victim=2)
            assert (error.__cause__ is not None) == (member.rank == 2)
            assert_same("combined", ep.combine(outside, received.handle), ep.combine(received.x, received.handle))

    anyep.local_group(3).run(rank_main)
