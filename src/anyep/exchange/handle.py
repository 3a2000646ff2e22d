"""What a dispatch leaves behind: enough to bring the rows back, or to send others the same way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.exchange.geometry import Geometry


@dataclass(frozen=True, kw_only=True, eq=False)
class SendPlan:
    """Where this rank's tokens go: *entries*, as kernels/spec.py defines them, and a ledger (``exchange/ledger.py``).

    T tokens; W entries a token: min(K, R) of the compact layout, K with a row for each (token, column). All are int32
    arrays in one piece of memory; ``*_addr`` is where each begins.
    """

    num_tokens: int
    geometry: Geometry
    memory: NDArray[np.int32]
    """the ledger, then the entries"""
    topk_idx: torch.Tensor
    """[T, K] int32 or int64, a copy of the caller's"""
    ledger_addr: int
    compact_width: int
    compact_rank_addr: int
    """[T, min(K, R)]"""
    compact_slot_addr: int
    width: int
    entry_rank_addr: int
    """[T, W]"""
    entry_slot_addr: int
    entry_row_addr: int
    """[T, W], from slots when the receivers' rows are known"""

    def field(self, name: str) -> int:
        """Return the address of a field of the ledger."""
        return self.ledger_addr + self.geometry.shape.bytes_at[name]

    def numbers(self, name: str) -> NDArray[np.int32]:
        """Return a field of the ledger, int32; a view."""
        return self.memory[self.geometry.shape.words_at[name]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Handle:
    """One dispatch, as both sides remember it. Opaque to callers but for the sizes.

    ``num_rows`` N rows were received, from ``num_tokens`` T tokens a rank sent. Valid while its buffer is open.
    """

    buffer: object
    """identity of the buffer that made it"""
    epoch: int
    layout: str
    send: SendPlan
    num_rows: int
    shape: tuple[int, ...]
    """of the batch without its channels: (N,), or (L, R * Tmax) in the padded layout"""
    counts: list[int]
    has_weights: bool
    topk_weights: torch.Tensor | None
    """padded layout: fp32 [T, K], what combine multiplies rows with; the caller's tensor"""

    @property
    def num_tokens(self) -> int:
        return self.send.num_tokens


def check_handle(handle: object, buffer: object) -> Handle:
    """Return ``handle`` if ``buffer`` (its identity) made it; TypeError or ValueError otherwise."""
    if not isinstance(handle, Handle):
        raise TypeError(f"handle must be the handle of a Received, got {type(handle).__name__}")
    if handle.buffer is not buffer:
        raise ValueError("this handle was made by another buffer; pass the handle of a dispatch of this one")
    return handle


@dataclass(frozen=True, kw_only=True, eq=False)
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
    counts: list[int]
    """rows for each local expert, without padding"""
    handle: Handle
    source_begin: torch.Tensor | None = None
    """padded only: int32 [L, R], the first row of each source in each expert's block"""
    source_count: torch.Tensor | None = None
    """padded only: int32 [L, R], how many rows it sent there"""
    source_token: torch.Tensor | None = None
    """padded only: int32 [L, P], the number of each row's token at its source"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Combined:
    """What combine returns when weights travel back."""

    x: torch.Tensor
    """[T, H]"""
    topk_weights: torch.Tensor
    """[T, K] fp32"""
