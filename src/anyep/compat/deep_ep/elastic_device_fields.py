"""A V2 handle's fields on a device, made when somebody looks at one; and what combine reads of them again.

Legend: T tokens, K top-k, N received rows, L local experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from anyep.compat.deep_ep.checks import refuse
from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.elastic_device_rows import (
    aligned_counts,
    describe_rows,
    number_slots,
    slab_begins,
    slab_rows,
)
from anyep.compat.deep_ep.elastic_fields import SAID, most_expanded_rows
from anyep.compat.deep_ep.elastic_landing import DispatchPlan
from anyep.compat.deep_ep.elastic_routes import ROUTING, counts_announced, route_of
from anyep.compat.deep_ep.elastic_rows import places_of
from anyep.compat.deep_ep.elastic_sizes import align
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.known_handles import UNCOUNTED, version_of
from anyep.exchange.device.plan import DeviceCounts, DevicePlan
from anyep.exchange.handle import Handle, Received

_METADATA = "recv_src_metadata"
_BEHIND_ALL = 2**31 - 1


class Places(NamedTuple):
    """Where the columns of received rows stand in a batch; N in the order of the exchange."""

    served: torch.Tensor
    """bool [N, K]: the columns that this rank serves"""
    rows: torch.Tensor
    """int64 [N, K]: the row of the batch that serves each column; of an expanded batch ``num_rows`` where none"""
    num_rows: int
    """of the batch"""
    stays: bool
    """whether the rows of a compact batch stand as the exchange brought them; else they are in column 0 of ``rows``"""


class OriginOnDevice:
    """What a dispatch left on the device, from which a handle's fields are made when they are looked at."""

    def __init__(self, context: ElasticContext, plan: DispatchPlan, received: Received) -> None:
        idx, native = received.topk_idx, received.handle
        assert idx is not None
        self.context = context
        self.native = native
        self.terms = plan.terms
        self.token = received.source_token
        """int32 [N]: each row's token at its source"""
        self.where = idx.device
        self.batch_rows = native.num_rows if plan.terms.exact else context.num_ranks * plan.terms.num_max_tokens
        """of a compact batch"""
        self.order = None if context.keeps_order else places_of(self._pair_rows(), context.num_scaleup).to(self.where)
        """int64 [N]: the row of a compact batch where each row of the exchange stands; None: the same one"""
        num_rows, served = self.batch_rows, idx >= 0
        if self.terms.do_expand:
            num_rows = self.expanded_rows()
            rows = slab_rows(idx, self.counts(), self.terms.alignment, num_rows)
        else:
            rows = _own_rows(self.order, idx)
        self.places = Places(served, rows, num_rows, self.order is None and num_rows == native.num_rows)

    def make(self, handle: EPHandle, name: str) -> Any:
        """Return a handle's field."""
        value = _MAKERS[name](self)
        if name in ROUTING:
            route_of(handle, self.native).note(name, value)
        if name == _METADATA:
            _remember(self.context, handle, value, self.places)
        return value

    def _pair_rows(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        """Return int32 [R]: rows of each source, which the host knows where several hosts take part."""
        return np.ascontiguousarray(self.native.pair_rows[:, self.context.number])

    def counts(self) -> torch.Tensor:
        """Return int32 [L], without waiting for them."""
        counts = self.native.counts
        if isinstance(counts, DeviceCounts):
            return counts.tensor.clone()
        return torch.tensor(list(counts), dtype=torch.int32, device=self.where)

    def aligned_list(self) -> list[int]:
        """Return the rows of each local expert with its padding, and wait for them; none where sizes are bounds."""
        return [align(count, self.terms.alignment) for count in self.native.counts] if self.terms.exact else []

    def expanded_rows(self) -> int:
        """Return the rows of an expanded batch: what arrived, or the most that can arrive."""
        return (
            sum(self.aligned_list()) if self.terms.exact else most_expanded_rows(self.context, self.terms, self.native)
        )

    def ends(self) -> torch.Tensor:
        """Return int32 [L]: where each expert's rows end, in an expanded batch those before the padding."""
        counts, alignment = self.counts(), self.terms.alignment
        if self.terms.do_expand:
            return slab_begins(counts, alignment).int() + counts
        return aligned_counts(counts, alignment).cumsum(0, dtype=torch.int32)

    def recv_rows(self) -> torch.Tensor:
        """Return int32 [R]: rows of each source, without waiting for them; on one host a view."""
        plan = self.native.send
        if not isinstance(plan, DevicePlan):
            return torch.from_numpy(self._pair_rows()).to(self.where)
        first = plan.map.first(plan.map.field("recv_rows"))
        return plan.device_memory[first : first + self.context.num_ranks]

    def sums_by_source(self) -> torch.Tensor:
        """Return int32 [S]: rows of each scale-up rank and those before it."""
        by_host_OS = self.recv_rows().view(-1, self.context.num_scaleup)
        return by_host_OS.sum(0).cumsum(0, dtype=torch.int32)

    def metadata(self) -> torch.Tensor:
        """Return int32 [rows of a compact batch, K + 2]: source token, master column and rows of each."""
        assert self.token is not None, "the variants of these calls bring source tokens"
        most = max(1, self.terms.num_max_tokens)
        told = describe_rows(self.places.rows, self.places.served, self.token, self.recv_rows(), most)
        if self.order is None and len(told) == self.batch_rows:
            return told
        metadata = told.new_full((self.batch_rows, told.shape[1]), -1)
        metadata[: len(told)] = told
        return metadata if self.order is None else metadata.index_copy_(0, self.order, told)

    def slots(self) -> torch.Tensor:
        """Return int32 [T, K]: slots of each rank in token order, at master columns; -1 elsewhere."""
        context, terms = self.context, self.terms
        first_id = context.number * terms.num_max_tokens
        return number_slots(self.native.topk_idx(), terms.num_experts // context.num_ranks, context.num_ranks, first_id)


_MAKERS: dict[str, Callable[[OriginOnDevice], Any]] = SAID | {
    "num_expanded_tokens": OriginOnDevice.expanded_rows,
    "num_recv_tokens_per_expert_list": OriginOnDevice.aligned_list,
    "psum_num_recv_tokens_per_scaleup_rank": OriginOnDevice.sums_by_source,
    "psum_num_recv_tokens_per_expert": OriginOnDevice.ends,
    "num_unaligned_recv_tokens_per_expert": OriginOnDevice.counts,
    _METADATA: OriginOnDevice.metadata,
    "dst_buffer_slot_idx": OriginOnDevice.slots,
    "announced_counts": lambda origin: counts_announced(origin.native, origin.where),
}


def places_of_handle(context: ElasticContext, handle: EPHandle, native: Handle) -> Places:
    """Return where the rows of a handle stand: of its dispatch while nobody looks, then what its metadata says.

    ``native``: the handle below. Metadata that was not looked through before is waited for. RuntimeError where it
    points outside the batch: what it says is an address.
    """
    source, num_rows = handle.source, native.num_rows
    if _METADATA not in handle.fields and isinstance(source, OriginOnDevice) and len(source.places.rows) == num_rows:
        return source.places
    metadata, kind = handle.recv_src_metadata, handle.kind
    sorts = not isinstance(native.send, DevicePlan)
    shape = [num_rows, kind.num_topk + 2]
    if not isinstance(metadata, torch.Tensor) or metadata.dtype != torch.int32 or not _fits(metadata, shape, sorts):
        told = f"{metadata.dtype} {list(metadata.shape)}" if isinstance(metadata, torch.Tensor) else repr(metadata)
        refuse(f"a handle's recv_src_metadata must be an int32 tensor {shape}, got {told}")
    known: Places | None = context.natives.handles.recall(metadata, _version(handle, metadata, num_rows))
    if known is not None:
        return known
    return _remember(context, handle, metadata, _places_from(metadata[:num_rows], handle, sorts=sorts))


def _fits(metadata: torch.Tensor, shape: list[int], sorts: bool) -> bool:
    """Whether metadata has a row for each of the exchange; between hosts, where batches are filled up, or more."""
    return list(metadata.shape) == shape or (
        sorts and metadata.dim() == 2 and metadata.shape[0] > shape[0] and metadata.shape[1] == shape[1]
    )


def _places_from(metadata: torch.Tensor, handle: EPHandle, *, sorts: bool) -> Places:
    """``sorts``: rows may stand by scale-up ranks; tokens' numbers at large ascend in the order of the exchange."""
    num_rows, order = handle.num_rows, None
    if sorts:
        numbers = metadata[:, 0]
        order = torch.where(numbers < 0, _BEHIND_ALL, numbers).argsort(stable=True)
        metadata = metadata[order]
    rows = metadata[:, 2:].long()
    if rows.numel() and int(rows.max()) >= num_rows:
        refuse(f"a handle's recv_src_metadata names rows from {num_rows} on, which the batch does not have")
    served = rows >= 0
    if handle.kind.do_expand:
        return Places(served, torch.where(served, rows, num_rows), num_rows, stays=False)
    if num_rows < len(rows):
        refuse(f"a handle's num_recv_tokens is {num_rows}, but {len(rows)} tokens were received")
    return Places(served, _own_rows(order, rows), num_rows, stays=not sorts)


def _own_rows(order: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """Return int64 [N, K] for a compact batch, in which a row serves all of its columns."""
    if order is None:
        order = torch.arange(len(rows), device=rows.device, dtype=torch.int64)
    return order.unsqueeze(1).expand(rows.shape)


def _version(handle: EPHandle, metadata: torch.Tensor, num_rows: int) -> tuple[int, int, int, bool]:
    """Return what places depend on besides the tensor: how often it was written to (first), and the handle."""
    return version_of(metadata), num_rows, handle.num_rows, handle.kind.do_expand


def _remember(context: ElasticContext, handle: EPHandle, metadata: torch.Tensor, places: Places) -> Places:
    """Know again what a tensor says, if torch counts what is written to it."""
    version = _version(handle, metadata, len(places.rows))
    if version[0] != UNCOUNTED:
        context.natives.handles.note_recalled(metadata, version, places)
    return places
