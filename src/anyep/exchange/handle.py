"""What a dispatch leaves behind: enough to bring the rows back, or to send others the same way."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyep.layout.arrival import Arrival


@dataclass(frozen=True, kw_only=True, eq=False)
class SendPlan:
    """Where this rank's tokens go: *entries*, as kernels/spec.py defines them. W entries a token."""

    num_tokens: int
    width: int
    by_expert: bool
    topk_idx: torch.Tensor
    """[T, K] int32 or int64, a copy of the caller's"""
    entry_rank: torch.Tensor
    """[T, W] int32"""
    entry_row: torch.Tensor
    """[T, W] int32; slots until the receivers have said where their rows begin"""
    rank_rows: torch.Tensor
    """[R] int32, rows that go to each rank"""
    expert_rows: torch.Tensor
    """[E] int32, (token, column) pairs of each expert"""


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
    arrival: Arrival
    has_weights: bool
    static_rows: int | None

    @property
    def num_tokens(self) -> int:
        return self.send.num_tokens

    @property
    def num_rows(self) -> int:
        return self.arrival.num_rows


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

    Legend: N rows, H hidden, K top-k, G scale groups (ceil(H / 128)).
    """

    x: torch.Tensor
    """[N, H] in the wire's dtype"""
    scales: torch.Tensor | None
    """fp8 only: fp32 [N, G], or int32 [N, ceil(G / 4)] for packed UE8M0"""
    topk_idx: torch.Tensor
    """[N, K] local expert index, or -1 in a column that this row does not serve; dtype of the input"""
    topk_weights: torch.Tensor | None
    """[N, K] fp32, 0 where topk_idx is -1; None if none were sent"""
    counts: list[int]
    """rows for each local expert, without padding"""
    handle: Handle


@dataclass(frozen=True, kw_only=True, eq=False)
class Combined:
    """What combine returns when weights travel back."""

    x: torch.Tensor
    """[T, H]"""
    topk_weights: torch.Tensor
    """[T, K] fp32"""
