"""Balancing by bias while a layer trains: the experts' shares come closer, and the layer still learns."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep import nn

R, T, H, E, K = 2, 64, 16, 8, 2
STEPS, RATE = 60, 0.02


def skewed_tokens(rank):
    """Tokens around one direction, so that a gate that is left alone sends most of them to the same experts."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(T, H, generator=generator) * 0.5 + torch.linspace(-1, 1, H)


def train(member, *, balanced, scoring):
    """Return each step's greatest share of an expert, over the mean share, and each step's loss."""
    sizes = {"hidden": H, "num_experts": E, "num_topk": K}
    x, over_ranks = skewed_tokens(member.rank), nn.RankSum(member)
    target = x.flip(1) * 0.5
    with nn.open_pair(member, max_tokens_per_rank=T, wire="fp32", **sizes) as ep:
        gate = nn.Router(**sizes, scoring=scoring)
        with torch.no_grad():
            gate.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
        layer = nn.MoE(ep, gate, nn.GroupedMLP(ep, width=8, seed=0))
        optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
        shares, losses = [], []
        for _ in range(STEPS):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.sum_gradients(layer.replicated_parameters(), over_ranks)
            optimizer.step()
            load = over_ranks(gate.load)
            shares.append(float(load.max() / load.float().mean()))
            losses.append(float(over_ranks(loss.detach().reshape(1))))
            if balanced:
                gate.update_bias(RATE, lambda _, load=load: load)
            else:
                gate.load.zero_()
        return shares, losses, gate.bias.clone()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_the_bias_evens_out_experts_of_a_layer_that_trains(scoring):
    def run(balanced):
        return anyep.local_group(R).run(lambda member: train(member, balanced=balanced, scoring=scoring))

    (shares, losses, bias), (other_shares, _, other_bias) = run(balanced=True)
    (alone, _, still), _ = run(balanced=False)
    assert shares == other_shares
    assert torch.equal(bias, other_bias)
    assert not still.any()
    assert shares[0] == alone[0] > 2  # the same gate, the same tokens: one expert has more than twice its share
    assert sum(shares[-20:]) / 20 < 2
    assert sum(alone[-20:]) / 20 > 3
    assert losses[-1] < 0.9 * losses[0]
