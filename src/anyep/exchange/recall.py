"""A handle from numbers: what every rank announced is all that a dispatch's places depend on.

So a handle can be kept as two tensors, sent elsewhere, and made again, on any buffer with the same experts; and the
order in which a combine adds a token's rows can be chosen after the dispatch. Nothing here exchanges a word.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.errors import Unavailable
from anyep.exchange import ledger
from anyep.exchange.arguments import CPU, check_choice, check_tensor
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.geometry import Geometry, GeometryKey
from anyep.exchange.handle import Handle, SendPlan, check_handle
from anyep.exchange.opening import BODY
from anyep.exchange.outgoing import make_plan
from anyep.transport.base import Words

Counts = NDArray[np.int32]

_ANY_ROWS = 2**31 - 1
_LAYOUTS = ("compact", "expert")


def announced_counts(opened_RW: Words, num_counts: int) -> Counts:
    """Return what every rank told: rows for each rank, then (token, column) pairs of each expert; int32 [R, R + E]."""
    words: Words = np.ascontiguousarray(opened_RW[:, BODY + ledger.COUNTS :])
    counts_RC: Counts = words.view(np.int32)[:, :num_counts].copy()
    return counts_RC


class Grouped(NamedTuple):
    """A handle whose combine (``reduce="column"``) has one sum for each (token, group of ranks)."""

    handle: Handle
    """T * G sums: token by token, group by group"""
    group_order: torch.Tensor
    """int32 [T, min(K, G)]: each token's groups in the order of their last columns, -1 behind the last"""


class Handles:
    """What can be done with the handles of a buffer by one rank alone. On one host, on CPU tensors."""

    def __init__(self, end: Endpoint, identity: object, check_open: Callable[[], None]) -> None:
        self._end = end
        self._identity = identity
        self._check_open = check_open

    def recall(
        self, topk_idx: torch.Tensor, announced: torch.Tensor, *, layout: str = "compact", expert_alignment: int = 1
    ) -> Handle:
        """Return the handle that a dispatch of ``topk_idx`` [T, K] left, on this buffer or one with the same experts.

        ``announced`` int32 [R, R + E]: ``Handle.announced`` of that dispatch, or of one with the same ``topk_idx`` on
        every rank. Raises TypeError and ValueError.
        """
        end = self._here("recall")
        check_choice("layout", layout, _LAYOUTS)
        dtypes, shape = (torch.int64, torch.int32), (None, end.num_topk)
        idx = check_tensor("topk_idx", topk_idx, dtypes=dtypes, shape=shape, legend="[T, num_topk]")
        counts_RC = _check_counts(end, announced)
        plan = make_plan(end, idx, _geometry(end, layout, idx.itemsize, expert_alignment))
        own = np.concatenate([plan.numbers("rank_rows"), plan.numbers("expert_rows")])
        if not plan.geometry.by_expert and not (own == counts_RC[end.rank]).all():
            raise ValueError("topk_idx does not belong to these counts: this rank announced others in that dispatch")
        _settle(end, plan, counts_RC)
        num_rows = int(plan.numbers("batch_rows")[end.rank])
        return Handle(
            buffer=self._identity,
            epoch=number_of(counts_RC),
            layout=layout,
            send=plan,
            num_rows=num_rows,
            shape=(num_rows,),
            counts=plan.numbers("counts").tolist(),
            topk_weights=None,
            announced=counts_RC,
        )

    def adopt(self, handle: Handle) -> Handle:
        """Return a compact handle of another buffer with the same experts as one of this.

        Its wire sums by column, as raw ones do: then handles go under the numbers that :meth:`recall` gives them.
        """
        self._check_open()
        if handle.buffer is self._identity:
            return handle
        self._here("adopt")
        assert handle.announced is not None, "only wires with sums by column keep what was announced"
        return replace(handle, buffer=self._identity)

    def by_group(self, handle: Handle, ranks_per_group: int) -> Grouped:
        """Return a compact handle of a raw wire whose combine sums per (token, group of so many consecutive ranks).

        ``combine(..., reduce="column")`` then returns [T * G, H].
        """
        return _summed_by_group(self._here("by_group"), check_handle(handle, self._identity), ranks_per_group)

    def _here(self, what: str) -> Endpoint:
        """Return the endpoint. Raises ClosedError, and Unavailable where ranks live on several hosts."""
        self._check_open()
        if self._end.where is not CPU:
            raise Unavailable(f"{what} works on CPU tensors, and this buffer's lie on {self._end.where}")
        if self._end.across is not None:
            raise Unavailable(f"{what} needs all ranks on one host, and this buffer's live on several")
        return self._end


