"""What a dispatch leaves behind: enough to bring the rows back, or to send others the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.exchange.geometry import Geometry, PlanShape

if TYPE_CHECKING:
    from anyep.exchange.crossing import Crossing
    from anyep.exchange.proxy import Proxy


class SendPlan:
    """Where this rank's tokens go: a ledger (``exchange/ledger.py``), topk_idx, and *entries* (kernels/spec.py).

    T tokens; W entries a token: min(K, R) of the compact layout, K with a row for each (token, column). All lie in one
    int32 array, ``memory``, which begins at ``first_addr``; ``*_addr`` is where each part begins.
    """

    __slots__ = (
        "by_column",
        "compact_rank_addr",
        "compact_slot_addr",
        "compact_width",
        "crossing",
        "entry_rank_addr",
        "entry_row_addr",
        "entry_slot_addr",
        "first_addr",
        "geometry",
        "idx_addr",
        "idx_bytes",
        "kept",
        "memory",
        "num_tokens",
        "placed",
        "width",
    )

    def __init__(
        self, geometry: Geometry, memory: NDArray[np.int32], first_addr: int, num_tokens: int, shape: PlanShape
    ) -> None:
        self.geometry = geometry
        self.memory = memory
        self.first_addr = first_addr
        self.num_tokens = num_tokens
        self.idx_bytes = geometry.key.idx_bytes
        self.compact_width = geometry.compact_width
        self.width = geometry.width
        self.idx_addr = first_addr + 4 * geometry.shape.num_words
        """[T, K] int32 or int64, a copy of the caller's"""
        self.compact_rank_addr = first_addr + shape.compact_rank
        """[T, min(K, R)]"""
        self.compact_slot_addr = first_addr + shape.compact_slot
        self.entry_rank_addr = first_addr + shape.entry_rank
        """[T, W]; in the compact layout the same as before"""
        self.entry_slot_addr = first_addr + shape.entry_slot
        self.entry_row_addr = first_addr + shape.entry_row
        """from slots when the receivers' rows are known (``placed``)"""
        self.placed = False
        self.crossing: Crossing | None = None
        """which tokens go to other hosts, where there are any"""
        self.by_column = False
        """whether compact entries stand in the order of the last column that each rank serves, not of ranks"""
        self.kept: NDArray[np.int32] | None = None
        """memory of entries that lie elsewhere"""

    def with_entries(self, memory: NDArray[np.int32], first: int, *, num_tokens: int, width: int) -> SendPlan:
        """Return the plan of a combine that adds the entries in ``memory``, which begins at address ``first``.

        Int32 [3, num_tokens, width]: ranks, slots, and room for rows.
        """
        other = SendPlan.__new__(SendPlan)
        for name in SendPlan.__slots__:  # a seventh of copy.copy's time
            setattr(other, name, getattr(self, name))
        other.kept, other.num_tokens, other.width, other.placed = memory, num_tokens, width, False
        stride = 4 * num_tokens * width
        other.entry_rank_addr, other.entry_slot_addr, other.entry_row_addr = first, first + stride, first + 2 * stride
        return other

    def field(self, name: str) -> int:
        """Return the address of a field of the ledger."""
        return self.first_addr + self.geometry.shape.bytes_at[name]

    def numbers(self, name: str) -> NDArray[np.int32]:
        """Return a field of the ledger, int32; a view."""
        return self.memory[self.geometry.shape.words_at[name]]

    def words(self, address: int, count: int) -> NDArray[np.int32]:
        """Return int32 [count] at one of the addresses; a view."""
        first = (address - self.first_addr) // 4
        return self.memory[first : first + count]

    def entry_ranks(self) -> NDArray[np.int32]:
        """Return the rank of each entry, [T, W], -1 for none; a view."""
        return self.words(self.entry_rank_addr, self.num_tokens * self.width).reshape(self.num_tokens, self.width)

    def topk_idx(self) -> torch.Tensor:
        """Return topk_idx [T, K]; a view."""
        geometry = self.geometry
        first = geometry.shape.num_words
        words = self.memory[first : first + self.num_tokens * geometry.num_topk * self.idx_bytes // 4]
        return torch.from_numpy(words).view(geometry.idx_dtype).view(self.num_tokens, geometry.num_topk)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Handle:
    """One dispatch, as both sides remember it. Opaque to callers but for the sizes.

    This rank sent ``num_tokens`` T tokens; the received batch has ``num_rows`` N rows, padding included. Valid while
    its buffer is open.
    """

    buffer: object
    """identity of the buffer that made it"""
    epoch: int
    layout: str
    send: SendPlan
    num_rows: int
    shape: tuple[int, ...]
    """of the batch without its channels: (N,), or (L, R * Tmax) in the padded layout"""
    counts: Sequence[int]
    topk_weights: torch.Tensor | None
    """padded layout: fp32 [T, K], what combine multiplies rows with; a copy of the caller's"""
    proxies: tuple[Proxy, ...] = ()
    """ranks of other hosts for which this rank forwards"""
    straight_from: tuple[int, ...] = ()
    """ranks of other hosts whose rows came straight, and go back so"""
    announced: NDArray[np.int32] | None = None
    """raw wires: all ranks' counts, int32 [R, R + E], from which ``Buffer.handles.recall`` makes the handle again"""

    def __repr__(self) -> str:
        sizes = f"{self.num_tokens} tokens sent, a batch of {self.num_rows} rows"
        return f"<anyep.Handle of a {self.layout} dispatch: {sizes}>"

    @property
    def num_tokens(self) -> int:
        """T of this rank."""
        return self.send.num_tokens

    def topk_idx(self) -> torch.Tensor:
        """Return what this rank dispatched with, [T, K] int32 or int64; a view that must not be written to."""
        return self.send.topk_idx()

    @property
    def pair_rows(self) -> NDArray[np.int32]:
        """Tokens that each rank sent each rank, [R, R], row = source; a view."""
        ranks = len(self.send.numbers("rank_rows"))
        return self.send.numbers("pair_rows").reshape(ranks, ranks)

    @property
    def source_tokens(self) -> NDArray[np.int32]:
        """T of each rank, [R]; a view."""
        return self.send.numbers("source_tokens")


def check_handle(handle: object, buffer: object) -> Handle:
    """Return ``handle`` if ``buffer`` (its identity) made it; TypeError or ValueError otherwise."""
    if not isinstance(handle, Handle):
        name = type(handle).__name__
        do = ": pass received.handle" if isinstance(handle, Received) else ""
        raise TypeError(f"handle must be the handle of a Received, got {'the Received itself' if do else name}{do}")
    if handle.buffer is not buffer:
        raise ValueError("this handle was made by another buffer; pass the handle of a dispatch of this one")
    return handle


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Received:
    """A received batch of N rows; every tensor belongs to the caller and stays valid while referenced.

    Legend: N rows, H hidden, K top-k, G scale groups (ceil(H / 128)), L local experts, R ranks, P = R * Tmax rows of
    an expert's block in the padded layout.
    """

    x: torch.Tensor
    """[N, H] in the wire's dtype; padded: [L, P, H], of which expert l's first ``counts[l]`` rows are defined"""
    scales: torch.Tensor | None
    """fp8 only: fp32 [N, G], or int32 [N, ceil(G / 4)] for packed UE8M0; padded: [L, P, G], column-major in (P, G)"""
    topk_idx: torch.Tensor | None
    """[N, K] local expert index, or -1 in a column that this row does not serve; dtype of the input; padded: None"""
    topk_weights: torch.Tensor | None
    """[N, K] fp32, 0 where topk_idx is -1; None if none were sent, or padded"""
    counts: Sequence[int]
    """rows for each local expert, without padding: a list, or on a device where the host did not wait for them, what
    waits when it is looked at, and has them as an int32 [L] tensor in ``counts.tensor``"""
    handle: Handle
    source_begin: torch.Tensor | None = None
    """padded only: int32 [L, R], the first row of each source in each expert's block"""
    source_count: torch.Tensor | None = None
    """padded only: int32 [L, R], how many rows it sent there"""
    source_token: torch.Tensor | None = None
    """padded: int32 [L, P], the number of each row's token at its source; else int32 [N] where that was asked for"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Combined:
    """What combine returns when weights travel back."""

    x: torch.Tensor
    """[T, H]"""
    topk_weights: torch.Tensor
    """[T, K] fp32"""
