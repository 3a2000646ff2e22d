"""What callers of V1's dispatch pass: checked in full once for each kind of batch, and then sent at once.

A kind is everything that the checks look at, but for the memory order of rows and routing: the native call refuses that
itself, before it sends a word, and the call is then checked in full.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from anyep.compat.deep_ep import indices
from anyep.compat.deep_ep.checks import check_count, check_dense, check_device, host_assert, refuse
from anyep.compat.deep_ep.domains import Domain
from anyep.compat.deep_ep.native import KnownLayout, Natives, Served
from anyep.exchange.wire import Wire, carrying_wire

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_SCALE_DTYPES = (torch.float32, torch.int32)


class NormalContext(NamedTuple):
    """What every normal call of a rank needs."""

    natives: Natives
    domain: Domain
    members: int
    """of a handle"""
    group: int
    """ranks whose sums combine rounds before it adds them; 0: none"""


class Batch(NamedTuple):
    """Arguments of a dispatch that is not cached."""

    topk_idx: Any
    topk_weights: Any
    num_tokens_per_rank: Any
    num_tokens_per_expert: Any
    is_token_in_rank: Any
    worst_tokens: int
    alignment: int


new_batch = partial(tuple.__new__, Batch)
"""Makes one of a tuple of all fields; the class's own constructor is a Python function, slow from cold caches."""


def known_layout(natives: Natives, batch: Batch) -> KnownLayout | None:
    """Return the layout if its tensors, topk_idx included, are those of one of the last ``get_dispatch_layout``."""
    idx, _, per_rank, per_expert, inside, _, _ = batch
    for known in natives.layouts:
        if known[0] is idx and known[1] is inside and known[2] is per_rank and known[3] is per_expert:
            return known
    return None


def key_of_batch(x: Any, batch: Batch, known: KnownLayout | None) -> tuple[Any, ...] | None:
    """Return what the checks of a batch depend on; None where they have to be made in any case."""
    idx, weights, per_rank, per_expert, inside, worst_tokens, alignment = batch
    layout = _key_of_layout(idx, per_rank, per_expert, inside) if known is None else known.sizes
    rows = key_of_rows(x)
    return None if layout is None or rows is None else (layout, rows, weights is None, worst_tokens, alignment)


def _key_of_layout(topk_idx: Any, *layout: Any) -> tuple[Any, ...] | None:
    """Return what is checked of a layout that was counted elsewhere; None where it has to be looked at in full."""
    try:
        if not all(one.is_contiguous() and one.is_cpu for one in layout):
            return None
        routing = () if topk_idx is None else (topk_idx.shape, topk_idx.dtype)
        return *((one.shape, one.dtype) for one in layout), *routing
    except AttributeError:
        return None


def key_of_rows(x: Any) -> tuple[Any, ...] | None:
    """Return what :func:`check_rows` looks at, but for the memory order."""
    if type(x) is torch.Tensor:
        return x.shape, x.dtype
    if type(x) is tuple and len(x) == 2 and type(x[0]) is torch.Tensor and type(x[1]) is torch.Tensor:
        return x[0].shape, x[0].dtype, x[1].shape, x[1].dtype
    return None


def check_rows(x: object) -> tuple[Rows, Wire]:
    """Return rows [T, H] of any dtype, or 1-byte rows with scales [T, P], and the wire they travel on."""
    if not isinstance(x, tuple):
        rows = check_dense("x", x, None, [None, None], "[T, H]")
        return rows, carrying_wire(rows.dtype, rows.size(1), 0, torch.float32)
    host_assert(len(x) == 2, f"x must be a tensor or (x, x_scales), got a tuple of {len(x)}")
    rows = check_dense("x", x[0], None, [None, None], "[T, H]")
    scales = x[1]
    check_device("x_scales", scales)
    host_assert(rows.itemsize == 1, f"x with scales must have elements of 1 byte, got {rows.dtype}")
    host_assert(
        isinstance(scales, torch.Tensor) and scales.dim() == 2 and scales.dtype in _SCALE_DTYPES,
        "x_scales must be a float32 or int32 tensor [T, P]",
    )
    host_assert(scales.size(0) == rows.size(0), f"x_scales has {scales.size(0)} rows for {rows.size(0)} of x")
    host_assert(scales.size(1) > 0, "x_scales has no columns; pass x alone")
    return (rows, scales), carrying_wire(rows.dtype, rows.size(1), scales.size(1), scales.dtype)


def check_batch(x: Rows, domain: Domain, batch: Batch) -> None:
    """Check what get_dispatch_layout gives, and the routing. AssertionError, RuntimeError."""
    given = (batch.num_tokens_per_rank, batch.is_token_in_rank, batch.num_tokens_per_expert)
    assert all(one is not None for one in given), (
        "without a handle, dispatch needs num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert: "
        "get_dispatch_layout returns them"
    )
    tokens, ranks = (x[0] if isinstance(x, tuple) else x).size(0), domain.num_ranks
    check_dense("is_token_in_rank", batch.is_token_in_rank, torch.bool, [tokens, ranks], "[T, R]")
    check_dense("num_tokens_per_rank", batch.num_tokens_per_rank, torch.int32, [ranks], "[R]")
    experts = check_dense("num_tokens_per_expert", batch.num_tokens_per_expert, torch.int32, [None], "[E]").size(0)
    if experts <= 0 or experts % ranks:
        refuse(f"the number of experts, {experts}, must be a multiple of R={ranks}")
    check_count("expert_alignment", batch.alignment, 1)
    check_count("num_worst_tokens", batch.worst_tokens, 0)
    has_idx, has_weights = batch.topk_idx is not None, batch.topk_weights is not None
    host_assert(has_idx == has_weights, "pass both topk_idx and topk_weights, or neither")
    if has_idx:
        idx = indices.check_topk_idx(batch.topk_idx, tokens)
        check_dense("topk_weights", batch.topk_weights, torch.float32, list(idx.shape), "[T, K]")
        host_assert(idx.size(1) > 0, "topk_idx must have at least one column")
    host_assert(batch.worst_tokens == 0 or has_idx, "num_worst_tokens needs topk_idx: it marks the rows of the tail")


def checked_batch(context: NormalContext, x: Any, batch: Batch, key: tuple[Any, ...] | None) -> Served:
    """Check a batch and return what serves it."""
    rows, wire = check_rows(x)
    check_batch(rows, context.domain, batch)
    context.natives.settle_on(rows)  # for good: behind all checks
    topk = context.domain.num_ranks if batch.topk_idx is None else batch.topk_idx.size(1)
    experts, static = batch.num_tokens_per_expert.size(0), batch.worst_tokens or None
    ep = context.natives.variant(experts, wire, topk, static_rows=static)
    return context.natives.remember(key, Served(ep, experts, topk, static))
