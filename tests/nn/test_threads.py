"""Ranks that are threads and share a GPU: torch has one thread for all their backward passes, where one would wait."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep import nn
from anyep.errors import Unavailable
from anyep.nn import ops, threads

SIZES = {"hidden": 8, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 6, "wire": "fp32"}
REFUSED = r"ranks are threads that share a GPU.*torch.autograd.set_multithreading_enabled\(False\), or give each rank a"


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(threads, "_shares_gpu", lambda ep: True)


def of_layer(member):
    """Return the loss of a layer, and the buffer."""
    ep = nn.open_pair(member, **SIZES)
    layer = nn.MoE(ep, nn.Router(hidden=8, num_experts=4, num_topk=2), nn.GroupedMLP(ep, width=4))
    return ep, layer(torch.ones(3, 8, requires_grad=True)).sum()


def of_operators(member):
    ep = anyep.Buffer(member, **SIZES, static_rows=12)
    ep.link = ops.Link(ep)
    x, idx = torch.ones(3, 8, requires_grad=True), torch.tensor([[0, 3]] * 3)
    arrived = ops.dispatch(ep.link, x, idx, torch.ones(3, 2))
    return ep, ops.combine(ep.link, arrived.x * 2, arrived, num_tokens=3).sum()


@pytest.mark.parametrize("make", [of_layer, of_operators])
def test_a_backward_pass_that_would_wait_for_itself_is_refused_with_the_way_out(make):
    def rank_main(member):
        ep, loss = make(member)
        with ep:
            with pytest.raises(Unavailable, match=REFUSED):
                loss.backward(retain_graph=True)
            with torch.autograd.set_multithreading_enabled(False):
                loss.backward()

    anyep.local_group(2).run(rank_main)


def test_one_rank_waits_for_nobody():
    def rank_main(member):
        ep, loss = of_layer(member)
        with ep:
            loss.backward()

    anyep.local_group(1).run(rank_main)


def test_only_threads_on_a_gpu_are_meant(monkeypatch):
    monkeypatch.undo()

    def rank_main(member):
        ep, loss = of_layer(member)
        with ep:
            loss.backward()

    anyep.local_group(2).run(rank_main)
