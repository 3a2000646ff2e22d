"""Dispatch and combine as functions that autograd knows. Each is linear, and each is the other's gradient.

::

    Send       x, weights -> rows        dispatch, first of its kind, or along a known way      gradient: Gather
    Gather     rows, weights -> sums     combine                                               gradient: Spread
    Spread     gradients -> rows         cached dispatch, in the precision of gradients         gradient: Gather

So that the gradient of a gradient needs nothing of its own.

**Whether a rank exchanges in a backward pass depends on nothing that another rank may see otherwise.** A rank that
received no rows has experts' outputs that depend on nothing; one without tokens may pass an x that requires no
gradient. Did such a rank leave out its part, the others would wait for it. In grad mode every call therefore has a
*tie*, an input that requires a gradient and gets none: its backward is always due, and always exchanges the same
things. A combine is tied to the rows of its dispatch, so that whoever comes to one comes to the other.

**In which order** is autograd's: of what is due, what was made last goes first. Exchanges therefore come in the reverse
order of the calls, on every rank that made its calls in the same order.

Legend: T tokens of this rank, H hidden, K top-k, N received rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import Function

from anyep.exchange.handle import Handle, Received
from anyep.nn.pair import BufferPair
from anyep.nn.threads import check_backward_thread
from anyep.numerics.fp8 import dequantise_fp8


@dataclass(kw_only=True, eq=False, slots=True)
class Way:
    """Where the rows of one dispatch went, on both buffers of a pair."""

    pair: BufferPair
    handle: Handle
    reduce: str
    served: torch.Tensor
    """bool [N, K]: whether a row serves a column, that is, whether its weight came along"""
    gradient_handle: Handle | None = None
    """the same places on the buffer for gradients; made when they are first needed, on all ranks alike"""

    def leads(self, topk_idx: torch.Tensor) -> bool:
        """Return whether tokens that chose ``topk_idx`` go this way."""
        known = self.handle.topk_idx()
        return known.dtype == topk_idx.dtype and torch.equal(known, topk_idx)

    def spread(self, x: torch.Tensor, weights: torch.Tensor | None) -> Received:
        """Send [T, H] and [T, K] the same way, in the precision of gradients."""
        buffer = self.pair.gradients
        if self.gradient_handle is None and buffer is self.pair.forward:
            self.gradient_handle = self.handle
        if self.gradient_handle is not None:
            return buffer.dispatch(x, None, weights, handle=self.gradient_handle)
        received = buffer.dispatch(x, self.handle.topk_idx(), weights, layout=self.handle.layout)
        self.gradient_handle = received.handle
        return received

    def gather(self, y: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bring [N, H] back and sum it to [T, H]; and weights [N, K], where rows serve them, to [T, K]."""
        buffer = self.pair.forward
        if weights is None:
            return buffer.combine(y, self.handle, reduce=self.reduce), None
        kept = torch.where(self.served, weights, 0.0)
        both = buffer.combine(y, self.handle, topk_weights=kept, reduce=self.reduce)
        return both.x, both.topk_weights


class Departure(NamedTuple):
    """How a batch is to be sent: to experts that were just chosen, or where ``handle`` sent another."""

    pair: BufferPair
    topk_idx: torch.Tensor
    handle: Handle | None
    layout: str
    reduce: str


class Arrival(NamedTuple):
    """What of a received batch autograd does not see."""

    way: Way
    topk_idx: torch.Tensor
    counts: list[int]
    quantised: tuple[torch.Tensor, torch.Tensor] | None


class Send(Function):
    """x [T, H], weights [T, K] or None -> rows [N, H], their weights [N, K] or None, and what autograd does not see."""

    @staticmethod
    def forward(
        ctx: Any, _tie: object, x: torch.Tensor, weights: torch.Tensor | None, departure: Departure
    ) -> tuple[torch.Tensor, torch.Tensor | None, Arrival]:
        arrival, rows, row_weights = _send(x, weights, departure)
        ctx.way, ctx.dtype, ctx.has_weights = arrival.way, x.dtype, weights is not None
        # Saved, though the way has it too: a checkpoint that computes again stops after the last tensor saved, and
        # must come as far as this exchange on every rank, also on one whose experts save nothing.
        ctx.save_for_backward(arrival.way.served)
        return rows, row_weights, arrival

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, torch.Tensor, torch.Tensor | None, None]:
        check_backward_thread(ctx.way.pair.forward)
        _ = ctx.saved_tensors  # computes again now what a checkpoint left out, if nothing before did
        grad_x, grad_weights = gather(gradients[0], gradients[1] if ctx.has_weights else None, ctx.way)
        return None, grad_x.to(ctx.dtype), grad_weights, None


