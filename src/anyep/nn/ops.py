"""Dispatch and combine as operators that ``torch.compile`` keeps whole: no graph break, shapes known, gradients too.

A compiled graph holds tensors and numbers. So a buffer goes in as the number of a :class:`Link`, and a handle comes out
as a *ticket*, an int64 [1] that a combine takes back; the link remembers the last handles. Rows have a fixed number:
the buffer is made with ``static_rows``. Importing this module registers the operators ``anyep::dispatch``, ``combine``,
``combine_both`` and ``repeat``, for tensors of the host and of devices.

The gradient of dispatch is combine and that of combine a dispatch the same way, as in ``nn/travel.py``; but a rank
exchanges in backward only if its own inputs require gradients: all ranks must agree in that here.

Legend: T tokens of this rank, H hidden, K top-k, N rows (``static_rows``), L local experts.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from anyep.buffer import Buffer
from anyep.exchange.handle import Combined, Handle
from anyep.nn.threads import check_backward_thread

_links: WeakValueDictionary[int, Link] = WeakValueDictionary()
"""By number: a graph cannot hold a buffer."""
_numbers = itertools.count()
_NO_GRADIENT_WIRES = ("fp8", "raw8", "raw16", "raw32", "raw64")


class Link:
    """A buffer as operators know it. It must live as long as graphs that name it; the last ``keep`` handles live too.

    Raises ValueError for a buffer without ``static_rows``, or with a wire in which gradients cannot travel.
    """

    def __init__(self, ep: Buffer, *, keep: int = 256) -> None:
        options = ep.options
        if options.static_rows is None:
            raise ValueError("operators need rows of a fixed number: make the buffer with static_rows")
        if options.wire in _NO_GRADIENT_WIRES:
            raise ValueError(f"gradients do not travel on wire={options.wire!r}; use bf16, fp16 or fp32, or anyep.nn")
        self.ep = ep
        self.num_rows = options.static_rows
        self.num_topk = options.num_topk
        self.num_local = len(ep.local_experts)
        self.number = next(_numbers)
        self._keep = keep
        self._handles: OrderedDict[int, Handle] = OrderedDict()
        self._tickets = itertools.count()
        self._changing = threading.Lock()
        _links[self.number] = self

    def remember(self, handle: Handle) -> Tensor:
        """Return a ticket for a handle."""
        with self._changing:
            number = next(self._tickets)
            self._handles[number] = handle
            if len(self._handles) > self._keep:
                self._handles.popitem(last=False)
        return torch.tensor([number], dtype=torch.int64, device="cpu")

    def handle(self, ticket: Tensor) -> Handle:
        """Return the handle of a ticket. ValueError for one that was forgotten."""
        number = int(ticket)
        with self._changing:
            known = self._handles.get(number)
        if known is None:
            raise ValueError(
                f"dispatch {number} of this link is forgotten: it keeps {self._keep}; make it with a larger keep"
            )
        return known


def _link(number: int) -> Link:
    link = _links.get(number)
    if link is None:
        raise ValueError(f"link {number} is gone: keep the anyep.nn.ops.Link as long as what was compiled with it")
    return link


class Arrived(NamedTuple):
    """A received batch of N rows, the tail padded: index -1, weights and rows 0."""

    x: Tensor
    """[N, H]"""
    topk_idx: Tensor
    """[N, K] local expert, or -1"""
    topk_weights: Tensor
    """fp32 [N, K]"""
    counts: Tensor
    """int32 [L]: rows of each local expert, where x is"""
    ticket: Tensor
    """for :func:`combine`"""


def dispatch(link: Link, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, layout: str = "compact") -> Arrived:
    """Send each token to the ranks that own its experts, as :meth:`anyep.Buffer.dispatch`. Collective.

    ``x`` [T, H] in the wire's dtype, ``topk_idx`` [T, K], ``topk_weights`` fp32 [T, K]; ``layout`` ``"compact"`` or
    ``"expert"``. Gradients of rows and of their weights come back as their sums.
    """
    return Arrived(*_dispatch(x, topk_idx, topk_weights, link.number, layout))


def combine(link: Link, y: Tensor, arrived: Arrived, *, num_tokens: int) -> Tensor:
    """Sum the experts' outputs ``y`` [N, H] by rank, to [T, H] of ``num_tokens`` T, as :meth:`anyep.Buffer.combine`."""
    summed: Tensor = _combine(y, arrived.ticket, link.number, num_tokens)
    return summed


