"""get_dispatch_layout: who gets how many tokens."""

from __future__ import annotations

import pytest
import torch

from anyep.compat import deep_ep
from anyep.compat.deep_ep.layout import loops
from tests.compat.v1_oracle import E, make_inputs, on_ranks


@pytest.mark.parametrize(("ranks", "per_host"), [(1, 8), (3, 8), (4, 2)])
def test_tokens_count_once_a_rank_and_host_and_in_every_column_of_an_expert(ranks, per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    given = make_inputs([17] * ranks)

    def rank_main(buffer):
        idx = given[buffer.rank].topk_idx
        per_rank, per_rdma, per_expert, inside, event = buffer.get_dispatch_layout(idx, E)
        owner = torch.where(idx < 0, -1, idx // (E // ranks))
        reached = torch.stack([(owner == rank).any(1) for rank in range(ranks)], 1)
        assert torch.equal(inside, reached)
        assert inside.dtype == torch.bool
        assert per_rank.dtype == torch.int32
        assert per_rank.tolist() == reached.sum(0).tolist()
        assert per_expert.dtype == torch.int32
        assert per_expert.tolist() == [(idx == expert).sum().item() for expert in range(E)]
        hosts = [reached[:, first : first + per_host].any(1).sum().item() for first in range(0, ranks, per_host)]
        assert (per_rdma is None) if ranks <= per_host else (per_rdma.tolist() == hosts)
        assert event.event is None

    on_ranks(ranks, rank_main)


def test_an_expert_named_twice_counts_twice_and_its_rank_once():
    def rank_main(buffer):
        per_rank, _, per_expert, _, _ = buffer.get_dispatch_layout(torch.tensor([[1, 1, 0]]), 4)
        assert per_rank.tolist() == [1]
        assert per_expert.tolist() == [1, 2, 0, 0]

    on_ranks(1, rank_main)


def test_no_tokens_are_a_layout_too():
    def rank_main(buffer):
        per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(torch.empty(0, 3, dtype=torch.int64), 4)
        assert per_rank.tolist() == [0, 0]
        assert per_expert.tolist() == [0] * 4
        assert inside.shape == (0, 2)

    on_ranks(2, rank_main)


@pytest.mark.parametrize(
    ("idx", "experts"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), 4),
        (torch.zeros(2, 4, dtype=torch.int64)[:, ::2], 4),
        (torch.zeros(4, dtype=torch.int64), 4),
        (torch.tensor([[4]]), 4),
        (torch.tensor([[-2]]), 4),
        (torch.tensor([[0]]), 0),
        ([[0]], 4),
    ],
)
def test_what_host_checks_refuse_is_a_runtime_error(idx, experts):
    def rank_main(buffer):
        with pytest.raises(RuntimeError, match="Assertion exception"):
            buffer.get_dispatch_layout(idx, experts)

    on_ranks(1, rank_main)


def test_an_asynchronous_layout_returns_an_event_that_can_be_waited_for():
    def rank_main(buffer):
        idx = torch.tensor([[0]])
        *_, event = buffer.get_dispatch_layout(idx, 4, async_finish=True)
        event.current_stream_wait()
        with pytest.raises(RuntimeError, match="previous_event"):
            buffer.get_dispatch_layout(idx, 4, allocate_on_comm_stream=True)
        buffer.get_dispatch_layout(
            idx, 4, previous_event=deep_ep.Buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )

    on_ranks(1, rank_main)


def test_bytes_are_the_same_or_not_whatever_their_number_and_place():
    left = torch.arange(40, dtype=torch.uint8)
    for first in (0, 3):
        for size in (0, 1, 7, 8, 9, 24, 29):
            right = left.clone()
            here, there = left.data_ptr() + first, right.data_ptr() + first
            assert loops().same_bytes(here, there, size)
            right[first + size] = 255
            assert loops().same_bytes(here, there, size)
            if size:
                right[first + size - 1] = 255
                assert not loops().same_bytes(here, there, size)
