"""What is told of a buffer between hosts, and is so: ways, memory, what is on its way."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch

import anyep
from anyep.exchange import courier, sums_in
from tests.exchange.cases import LAYOUTS
from tests.hosts.shapes import cut_small


def test_what_was_chosen_is_told(played):
    played(2)

    def rank_main(member):
        with anyep.Buffer(member, hidden=8, num_experts=4, num_topk=2, max_tokens_per_rank=4) as ep:
            received = ep.dispatch(torch.ones(1, 8).bfloat16(), torch.tensor([[0, 3]]))
            ep.combine(received.x, received.handle)
            return str(ep.explain()), ep.stats()

    outcomes = anyep.local_group(3).run(rank_main)
    assert all("ANYEP_RANKS_PER_HOST=2: threads play 2 hosts" in text for text, _ in outcomes)
    assert all("(ranks 0-1; rank 2)" in text for text, _ in outcomes)
    assert all("rows cross in pieces of 1024 KiB, 2 of a stream on their way" in text for text, _ in outcomes)
    assert all("up to 1024.0 KiB to another host that need not take" in text for text, _ in outcomes)
    assert all("a round of announcements takes" in text for text, _ in outcomes)
    assert [stats.far_rows for _, stats in outcomes] == [2, 1, 3]  # rank 2 owns expert 3, rank 0 expert 0
    assert all(stats.network_bytes > 0 for _, stats in outcomes)


@pytest.mark.parametrize(("straight_bytes", "straight_rows"), [(0, [0, 0]), (80, [0, 0]), (200, [6, 6])])
def test_rows_go_straight_to_another_host_up_to_as_many_bytes_as_were_asked_for(played, straight_bytes, straight_rows):
    """Three rows of 16 bytes each way, with an index of 16 bytes."""
    played(1)

    def rank_main(member):
        sizes = {"hidden": 8, "num_experts": 2, "num_topk": 2, "max_tokens_per_rank": 4}
        with anyep.Buffer(member, straight_bytes=straight_bytes, **sizes) as ep:
            received = ep.dispatch(torch.ones(3, 8).bfloat16(), torch.tensor([[1, 0]] * 3))
            ep.combine(received.x, received.handle)
            return ep.stats().straight_rows

    assert anyep.local_group(2).run(rank_main) == straight_rows


def test_the_account_is_that_of_a_buffer_between_hosts(played):
    played(2)
    sizes = {"hidden": 512, "num_experts": 8, "num_topk": 4, "max_tokens_per_rank": 100}

    def rank_main(member):
        with anyep.Buffer(member, **sizes) as ep:
            return ep.explain().memory

    for rank, memory in enumerate(anyep.local_group(5).run(rank_main)):
        assert memory == anyep.memory_account(5, rank=rank, ranks_per_host=2, **sizes)
        assert f"{memory.crossing_bytes / 2**20:.1f} MiB on their way between hosts" in str(memory)
    assert anyep.memory_account(5, ranks_per_host=5, **sizes).crossing_bytes == 0


def test_all_ranks_choose_the_same_way_for_announcements(played):
    played(2)

    def rank_main(member):
        with anyep.Buffer(member, hidden=8, num_experts=4, num_topk=2, max_tokens_per_rank=4) as ep:
            return {choice.topic: choice.reason for choice in ep.explain().choices}["straight"]

    assert len(set(anyep.local_group(5).run(rank_main))) == 1


class Pieces:
    """Stands for the memory of pieces: poisoned, and counted by what of it is alive."""

    def __init__(self):
        self.alive = self.most = 0
        self._counting = threading.Lock()

    def make(self, num_bytes: int) -> np.ndarray:
        memory = np.full(num_bytes, 0xFF, np.uint8)
        with self._counting:
            self.alive += num_bytes
            self.most = max(self.most, self.alive)
        weakref.finalize(memory, self._gone, num_bytes)
        return memory

    def _gone(self, num_bytes: int) -> None:
        with self._counting:
            self.alive -= num_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_on_its_way_is_as_much_as_the_account_says_at_most(played, monkeypatch, layout):
    """400 tokens of 128 bytes a rank in pieces of 700 bytes: eight a stream, and not the rows of a batch."""
    played(2)
    cut_small(monkeypatch, 700)
    pieces = Pieces()
    monkeypatch.setattr(courier, "piece_memory", pieces.make)
    monkeypatch.setattr(sums_in, "piece_memory", pieces.make)
    tokens = torch.arange(400)
    idx = torch.stack([tokens % 8, (tokens + 3) % 8], 1)

    def rank_main(member):
        x = (torch.arange(400.0)[:, None] + member.rank).expand(400, 64).bfloat16().contiguous()
        sizes = {"hidden": 64, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 400}
        with anyep.Buffer(member, straight_bytes=0, **sizes) as ep:
            received = ep.dispatch(x, idx, torch.full((400, 2), 0.5), layout=layout)
            out = ep.combine(received.x, received.handle, topk_weights=received.topk_weights)
            assert torch.equal(out if layout == "padded" else out.x, x if layout == "padded" else 2 * x)
            return ep.explain().memory.crossing_bytes

    bounds = anyep.local_group(4).run(rank_main)
    assert 2 * 700 < pieces.most <= sum(bounds)
    assert sum(bounds) < 4 * 2 * 400 * 128, "less than the rows that cross"
