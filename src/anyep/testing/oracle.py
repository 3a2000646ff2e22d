"""The whole exchange in one process, slow and obvious: what every rank must receive, and what it must get back.

Legend: T tokens of a rank, H hidden, K top-k, E experts, R ranks, N received rows.

Nothing here is shared with the code it judges, but for rounding and FP8 (:mod:`anyep.numerics`), which have their own
tests. Rows are asked for by number (:data:`RowSource`), so that large exchanges can be judged piece by piece.

>>> exchange = Exchange(
...     routing=[Routing(topk_idx=torch.tensor([[0, 3], [1, 0], [-1, 2]])), Routing(topk_idx=torch.tensor([[3, 3]]))],
...     expert_rank=[0, 0, 1, 1],
... )
>>> there = exchange.arrivals[1]
>>> there.source.tolist(), there.token.tolist(), there.topk_idx.tolist(), there.counts
([0, 0, 1], [0, 2, 0], [[-1, 1], [-1, 0], [1, 1]], [1, 3])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from anyep.numerics.formats import ScaleFormat
from anyep.numerics.fp8 import quantise_fp8

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
RowSource = Callable[[int, torch.Tensor], Rows]
"""(rank, row numbers int64 [n]) -> rows [n, H]; or for FP8 that is quantised already: (rows, scales)."""

SCALE_FORMATS = {"fp32": ScaleFormat.FP32, "pow2": ScaleFormat.POWER_OF_TWO, "ue8m0": ScaleFormat.UE8M0}

PADDING = -1
"""Source and token of a row that nobody sent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """One rank's choice of experts."""

    topk_idx: torch.Tensor
    """[T, K], -1 is none"""
    topk_weights: torch.Tensor | None = None
    """[T, K] fp32"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrivals:
    """The rows that one rank receives, padding included."""

    source: torch.Tensor
    """[N] int64, the rank that sent it"""
    token: torch.Tensor
    """[N] int64, its number there"""
    column: torch.Tensor
    """[N] int64, the top-k column that the row serves; -1 in the compact layout, where it serves several"""
    topk_idx: torch.Tensor
    """[N, K] local expert, or -1; dtype of the input"""
    topk_weights: torch.Tensor | None
    """[N, K] fp32, 0 beside -1"""
    counts: list[int]
    """(token, column) pairs of each local expert"""

    @property
    def num_rows(self) -> int:
        return len(self.source)


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """Every rank's routing, and where the experts live."""

    routing: Sequence[Routing]
    expert_rank: Sequence[int]
    """[E], the rank that owns each expert; a rank numbers its own from 0 in ascending order"""
    layout: str = "compact"
    expert_alignment: int = 1
    static_rows: int | None = None
    block_rows: int = 0
    """padded layout: rows of each expert's block"""

    @property
    def num_ranks(self) -> int:
        return len(self.routing)

    @cached_property
    def arrivals(self) -> list[Arrivals]:
        """What each rank receives. ValueError if a rank needs more than ``static_rows``."""
        receive = {"compact": self._compact, "expert": self._by_expert, "padded": self._by_expert}[self.layout]
        return [self._with_tail(receive(rank)) for rank in range(self.num_ranks)]

    def local_experts(self, rank: int) -> list[int]:
        """Return the experts of ``rank``; the position in the list is the local index."""
        return [expert for expert, owner in enumerate(self.expert_rank) if owner == rank]

    def _compact(self, rank: int) -> Arrivals:
        """Each token once, in the order (source rank, source token)."""
        mine = torch.tensor(self.local_experts(rank), dtype=torch.int64)
        pieces = []
        for source, routing in enumerate(self.routing):
            serves_TK = torch.isin(routing.topk_idx.long(), mine)
            token = serves_TK.any(dim=1).nonzero().flatten()
            column = torch.full_like(token, -1)
            pieces.append(self._piece(rank, source, token, column, serves_TK[token]))
        return self._joined(rank, pieces)

    def _by_expert(self, rank: int) -> Arrivals:
        """One row for each (token, column), grouped by expert and padded, in the order (source rank, token, column)."""
        pieces = []
        for expert in self.local_experts(rank):
            num_rows = 0
            for source, routing in enumerate(self.routing):
                token, column = (routing.topk_idx == expert).nonzero(as_tuple=True)
                serves_NK = torch.zeros(len(token), routing.topk_idx.shape[1], dtype=torch.bool)
                serves_NK[torch.arange(len(token)), column] = True
                pieces.append(self._piece(rank, source, token, column, serves_NK))
                num_rows += len(token)
            pieces.append(self._padding(-num_rows % (self.block_rows or self.expert_alignment)))
            if self.block_rows and not num_rows:
                pieces.append(self._padding(self.block_rows))
        return self._joined(rank, pieces)

    def _piece(
        self, rank: int, source: int, token: torch.Tensor, column: torch.Tensor, serves_NK: torch.Tensor
    ) -> Arrivals:
        routing = self.routing[source]
        local_E = torch.full((len(self.expert_rank) + 1,), -1)
        local_E[self.local_experts(rank)] = torch.arange(len(self.local_experts(rank)))
        idx = routing.topk_idx[token].long()
        local = torch.where(serves_NK, local_E[idx], -1).to(routing.topk_idx.dtype)
        weights = None
        if routing.topk_weights is not None:
            weights = torch.where(serves_NK, routing.topk_weights[token], 0.0)
        return Arrivals(
            source=torch.full_like(token, source),
            token=token,
            column=column,
            topk_idx=local,
            topk_weights=weights,
            counts=[],
        )

    def _padding(self, num_rows: int) -> Arrivals:
        like = self.routing[0]
        nobody = torch.full((num_rows,), PADDING, dtype=torch.int64)
        num_topk = like.topk_idx.shape[1]
        return Arrivals(
            source=nobody,
            token=nobody,
            column=nobody,
            topk_idx=torch.full((num_rows, num_topk), -1, dtype=like.topk_idx.dtype),
            topk_weights=None if like.topk_weights is None else torch.zeros(num_rows, num_topk),
            counts=[],
        )

    def _joined(self, rank: int, pieces: list[Arrivals]) -> Arrivals:
        pieces = [self._padding(0), *pieces]
        weights = [piece.topk_weights for piece in pieces if piece.topk_weights is not None]
        return Arrivals(
            source=torch.cat([piece.source for piece in pieces]),
            token=torch.cat([piece.token for piece in pieces]),
            column=torch.cat([piece.column for piece in pieces]),
            topk_idx=torch.cat([piece.topk_idx for piece in pieces]),
            topk_weights=torch.cat(weights) if weights else None,
            counts=[
                sum(int((routing.topk_idx == expert).sum()) for routing in self.routing)
                for expert in self.local_experts(rank)
            ],
        )

    def _with_tail(self, arrivals: Arrivals) -> Arrivals:
        if self.static_rows is None:
            return arrivals
        if arrivals.num_rows > self.static_rows:
            raise ValueError(f"{arrivals.num_rows} rows arrive and static_rows is {self.static_rows}")
        tail = self._padding(self.static_rows - arrivals.num_rows)
        return replace(self._joined(0, [arrivals, tail]), counts=arrivals.counts)


