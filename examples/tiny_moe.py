"""A byte-level Mixture-of-Experts language model that learns in minutes on one CPU core.

Its gate is DeepSeek-V3's (https://arxiv.org/abs/2412.19437, section 2.1.2): sigmoid affinities, the K chosen ones
scaled to sum to 1, and a bias for each expert, moved against its load, that enters the choice but not the weight.

Legend: T tokens of a batch, H hidden, E experts, K top-k, C rows that one expert takes from a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256
"""tokens are bytes"""
BIAS_STEP = 0.003
"""by how much an expert's bias moves in one training step (DeepSeek-V3: 0.001, over far more steps)"""
CAPACITY_FACTOR = 2.0
"""an expert takes at most so many times its even share; the rest of a batch passes it by (Switch Transformer)"""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the model and one training step are made of."""

    hidden: int = 128
    num_layers: int = 3
    """the first is dense, as in DeepSeek-V3"""
    num_heads: int = 4
    num_experts: int = 256
    num_topk: int = 8
    expert_width: int = 16
    shared_width: int = 128
    context: int = 256
    """bytes that a token may look back on"""
    batch: int = 8
    """sequences of one step"""
    learning_rate: float = 4e-3

    @property
    def batch_tokens(self) -> int:
        return self.batch * self.context


class Dispatch(torch.autograd.Function):
    """Copy tokens [T, H] to their experts' rows [E * C, H].

    ``token_of_row`` [E * C] holds T where no token goes. ``row_of_choice`` [T, K] names a row without a token where its
    expert had none left: zeros go in and come out, forward and backward.
    Backward is the forward of :class:`Combine` and the other way round, so that both directions only read by index and
    add in a fixed order; the backward of plain indexing would scatter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice)
        return _with_zero_row(x).index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_of_choice,) = ctx.saved_tensors
        return functional.embedding_bag(row_of_choice, gradients[0], mode="sum"), None, None


class Combine(torch.autograd.Function):
    """Sum each token's rows [E * C, H] to [T, H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return functional.embedding_bag(row_of_choice, rows, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return _with_zero_row(gradients[0]).index_select(0, token_of_row), None, None


def _with_zero_row(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 0, 0, 1))


class Experts(nn.Module):
    """A gate, E tiny experts and one shared expert."""

    bias: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        E, H, width = sizes.num_experts, sizes.hidden, sizes.expert_width
        self.gate = nn.Linear(H, E, bias=False)
        self.register_buffer("bias", torch.zeros(E))
        self.up = nn.Parameter(torch.randn(E, H, width) / math.sqrt(H))
        self.down = nn.Parameter(torch.randn(E, width, H) / math.sqrt(width * sizes.num_topk))
        self.shared = _mlp(H, sizes.shared_width)
        self.listener: Callable[[Tensor, Tensor], None] | None = None
        """called with (topk_idx [T, K], topk_weights [T, K]) of every batch"""

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        affinity = torch.sigmoid(self.gate(x))
        chosen = (affinity.detach() + self.bias).topk(self.sizes.num_topk).indices
        weights = affinity.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True)
        if self.listener is not None:
            self.listener(chosen, weights)
        counts = torch.bincount(chosen.flatten(), minlength=self.sizes.num_experts)
        if self.training:
            self.bias += BIAS_STEP * torch.sign(counts.float().mean() - counts)
        choice_of_row, row_of_choice = self._places(chosen, counts)
        token_of_row = choice_of_row // self.sizes.num_topk
        rows = Dispatch.apply(x, token_of_row, row_of_choice)
        weight_of_row = Dispatch.apply(weights.view(-1, 1), choice_of_row, row_of_choice.view(-1, 1))
        # The weights meet the rows where rows are narrowest; the sum that follows is linear.
        inner = functional.silu(rows.view(len(counts), -1, x.shape[1]) @ self.up)
        rows = (inner * weight_of_row.view(len(counts), -1, 1)) @ self.down
        return self.shared(x) + Combine.apply(rows.flatten(0, 1), token_of_row, row_of_choice)

    def _places(self, chosen: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return choice_of_row [E * C] (T * K where there is none) and row_of_choice [T, K] for ``chosen`` [T, K].

        The last of an expert's C rows is always empty; expert 0's is where choices beyond the capacity go.
        """
        T, K = chosen.shape
        capacity = min(int(counts.max()), math.ceil(CAPACITY_FACTOR * T * K / len(counts)))
        C = capacity + 1
        expert, order = chosen.flatten().sort(stable=True)
        slot = torch.arange(T * K) - (counts.cumsum(0) - counts)[expert]
        row = torch.where(slot < capacity, expert * C + slot, capacity)
        choice_of_row = torch.full((len(counts) * C,), T * K).index_copy(0, row, order)
        choice_of_row[capacity] = T * K
        return choice_of_row, torch.empty_like(row).index_copy(0, order, row).view(T, K)


def _mlp(hidden: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, width, bias=False), nn.SiLU(), nn.Linear(width, hidden, bias=False))


class Block(nn.Module):
    """Attention, then a dense layer or experts."""

    def __init__(self, sizes: Sizes, *, dense: bool) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.norm_attention = nn.RMSNorm(sizes.hidden)
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=False)
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.norm_layer = nn.RMSNorm(sizes.hidden)
        self.layer = _mlp(sizes.hidden, 4 * sizes.hidden) if dense else Experts(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, context, H] to the same shape."""
        batch, context, hidden = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, context, hidden))
        return x + self.layer(self.norm_layer(x).view(-1, hidden)).view_as(x)


class Model(nn.Module):
    """A byte-level language model."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, sizes.hidden)
        self.position = nn.Parameter(0.02 * torch.randn(sizes.context, sizes.hidden))
        self.blocks = nn.Sequential(*(Block(sizes, dense=layer == 0) for layer in range(sizes.num_layers)))
        self.norm = nn.RMSNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, VOCABULARY, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return the mean bits per byte of predicting all but the first of ``text`` int64 [batch, context + 1]."""
        x = self.embedding(text[:, :-1]) + self.position
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / math.log(2)

    def experts(self) -> list[Experts]:
        return [block.layer for block in self.blocks if isinstance(block.layer, Experts)]
