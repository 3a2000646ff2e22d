"""A handle's fields, made from what its dispatch left when somebody looks at one: most programs never do.

Legend: T tokens, K top-k, E experts, L local experts, R ranks, S scale-up ranks, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.compat.deep_ep.elastic_arguments import Terms
from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.elastic_routes import ROUTING, route_of
from anyep.compat.deep_ep.elastic_sizes import align
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.compat.deep_ep.layout import tensor_on
from anyep.compat.deep_ep.notebook import Bytes, bytes_at
from anyep.compat.deep_ep.underway import Underway
from anyep.exchange.handle import Handle
from anyep.machine.addresses import address_of


class Late:
    """What a dispatch that goes on brings besides its batch; waiting for it is waiting for the dispatch."""

    __slots__ = ("metadata", "underway")

    def __init__(self) -> None:
        self.underway: Underway | None = None
        self.metadata: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """Return the metadata, when the dispatch is over."""
        assert self.underway is not None, "set by who began the dispatch"
        self.underway.wait()
        assert self.metadata is not None
        return self.metadata


class Origin(NamedTuple):
    """What a dispatch left: its own records, which no caller can write to."""

    context: ElasticContext
    terms: Terms
    native: Handle
    columns: tuple[Bytes, int] | None
    """a piece of a notebook, uint8 [N, ceil(K / 8)]: a bit for each column of a row that names a local expert; None
    where the metadata is made already"""
    token: torch.Tensor | None
    """int32 [N]: each row's token at its source"""
    late: Late | None
    """where the dispatch goes on when the handle is made"""

    def make(self, handle: EPHandle, name: str) -> Any:
        """Return a handle's field."""
        value = _MAKERS[name](self)
        if name in ROUTING:
            route_of(handle, self.native).note(name, value)
        return value

    def describe(self) -> torch.Tensor:
        """Return ``recv_src_metadata``."""
        if self.late is not None:
            return self.late.wait()
        assert self.columns is not None
        num_rows, num_topk = self.native.num_rows, self.native.send.geometry.num_topk
        width = (num_topk + 7) // 8
        noted = bytes_at(*self.columns, num_rows * width).reshape(num_rows, width)
        bits_NK = np.unpackbits(noted, axis=1, count=num_topk, bitorder="little")
        return describe_rows(self, bits_NK.astype(np.int32) - 1, None)


new_origin = partial(tuple.__new__, Origin)
"""Makes one of a tuple of all fields; the class's own constructor is a Python function, slow from cold caches."""


def describe_rows(origin: Origin, idx: torch.Tensor | NDArray[np.int32], places: torch.Tensor | None) -> torch.Tensor:
    """Return ``recv_src_metadata``, from what the dispatch knows of the rows; ``idx`` [N, K]: their local experts.

    Int32 or int64, dense; of a compact batch only whether there is one matters.
    """
    context, terms, plan = origin.context, origin.terms, origin.native.send
    assert origin.token is not None, "the variants of these calls bring source tokens"
    num_topk = plan.geometry.num_topk
    rows = origin.native.num_rows if terms.exact else context.num_ranks * terms.num_max_tokens
    metadata = torch.empty((rows, num_topk + 2), dtype=torch.int32, device="cpu")
    cursors = slab_starts(terms, origin.native) if terms.do_expand else None
    context.loops.describe_rows(
        idx.data_ptr() if isinstance(idx, torch.Tensor) else address_of(idx),
        idx.itemsize,
        rows,
        num_topk,
        origin.token.data_ptr(),
        plan.field("pair_rows"),
        context.num_ranks,
        context.number,
        max(1, terms.num_max_tokens),
        0 if places is None else places.data_ptr(),
        0 if cursors is None else address_of(cursors),
        metadata.data_ptr(),
    )
    return metadata


def _counts(origin: Origin) -> NDArray[np.int32]:
    return origin.native.send.numbers("counts")


