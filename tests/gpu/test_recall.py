"""Handles made again on a device from what all ranks announced: the way of rows of the dispatch that announced it."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep.exchange.device.announced import announced_on
from anyep.exchange.wire import carrying_wire
from anyep.testing.pretend_device import PretendDevice, pretended

E, K = 12, 3
TOKENS = [[9], [0, 5], [7, 0, 13], [4, 20, 1, 6]]


@pytest.fixture(autouse=True)
def _pretended():
    with pretended(PretendDevice()):
        yield


def indices_of(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(-1, E, (tokens, K), generator=generator)
    return torch.where(idx == idx.roll(1, 1), -1, idx)


def on_ranks(tokens, rank_main, *, by_column=True, static=None):
    """Run ``rank_main(calls, idx)`` on a variant for rows of 8 numbers of 4 bytes that say where they come from."""

    def act(member):
        sizes = {"hidden": 8, "num_experts": E, "num_topk": K, "max_tokens_per_rank": 32}
        with anyep.Buffer(member, **sizes, device="cuda") as ep:
            wire = carrying_wire(torch.float32, 8, 0, torch.float32, by_column=by_column)
            kinds = {"wire": wire, "num_topk": K, "max_tokens_per_rank": 32, "source_tokens": True}
            return rank_main(ep.variant(**kinds, static_rows=static), indices_of(tokens[member.rank], member.rank))

    return anyep.local_group(len(tokens)).run(act)


@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize("static", [None, 100])
@pytest.mark.parametrize("tokens", TOKENS)
def test_what_goes_by_a_recalled_handle_has_the_bits_of_the_first(tokens, static, by_column):
    def rank_main(calls, idx):
        x = torch.randn(len(idx), 8)
        first = calls.dispatch(x, idx)
        announced = announced_on(first.handle.send).clone()
        again = calls.handles.recall(idx.clone(), announced)
        assert again.num_rows == first.handle.num_rows
        assert list(again.counts) == list(first.counts)
        idx.zero_()  # a handle has its own
        announced.zero_()
        assert torch.equal(calls.dispatch(x, handle=again).x, first.x)
        way = {"reduce": "column"} if by_column else {}
        assert torch.equal(calls.combine(first.x, again, **way), calls.combine(first.x, first.handle, **way))
        assert torch.equal(announced_on(again.send), announced_on(first.handle.send))

    on_ranks(tokens, rank_main, by_column=by_column, static=static)


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_rows_of_another_layout_go_back_from_the_same_counts(tokens, alignment):
    def rank_main(calls, idx):
        announced = announced_on(calls.dispatch(torch.randn(len(idx), 8), idx).handle.send)
        known = calls.handles.recall(idx, announced, layout="expert", expert_alignment=alignment)
        assert known.num_rows == sum(-(-count // alignment) * alignment for count in known.counts)
        out = calls.combine(torch.ones(known.num_rows, 8), known, reduce="expert")
        assert torch.equal(out, (idx >= 0).sum(1, keepdim=True).expand(-1, 8).float())

    on_ranks(tokens, rank_main)


def test_what_does_not_belong_together_is_refused_and_the_buffer_goes_on():
    def rank_main(calls, idx):
        first = calls.dispatch(torch.randn(len(idx), 8), idx)
        announced = announced_on(first.handle.send).clone()
        with pytest.raises(ValueError, match="does not belong to these counts"):
            calls.handles.recall(torch.zeros_like(idx), announced)
        with pytest.raises(TypeError, match="topk_idx must be int64"):
            calls.handles.recall(idx.float(), announced)
        with pytest.raises(ValueError, match="announced must have shape"):
            calls.handles.recall(idx, announced[:, 1:].contiguous())
        calls.combine(first.x, calls.handles.recall(idx, announced), reduce="column")

    on_ranks([5, 9], rank_main)


def test_counts_of_more_rows_than_a_fixed_number_are_refused():
    def rank_main(calls, idx):
        announced = torch.zeros(2, 2 + E, dtype=torch.int32)
        announced[:, 0] = announced[:, 2] = 3
        with pytest.raises(ValueError, match="more than static_rows=5"):
            calls.handles.recall(torch.tensor([[0, -1, -1]] * 3), announced)
        for _ in range(2):  # what is refused is no fault of a dispatch
            calls.dispatch(torch.ones(1, 8), torch.tensor([[0, 11, -1]]))

    on_ranks([3, 3], rank_main, static=5)


def test_handles_of_another_buffer_on_the_device_are_adopted():
    def rank_main(calls, idx):
        first = calls.dispatch(torch.randn(len(idx), 8), idx)
        expected = calls.combine(first.x, first.handle, reduce="column")
        kept[calls.rank] = first, expected

    def other(calls, idx):
        first, expected = kept[calls.rank]
        assert torch.equal(calls.combine(first.x, calls.handles.adopt(first.handle), reduce="column"), expected)

    kept = {}
    on_ranks([5, 9], rank_main)
    on_ranks([5, 9], other)
