"""Padded operations that go on without a rank which does not come: before a dispatch, or between it and its combine."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

import anyep

R, E, K, H, T = 4, 8, 3, 32, 6
SIZES = {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": T}
SILENT = 2


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    idx = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K].contiguous()
    return torch.randn(T, H, generator=generator).bfloat16(), idx


def sums_without(rank, silent):
    """What comes back where experts return what they get, and those of ``silent`` do not answer."""
    x, idx = batch(rank)
    total = torch.zeros(T, H)
    for column in range(K):
        total = total + x.float() * (idx[:, column : column + 1] // (E // R) != silent)
    return total.bfloat16()


def run(rank_main, **options):
    def thread_main(member):
        ep = anyep.Buffer(member, **SIZES, timeout_s=1.0, **options)
        try:
            ep.expel_absent()
            return rank_main(ep)
        finally:
            ep.close()

    return anyep.local_group(R).run(thread_main)


@pytest.mark.parametrize("eager_bytes", [0, 1 << 16])
@pytest.mark.parametrize("where", ["dispatch", "combine"])
def test_the_others_go_on_as_if_the_silent_rank_had_been_left_out(where, eager_bytes):
    done = threading.Barrier(R)

    def rank_main(ep):
        x, idx = batch(ep.rank)
        ep.barrier()
        if ep.rank == SILENT:
            late = partial(ep.dispatch, x, idx, layout="padded")
            if where == "combine":
                received = late()
                late = partial(ep.combine, received.x, received.handle)
            done.wait(30)
            with pytest.raises(anyep.PeerLost, match="went on without it"):
                late()
            return
        received = ep.dispatch(x, idx, layout="padded")
        out = ep.combine(received.x, received.handle)
        assert torch.equal(out, sums_without(ep.rank, SILENT))
        if where == "dispatch":
            assert int(received.source_count[:, SILENT].sum()) == 0
        assert ep.left_out == [SILENT]
        masked = idx.masked_fill(idx // (E // R) == SILENT, -1)
        again = ep.dispatch(x, masked, layout="padded")
        assert torch.equal(ep.combine(again.x, again.handle), out)
        with pytest.raises(ValueError, match="rank 2 was expelled"):
            ep.leave_out(())
        done.wait(30)

    run(rank_main, eager_bytes=eager_bytes)


@pytest.mark.parametrize("eager_bytes", [0, 1 << 16])
def test_what_was_posted_before_a_rank_was_expelled_drops_what_was_meant_for_it(eager_bytes):
    """Two dispatches are under way when the first finds out; the second was announced with rows for the rank too."""
    done = threading.Barrier(R)

    def rank_main(ep):
        x, idx = batch(ep.rank)
        ep.barrier()
        if ep.rank == SILENT:
            done.wait(30)
            with pytest.raises(anyep.PeerLost, match="went on without it"):
                ep.dispatch(x, idx, layout="padded")
            return
        pendings = [ep.dispatch(x, idx, layout="padded", wait=False) for _ in range(2)]
        with pytest.raises(ValueError, match="operations are in flight"):
            ep.leave_out([SILENT])
        for pending in pendings:
            received = pending.wait()
            assert int(received.source_count[:, SILENT].sum()) == 0
            assert torch.equal(ep.combine(received.x, received.handle), sums_without(ep.rank, SILENT))
        assert ep.left_out == [SILENT]
        done.wait(30)

    run(rank_main, eager_bytes=eager_bytes)


@pytest.mark.parametrize("what", ["compact", "cached", "combine"])
def test_what_was_posted_before_a_rank_was_expelled_and_needs_it_ends_the_buffer(what):
    """Whether it misses the rank itself, or finds it expelled by the operation before."""
    done = threading.Barrier(R)

    def rank_main(ep):
        x, idx = batch(ep.rank)
        first = ep.dispatch(x, idx)
        if ep.rank == SILENT:
            done.wait(30)
            return
        padded = ep.dispatch(x, idx, layout="padded", wait=False)
        calls = {
            "compact": lambda: ep.dispatch(x, idx, wait=False),
            "cached": lambda: ep.dispatch(x, handle=first.handle, wait=False),
            "combine": lambda: ep.combine(first.x, first.handle, wait=False),
        }
        pending = calls[what]()
        try:
            with pytest.raises(anyep.AnyEPError):  # noqa: PT012  # either may be the first to miss it
                padded.wait()
                pending.wait()
            assert isinstance(ep.ended_by, anyep.PeerError)
            assert ep.ended_by.ranks == (SILENT,)
        finally:
            done.wait(30)

    run(rank_main, eager_bytes=0)


def test_operations_of_other_layouts_still_end_the_buffer():
    done = threading.Barrier(R)

    def rank_main(ep):
        x, idx = batch(ep.rank)
        if ep.rank != SILENT:
            with pytest.raises(anyep.PeerError, match="rank 2"):
                ep.dispatch(x, idx)
        done.wait(30)

    run(rank_main)


def test_a_rank_that_comes_late_but_in_time_takes_part():
    def rank_main(ep):
        x, idx = batch(ep.rank)
        if ep.rank == SILENT:
            threading.Event().wait(0.3)
        received = ep.dispatch(x, idx, layout="padded")
        assert torch.equal(ep.combine(received.x, received.handle), sums_without(ep.rank, None))
        assert ep.left_out == []

    run(rank_main)


def test_ranks_between_hosts_cannot_be_expelled(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    with pytest.raises(anyep.Unavailable, match="where a word in shared memory says who is missed"):
        run(lambda ep: None)
