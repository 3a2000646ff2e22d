"""The work that is measured: R virtual ranks on one GPU, their inputs, and their calls from one thread.

Legend: T tokens a rank, H hidden, K top-k, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import anyep


@dataclass(frozen=True, kw_only=True)
class Work:
    """Sizes; ``layout`` and ``wire`` of its dispatches."""

    name: str
    layout: str
    tokens: int
    hidden: int = 7168
    experts: int = 256
    topk: int = 8
    ranks: int = 8
    wire: str = "fp8"

    @property
    def title(self) -> str:
        return f"{self.name} {self.ranks} x {self.tokens}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """One batch a rank: x BF16 [T, H], topk_idx int64 [T, K] distinct, topk_weights fp32 [T, K]."""

    x: list[torch.Tensor]
    topk_idx: list[torch.Tensor]
    topk_weights: list[torch.Tensor]

    @classmethod
    def draw(cls, work: Work, device: torch.device, seed: int = 0) -> Inputs:
        """Draw every token's experts alike and independently."""
        generator = torch.Generator(device=device).manual_seed(seed)
        options = {"generator": generator, "device": device}
        scores = [torch.rand(work.tokens, work.experts, **options) for _ in range(work.ranks)]
        return cls(
            x=[torch.randn(work.tokens, work.hidden, **options).bfloat16() for _ in range(work.ranks)],
            topk_idx=[one.topk(work.topk, dim=1).indices for one in scores],
            topk_weights=[torch.rand(work.tokens, work.topk, **options) for _ in range(work.ranks)],
        )


class Ranks:
    """The buffers of all ranks. Every call begins all ranks' halves before it ends the first."""

    def __init__(self, work: Work, **options: object) -> None:
        def make(member: object) -> anyep.Buffer:
            return anyep.Buffer(
                member,
                hidden=work.hidden,
                num_experts=work.experts,
                num_topk=work.topk,
                max_tokens_per_rank=work.tokens,
                wire=work.wire,
                device="cuda",
                **options,
            )

        self.work = work
        self.buffers = anyep.local_group(work.ranks, timeout_s=600).run(make)

    def dispatch(self, inputs: Inputs) -> list[anyep.Received]:
        return [call.wait() for call in self._begin(inputs)]

    def send(self, inputs: Inputs) -> list[anyep.Pending[anyep.Received]]:
        """Do all first halves, and let the caller's stream go on behind them: a part of a graph of its own."""
        calls = self._begin(inputs)
        for ep in self.buffers:
            device, exchange = ep._end.device, ep._end.stream
            device.follow(device.current_stream(), device.mark(exchange))
        return calls

    def receive(self, calls: Sequence[anyep.Pending[anyep.Received]]) -> list[anyep.Received]:
        """Do all second halves of what was sent, behind what the caller's stream has launched."""
        for ep in self.buffers:
            device, exchange = ep._end.device, ep._end.stream
            device.follow(exchange, device.mark(device.current_stream()))
        return [call.wait() for call in calls]

    def _begin(self, inputs: Inputs) -> list[anyep.Pending[anyep.Received]]:
        batches = zip(self.buffers, inputs.x, inputs.topk_idx, inputs.topk_weights, strict=True)
        return [ep.dispatch(x, idx, w, layout=self.work.layout, wait=False) for ep, x, idx, w in batches]

    def combine(self, outputs: Sequence[torch.Tensor], received: Sequence[anyep.Received]) -> list[torch.Tensor]:
        rows = zip(self.buffers, outputs, received, strict=True)
        calls = [ep.combine(y, one.handle, wait=False) for ep, y, one in rows]
        return [call.wait() for call in calls]

    def close(self) -> None:
        for ep in self.buffers:
            ep.close()
