"""The two buffers of a layer that learns: one for tokens, one for gradients, or the same one for both.

A buffer has one wire. Where tokens travel in FP8 and gradients must not, gradients need a second buffer. It is made
with the first, and not when the first gradient comes: ranks must make buffers together and in one order, which
nobody can promise of what happens inside a backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from anyep.buffer import Buffer

_GRADIENT_WIRE = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "fp8": "bf16"}
"""What gradients travel in unless told otherwise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BufferPair:
    """Owns the buffers of dispatch and combine with gradients. :func:`open_pair` makes one; use it in a ``with``.

    Both have the same sizes, placement and alignment, so that a row has the same number in both.
    """

    forward: Buffer
    """tokens to experts, and sums back, of either direction of the chain rule"""
    gradients: Buffer
    """gradients of sums to experts; ``forward`` itself where its wire is good enough"""

    @property
    def rank(self) -> int:
        """This rank's number in the group, 0 to R - 1."""
        return self.forward.rank

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.forward.num_ranks

    @property
    def local_experts(self) -> list[int]:
        """The experts that this rank owns, ascending."""
        return self.forward.local_experts

    @property
    def dtype(self) -> torch.dtype:
        """What experts see and return: the wire's dtype, bfloat16 for fp8."""
        wire = self.forward.options.make_wire()
        return torch.bfloat16 if wire.scale_format is not None else wire.dtype

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What gradients of sums travel in."""
        return self.gradients.options.make_wire().dtype

    def close(self) -> None:
        """Close both, also when closing one fails. Idempotent."""
        try:
            self.forward.close()
        finally:
            self.gradients.close()

    def __enter__(self) -> BufferPair:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close both; after an error without waiting for anybody."""
        try:
            self.forward.__exit__(kind, error, tb)
        finally:
            self.gradients.__exit__(kind, error, tb)


def open_pair(group: object, *, gradient_wire: str | None = None, **sizes: Any) -> BufferPair:
    """Make the buffers of a layer that learns. Collective; ``group`` and ``sizes`` as :class:`anyep.Buffer` takes them.

    ``gradient_wire``: "bf16", "fp16" or "fp32"; None: the wire's own, "bf16" for fp8. A second buffer is made only
    where it differs from the wire. Raises ValueError for "fp8": its 3 bits of mantissa are not for gradients, and
    what :class:`anyep.Buffer` raises.

    >>> from anyep import local_group
    >>> def rank_main(member):
    ...     with open_pair(member, hidden=8, num_experts=4, num_topk=2, max_tokens_per_rank=3, wire="fp8") as pair:
    ...         return pair.dtype, pair.gradient_dtype, pair.local_experts
    >>> local_group(2).run(rank_main)
    [(torch.bfloat16, torch.bfloat16, [0, 1]), (torch.bfloat16, torch.bfloat16, [2, 3])]
    """
    wires = tuple(wire for wire in _GRADIENT_WIRE if wire != "fp8")
    if gradient_wire is not None and gradient_wire not in wires:
        raise ValueError(f"gradient_wire must be one of {', '.join(map(repr, wires))} or None, got {gradient_wire!r}")
    forward = Buffer(group, **sizes)
    wire = forward.options.wire
    chosen = _GRADIENT_WIRE[wire] if gradient_wire is None else gradient_wire
    if chosen == wire:
        return BufferPair(forward=forward, gradients=forward)
    try:
        gradients = Buffer(group, **{**sizes, "wire": chosen, "scales": "fp32", "record": None})
    except BaseException:
        forward.close()
        raise
    return BufferPair(forward=forward, gradients=gradients)


def as_pair(ep: object) -> BufferPair:
    """Return a pair as it is, and a plain buffer as both of a pair. TypeError otherwise, ValueError for one of FP8."""
    if isinstance(ep, BufferPair):
        return ep
    if not isinstance(ep, Buffer):
        raise TypeError(f"ep must be an anyep.Buffer or an anyep.nn.BufferPair, got {type(ep).__name__}")
    if ep.options.wire == "fp8":
        raise ValueError(
            "ep is a buffer with wire='fp8', and gradients do not travel in FP8: "
            "make it with anyep.nn.open_pair(group, wire='fp8', ...), which makes a second buffer for them"
        )
    return BufferPair(forward=ep, gradients=ep)