def expected_rows(arrivals: Arrivals, sent: RowSource, *, wire: str, scales: str = "fp32", rows: slice) -> Rows:
    """Return what must lie in rows ``rows`` of a received batch: x, or for the wire ``"fp8"`` (x, scales).

    ``sent`` gives the rows that a rank sent; it must know at least one row. Padding is zeros.
    """
    source, token = arrivals.source[rows], arrivals.token[rows]
    template = _on_wire(sent(0, torch.zeros(0, dtype=torch.int64)), wire, scales)
    out = tuple(torch.zeros(len(source), part.shape[1], dtype=part.dtype) for part in template)
    for rank in range(int(source.max()) + 1 if len(source) else 0):
        here = (source == rank).nonzero().flatten()
        for target, part in zip(out, _on_wire(sent(rank, token[here]), wire, scales), strict=True):
            as_bytes(target)[here] = as_bytes(part)
    return out[0] if len(out) == 1 else (out[0], out[1])


def _on_wire(rows: Rows, wire: str, scales: str) -> tuple[torch.Tensor, ...]:
    if isinstance(rows, tuple):
        return rows
    if wire != "fp8":
        return (rows,)
    return quantise_fp8(rows, SCALE_FORMATS[scales])


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a 2-D tensor's bytes, uint8 [rows, row bytes]: the view in which equal means bit for bit."""
    return tensor.view(torch.uint8)
