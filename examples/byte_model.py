"""A byte-level language model whose experts live on all ranks.

Legend: B sequences of this rank, S bytes of one, H hidden, C channels of an attention head, L local experts, N rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from anyep import nn

VOCABULARY = 256
"""tokens are bytes"""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the model and a training step are made of; alike on all ranks."""

    hidden: int = 128
    layers: int = 3
    """the first is dense, as in DeepSeek-V3"""
    heads: int = 4
    experts: int = 16
    topk: int = 2
    width: int = 128
    """of an expert, and of the shared one"""
    context: int = 256
    """bytes that a sequence has"""
    batch: int = 8
    """sequences of a step, of all ranks together"""
    seed: int = 0
    row_by_row: bool = False
    """experts compute each row alone: slow, and the same bits in any batch"""


class RowByRow(torch.nn.Module):
    """The same experts, each row by itself: what a matrix product gives depends on how many rows it has."""

    def __init__(self, experts: nn.GroupedMLP) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, batch: nn.Batch) -> Tensor:
        """Rows of the expert layout [N, H] -> [N, H]."""
        owner = torch.repeat_interleave(torch.tensor(batch.group_sizes))
        rows = [self._row(row, int(expert)) for row, expert in zip(batch.x, owner, strict=True)]
        return torch.cat(rows) if rows else batch.x

    def _row(self, row: Tensor, expert: int) -> Tensor:
        gate, up = (row.unsqueeze(0) @ self.experts.gate_up[expert]).chunk(2, dim=1)
        return (functional.silu(gate) * up) @ self.experts.down[expert]


def make_moe(ep: nn.BufferPair, sizes: Sizes, layer: int) -> nn.MoE:
    """Return DeepSeek-V3's layer: sigmoid gate with a balancing bias, experts on all ranks, one shared expert."""
    experts = nn.GroupedMLP(ep, width=sizes.width, seed=1000 * sizes.seed + layer)
    return nn.MoE(
        ep,
        nn.Router(sizes.hidden, sizes.experts, sizes.topk, scoring="sigmoid"),
        RowByRow(experts) if sizes.row_by_row else experts,
        shared=_mlp(sizes.hidden, sizes.width),
    )


def _mlp(hidden: int, width: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(hidden, width, bias=False), torch.nn.SiLU(), torch.nn.Linear(width, hidden, bias=False)
    )


def rotated(x: Tensor) -> Tensor:
    """Turn each pair of channels of ``x`` [B, heads, S, C] by an angle that grows with the position.

    RoFormer (https://arxiv.org/abs/2104.09864, section 3.2.2), channels c and c + C / 2 being a pair.
    """
    context, channels = x.shape[-2:]
    speed = 10000.0 ** (-torch.arange(0, channels, 2) / channels)
    angle = torch.arange(context).unsqueeze(1) * speed
    one, other = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


class Block(torch.nn.Module):
    """Attention, then a dense layer or experts."""

    def __init__(self, ep: nn.BufferPair, sizes: Sizes, layer: int) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm_attention = torch.nn.RMSNorm(sizes.hidden)
        self.qkv = torch.nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=False)
        self.out = torch.nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.norm_layer = torch.nn.RMSNorm(sizes.hidden)
        self.layer = make_moe(ep, sizes, layer) if layer else _mlp(sizes.hidden, 4 * sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] to the same shape."""
        batch, context, hidden = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, context, hidden))
        return x + self.layer(self.norm_layer(x))


class Model(torch.nn.Module):
    """Everything but the experts is alike on all ranks, which draw it from the same seed."""

    def __init__(self, ep: nn.BufferPair, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(sizes.seed)
        self.embedding = torch.nn.Embedding(VOCABULARY, sizes.hidden)
        self.blocks = torch.nn.Sequential(*(Block(ep, sizes, layer) for layer in range(sizes.layers)))
        self.norm = torch.nn.RMSNorm(sizes.hidden)
        self.head = torch.nn.Linear(sizes.hidden, VOCABULARY, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return the bits that each byte of ``text`` int64 [B, S + 1] but the first takes, [B, S]."""
        logits = self.head(self.norm(self.blocks(self.embedding(text[:, :-1]))))
        return functional.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none") / math.log(2)

    def moes(self) -> list[nn.MoE]:
        return [block.layer for block in self.blocks if isinstance(block.layer, nn.MoE)]

    def expert_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return what is this rank's own, by name: [L, ...], one entry for each of ``ep.local_experts``."""
        own = {id(parameter) for moe in self.moes() for parameter in moe.experts.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) in own}

    def replicated_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return what all ranks hold alike, by name."""
        own = self.expert_parameters()
        return {name: parameter for name, parameter in self.named_parameters() if name not in own}
