"""Graphs: what was launched once is launched again, on other tokens, with memory that kept nothing in between.

A lazy device records launches without running them, and refuses to bring words to the host meanwhile.
"""

from __future__ import annotations

import gc

import pytest
import torch

import anyep
from anyep.exchange.device.reach import OwnDevices
from anyep.testing.lazy_device import LazyDevice
from anyep.testing.pretend_device import pretended
from anyep.transport.cuda_symmetric import SymmetricHeap

R, T = 2, 6
SIZES = {"hidden": 8, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": T, "wire": "fp32"}
FIRST_IDX = [[0, 3], [1, 0], [-1, 2], [3, 3], [-1, -1], [2, 0]]
OTHER_IDX = [[3, 2], [-1, -1], [0, 1], [0, 2], [1, 3], [-1, 0]]


@pytest.fixture
def kept(monkeypatch):
    """What is allocated: as long as a graph lives, so does it, and nothing else takes its place."""
    tensors, empty = [], torch.empty

    def keep(*shape, **options):
        tensors.append(empty(*shape, **options))
        return tensors[-1]

    monkeypatch.setattr(torch, "empty", keep)
    return tensors


def returned(x, idx, layout):
    """What comes back of tokens whose experts return them as they are: once a row that was sent."""
    owner = torch.where(idx >= 0, idx // 2, -1)
    pairs = (idx >= 0).sum(dim=1)
    same_rank = (owner[:, 0] == owner[:, 1]) & (owner[:, 0] >= 0)
    rows = pairs if layout in ("padded", "expert") else pairs - same_rank.int()
    return x * rows[:, None]


class Ranks:
    """All ranks of one thread, and their inputs."""

    def __init__(self):
        members = anyep.local_group(R)
        self.buffers = members.run(lambda member: anyep.Buffer(member, **SIZES, static_rows=R * T * 2, device="cuda"))
        self.x = [torch.zeros(T, 8) for _ in range(R)]
        self.idx = [torch.tensor(FIRST_IDX) for _ in range(R)]

    def dispatch(self, layout, handles=None):
        batches = list(zip(self.buffers, self.x, self.idx, handles or [None] * R, strict=True))
        calls = [
            ep.dispatch(x, idx, layout=layout, wait=False)
            if handle is None
            else ep.dispatch(x, None, handle=handle, wait=False)
            for ep, x, idx, handle in batches
        ]
        return [call.wait() for call in calls]

    def combine(self, received):
        rows = zip(self.buffers, received, strict=True)
        calls = [ep.combine(one.x, one.handle, wait=False) for ep, one in rows]
        return [call.wait() for call in calls]

    def both(self, layout, handles=None):
        received = self.dispatch(layout, handles)
        return received, self.combine(received)

    def change(self, turn):
        for rank in range(R):
            self.x[rank].copy_(torch.arange(T * 8).view(T, 8) + 100 * turn + 1000 * rank)
            self.idx[rank].copy_(torch.tensor(OTHER_IDX if (turn + rank) % 2 else FIRST_IDX))


@pytest.fixture
def world(kept):
    with pretended(LazyDevice(0)) as device:
        ranks = Ranks()
        yield device, ranks, kept
        for ep in ranks.buffers:
            ep.close()


def record(device, kept, act):
    """Return what replays ``act`` on memory that is poisoned before, and its result."""
    first = len(kept)
    with device.recording() as graph:
        result = act()
    own = kept[first:]

    def replay():
        for tensor in own:
            tensor.view(torch.uint8).fill_(0xFF)
        graph.replay()

    return replay, result


def test_halves_of_a_padded_dispatch_are_graphs_of_their_own(world):
    device, ranks, kept = world

    def begin():
        batches = zip(ranks.buffers, ranks.x, ranks.idx, strict=True)
        return [ep.dispatch(x, idx, layout="padded", wait=False) for ep, x, idx in batches]

    ranks.dispatch("padded")
    send, calls = record(device, kept, begin)
    receive, received = record(device, kept, lambda: [call.wait() for call in calls])
    for turn in range(3):
        ranks.change(turn)
        send()
        receive()
        replayed = [(list(one.counts), one.x.clone()) for one in received]
        for (counts, x), again in zip(replayed, ranks.dispatch("padded"), strict=True):
            assert counts == list(again.counts)
            for expert, count in enumerate(counts):
                assert torch.equal(x[expert, :count], again.x[expert, :count])


@pytest.mark.parametrize("layout", ["compact", "expert", "padded"])
def test_graphs_of_one_buffer_replay_on_other_tokens_and_experts(world, layout):
    device, ranks, kept = world
    ranks.both(layout)
    graphs = [record(device, kept, lambda: ranks.both(layout)) for _ in range(3)]
    for turn in (0, 2, 1, 1, 0, 2):
        ranks.change(turn + 1)
        replay, (received, sums) = graphs[turn]
        replay()
        for rank in range(R):
            assert torch.equal(sums[rank], returned(ranks.x[rank], ranks.idx[rank], layout))
            counts = sum(torch.bincount(idx[idx >= 0], minlength=4) for idx in ranks.idx)
            assert list(received[rank].counts) == counts[2 * rank : 2 * rank + 2].tolist()
        eager, later = ranks.both(layout)
        for rank in range(R):
            assert torch.equal(later[rank], sums[rank])
            assert list(eager[rank].counts) == list(received[rank].counts)


def test_a_padded_batch_says_of_each_replay_where_its_sources_begin(world):
    device, ranks, kept = world
    ranks.dispatch("padded")
    replay, received = record(device, kept, lambda: ranks.dispatch("padded"))
    for turn in range(3):
        ranks.change(turn)
        replay()
        eager = ranks.dispatch("padded")
        for got, expected in zip(received, eager, strict=True):
            assert torch.equal(got.source_begin, expected.source_begin)
            assert torch.equal(got.source_count, expected.source_count)


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_a_graph_with_a_handle_made_before(world, layout):
    device, ranks, kept = world
    handles = [one.handle for one in ranks.dispatch(layout)]
    replay, (_, sums) = record(device, kept, lambda: ranks.both(layout, handles))
    first = torch.tensor(FIRST_IDX)
    for turn in range(3):
        ranks.change(turn)
        replay()
        assert all(torch.equal(one, returned(x, first, layout)) for one, x in zip(sums, ranks.x, strict=True))


def test_the_faults_of_a_replay_are_said_by_the_barrier(world):
    device, ranks, kept = world
    replay, received = record(device, kept, lambda: ranks.dispatch("compact"))
    ranks.idx[1][2, 1] = 4
    replay()
    assert [list(one.counts) for one in received] == [[0, 0], [0, 0]]

    def barrier(member):
        with pytest.raises(ValueError, match=r"rank 1: topk_idx\[2, 1\] names no expert"):
            ranks.buffers[member.rank].barrier()

    anyep.local_group(R).run(barrier)
    ranks.change(0)
    replay()
    assert [sum(one.counts) for one in received] != [0, 0]


def test_the_faults_of_a_replay_are_said_by_a_later_call(world):
    device, ranks, kept = world
    replay, received = record(device, kept, lambda: ranks.dispatch("compact"))
    ranks.idx[1][2, 1] = 4
    replay()
    for ep, one in zip(ranks.buffers, received, strict=True):
        with pytest.raises(ValueError, match=r"an earlier dispatch: rank 1: topk_idx\[2, 1\] names no expert"):
            ep.combine(one.x, one.handle)
    ranks.change(0)
    assert [one.shape for one in ranks.both("compact")[1]] == [(T, 8)] * R


def test_words_do_not_come_to_the_host_while_a_graph_is_recorded():
    """A test of the test."""
    device = LazyDevice(0)
    with device.recording(), pytest.raises(RuntimeError, match="a graph cannot wait for"):
        device.fetch(torch.zeros(1, dtype=torch.int64))


def test_memory_that_a_graph_writes_to_is_not_handed_out_again():
    device, memory = LazyDevice(0), torch.zeros(1 << 12, dtype=torch.uint8)
    reach = OwnDevices(device, SymmetricHeap(memory, [memory.data_ptr()], 0))

    def take():
        address = reach.room((16,), torch.float32, lambda: "").data_ptr()
        gc.collect()
        return address

    with device.recording():
        captured = take()
    later = take()
    assert later != captured
    assert take() == later
