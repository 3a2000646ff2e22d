"""A V2 combine, bit by bit in upstream's order of sums.

::

    stage A   expanded rows of a token at this rank, in column order      rounded    with several reductions
    stage B   the ranks of a host, by their master columns                rounded    with several reductions and hosts
    last      biases, then what remains, by master columns                rounded

A rank's or host's *master column* is the last of a token's columns that it serves. Stage A is the owners' work, before
rows travel; the origin does the rest. Each stage sums in fp32 and rounds once to bfloat16.

Legend: T tokens, H hidden, K top-k, N rows of the exchange, O hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from anyep.buffer import Buffer
from anyep.compat.deep_ep.elastic_dispatch import served_rows
from anyep.compat.deep_ep.elastic_natives import Natives
from anyep.compat.deep_ep.elastic_rows import places_from_handle
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.exchange.handle import Combined, Handle
from anyep.kernels.spec import Element, KernelSet


@dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """What the experts of a rank return, checked."""

    x: torch.Tensor
    """bfloat16 [rows, H]: a row for each of the batch"""
    topk_weights: torch.Tensor | None
    """fp32 [rows, K], or [rows] of an expanded batch"""
    bias: tuple[torch.Tensor, ...]
    """up to two, bfloat16 [T, H]"""


class Sums(NamedTuple):
    """What combine returns, but for the event."""

    x: torch.Tensor
    topk_weights: torch.Tensor | None


def combine(natives: Natives, outputs: Outputs, handle: EPHandle, *, several_sums: bool, ranks_per_host: int) -> Sums:
    """Bring the experts' outputs back and sum them. ``several_sums``: also per rank and per host."""
    native, kind = natives.for_sums(outputs.x.shape[1], handle)
    if handle.do_expand and not several_sums:
        return _sum_columns(natives, native, outputs, handle)
    known = natives.recall(native, kind, handle)
    returned = _return_rows(natives.kernels, native, outputs, handle, known)
    weights = _owned_weights(natives, outputs, handle, native.num_ranks)
    if several_sums and ranks_per_host < native.num_ranks:
        return _sum_by_host(natives.kernels, native, outputs, returned, weights, known, ranks_per_host)
    return _unpacked(native, returned, known, weights, outputs.bias)


def _unpacked(
    native: Buffer, y: torch.Tensor, handle: Handle, weights: torch.Tensor | None, bias: tuple[torch.Tensor, ...]
) -> Sums:
    if weights is None:
        return Sums(native.combine(y, handle, bias=bias, reduce="column"), None)
    combined = native.combine(y, handle, bias=bias, topk_weights=weights, reduce="column")
    assert isinstance(combined, Combined)
    return Sums(combined.x, combined.topk_weights)


def _sum_columns(natives: Natives, native: Buffer, outputs: Outputs, handle: EPHandle) -> Sums:
    """One sum only of an expanded batch: every row travels, and they are added in column order."""
    if handle.announced_counts is None:
        _, kind = natives.for_sums(outputs.x.shape[1], handle)
        natives.recall(native, kind, handle)
    assert handle.announced_counts is not None
    known = native.handles.recall(
        handle.topk_idx, handle.announced_counts, layout="expert", expert_alignment=handle.expert_alignment
    )
    return Sums(native.combine(outputs.x[: known.num_rows], known, bias=outputs.bias, reduce="expert"), None)


def _return_rows(kernels: KernelSet, native: Buffer, outputs: Outputs, handle: EPHandle, known: Handle) -> torch.Tensor:
    """Return one row for each of the exchange, bfloat16 [N, H]: the batch's, or stage A of an expanded batch."""
    x, places = outputs.x, places_from_handle(handle, native.num_ranks)
    if not handle.do_expand:
        if places is None:
            return x if x.shape[0] == known.num_rows else x[: known.num_rows]
        return x[places]
    sums = native.empty_output(known, torch.bfloat16)
    served = served_rows(handle.recv_src_metadata[: known.num_rows], places)
    _sum_rows(kernels, x, served, (), sums)
    return sums


def _sum_rows(
    kernels: KernelSet, x: torch.Tensor, rows: torch.Tensor, bias: tuple[torch.Tensor, ...], out: torch.Tensor
) -> None:
    """out[n] = biases + the rows of ``x`` that ``rows`` int32 [n, W] names, in its order; -1 names none."""
    ranks = rows.clamp(max=0)  # 0 where a row is named, -1 where none is
    table = torch.tensor([x.data_ptr()], dtype=torch.int64, device="cpu")
    entries = (rows.shape[1], 0, ranks.data_ptr(), rows.data_ptr(), table.data_ptr())
    bias0, bias1 = [*(one.data_ptr() for one in bias), 0, 0][:2]
    kernels.reduce(int(Element.BF16), x.shape[1], 0, rows.shape[0], *entries, 0, bias0, bias1, out.data_ptr())
    kernels.fence()


def _owned_weights(natives: Natives, outputs: Outputs, handle: EPHandle, num_ranks: int) -> torch.Tensor | None:
    """Return fp32 [N, K]: this rank's value in the columns that it serves, 0 elsewhere, so that a sum picks them."""
    if outputs.topk_weights is None:
        return None
    places = places_from_handle(handle, num_ranks)
    served = served_rows(handle.recv_src_metadata[: handle.num_valid_tokens], places)
    owned = torch.empty(served.shape, dtype=torch.float32, device="cpu")
    natives.loops.gather_weights(
        *served.shape,
        served.data_ptr(),
        int(not handle.do_expand),
        outputs.topk_weights.data_ptr(),
        owned.data_ptr(),
    )
    return owned


def _sum_by_host(
    kernels: KernelSet,
    native: Buffer,
    outputs: Outputs,
    returned: torch.Tensor,
    weights: torch.Tensor | None,
    known: Handle,
    ranks_per_host: int,
) -> Sums:
    """Stage B, a sum for each (token, host), and then the last one."""
    grouped, host_order = native.handles.by_group(known, ranks_per_host)
    partial = _unpacked(native, returned, grouped, weights, ())
    num_hosts = native.num_ranks // ranks_per_host
    first_T1 = torch.arange(0, partial.x.shape[0], num_hosts, dtype=torch.int32, device="cpu").unsqueeze(1)
    rows = torch.where(host_order >= 0, host_order + first_T1, host_order)
    out = torch.empty((rows.shape[0], returned.shape[1]), dtype=torch.bfloat16, device="cpu")
    _sum_rows(kernels, partial.x, rows, outputs.bias, out)
    if partial.topk_weights is None:
        return Sums(out, None)
    by_host = partial.topk_weights.view(rows.shape[0], num_hosts, partial.topk_weights.shape[1])
    return Sums(out, by_host.sum(1))
