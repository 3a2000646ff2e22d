"""The gate of a layer: scores, choice and weights of experts, and the bias that keeps their load even.

Legend: T tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from anyep.exchange.arguments import check_choice, check_integer, shape_text
from anyep.nn import replay, routing


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """What a router says of T tokens."""

    topk_idx: torch.Tensor
    """[T, K] int64"""
    topk_weights: torch.Tensor
    """[T, K] fp32; gradients pass to the gate"""
    scores: torch.Tensor
    """[T, E] fp32, of all experts and without bias; for balance losses"""


class Router(torch.nn.Module):
    """Chooses K of E experts for each token, alike on all ranks whose weights are alike.

    ``scoring``: "softmax" or "sigmoid". ``n_group``, ``topk_group``: experts are in n_group groups, of which a token
    uses topk_group (section 2.1.2 of DeepSeek-V3, nn/routing.py has the formulas). ``norm_topk_prob``: a token's
    weights sum to ``routed_scaling_factor``; otherwise they are its scores times that. The gate, ``weight`` [E, H],
    is applied in fp32 whatever autocast says, for a choice is not continuous.

    ``bias`` fp32 [E], a buffer, is zero until :meth:`update_bias` moves it; ``load`` int64 [E] counts what was chosen
    in training since then. Raises TypeError and ValueError for sizes that do not go together.
    """

    bias: torch.Tensor
    load: torch.Tensor

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        num_topk: int,
        *,
        scoring: str = "softmax",
        n_group: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        check_integer("hidden", hidden, at_least=1)
        check_integer("num_experts", num_experts, at_least=1)
        check_integer("num_topk", num_topk, at_least=1, at_most=num_experts)
        self.hidden, self.num_experts, self.num_topk = hidden, num_experts, num_topk
        self.scoring = check_choice("scoring", scoring, routing.SCORINGS)
        self.n_group = check_integer("n_group", n_group, at_least=1)
        self.topk_group = check_integer("topk_group", topk_group, at_least=1, at_most=n_group)
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.best_per_group = 2 if scoring == "sigmoid" else 1
        self._check_groups()
        self.weight = torch.nn.Parameter(torch.empty(num_experts, hidden))
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def _check_groups(self) -> None:
        if self.n_group == 1:
            return
        size, rest = divmod(self.num_experts, self.n_group)
        if rest:
            raise ValueError(f"n_group={self.n_group} must divide num_experts={self.num_experts}")
        if size < self.best_per_group:
            raise ValueError(
                f"with scoring='sigmoid' a group is judged by its two best experts, but n_group={self.n_group} leaves "
                f"{size} of num_experts={self.num_experts} in each; use fewer groups"
            )
        if self.topk_group * size < self.num_topk:
            raise ValueError(
                f"num_topk={self.num_topk} experts cannot come from topk_group={self.topk_group} groups of {size}; "
                "raise topk_group or use fewer groups"
            )

    def reset_parameters(self) -> None:
        """Fill the gate as torch.nn.Linear does: uniform in +-1 / sqrt(H)."""
        bound = 1 / math.sqrt(self.hidden)
        torch.nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> Routing:
        """Route ``x`` [T, H]. ValueError for another shape."""
        if x.dim() != 2 or x.shape[1] != self.hidden:
            raise ValueError(f"x must have shape [T, hidden] = [any, {self.hidden}], got {shape_text(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            scores = routing.score(functional.linear(x.float(), self.weight.float()), self.scoring)
        topk_idx = routing.choose(
            scores,
            self.num_topk,
            bias_E=self.bias,
            num_groups=self.n_group,
            groups_per_token=self.topk_group,
            best_per_group=self.best_per_group,
        )
        if self.training and not replay.replaying():
            self.load += routing.count_load(topk_idx, self.num_experts)
        weights = routing.weigh(
            scores,
            topk_idx,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
        )
        return Routing(topk_idx=topk_idx, topk_weights=weights, scores=scores)

    @torch.no_grad()
    def update_bias(self, rate: float = 1e-3, over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """Move the bias against the load since the last update, at the end of a training step.

        ``over_ranks`` sums an int64 tensor over ranks, as :class:`anyep.nn.RankSum` does (the call is then collective);
        without it this rank's load counts alone, which is right for one rank only.
        """
        load = self.load.clone() if over_ranks is None else over_ranks(self.load)
        self.bias.copy_(routing.moved_bias(self.bias, load, rate))
        self.load.zero_()

    def extra_repr(self) -> str:
        groups = f", {self.topk_group} of {self.n_group} groups" if self.n_group > 1 else ""
        return f"{self.num_topk} of {self.num_experts} experts by {self.scoring}{groups}"