@torch.library.custom_op("anyep::dispatch", mutates_args=())
def _dispatch(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, link: int, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    known = _link(link)
    received = known.ep.dispatch(x.contiguous(), topk_idx.contiguous(), topk_weights.contiguous(), layout=layout)
    assert received.topk_idx is not None
    assert received.topk_weights is not None
    counts = getattr(received.counts, "tensor", None)
    if counts is None:
        counts = torch.tensor(list(received.counts), dtype=torch.int32, device=x.device)
    ticket = known.remember(received.handle)
    return received.x, received.topk_idx, received.topk_weights, counts.clone(), ticket


@_dispatch.register_fake
def _(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, link: int, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    known = _link(link)
    rows, topk = known.num_rows, known.num_topk
    return (
        x.new_empty((rows, x.shape[1])),
        topk_idx.new_empty((rows, topk)),
        topk_weights.new_empty((rows, topk)),
        x.new_empty((known.num_local,), dtype=torch.int32),
        torch.empty((1,), dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("anyep::combine", mutates_args=())
def _combine(y: Tensor, ticket: Tensor, link: int, num_tokens: int) -> Tensor:
    known = _link(link)
    result = known.ep.combine(y.contiguous(), known.handle(ticket))
    assert isinstance(result, Tensor)
    return result


@_combine.register_fake
def _(y: Tensor, ticket: Tensor, link: int, num_tokens: int) -> Tensor:
    return y.new_empty((num_tokens, y.shape[1]))


@torch.library.custom_op("anyep::combine_both", mutates_args=())
def _combine_both(y: Tensor, weights: Tensor, ticket: Tensor, link: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    known = _link(link)
    check_backward_thread(known.ep)
    both = known.ep.combine(y.contiguous(), known.handle(ticket), topk_weights=weights.contiguous())
    assert isinstance(both, Combined)
    return both.x, both.topk_weights


@_combine_both.register_fake
def _(y: Tensor, weights: Tensor, ticket: Tensor, link: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    return y.new_empty((num_tokens, y.shape[1])), weights.new_empty((num_tokens, weights.shape[1]))


@torch.library.custom_op("anyep::repeat", mutates_args=())
def _repeat(x: Tensor, ticket: Tensor, link: int) -> Tensor:
    """Send [T, H] where a ticket's dispatch sent its tokens: [N, H]."""
    known = _link(link)
    check_backward_thread(known.ep)
    return known.ep.dispatch(x.contiguous(), handle=known.handle(ticket)).x


@_repeat.register_fake
def _(x: Tensor, ticket: Tensor, link: int) -> Tensor:
    return x.new_empty((_link(link).num_rows, x.shape[1]))


def _keep_for_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, link, _ = inputs
    ctx.save_for_backward(output[1], output[4])
    ctx.mark_non_differentiable(output[1], output[3], output[4])
    ctx.link, ctx.num_tokens = link, x.shape[0]


def _dispatch_backward(ctx: Any, grad_x: Tensor, _idx: Any, grad_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    idx, ticket = ctx.saved_tensors
    served = torch.where(idx >= 0, grad_weights, 0.0)
    x, weights = _combine_both(grad_x, served, ticket, ctx.link, ctx.num_tokens)
    return x, None, weights, None, None


def _keep_for_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ticket, link, _ = inputs
    ctx.save_for_backward(ticket)
    ctx.link = link


def _combine_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    (ticket,) = ctx.saved_tensors
    return _repeat(grad_out, ticket, ctx.link), None, None, None


_dispatch.register_autograd(_dispatch_backward, setup_context=_keep_for_dispatch)
_combine.register_autograd(_combine_backward, setup_context=_keep_for_combine)