def _check_counts(end: Endpoint, announced: object) -> Counts:
    shape = (end.num_ranks, end.num_counts)
    legend = "[R, R + num_experts]"
    counts_RC: Counts = check_tensor("announced", announced, dtypes=(torch.int32,), shape=shape, legend=legend).numpy()
    return counts_RC


def number_of(counts_RC: Counts) -> int:
    """Return the number under which a handle goes that can be made again: the same on all ranks."""
    return zlib.crc32(counts_RC.data) & _ANY_ROWS


def _geometry(end: Endpoint, layout: str, idx_bytes: int, alignment: int) -> Geometry:
    if layout == "compact":
        return end.geometry(layout, idx_bytes, False)
    return Geometry(
        GeometryKey(layout, idx_bytes, False),
        end.placement,
        end.rank,
        end.wire,
        num_topk=end.num_topk,
        max_tokens=end.max_tokens,
        alignment=alignment,
        static_rows=None,
        source_tokens=end.source_tokens,
        slots=end.slots,
        rule=end.rule,
    )


def _settle(end: Endpoint, plan: SendPlan, counts_RC: Counts) -> None:
    """Fill the plan's ledger as a dispatch does, from messages that every rank might have sent."""
    shape, num_counts = plan.geometry.shape, counts_RC.shape[1]
    opened_RW: Words = np.zeros((end.num_ranks, end.lanes.open.words), np.int64)
    opened_RW[:, BODY + ledger.CAPACITY] = _ANY_ROWS
    opened_RW.view(np.int32)[:, 2 * (BODY + ledger.COUNTS) :][:, :num_counts] = counts_RC
    found = end.books.settle(
        opened_RW,
        BODY,
        shape.dims,
        shape.offsets,
        end.tables.rank_addr,
        end.tables.local_addr,
        plan.first_addr,
        np.zeros(end.num_ranks, np.int64),
        np.zeros(shape.num_local, np.int64),
    )
    assert found == ledger.SETTLED, "nothing limits the rows of a recalled dispatch"


def _summed_by_group(end: Endpoint, handle: Handle, ranks_per_group: int) -> Grouped:
    """Return a compact handle with one sum for each (token, group of consecutive ranks), in the order of columns."""
    plan, topk = handle.send, end.num_topk
    assert plan.by_column, "only raw wires sum in the order of columns"
    num_groups = -(-end.num_ranks // ranks_per_group)
    width = min(topk, ranks_per_group)
    num_entries, order_width = plan.num_tokens * num_groups * width, min(topk, num_groups)
    memory = np.empty(3 * num_entries + plan.num_tokens * order_width, np.int32)
    first: int = memory.__array_interface__["data"][0]
    end.books.order_by_column(
        plan.idx_addr,
        plan.idx_bytes,
        plan.num_tokens,
        topk,
        end.tables.rank_addr,
        plan.width,
        plan.entry_rank_addr,
        plan.entry_slot_addr,
        ranks_per_group,
        num_groups,
        width,
        first,
        first + 4 * num_entries,
        order_width,
        first + 12 * num_entries,
    )
    grouped = plan.with_entries(memory, first, num_tokens=plan.num_tokens * num_groups, width=width)
    order = torch.from_numpy(memory[3 * num_entries :]).view(plan.num_tokens, order_width)
    epoch = zlib.crc32(b"%d" % ranks_per_group, handle.epoch) & _ANY_ROWS
    return Grouped(replace(handle, epoch=epoch, send=grouped), order)