def _aligned(origin: Origin) -> NDArray[np.int32]:
    counts_L, alignment = _counts(origin), origin.terms.alignment
    return counts_L if alignment == 1 else -(-counts_L // alignment) * alignment


def _aligned_list(origin: Origin) -> list[int]:
    return _aligned(origin).tolist() if origin.terms.exact else []


def expanded_rows(context: ElasticContext, terms: Terms, native: Handle) -> int:
    """Return the rows of an expanded batch: what arrived, or the most that can arrive."""
    if terms.exact:
        counts_L, alignment = native.send.numbers("counts"), terms.alignment
        return int((-(-counts_L // alignment) * alignment).sum())
    return most_expanded_rows(context, terms, native)


def most_expanded_rows(context: ElasticContext, terms: Terms, native: Handle) -> int:
    """Return the rows of an expanded batch that is as large as it can be."""
    num_local = native.send.geometry.shape.num_local
    most, padding = context.num_ranks * terms.num_max_tokens, (terms.alignment - 1) * num_local
    return align(most * min(native.send.geometry.num_topk, num_local) + padding, terms.alignment)


def slab_starts(terms: Terms, native: Handle) -> NDArray[np.int32]:
    """Return int32 [L]: where each expert's rows begin in an expanded batch."""
    counts_L, alignment = native.send.numbers("counts"), terms.alignment
    aligned_L = -(-counts_L // alignment) * alignment
    return np.cumsum(aligned_L, dtype=np.int32) - aligned_L


def _sums_by_source(origin: Origin) -> torch.Tensor:
    rows_R = origin.native.pair_rows[:, origin.context.number]
    by_host_OS = rows_R.reshape(-1, origin.context.num_scaleup)
    return torch.from_numpy(np.cumsum(by_host_OS.sum(0), dtype=np.int32))


def _ends(origin: Origin) -> torch.Tensor:
    if origin.terms.do_expand:
        return torch.from_numpy(slab_starts(origin.terms, origin.native) + _counts(origin))
    return torch.from_numpy(np.cumsum(_aligned(origin), dtype=np.int32))


def _slots(origin: Origin) -> torch.Tensor:
    plan, context, terms = origin.native.send, origin.context, origin.terms
    slots_TK = np.empty((plan.num_tokens, plan.geometry.num_topk), np.int32)
    context.loops.number_slots(
        plan.idx_addr,
        plan.idx_bytes,
        *slots_TK.shape,
        context.num_ranks,
        terms.num_experts // context.num_ranks,
        context.number * terms.num_max_tokens,
        address_of(slots_TK),
    )
    return tensor_on(slots_TK)


def _announced(origin: Origin) -> torch.Tensor:
    announced = origin.native.announced
    assert announced is not None, "wires with sums by column keep what was announced"
    return torch.from_numpy(announced.copy())


SAID: dict[str, Callable[[Any], Any]] = {
    "do_expand": lambda origin: origin.terms.do_expand,
    "num_experts": lambda origin: origin.terms.num_experts,
    "expert_alignment": lambda origin: origin.terms.alignment,
    "num_max_tokens_per_rank": lambda origin: origin.terms.num_max_tokens,
    "num_sms": lambda origin: origin.terms.num_sms,
    "topk_idx": lambda origin: origin.native.topk_idx().clone(),
    "token_metadata_at_forward": lambda _: None,
    "channel_linked_list": lambda _: None,
    "cached_recv_src_metadata_before_sort": lambda _: None,
}
"""Fields that say what the dispatch was given, or nothing; of an origin on the host or on a device."""
_MAKERS: dict[str, Callable[[Origin], Any]] = SAID | {
    "num_expanded_tokens": lambda origin: expanded_rows(origin.context, origin.terms, origin.native),
    "num_recv_tokens_per_expert_list": _aligned_list,
    "psum_num_recv_tokens_per_scaleup_rank": _sums_by_source,
    "psum_num_recv_tokens_per_expert": _ends,
    "num_unaligned_recv_tokens_per_expert": lambda origin: torch.from_numpy(_counts(origin).copy()),
    "recv_src_metadata": lambda origin: origin.describe(),
    "dst_buffer_slot_idx": _slots,
    "announced_counts": _announced,
}
