"""The five members of a low-latency dispatch's handle, and what they are made from.

Legend: E experts, L local experts, R ranks, P = R * Tmax rows of a block.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.compat.deep_ep.checks import refuse
from anyep.compat.deep_ep.lazy_tuple import LazyTuple, item
from anyep.compat.deep_ep.native import Natives
from anyep.compat.deep_ep.underway import Underway
from anyep.exchange.calls import Calls
from anyep.exchange.handle import Handle

MEMBERS = 5
"""Of a handle."""
_LAYOUT_RANGE = 1
"""The member by which a handle is known."""


class Blocks(NamedTuple):
    """What serves low-latency calls of a kind."""

    ep: Calls
    num_experts: int
    num_topk: int
    most_tokens: int
    """Tmax"""
    hidden: int
    """H of the dispatch"""


class LowLatencyKept:
    """What a low-latency handle's members are made from; its dispatch may still be under way."""

    landed: Handle | None = None
    """None until the dispatch is over"""
    sources: tuple[torch.Tensor, torch.Tensor] | None = None
    """int32 [L, R]: where each source's rows begin in each block, and how many; None until the dispatch is over"""
    underway: Underway | None = None
    """what finishes the dispatch"""
    ranges: weakref.ref[NDArray[np.int64]] | weakref.ref[torch.Tensor] | None = None
    """the member that is filled from ``sources``, once somebody has looked at it"""
    order: torch.Tensor | None = None
    """int64 [L, P]: which row of a block stands where, as rows of ranks are left out that were masked since"""
    combine_buffer: torch.Tensor | None = None
    """where the next combine reads without a copy, if that was asked for"""

    def __init__(self, natives: Natives, blocks: Blocks, topk_idx: object, token: torch.Tensor | None) -> None:
        """``topk_idx``: the caller's. ``token`` int32 [L, P]: source token of each row; None where copies serve."""
        self.natives = natives
        self.blocks = blocks
        self.topk_idx = topk_idx
        self.token = token

    @property
    def handle(self) -> Handle:
        """The dispatch, which is finished if it was not."""
        if self.landed is None and self.underway is not None:
            self.underway.wait()
        assert self.landed is not None, "a dispatch that ended without an error has a handle"
        return self.landed

    def fill_ranges(self) -> None:
        """Fill the member that was looked at, once it is known: called when either comes true."""
        ranges = None if self.ranges is None else self.ranges()
        if self.sources is None or ranges is None:
            return
        begin, count = self.sources
        member = ranges if isinstance(ranges, torch.Tensor) else torch.from_numpy(ranges)
        member.copy_((begin.long() << 32) | count)


class LowLatencyHandle(LazyTuple):
    """(src_info int32 [L, P], layout_range int64 [L, R], Tmax, H, E); a range is (first row << 32) | rows."""

    def _make(self) -> tuple[Any, ...]:
        kept: LowLatencyKept = self.origin
        ep, experts, _, most_tokens, hidden = kept.blocks
        shape = (experts // ep.num_ranks, ep.num_ranks)
        assert kept.token is not None, "only handles of dispatches make their members"
        if kept.natives.device is None:
            memory = np.empty(shape, np.int64)
            ranges, kept.ranges = kept.natives.handles.keep(memory, kept), weakref.ref(memory)
        else:
            ranges = kept.natives.handles.keep_tensor(
                torch.empty(shape, dtype=torch.int64, device=kept.token.device), kept
            )
            kept.ranges = weakref.ref(ranges)
        kept.fill_ranges()
        return kept.token, ranges, most_tokens, hidden, experts


def find_handle(natives: Natives, handle: object) -> LowLatencyKept | None:
    """Return what a handle, or a tuple of its members, stands for; None for copies. RuntimeError for others."""
    if type(handle) is LowLatencyHandle:
        made: LowLatencyKept = item(handle, 0)
        if made.natives is natives:
            return made
    if not isinstance(handle, (tuple, list)) or len(handle) != MEMBERS:
        refuse(f"handle must be the tuple of {MEMBERS} that low_latency_dispatch returned")
    kept = natives.handles.find(handle[_LAYOUT_RANGE])
    if kept is not None and not isinstance(kept, LowLatencyKept):
        refuse("handle must be that of a low_latency_dispatch, got members of a dispatch's")
    return kept
