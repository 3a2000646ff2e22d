"""Ranks that take no part, on a device: the others go on as if those had nothing to send, in any order of launches."""

from __future__ import annotations

import threading

import pytest
import torch

import anyep
from anyep.testing.lazy_device import LazyDevice
from anyep.testing.pretend_device import PretendDevice, pretended

R, E, K, H, TMAX = 4, 8, 3, 16, 12
TOKENS = (5, 12, 0, 7)
ORDERS = pytest.mark.parametrize(
    ("make", "concurrent"),
    [
        (PretendDevice, False),
        (lambda: LazyDevice(3), False),
        (lambda: LazyDevice(1), True),
        (lambda: LazyDevice(2), True),
    ],
    ids=["one stream", "one late stream", "own streams", "own streams, another order"],
)


def batch_of(rank, seed=0):
    """x [T, H] of whole numbers, whose sums are exact; topk_idx [T, K]."""
    generator = torch.Generator().manual_seed(10 * seed + rank)
    x = torch.randint(-9, 9, (TOKENS[rank], H), generator=generator).bfloat16()
    return x, torch.rand(TOKENS[rank], E, generator=generator).argsort(1)[:, :K].contiguous()


def without(idx, away):
    owner = idx // (E // R)
    return idx.masked_fill(torch.isin(owner, torch.tensor(away)), -1)


def arrivals(rank, away, layout, seed):
    """What arrives at a rank from those that take part, in the order of sources, tokens and columns."""
    rows = []
    for source in (one for one in range(R) if one not in away):
        x, idx = batch_of(source, seed)
        for token, experts in enumerate(idx.tolist()):
            mine = [expert for expert in experts if expert // (E // R) == rank]
            rows += [(expert, x[token]) for expert in (mine[:1] if layout == "compact" else sorted(mine))]
    if layout != "compact":
        rows.sort(key=lambda row: row[0])
    return torch.stack([x for _, x in rows]) if rows else torch.empty(0, H).bfloat16()


def check_step(ep, away, layout, seed):
    x, idx = batch_of(ep.rank, seed)
    sent = without(idx, away)
    got = ep.dispatch(x, sent, layout=layout)
    rows = got.x
    if layout == "padded":
        rows = torch.cat([got.x[expert, :count] for expert, count in enumerate(got.counts)])
    assert torch.equal(rows, arrivals(ep.rank, away, layout, seed))
    reduce = {} if layout == "padded" else {"reduce": "expert" if layout == "expert" else "rank"}
    out = ep.combine(got.x, got.handle, **reduce)
    owner = torch.where(sent < 0, -1, sent // (E // R))
    times = (sent >= 0).sum(1) if layout != "compact" else torch.stack([(owner == r).any(1) for r in range(R)]).sum(0)
    assert torch.equal(out, x * times.unsqueeze(1))
    return got


def on_ranks(make, rank_main, **options):
    sizes = {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": TMAX, "device": "cuda"}

    def act(member):
        with anyep.Buffer(member, **sizes, **options) as ep:
            return rank_main(ep)

    with pretended(make()):
        return anyep.local_group(R).run(act)


@ORDERS
@pytest.mark.parametrize("away", [[1], [0, 2], [3], [1, 2, 3]])
@pytest.mark.parametrize("eager", [None, 0])
def test_those_that_are_left_go_on_without_some_whatever_they_call(make, concurrent, away, eager):
    rested = threading.Barrier(R)

    def rank_main(ep):
        for layout in ("padded", "compact", "expert"):
            check_step(ep, [], layout, 0)
        if ep.rank not in away:
            ep.leave_out(away)
            for seed in range(1, 7):
                for layout in ("padded", "compact", "expert"):
                    check_step(ep, away, layout, seed)
        rested.wait(60)

    on_ranks(make, rank_main, concurrent=concurrent, eager_bytes=eager)


@pytest.mark.parametrize("per_host", ["2", "1"])
@pytest.mark.parametrize("away", [[1], [0, 2], [2, 3], [1, 2, 3]])
@pytest.mark.parametrize("straight_bytes", [0, 1 << 20], ids=["forwarded", "straight"])
def test_those_that_are_left_go_on_between_hosts_and_who_comes_back_is_heard(
    away, per_host, straight_bytes, monkeypatch
):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", per_host)
    rested = threading.Barrier(R)

    def rank_main(ep):
        calls = 0
        assert ep.num_hosts > 1
        for layout in ("padded", "compact", "expert"):
            check_step(ep, [], layout, 0)
        others = [rank for rank in range(R) if (rank in away) != (ep.rank in away)]
        ep.leave_out(others)
        for seed in range(1, 3):
            for layout in ("padded", "compact", "expert"):
                check_step(ep, others, layout, seed)
                calls += 1
        rested.wait(60)
        ep.leave_out(())
        rested.wait(60)
        check_step(ep, [], "compact", calls)

    on_ranks(lambda: LazyDevice(4), rank_main, straight_bytes=straight_bytes)


@ORDERS
def test_who_made_as_many_calls_may_come_back(make, concurrent):
    rested = threading.Barrier(R)

    def rank_main(ep):
        check_step(ep, [], "padded", 0)
        away = [2, 3] if ep.rank < 2 else [0, 1]
        ep.leave_out(away)  # two halves go on by themselves
        for seed in range(1, 4):
            check_step(ep, away, "padded", seed)
        rested.wait(60)
        ep.leave_out(())
        rested.wait(60)
        for layout in ("compact", "padded", "expert"):
            check_step(ep, [], layout, 5)

    on_ranks(make, rank_main, concurrent=concurrent)


@ORDERS
def test_a_handle_of_those_that_took_part_is_refused_or_forgets_them(make, concurrent):
    rested = threading.Barrier(R)

    def rank_main(ep):
        x, idx = batch_of(ep.rank)
        idx[:, 0] = 2  # rank 1 takes part in each
        got = ep.dispatch(x, idx)
        padded = ep.dispatch(x, idx, layout="padded")
        if ep.rank != 1:
            ep.leave_out([1])
            if len(x):
                with pytest.raises(ValueError, match="rank 1 took part in this handle's dispatch"):
                    ep.dispatch(x, handle=got.handle)
            out = ep.combine(padded.x, padded.handle)
            assert torch.equal(out, x * (without(idx, [1]) >= 0).sum(1, keepdim=True))
        rested.wait(60)

    on_ranks(make, rank_main, concurrent=concurrent)


@ORDERS
def test_who_does_not_come_to_a_padded_call_is_expelled_by_all(make, concurrent):
    rested = threading.Barrier(R)

    def rank_main(ep):
        ep.expel_absent()
        check_step(ep, [], "padded", 0)
        if ep.rank == 2:
            rested.wait(60)
            with pytest.raises(anyep.PeerLost, match=r"rank 2 \(this rank\)"):
                ep.dispatch(*batch_of(2), layout="padded")
            return
        x, idx = batch_of(ep.rank, 1)
        got = ep.dispatch(x, idx, layout="padded")  # rank 2 is missed here, with rows on their way
        rows = torch.cat([got.x[expert, :count] for expert, count in enumerate(got.counts)])
        assert torch.equal(rows, arrivals(ep.rank, [2], "padded", 1))
        out = ep.combine(got.x, got.handle)
        assert torch.equal(out, x * (without(idx, [2]) >= 0).sum(1, keepdim=True))
        assert ep.left_out == [2]
        for seed in (2, 3, 4):
            check_step(ep, [2], "padded", seed)
            check_step(ep, [2], "compact", seed)
        rested.wait(60)

    on_ranks(make, rank_main, concurrent=concurrent, timeout_s=1.5)
