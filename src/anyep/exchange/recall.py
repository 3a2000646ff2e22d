"""A handle from numbers: what every rank announced is all that a dispatch's places depend on.

So a handle can be kept as two tensors, sent elsewhere, and made again, on any buffer with the same experts; and the
order in which a combine adds a token's rows can be chosen after the dispatch. On one host nothing here exchanges a
word; on several, forwarders have to be told what to stand in for (exchange/asking.py).
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
from anyep.layout.hosts import HostMap
from anyep.machine.addresses import address_of
from anyep.transport.base import Words

Counts = NDArray[np.int32]

_ANY_ROWS = 2**31 - 1
LAYOUTS = ("compact", "expert")


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
    """What can be done with the handles of a buffer besides its operations. On CPU tensors, and a part on a device's.

    ``ask``: collective, a handle from topk_idx (exchange/asking.py).
    """

    def __init__(
        self, end: Endpoint, identity: object, check_open: Callable[[], None], ask: Callable[..., Handle]
    ) -> None:
        self._end = end
        self._identity = identity
        self._check_open = check_open
        self._ask = ask

    def ask(self, topk_idx: torch.Tensor, *, layout: str = "compact", expert_alignment: int = 1) -> Handle:
        """Return a handle for rows that go the way of ``topk_idx`` [T, K], of any layout. Collective.

        All ranks tell each other, by a dispatch whose rows nobody reads. Errors are those of a dispatch.
        """
        self._here("ask")
        return self._ask(self._end, topk_idx, layout=layout, expert_alignment=expert_alignment)

    def recall(
        self, topk_idx: torch.Tensor, announced: torch.Tensor, *, layout: str = "compact", expert_alignment: int = 1
    ) -> Handle:
        """Return the handle that a dispatch of ``topk_idx`` [T, K] left, on this buffer or one with the same experts.

        ``announced`` int32 [R, R + E]: ``Handle.announced`` of that dispatch, or of one with the same ``topk_idx`` on
        every rank. Raises TypeError and ValueError.

        Where ranks live on several hosts all of them recall together, as forwarders have to learn again for whom they
        forward, and use what they recalled together: it does not go with the dispatch's own handle there.
        """
        end = self._here("recall")
        check_choice("layout", layout, LAYOUTS)
        dtypes, shape = (torch.int64, torch.int32), (None, end.num_topk)
        idx = check_tensor("topk_idx", topk_idx, dtypes=dtypes, shape=shape, legend="[T, num_topk]")
        counts_RC: Counts = check_counts(end, announced).numpy()
        if end.across is not None:
            return self._recall_together(idx, counts_RC, layout, expert_alignment)
        plan = make_plan(end, idx, geometry_for(end, layout, idx.itemsize, expert_alignment))
        own = np.concatenate([plan.numbers("rank_rows"), plan.numbers("expert_rows")])
        check_own_counts(plan, own, counts_RC[end.rank])
        _settle(end, plan, counts_RC)
        num_rows = int(plan.numbers("batch_rows")[end.rank])
        return handle_from_counts(self._identity, layout, plan, num_rows, counts_RC, announced=counts_RC)

    def _recall_together(self, idx: torch.Tensor, counts_RC: Counts, layout: str, expert_alignment: int) -> Handle:
        handle = self._ask(self._end, idx, layout=layout, expert_alignment=expert_alignment)
        assert handle.announced is not None, "rows that are asked for keep what was announced"
        if layout == "compact" and not (handle.announced == counts_RC).all():
            raise ValueError("topk_idx does not belong to these counts: ranks announced others in that dispatch")
        return handle

    def adopt(self, handle: Handle) -> Handle:
        """Return a compact handle of another buffer with the same experts as one of this.

        Its wire sums by column, as raw ones do: then handles go under the numbers that :meth:`recall` gives them.
        Raises ValueError where the ranks of the two live on other hosts.
        """
        self._check_open()
        if handle.buffer is self._identity:
            return handle
        return adopted(self._here("adopt"), handle, self._identity)

    def by_group(self, handle: Handle, ranks_per_group: int) -> Grouped:
        """Return a compact handle of a raw wire whose combine sums per (token, group of so many consecutive ranks).

        ``combine(..., reduce="column")`` then returns [T * G, H].
        """
        end = self._here("by_group")
        if end.across is not None:
            raise Unavailable(
                "by_group sums ranks whose rows can be read here, and this buffer's live on several hosts, which send "
                "their own sums: use combine(reduce='column', group=<ranks a host>)"
            )
        return _summed_by_group(end, check_handle(handle, self._identity), ranks_per_group)

    def _here(self, what: str) -> Endpoint:
        """Return the endpoint. Raises ClosedError, and Unavailable on a device."""
        self._check_open()
        if self._end.where is not CPU:
            raise Unavailable(f"{what} works on CPU tensors, and this buffer's lie on {self._end.where}")
        return self._end


def handles_on(end: Endpoint, identity: object, check_open: Callable[[], None], ask: Callable[..., Handle]) -> Handles:
    """Return what can be done with the handles of an endpoint's kind."""
    from anyep.exchange.device.endpoint import DeviceEndpoint
    from anyep.exchange.device.recall import DeviceHandles, StagedHandles
    from anyep.exchange.device.staged import StagedEndpoint

    if isinstance(end, StagedEndpoint):
        return StagedHandles(end, identity, check_open, ask)
    return (DeviceHandles if isinstance(end, DeviceEndpoint) else Handles)(end, identity, check_open, ask)


