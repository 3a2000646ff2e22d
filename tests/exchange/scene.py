"""An open buffer with good batches, on which bad calls are made, and the proof that it still works afterwards."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch

import anyep

T, H, K, E, R = 5, 64, 3, 8, 2


@dataclass(frozen=True, kw_only=True)
class Scene:
    ep: anyep.Buffer
    fp8: anyep.Buffer
    x: torch.Tensor
    idx: torch.Tensor
    weights: torch.Tensor
    received: anyep.Received
    blocks: anyep.Received
    """in the padded layout"""
    fp8_blocks: anyep.Received
    foreign: anyep.Handle

    @property
    def y(self) -> torch.Tensor:
        return self.received.x

    @property
    def handle(self) -> anyep.Handle:
        return self.received.handle


def make_scene(member, stack: ExitStack) -> Scene:
    sizes = {"hidden": H, "num_experts": E, "num_topk": K, "max_tokens_per_rank": 16, "timeout_s": 20}
    ep = stack.enter_context(anyep.Buffer(member, **sizes))
    fp8 = stack.enter_context(anyep.Buffer(member, wire="fp8", **sizes))
    generator = torch.Generator().manual_seed(member.rank)
    x = torch.randn(T, H, generator=generator).bfloat16()
    idx = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    idx[0, 0], idx[1, 0] = 0, E - 1  # every rank receives something
    weights = torch.rand(T, K, generator=generator)
    return Scene(
        ep=ep,
        fp8=fp8,
        x=x,
        idx=idx,
        weights=weights,
        received=ep.dispatch(x, idx, weights),
        blocks=ep.dispatch(x, idx, weights, layout="padded"),
        fp8_blocks=fp8.dispatch(x, idx, weights, layout="padded"),
        foreign=fp8.dispatch(x, idx).handle,
    )


def check_works(scene: Scene) -> None:
    received = scene.ep.dispatch(scene.x, scene.idx, scene.weights)
    assert torch.equal(received.x, scene.received.x)
    ranks = (scene.idx // (E // R)).unsqueeze(-1) == torch.arange(R)
    copies = ranks.any(dim=1).sum(dim=1, keepdim=True)
    combined = scene.ep.combine(received.x, received.handle)
    assert torch.equal(combined, (scene.x.float() * copies).bfloat16())
