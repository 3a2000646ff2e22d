"""Operators for torch.compile: whole graphs, known shapes, and the gradients of anyep.nn."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep import nn
from anyep.nn import ops
from anyep.testing.pretend_device import PretendDevice, pretended

T, H, K, E, N = 5, 16, 2, 4, 24
SIZES = {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": T, "wire": "fp32"}


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(T, H, generator=generator)
    idx = torch.rand(T, E, generator=generator).topk(K, dim=1).indices
    return x, idx, torch.rand(T, K, generator=generator)


def layer(link, x, idx, weights, layout="compact"):
    """Each row times the sum of its weights, squared: both have gradients."""
    arrived = ops.dispatch(link, x, idx, weights, layout=layout)
    y = arrived.x * arrived.topk_weights.sum(dim=1, keepdim=True) ** 2
    return ops.combine(link, y, arrived, num_tokens=x.shape[0])


def with_gradients(function, rank):
    x, idx, weights = batch(rank)
    x.requires_grad_()
    weights.requires_grad_()
    out = function(x, idx, weights)
    out.square().sum().backward()
    return out.detach(), x.grad, weights.grad


@pytest.mark.parametrize("layout", ["compact", "expert"])
@pytest.mark.parametrize("device", [None, "cuda"])
def test_outputs_and_gradients_are_those_of_the_functions_of_nn(layout, device):
    def rank_main(member):
        with anyep.Buffer(member, **SIZES, static_rows=N, device=device) as ep:
            link = ops.Link(ep)
            return with_gradients(lambda *inputs: layer(link, *inputs, layout), member.rank)

    def known_main(member):
        def known(x, idx, weights):
            sent = nn.dispatch(ep, x, idx, weights, layout=layout, reduce="rank")
            y = sent.x * sent.topk_weights.sum(dim=1, keepdim=True) ** 2
            return nn.combine(y, sent)

        with anyep.Buffer(member, **SIZES, static_rows=N) as ep:
            return with_gradients(known, member.rank)

    with pretended(PretendDevice()):
        found = anyep.local_group(2).run(rank_main)
    for ours, theirs in zip(found, anyep.local_group(2).run(known_main), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.fixture
def link():
    ep = anyep.local_group(1).run(lambda member: anyep.Buffer(member, **SIZES, static_rows=N))[0]
    yield ops.Link(ep)
    ep.close()


def test_a_default_device_of_the_caller_changes_nothing(link):
    inputs = batch(0)
    expected = layer(link, *inputs)
    with torch.device("meta"):
        found = layer(link, *inputs)
    assert torch.equal(found, expected)


def test_a_compiled_layer_is_one_graph_with_the_same_bits(link):
    compiled = torch.compile(lambda *inputs: layer(link, *inputs), backend="aot_eager", fullgraph=True)
    for a, b in zip(with_gradients(compiled, 0), with_gradients(lambda *inputs: layer(link, *inputs), 0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["test_schema", "test_autograd_registration", "test_faketensor"])
def test_operators_keep_what_they_promise_torch(link, name):
    x, idx, weights = batch(0)
    torch.library.opcheck(ops._dispatch, (x.requires_grad_(), idx, weights, link.number, "compact"), test_utils=name)
    arrived = ops.dispatch(link, x, idx, weights)
    y = arrived.x.detach().clone().requires_grad_()
    torch.library.opcheck(ops._combine, (y, arrived.ticket, link.number, T), test_utils=name)
    torch.library.opcheck(ops._repeat, (x.detach(), arrived.ticket, link.number), test_utils=name)
    both = (y.detach(), arrived.topk_weights.detach(), arrived.ticket, link.number, T)
    torch.library.opcheck(ops._combine_both, both, test_utils=name)


def test_a_buffer_without_fixed_rows_is_refused_and_one_with_fp8():
    def rank_main(member):
        with anyep.Buffer(member, **SIZES) as ep, pytest.raises(ValueError, match="make the buffer with static_rows"):
            ops.Link(ep)
        with anyep.Buffer(member, **SIZES | {"wire": "fp8"}, static_rows=N) as ep:  # noqa: SIM117
            with pytest.raises(ValueError, match="gradients do not travel on wire='fp8'"):
                ops.Link(ep)

    anyep.local_group(1).run(rank_main)


def test_a_forgotten_ticket_and_a_link_that_is_gone_are_said(link):
    x, idx, weights = batch(0)
    short = ops.Link(link.ep, keep=1)
    first = ops.dispatch(short, x, idx, weights)
    ops.dispatch(short, x, idx, weights)
    with pytest.raises(ValueError, match="dispatch 0 of this link is forgotten: it keeps 1"):
        ops.combine(short, first.x, first, num_tokens=T)
    number = short.number
    del short
    with pytest.raises(ValueError, match=f"link {number} is gone"):
        ops._dispatch(x, idx, weights, number, "compact")