def adopted(end: Endpoint, handle: Handle, identity: object) -> Handle:
    """Return a handle under another identity. ValueError where ranks of the two buffers live on other hosts."""
    crossing = handle.send.crossing
    theirs = None if crossing is None else crossing.hosts
    ours = None if end.across is None else end.across.hosts
    if theirs is not ours and (theirs is None or ours is None or theirs.members != ours.members):
        raise ValueError(
            f"this handle's buffer has {_hosts_told(theirs)}, and this one {_hosts_told(ours)}: dispatch on this one"
        )
    assert handle.announced is not None, "only wires with sums by column keep what was announced"
    return replace(handle, buffer=identity)


def _hosts_told(hosts: HostMap | None) -> str:
    return "its ranks on one host" if hosts is None else f"hosts of ranks {list(map(list, hosts.members))}"


def check_counts(end: Endpoint, announced: object) -> torch.Tensor:
    """Return what all ranks announced, int32 [R, R + E], where the buffer's tensors lie. TypeError and ValueError."""
    shape, legend = (end.num_ranks, end.num_counts), "[R, R + num_experts]"
    return check_tensor("announced", announced, dtypes=(torch.int32,), shape=shape, legend=legend, device=end.where)


def check_own_counts(plan: SendPlan, own: Counts, announced: Counts) -> None:
    """Raise ValueError unless topk_idx of a compact plan gives, int32 [R + E], what this rank announced."""
    if not plan.geometry.by_expert and not np.array_equal(own, announced):
        raise ValueError("topk_idx does not belong to these counts: this rank announced others in that dispatch")


def handle_from_counts(
    identity: object, layout: str, plan: SendPlan, num_rows: int, counts_RC: Counts, announced: Counts | None = None
) -> Handle:
    """Return the handle of a settled plan, under the number that its counts give it."""
    return Handle(
        buffer=identity,
        epoch=number_of(counts_RC),
        layout=layout,
        send=plan,
        num_rows=num_rows,
        shape=(num_rows,),
        counts=plan.numbers("counts").tolist(),
        topk_weights=None,
        announced=announced,
    )


def number_of(counts_RC: Counts) -> int:
    """Return the number under which a handle goes that can be made again: the same on all ranks."""
    return zlib.crc32(counts_RC.data) & _ANY_ROWS


def geometry_for(end: Endpoint, layout: str, idx_bytes: int, alignment: int) -> Geometry:
    """Return the sizes of a batch that is recalled."""
    if layout == "compact":
        return end.geometry(layout, idx_bytes, False)
    return end.new_geometry(GeometryKey(layout, idx_bytes, False), end.rank, alignment=alignment, static_rows=None)


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
    first = address_of(memory)
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
