"""Sizes and offsets of one kind of dispatch (layout, index width, weights or not), worked out once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from anyep.exchange.eager import EagerRule, EagerSlots
from anyep.exchange.ledger import LedgerShape
from anyep.exchange.opening import LAYOUT_CODES, Kind, make_header
from anyep.exchange.wire import Wire
from anyep.layout.placement import Placement
from anyep.layout.regions import RowBytes, hit_probability

if TYPE_CHECKING:
    from anyep.exchange.desk import Desk
    from anyep.exchange.frame import Frame
    from anyep.exchange.receive import Landing

PADDED = "padded"
BY_EXPERT = ("expert", PADDED)
"""Layouts with a row for each (token, column)."""
_ROUNDING = 31


class GeometryKey(NamedTuple):
    """What the sizes of a row depend on within one buffer."""

    layout: str
    idx_bytes: int
    has_weights: bool


class PlanShape(NamedTuple):
    """What a plan of T tokens takes, and where each of its parts begins, in bytes (exchange/handle.py: SendPlan)."""

    num_words: int
    """int32, with the ledger that comes first"""
    idx_bytes: int
    """of all of topk_idx"""
    compact_rank: int
    compact_slot: int
    entry_rank: int
    entry_slot: int
    entry_row: int


class Geometry:
    """Everything about a kind of dispatch that does not depend on its tokens."""

    def __init__(
        self,
        key: GeometryKey,
        placement: Placement,
        rank: int,
        wire: Wire,
        *,
        num_topk: int,
        max_tokens: int,
        alignment: int,
        static_rows: int | None,
        source_tokens: bool,
        slots: EagerSlots,
        rule: EagerRule,
    ) -> None:
        self.key = key
        self.num_topk = num_topk
        self.dtype = wire.dtype
        self.hidden = wire.hidden
        self.scale_columns = wire.scale_columns
        self.scale_dtype = wire.scale_dtype
        self.idx_dtype = torch.int64 if key.idx_bytes == 8 else torch.int32
        self.by_expert = key.layout in BY_EXPERT
        self.padded = key.layout == PADDED
        idx, weights = num_topk * key.idx_bytes, 4 * num_topk * key.has_weights
        self.row = RowBytes(
            x=wire.row_bytes,
            scales=wire.scale_bytes,
            topk_idx=0 if self.padded else idx,
            topk_weights=0 if self.padded else weights,
            token=4 if self.padded or source_tokens else 0,
            y=0,
        )
        """a row of the batch"""
        self.eager_row = RowBytes(
            x=self.row.x,
            scales=self.row.scales,
            topk_idx=idx,
            topk_weights=self.row.topk_weights,
            token=self.row.token,
            y=0,
        )
        """a row on its way in an eager slot: always with its columns, from which the receiver makes its rows"""
        self.shape = LedgerShape(
            placement,
            rank,
            by_expert=self.by_expert,
            alignment=1 if self.padded else alignment,
            block_rows=placement.num_ranks * max_tokens if self.padded else 0,
            static_rows=-1 if static_rows is None or self.padded else static_rows,
        )
        agreed = {
            "layout": LAYOUT_CODES[key.layout],
            "idx_bytes": key.idx_bytes,
            "has_weights": int(key.has_weights),
            "row_bytes": self.row.x,
            "scale_bytes": self.row.scales,
            "num_topk": num_topk,
            "block_rows": self.shape.block_rows,
            "static_rows": self.shape.static_rows,
        }
        self.header = make_header(kind=Kind.DISPATCH, **agreed)
        self.cached_header = make_header(kind=Kind.CACHED_DISPATCH, **agreed)
        self.slot_rows = slots.capacity(self.eager_row.sent)
        """rows that an eager slot holds"""
        self.limit_rows = rule.limit_rows(self.eager_row.sent, self.slot_rows)
        """rows up to which a pair's come along"""
        self.sent_bytes = self.row.sent
        self.part_sizes = self.row.parts()
        self.part_bytes = np.array(self.part_sizes, np.int64)
        """the same, as compiled bookkeeping reads it"""
        self.slot_offsets = np.array(slots.offsets(self.eager_row), np.int64)
        """where each part of the rows begins in an eager slot"""
        self.compact_width = min(num_topk, placement.num_ranks)
        """entries a token that name each rank once"""
        self.width = num_topk if self.by_expert else self.compact_width
        """entries a token"""
        self._plan_shapes: dict[int, PlanShape] = {}
        self._placement = placement
        self._last_rows: int | None = None
        self.frames: dict[tuple[Desk, bool] | tuple[Desk, int, int], Frame] = {}
        """of dispatches by desk, with a handle or without; of combines by desk and slots (rows, where weights begin):
        desks of a buffer that has adopted a handle, too"""
        self.spare_landings: list[Landing] = []
        """offered before, and not needed then: nobody has written there"""

    def plan_shape(self, num_tokens: int) -> PlanShape:
        """Return how a plan of so many tokens lies in memory, worked out once."""
        known = self._plan_shapes.get(num_tokens)
        if known is None:
            idx_bytes = num_tokens * self.num_topk * self.key.idx_bytes
            compact_rank = 4 * self.shape.num_words + idx_bytes
            compact, entries = 4 * num_tokens * self.compact_width, 4 * num_tokens * self.width
            first = compact_rank + 2 * compact * self.by_expert
            known = self._plan_shapes[num_tokens] = PlanShape(
                num_words=(first + 3 * entries) // 4,
                idx_bytes=idx_bytes,
                compact_rank=compact_rank,
                compact_slot=compact_rank + compact,
                entry_rank=first,
                entry_slot=first + entries,
                entry_row=first + 2 * entries,
            )
        return known

    def expected_rows(self, num_tokens: int) -> int:
        """Return how many rows to prepare memory for before the counts are known.

        The first time as if all ranks had ``num_tokens`` and experts were equally likely; then an eighth more than
        last time, rounded, so that the next batch often fits where the last but one was. Too few cost a message more,
        too many little: of a large batch the rest goes back at once, of a small one with the batch.
        """
        if self.padded:
            return self.shape.num_local * self.shape.block_rows
        if self.shape.static_rows >= 0:
            return self.shape.static_rows
        if self._last_rows is None:
            experts, local = self._placement.num_experts, self.shape.num_local
            reach = hit_probability(experts, local, self.num_topk)
            if self.by_expert:
                reach = self.num_topk * local / experts
            self._last_rows = math.ceil(reach * num_tokens * self._placement.num_ranks)
        return (self._last_rows + self._last_rows // 8 + 8 + _ROUNDING) & ~_ROUNDING

    def note_rows(self, num_rows: int) -> None:
        """Remember a batch's size."""
        self._last_rows = num_rows
