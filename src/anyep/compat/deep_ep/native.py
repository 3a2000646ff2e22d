"""The AnyEP buffers under a DeepEP buffer: made when the number of experts is known, and what of theirs is under way.

DeepEP's constructor says how many bytes to take and nothing else. Here a first call makes a buffer for its number of
experts, on all ranks, since all make the same calls; everything else (hidden size, dtype, top-k) is a variant of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

import anyep
from anyep.compat.deep_ep.checks import check_device
from anyep.compat.deep_ep.known_handles import KnownHandles
from anyep.compat.deep_ep.layout import Layout, loops
from anyep.compat.deep_ep.underway import Underway
from anyep.exchange.calls import Calls
from anyep.exchange.event import Pending
from anyep.exchange.handle import Handle
from anyep.exchange.wire import Wire

ANY_NUMBER_OF_TOKENS = 2**31 - 1
"""Ranks differ in how many they have, and nothing but slots for small batches depends on it."""
_TIMEOUT_S = 100.0
"""As DeepEP's."""
_IN_FLIGHT = 4
_SLOT_HIDDEN, _SLOT_TOKENS = 1024, 128
"""A pair's small batches take up to so many bytes: 256 KiB, of which R^2 times 8 are committed on a host."""
_DEVICE_SLOT_BYTES = 2 << 20
"""On a GPU low-latency rows leave at once where a rank's fit: 128 tokens of 7168 channels in BF16, 256 in FP8."""
_MOST_LAYOUTS = 4
_MOST_VARIANTS = 64
_MOST_KEYS = 4096
_Value = TypeVar("_Value")


class Served(NamedTuple):
    """What serves the normal calls of a kind."""

    ep: Calls
    num_experts: int
    num_topk: int
    static_rows: int | None


class Kept(Protocol):
    """What a handle tuple, or a tuple of its tensors, stands for."""

    @property
    def served(self) -> Served:
        """How its dispatch was served."""

    @property
    def handle(self) -> Handle:
        """What the dispatch left."""


class KnownLayout(NamedTuple):
    """What was counted here: a dispatch to which the same tensors come need not look at them again."""

    topk_idx: torch.Tensor
    is_token_in_rank: torch.Tensor
    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    counts: NDArray[np.int32] | None
    """the memory of num_tokens_per_rank, which takes a third of torch's time to read; None on a GPU"""
    sizes: tuple[Any, ...]
    """(T, K, E, dtype of topk_idx)"""


def ask_everybody(ep: Calls, topk_idx: torch.Tensor, layout: str) -> Handle:
    """Return a handle for rows that went the way of ``topk_idx``: all ranks tell each other, and nobody reads the rows.

    ``ep`` sends rows of one uint8. What follows is wider, and is forwarded between hosts whatever its size.
    """
    if ep.num_hosts > 1:
        return ep.handles.ask(topk_idx, layout=layout)
    x = torch.zeros((topk_idx.size(0), 1), dtype=torch.uint8, device=topk_idx.device)
    return ep.dispatch(x, topk_idx, layout=layout).handle


def device_of(rows: torch.Tensor) -> str | None:
    """Return the GPU that rows are on; None for the host."""
    return None if rows.is_cpu else str(rows.device)


