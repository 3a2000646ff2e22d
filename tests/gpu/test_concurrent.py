"""Ranks on streams of their own: every order of launches brings the same bits, and a silent rank is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import anyep
from anyep.errors import PeerTimeout
from anyep.testing.lazy_device import LazyDevice
from anyep.testing.pretend_device import pretended
from tests.exchange.rounds import check, open_buffer, play
from tests.gpu.exchanged import WAYS, draw

SIZES = {"hidden": 8, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 6}


def run(case):
    def rank_main(member):
        with open_buffer(case, member, device="cuda", concurrent=True) as ep:
            return [play(case, ep) for _ in range(2)]

    for outcomes in zip(*anyep.local_group(case.num_ranks).run(rank_main), strict=True):
        check(case, list(outcomes))


@pytest.mark.parametrize("seed", range(len(WAYS)))
def test_every_order_of_launches_brings_the_same_bits(seed):
    with pretended(LazyDevice(seed)):
        run(replace(draw(seed), num_tokens=(6, 0, 5)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_orders_of_launches():
    for seed in range(100, 400):
        with pretended(LazyDevice(seed)):
            run(draw(seed))


def test_memory_that_is_offered_again_is_announced_when_nobody_reads_the_first_offer():
    case = replace(draw(0), num_tokens=(40, 40), num_experts=8, num_topk=1, skew=0.05, spare_rows=None, hidden=8)
    for seed in range(5):
        with pretended(LazyDevice(seed)):
            run(case)


def test_ranks_that_disagreed_count_alike_afterwards():
    case = replace(draw(0), num_tokens=(6, 5), num_topk=2, num_experts=4)

    def rank_main(member):
        with open_buffer(case, member, device="cuda", concurrent=True) as ep:
            batch = case.batches[ep.rank]
            for call in (ep.barrier, lambda: ep.dispatch(batch.x, batch.topk_idx, layout="padded")):
                other = call if ep.rank else (lambda: ep.dispatch(batch.x, batch.topk_idx))
                with pytest.raises(ValueError, match="ranks disagree"):
                    other()
            return play(case, ep)

    with pretended(LazyDevice(0)):
        check(case, anyep.local_group(2).run(rank_main))


def silence(ep, stage):
    """From now on this rank's words of one stage are not written."""
    order, signal = ep._end.order, ep._end.order._signal
    order._signal = lambda kernels, turn, which: None if which == stage else signal(kernels, turn, which)
    order._tapes.clear()
    if stage == 1:
        order._meet = order._wait


def on_two_ranks(act):
    batch = torch.ones(6, 8, dtype=torch.bfloat16), torch.zeros(6, 2, dtype=torch.int64)
    batch[1][:, 1] = 3

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda", concurrent=True, timeout_s=30) as ep:
            act(ep, *batch)
            with pytest.raises(anyep.ClosedError):
                ep.dispatch(*batch)

    device = LazyDevice(0)
    device.looks_in = lambda seconds: 300  # the device's time is up long before the host's
    with pretended(device):
        anyep.local_group(2).run(rank_main)


def test_a_rank_that_does_not_announce_is_a_timeout_with_counters():
    def act(ep, x, idx):
        ep.barrier()
        if ep.rank == 1:
            silence(ep, 0)
        said = r"dispatch 2: the device waited longer than timeout_s=30 for rank 1, .* operation 2 .* had come to 0"
        with pytest.raises(PeerTimeout, match=said) as caught:
            ep.dispatch(x, idx)
        assert caught.value.ranks == (1,)

    on_two_ranks(act)


@pytest.mark.parametrize("stage", [0, 1])
def test_where_nobody_waits_for_the_device_the_barrier_says_it(stage):
    def act(ep, x, idx):
        ep.barrier()
        if ep.rank == 1:
            silence(ep, stage)
        received = ep.dispatch(x, idx, layout="padded")
        if stage == 0:
            assert list(received.counts) == [0, 0]
        with pytest.raises(PeerTimeout, match="for rank 1, which was waited for in operation 2 on"):
            ep.barrier()

    on_two_ranks(act)


def test_a_combine_without_a_rank_reads_nothing_and_ends():
    def act(ep, x, idx):
        received = ep.dispatch(x, idx)
        if ep.rank == 1:
            silence(ep, 0)
        assert (ep.combine(received.x, received.handle) == 0).all()
        with pytest.raises(PeerTimeout, match="rank 1"):
            ep.barrier()

    on_two_ranks(act)


def test_calls_of_a_graph_count_on_when_it_is_replayed(monkeypatch):
    """What a graph of a dispatch holds are its launches and memory: they are run again here, on other tokens."""
    kept, empty = [], torch.empty

    def keep(*shape, **options):
        tensor = empty(*shape, **options)
        kept.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", keep)

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda", concurrent=True, wire="fp32") as ep:
            x, idx = torch.zeros(6, 8), torch.tensor([[0, 3]] * 6)
            ep.dispatch(x, idx, layout="padded")
            with device.recording() as graph:
                received = ep.dispatch(x, idx, layout="padded")
                out = ep.combine(received.x, received.handle)
            for turn in range(3):
                x.fill_(10 * turn + ep.rank)
                graph.replay()
                assert (out == 2 * x).all()
            later = ep.dispatch(x, idx, layout="padded")
            assert (ep.combine(later.x, later.handle) == 2 * x).all()

    for seed in range(4):
        with pretended(LazyDevice(seed)) as device:
            anyep.local_group(2).run(rank_main)
