"""The buffers of AnyEP under an :class:`ElasticBuffer`, made when a call needs one, and handles as they know them.

DeepEP's buffer knows no number of experts and takes rows of any kind; ours fix both. So there is one for each kind of
row, made in the order of calls, which is the same on all ranks.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from anyep.buffer import Buffer
from anyep.compat.deep_ep.checks import host_assert
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.exchange.handle import Handle
from anyep.kernels.registry import load
from anyep.kernels.spec import KernelSet
from anyep.transport.inprocess import Member

_ARENA_BYTES = 4 << 20
"""To begin with: more is added when batches need it."""
_EAGER_BYTES = 32 << 10
"""About what is measured for 8 ranks; measuring for each kind of row would cost every first call some milliseconds."""
_ANY_TOKENS = 1 << 24
"""Tokens are limited by each call's own number; this one sizes nothing when both sizes above are given."""
RAW_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WIDEST_ITEM = max(RAW_DTYPES)


class RowKind(NamedTuple):
    """What a native buffer is made for: rows of ``hidden`` items, ``num_packs`` scales, K columns, E experts."""

    hidden: int
    itemsize: int
    num_packs: int
    num_topk: int
    num_experts: int


class Natives:
    """The native buffers of one rank. ``group`` as :class:`anyep.Buffer` takes it."""

    def __init__(self, group: object, num_ranks: int, timeout_s: float) -> None:
        self._group = group
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._made: dict[RowKind, Buffer] = {}
        self._known: WeakKeyDictionary[EPHandle, _Known] = WeakKeyDictionary()
        self.kernels: KernelSet = load("cpu")
        self.loops: ModuleType = _load_loops()

    def for_rows(self, kind: RowKind) -> Buffer:
        """Return the buffer that moves such rows. Collective the first time."""
        made = self._made.get(kind)
        if made is None:
            host_assert(
                kind.num_experts % self._num_ranks == 0,
                f"num_experts={kind.num_experts} must be a multiple of the number of ranks, {self._num_ranks}",
            )
            made = self._made[kind] = Buffer(
                self._group,
                hidden=kind.hidden,
                num_experts=kind.num_experts,
                num_topk=kind.num_topk,
                max_tokens_per_rank=_ANY_TOKENS,
                wire=f"raw{8 * kind.itemsize}",
                side_words=kind.num_packs + kind.num_topk + 1,
                timeout_s=self._timeout_s,
                arena_bytes=_ARENA_BYTES,
                eager_bytes=_EAGER_BYTES,
                max_in_flight=1,
                transport="inprocess" if isinstance(self._group, Member) else "shm",  # hosts that are played are one
            )
        return made

    def for_sums(self, hidden: int, handle: EPHandle) -> tuple[Buffer, RowKind]:
        """Return a buffer that sums rows of ``hidden`` bfloat16: the first that moves rows as wide, or a new one."""
        num_topk, num_experts = handle.topk_idx.shape[1], handle.num_experts
        for kind, made in self._made.items():
            if (kind.hidden, kind.num_topk, kind.num_experts) == (hidden, num_topk, num_experts):
                return made, kind
        kind = RowKind(hidden, torch.bfloat16.itemsize, 0, num_topk, num_experts)
        return self.for_rows(kind), kind

    def barrier(self) -> None:
        """Wait until every rank is here."""
        kind = next(iter(self._made), RowKind(1, 1, 0, 1, self._num_ranks))
        self.for_rows(kind).barrier()

    def remember(self, handle: EPHandle, owner: Buffer, native: Handle) -> None:
        """Keep what a dispatch worked out; a handle made from the same fields works without it."""
        self._known[handle] = _Known.of(handle, owner, native)

    def recall(self, native: Buffer, kind: RowKind, handle: EPHandle) -> Handle:
        """Return the handle of the compact dispatch, as ``native`` takes it. Exchanges something in one case alone:

        ``announced_counts`` is None. All ranks tell theirs then, by a dispatch whose rows nobody reads.
        """
        known = self._known.get(handle)
        if known is not None and known.fits(handle):
            return known.native if known.owner is native else native.handles.adopt(known.native)
        if handle.announced_counts is None:
            handle.announced_counts = _ask_for_counts(native, kind, handle.topk_idx)
        recalled = native.handles.recall(handle.topk_idx, handle.announced_counts)
        self.remember(handle, native, recalled)
        return recalled

    def close(self) -> None:
        """Close all buffers. Idempotent; waits for no other rank."""
        made, self._made = self._made, {}
        for buffer in made.values():
            buffer.close()


class _Known(NamedTuple):
    """A native handle and the fields it came from, with the numbers of their last changes."""

    owner: Buffer
    native: Handle
    topk_idx: torch.Tensor
    counts: torch.Tensor | None
    num_experts: int
    versions: tuple[int, int] | None

    @classmethod
    def of(cls, handle: EPHandle, owner: Buffer, native: Handle) -> _Known:
        versions = _versions(handle.topk_idx, handle.announced_counts)
        return cls(owner, native, handle.topk_idx, handle.announced_counts, handle.num_experts, versions)

    def fits(self, handle: EPHandle) -> bool:
        """Whether the handle's fields are the same tensors, and nobody has written to them."""
        return (
            self.versions is not None
            and handle.topk_idx is self.topk_idx
            and handle.announced_counts is self.counts
            and handle.num_experts == self.num_experts
            and _versions(self.topk_idx, self.counts) == self.versions
        )


def _versions(topk_idx: torch.Tensor, counts: torch.Tensor | None) -> tuple[int, int] | None:
    """Return how often the tensors were changed in place; None where torch does not count, in inference mode."""
    if topk_idx.is_inference() or (counts is not None and counts.is_inference()):
        return None
    return topk_idx._version, -1 if counts is None else counts._version


def _ask_for_counts(native: Buffer, kind: RowKind, topk_idx: torch.Tensor) -> torch.Tensor:
    num_tokens = topk_idx.shape[0]
    x = torch.zeros((num_tokens, kind.hidden), dtype=RAW_DTYPES[kind.itemsize], device="cpu")
    words = kind.num_packs + kind.num_topk + 1
    side = torch.zeros((num_tokens, words), dtype=torch.int32, device="cpu")
    announced = native.dispatch((x, side), topk_idx).handle.announced
    assert announced is not None, "buffers with a raw wire keep what was announced"
    return torch.from_numpy(announced)


def _load_loops() -> ModuleType:
    """Import the compiled loops, which lie where ``import deep_ep`` does not come; they compile once a machine."""
    from anyep.machine.compiler import compiling

    with compiling():
        from anyep.compat import elastic_loops
    return elastic_loops