class Gather(Function):
    """Rows y [N, H], weights [N, K] or None -> their sums [T, H], and [T, K] or None."""

    @staticmethod
    def forward(
        ctx: Any, _tie: object, y: torch.Tensor, weights: torch.Tensor | None, way: Way
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.way, ctx.has_weights = way, weights is not None
        return way.gather(y, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, torch.Tensor, torch.Tensor | None, None]:
        check_backward_thread(ctx.way.pair.forward)
        rows, weights = spread(gradients[0], gradients[1] if ctx.has_weights else None, ctx.way)
        return None, rows, weights, None


class Spread(Function):
    """Gradients of sums [T, H], of summed weights [T, K] or None -> those of every row [N, H], [N, K] or None."""

    @staticmethod
    def forward(
        ctx: Any, _tie: object, x: torch.Tensor, weights: torch.Tensor | None, way: Way
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.way, ctx.has_weights = way, weights is not None
        sent = x.to(way.pair.gradient_dtype).contiguous()
        received = way.spread(sent, None if weights is None else weights.contiguous())
        return received.x.to(x.dtype), received.topk_weights

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, torch.Tensor, torch.Tensor | None, None]:
        check_backward_thread(ctx.way.pair.forward)
        sums, weights = gather(gradients[0], gradients[1] if ctx.has_weights else None, ctx.way)
        return None, sums, weights, None


def send(
    x: torch.Tensor, weights: torch.Tensor | None, departure: Departure
) -> tuple[torch.Tensor, torch.Tensor | None, Arrival]:
    """Send [T, H] and [T, K] to experts; see :class:`Send`."""
    return Send.apply(_fresh_tie(), x, weights, departure)  # type: ignore[no-untyped-call, no-any-return]  # torch gives apply no types


def gather(
    y: torch.Tensor, weights: torch.Tensor | None, way: Way, tie: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bring [N, H] and [N, K] back as sums; see :class:`Gather`. Strides may be any. ``tie``: rows of the dispatch."""
    tied = tie if tie is not None and tie.requires_grad else _fresh_tie()
    return Gather.apply(tied, y.contiguous(), weights, way)  # type: ignore[no-untyped-call, no-any-return]  # torch gives apply no types


def spread(x: torch.Tensor, weights: torch.Tensor | None, way: Way) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Send gradients [T, H] and [T, K] to rows; see :class:`Spread`. Strides may be any."""
    return Spread.apply(_fresh_tie(), x, weights, way)  # type: ignore[no-untyped-call, no-any-return]  # torch gives apply no types


def _fresh_tie() -> torch.Tensor | None:
    """Return what makes a call's backward due on this rank whatever its other inputs are; None without grad mode."""
    return torch.empty(0, requires_grad=True, device="cpu") if torch.is_grad_enabled() else None


def _send(
    x: torch.Tensor, weights: torch.Tensor | None, departure: Departure
) -> tuple[Arrival, torch.Tensor, torch.Tensor | None]:
    pair, topk_idx, handle, layout, reduce = departure
    buffer = pair.forward
    dense = None if weights is None else weights.contiguous()
    if handle is None:
        received = buffer.dispatch(x.contiguous(), topk_idx.contiguous(), dense, layout=layout)
    else:
        received = buffer.dispatch(x.contiguous(), None, dense, handle=handle)
    assert received.topk_idx is not None  # not of the padded layout
    way = Way(pair=pair, handle=received.handle, reduce=reduce, served=received.topk_idx >= 0)
    rows, quantised = received.x, None
    if received.scales is not None:
        wire = buffer.options.make_wire()
        assert wire.scale_format is not None
        quantised = (received.x, received.scales)
        rows = dequantise_fp8(received.x, received.scales, wire.scale_format, pair.dtype)
    arrival = Arrival(way=way, topk_idx=received.topk_idx, counts=list(received.counts), quantised=quantised)
    return arrival, rows, received.topk_weights
