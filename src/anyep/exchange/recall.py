"""A handle from numbers: what every rank announced is all that a dispatch's places depend on.

So a handle can be kept as two tensors, sent elsewhere, and made again, on any buffer with the same experts; and the
order in which a combine adds a token's rows can be chosen after the dispatch. Nothing here exchanges a word.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.exchange import ledger
from anyep.exchange.arguments import check_choice, check_tensor
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.geometry import Geometry, GeometryKey
from anyep.exchange.handle import Handle, SendPlan
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


def number_of(counts_RC: Counts) -> int:
    """Return the number under which a handle goes that can be made again: the same on all ranks."""
    return zlib.crc32(counts_RC.data) & _ANY_ROWS


def adopted(handle: Handle, buffer: object) -> Handle:
    """Return a handle of any buffer as one of this: its number is that which :func:`recall` gives it already."""
    assert handle.announced is not None, "only wires with sums by column keep what was announced"
    return handle if handle.buffer is buffer else replace(handle, buffer=buffer)


def recall(
    end: Endpoint, buffer: object, topk_idx: object, announced: object, *, layout: object, alignment: int
) -> Handle:
    """Return the handle that a dispatch of ``topk_idx`` left, given all ranks' counts. TypeError and ValueError."""
    check_choice("layout", layout, _LAYOUTS)
    idx = check_tensor(
        "topk_idx", topk_idx, dtypes=(torch.int64, torch.int32), shape=[None, end.num_topk], legend="[T, num_topk]"
    )
    width = end.num_ranks + end.placement.num_experts
    legend = "[R, R + num_experts]"
    counts = check_tensor("announced", announced, dtypes=(torch.int32,), shape=[end.num_ranks, width], legend=legend)
    counts_RC = counts.numpy()
    plan = make_plan(end, idx, _geometry(end, str(layout), idx.itemsize, alignment))
    own = np.concatenate([plan.numbers("rank_rows"), plan.numbers("expert_rows")])
    if not plan.geometry.by_expert and not (own == counts_RC[end.rank]).all():
        raise ValueError("topk_idx does not belong to these counts: this rank announced others in that dispatch")
    _settle(end, plan, counts_RC)
    num_rows = int(plan.numbers("batch_rows")[end.rank])
    return Handle(
        buffer=buffer,
        epoch=number_of(counts_RC),
        layout=str(layout),
        send=plan,
        num_rows=num_rows,
        shape=(num_rows,),
        counts=plan.numbers("counts").tolist(),
        topk_weights=None,
        announced=counts_RC,
    )


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


class Grouped(NamedTuple):
    """A handle whose combine (``reduce="column"``) has one sum for each (token, group of ranks)."""

    handle: Handle
    """T * G sums: token by token, group by group"""
    group_order: torch.Tensor
    """int32 [T, min(K, G)]: each token's groups in the order of their last columns, -1 behind the last"""


def summed_by_group(end: Endpoint, handle: Handle, ranks_per_group: int) -> Grouped:
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
