"""Random exchanges: sizes, inputs and options drawn as the property tests need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from hypothesis import strategies as st

from anyep.layout.placement import even_placement
from anyep.testing.oracle import Exchange, Routing

LAYOUTS = ("compact", "expert", "padded")
EAGER_BYTES = (None, 0, 700, 5000, 1 << 20)
"""Measured, never, rows of some pairs, rows of more pairs, all that a slot can hold."""
WIRES = ("bf16", "fp16", "fp32", "fp8")
INPUT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One exchange of R ranks; inputs are a function of ``seed``."""

    num_tokens: tuple[int, ...]
    hidden: int
    num_topk: int
    num_experts: int
    wire: str
    scales: str
    layout: str
    alignment: int
    idx_dtype: torch.dtype
    with_weights: bool
    num_bias: int
    reduce: str
    skew: float
    placement: tuple[int, ...] | None
    spare_rows: int | None
    num_threads: int
    seed: int
    eager_bytes: int | None = None
    max_tokens: int | None = None
    """Tmax of the buffer; None: as many as the largest batch has"""
    absent: tuple[int, ...] = ()
    """ranks that take no part: they have no tokens, and nobody names their experts"""

    @property
    def most_tokens(self) -> int:
        return max(self.num_tokens) if self.max_tokens is None else self.max_tokens

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @cached_property
    def batches(self) -> list[Batch]:
        """Every rank's batch."""
        return [self._batch(rank) for rank in range(self.num_ranks)]

    @cached_property
    def exchange(self) -> Exchange:
        """The oracle's view of the case."""
        return self._exchange(self.static_rows)

    @property
    def block_rows(self) -> int:
        """Rows of an expert's block in the padded layout."""
        return self.num_ranks * self.most_tokens if self.layout == "padded" else 0

    @cached_property
    def static_rows(self) -> int | None:
        """A number of rows that just fits, and the spare ones."""
        if self.spare_rows is None or self.layout == "padded":
            return None
        return max(there.num_rows for there in self._exchange(None).arrivals) + self.spare_rows

    def _exchange(self, static_rows: int | None) -> Exchange:
        return Exchange(
            routing=[Routing(topk_idx=batch.topk_idx, topk_weights=batch.topk_weights) for batch in self.batches],
            expert_rank=self._expert_rank(),
            layout=self.layout,
            expert_alignment=self.alignment,
            static_rows=static_rows,
            block_rows=self.block_rows,
        )

    def _expert_rank(self) -> Sequence[int]:
        return self.placement or even_placement(self.num_experts, self.num_ranks).expert_rank_E.tolist()

    def _batch(self, rank: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1009 + rank)
        tokens = self.num_tokens[rank]
        x = torch.randn(tokens, self.hidden, generator=generator) * 10 ** torch.randn(tokens, 1, generator=generator)
        draw = torch.rand(tokens, self.num_topk, generator=generator) ** self.skew
        idx = (draw * (self.num_experts + 1)).long().clamp(max=self.num_experts) - 1
        if self.layout == "padded":
            idx = _without_duplicates(idx)
        if self.absent:
            owner = torch.tensor([*self._expert_rank(), -1])[idx]
            idx = idx.masked_fill(torch.isin(owner, torch.tensor(self.absent)), -1)
        weights = torch.rand(tokens, self.num_topk, generator=generator)
        dtype = INPUT_DTYPES[self.wire]
        bias = tuple(torch.randn(tokens, self.hidden, generator=generator).to(dtype) for _ in range(self.num_bias))
        return Batch(
            x=x.to(dtype),
            topk_idx=idx.to(self.idx_dtype),
            topk_weights=weights if self.with_weights else None,
            bias=bias,
        )


def _without_duplicates(idx: torch.Tensor) -> torch.Tensor:
    """Name each expert of a token once: a block of the padded layout holds no more."""
    for column in range(1, idx.shape[1]):
        known = (idx[:, :column] == idx[:, column : column + 1]).any(dim=1)
        idx[known, column] = -1
    return idx


@dataclass(frozen=True, kw_only=True)
class Batch:
    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    bias: tuple[torch.Tensor, ...]


NUMBERS = 1 << 22
"""That an exchange moves in all, or its blocks could hold: a few MiB are as instructive as the most, 1.4 GiB a rank."""


@st.composite
def cases(
    draw: st.DrawFn,
    layouts: Sequence[str] = LAYOUTS,
    wires: Sequence[str] = WIRES,
    numbers: int | None = NUMBERS,
    ranks: st.SearchStrategy[int] | None = None,
) -> Case:
    """Draw a case; R 1 to 9 unless ``ranks`` says otherwise, T 0 to 300, H 1 to 1030, K 1 to 17, E 1 to 128.

    There are fewer tokens where more than ``numbers`` numbers would move.
    """
    num_ranks = draw(st.integers(1, 9) if ranks is None else ranks)
    num_experts = draw(st.integers(1, 128))
    layout = draw(st.sampled_from(layouts))
    wire = draw(st.sampled_from(wires))
    mapped = st.lists(st.integers(0, num_ranks - 1), min_size=num_experts, max_size=num_experts).map(tuple)
    largest = draw(st.sampled_from([0, 3, 20, 300]))
    num_topk = draw(st.integers(1, 17))
    hidden = draw(st.one_of(st.integers(1, 1030), st.sampled_from([1, 64, 127, 128, 129, 256, 1024])))
    if numbers is not None:
        copies = num_experts if layout == "padded" else num_topk
        largest = min(largest, numbers // (num_ranks * copies * hidden))
    return Case(
        num_tokens=tuple(draw(st.lists(st.integers(0, largest), min_size=num_ranks, max_size=num_ranks))),
        hidden=hidden,
        num_topk=num_topk,
        num_experts=num_experts,
        wire=wire,
        scales=draw(st.sampled_from(["fp32", "pow2", "ue8m0"])) if wire == "fp8" else "fp32",
        layout=layout,
        alignment=draw(st.sampled_from([1, 1, 4, 7, 128])),
        idx_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        with_weights=draw(st.booleans()),
        num_bias=draw(st.integers(0, 2)),
        reduce="rank" if layout == "compact" else draw(st.sampled_from(["rank", "expert"])),
        skew=draw(st.sampled_from([1.0, 1.0, 3.0, 20.0])),
        placement=draw(st.one_of(st.none(), mapped)),
        spare_rows=draw(st.one_of(st.none(), st.integers(0, 40))),
        num_threads=draw(st.sampled_from([1, 1, 3])),
        seed=draw(st.integers(0, 10_000)),
        eager_bytes=draw(st.sampled_from(EAGER_BYTES)),
    )