class Natives:
    """The buffers of one group, their variants, and the handles that their dispatches left."""

    def __init__(self, group: object, *, timeout_s: float = _TIMEOUT_S, heap_bytes: int = 0) -> None:
        """``group`` and ``timeout_s`` as :class:`anyep.Buffer` takes them.

        ``heap_bytes``: memory of each GPU that all ranks map, where each has its own.
        """
        self._group = group
        self._timeout_s = timeout_s
        self._buffers: dict[int, anyep.Buffer] = {}
        self._variants: OrderedDict[Hashable, Calls] = OrderedDict()
        self._underway: deque[Underway] = deque()
        self.checked: dict[Hashable, Any] = {}
        """buffers by the shapes, dtypes and flags of calls that passed every check of them"""
        self.layouts: tuple[KnownLayout, ...] = ()
        """those that were counted last: most dispatches bring one of them"""
        self.handles = KnownHandles()
        self.loops: Any = None
        """the compiled ones of this interface; there as soon as there is a buffer"""
        self.closed = False
        self.device: str | None = None
        """the GPU on which tensors are exchanged, by the first call's rows; None: the host"""
        self._settled = False
        self._heap_bytes = heap_bytes
        self.expels = False
        """whether low-latency calls go on without ranks that do not come"""

    def buffer(self, num_experts: int) -> anyep.Buffer:
        """Return the buffer for so many experts; collective the first time."""
        if self.closed:
            raise anyep.ClosedError("this deep_ep.Buffer was destroyed; make a new one")
        known = self._buffers.get(num_experts)
        if known is None:
            self.loops = loops()
            known = self._buffers[num_experts] = anyep.Buffer(
                self._group,
                num_experts=num_experts,
                num_topk=1,
                arena_bytes=0 if self.device is None else self._heap_bytes or None,
                device=self.device,
                eager_bytes=None if self.device is None else _DEVICE_SLOT_BYTES,
                timeout_s=self._timeout_s,
                max_in_flight=_IN_FLIGHT,
                hidden=_SLOT_HIDDEN,
                max_tokens_per_rank=_SLOT_TOKENS,
            )
            if self.expels and known.num_hosts == 1:
                known.expel_absent()
        return known

    def variant(
        self,
        num_experts: int,
        wire: Wire,
        num_topk: int,
        *,
        max_tokens: int = ANY_NUMBER_OF_TOKENS,
        static_rows: int | None = None,
        source_tokens: bool = True,
    ) -> Calls:
        """Return the buffer for rows of a kind. (The oldest are forgotten: they only keep spare memory.)

        ``source_tokens``: whether rows say where they come from; with a handle nobody asks.
        """
        key = (num_experts, wire, num_topk, max_tokens, static_rows, source_tokens)
        known = self._variants.get(key)
        if known is None or self.closed:
            known = self._variants[key] = self.buffer(num_experts).variant(
                wire=wire,
                num_topk=num_topk,
                max_tokens_per_rank=max_tokens,
                static_rows=static_rows,
                source_tokens=source_tokens,
            )
            if len(self._variants) > _MOST_VARIANTS:
                self._variants.popitem(last=False)
        return known

    def settle_on(self, x: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """Exchange tensors where a first call's rows lie. Unavailable where neither host nor GPU has them."""
        if not self._settled:
            rows = x[0] if isinstance(x, tuple) else x
            check_device("x", rows)
            self.device, self._settled = device_of(rows), True

    def remember(self, key: Hashable, ep: _Value) -> _Value:
        """Note which buffer serves calls that passed their checks, by what these look at; None: by nothing."""
        if len(self.checked) >= _MOST_KEYS:
            self.checked.clear()
        if key is not None:
            self.checked[key] = ep
        return ep

    def note_layout(self, topk_idx: torch.Tensor, layout: Layout) -> None:
        """Know again what ``topk_idx`` was counted to."""
        per_rank, _, per_expert, inside = layout
        known = KnownLayout(
            topk_idx=topk_idx,
            is_token_in_rank=inside,
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            counts=per_rank.numpy() if per_rank.is_cpu else None,
            sizes=(*topk_idx.shape, per_expert.size(0), topk_idx.dtype),
        )
        self.layouts = (known, *self.layouts[: _MOST_LAYOUTS - 1])

    def make_room(self) -> None:
        """Finish the oldest call under way where no more fit: DeepEP's callers may hold as many events as they like."""
        while self._underway and (self._underway[0].finished or len(self._underway) >= _IN_FLIGHT):
            self._underway.popleft().finish()

    def left_out(self) -> set[int]:
        """Return the ranks that some buffer goes on without."""
        return {rank for buffer in self._buffers.values() for rank in buffer.left_out}

    def leave_out(self, ranks: list[int]) -> None:
        """Go on without these ranks in every buffer that there is."""
        for buffer in self._buffers.values():
            buffer.leave_out(ranks)

    def culprits(self) -> set[int]:
        """Return the ranks that were lost or silent in a call which ended a buffer."""
        errors = [buffer.ended_by for buffer in self._buffers.values()]
        return {rank for error in errors if isinstance(error, anyep.PeerError) for rank in error.ranks}

    def barrier(self, num_ranks: int) -> None:
        """Wait until every rank is here, on any buffer: the first that there is, on all ranks alike."""
        self.buffer(self.first_num_experts(num_ranks)).barrier()

    def start(self, pending: Pending[Any], fill: Callable[[Any], None] | None = None) -> Underway:
        """Note a call under way."""
        underway = Underway(pending, fill)
        self._underway.append(underway)
        return underway

    def first_num_experts(self, num_ranks: int) -> int:
        """Return a number of experts for which all ranks have a buffer; R, for a new one, where there is none."""
        return next(iter(self._buffers), num_ranks)

    def close(self) -> None:
        """Close every buffer. Idempotent."""
        self.closed = True
        self._underway.clear()
        self.checked.clear()
        self.layouts = ()
        buffers, self._buffers = list(self._buffers.values()), {}
        for buffer in buffers:
            buffer.close()
