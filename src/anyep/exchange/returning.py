"""The owner's half of a combine: check the experts' outputs, and put them where their origins can read them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from anyep.exchange.arguments import check_tensor
from anyep.exchange.crossing import check_forwarders
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.handle import Handle
from anyep.exchange.receive import fresh, tensor_on
from anyep.exchange.way_back import WayBack, way_back
from anyep.exchange.wire import ELEMENTS
from anyep.numerics.logfmt import logfmt_row_bytes
from anyep.transport.base import Block, Place


class Returning(NamedTuple):
    """Checked outputs of this rank's experts, and where the sum goes."""

    y: torch.Tensor
    topk_weights: torch.Tensor | None
    """[N, K]: travel back beside the rows"""
    factors: torch.Tensor | None
    """[T, K]: what the origin multiplies rows with (padded layout)"""
    bias: tuple[torch.Tensor, ...]
    out: torch.Tensor
    handle: Handle
    weights_out: torch.Tensor | None
    """[T, K]: where the sum of the weights that travel back goes"""
    way: WayBack


class Loan(NamedTuple):
    """A tensor's bytes where peers can read them; ``block`` keeps a copy alive, None if it lay there already."""

    place: Place
    block: Block | None
    dense: bool = False
    """whether the blocks of a padded batch lie one behind the other, without their undefined rows"""


NOWHERE = Loan(place=Place(segment=-1, offset=0), block=None)


def prepare(
    end: Endpoint,
    y: object,
    handle: Handle,
    *,
    topk_weights: object,
    bias: object,
    out: object,
    reduce: object,
    wire: object,
    group: object = 0,
) -> Returning:
    """Check the caller's tensors. Raises TypeError and ValueError; exchanges nothing."""
    check_forwarders(end.across, handle.send.crossing)
    padded = handle.send.geometry.padded
    legend = "[L, R * Tmax, hidden]" if padded else "[N, hidden]"
    checked = check_tensor("y", y, dtypes=ELEMENTS, shape=(*handle.shape, end.hidden), legend=legend, device=end.where)
    weighted = not padded and topk_weights is not None
    way = way_back(end, handle, checked.dtype, weighted=weighted, reduce=reduce, wire=wire, group=group)
    target = _check_out(end, out, handle, checked)
    biases = () if bias is None else _check_bias(end, bias, handle, checked.dtype)
    if biases and any(_overlap(target, one) and target.data_ptr() != one.data_ptr() for one in biases):
        raise ValueError(
            "out overlaps bias in other rows, which would be read after they were written; pass another out"
        )
    weights = None if topk_weights is None else _check_weights(end, topk_weights, handle)
    factors = (handle.topk_weights if weights is None else weights) if padded else None
    if not weighted:
        return Returning(checked, None, factors, biases, target, handle, None, way)
    weights_out = fresh((handle.num_tokens, end.num_topk), torch.float32, end.where)
    return Returning(checked, weights, None, biases, target, handle, weights_out, way)


def _check_weights(end: Endpoint, topk_weights: object, handle: Handle) -> torch.Tensor:
    """Padded: [T, K], applied at the origin. Otherwise [N, K], which travel back."""
    padded = handle.send.geometry.padded
    rows, legend = (handle.num_tokens, "[T, num_topk]") if padded else (handle.num_rows, "[N, num_topk]")
    shape = (rows, end.num_topk)
    return check_tensor(
        "topk_weights", topk_weights, dtypes=(torch.float32,), shape=shape, legend=legend, device=end.where
    )


def _check_bias(end: Endpoint, bias: object, handle: Handle, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    given = bias if isinstance(bias, (tuple, list)) else (bias,)
    if len(given) > 2:
        raise ValueError(f"bias takes at most 2 tensors, got {len(given)}: add them first")
    return tuple(
        check_tensor(
            "bias",
            one,
            dtypes=(dtype,),
            shape=(handle.num_tokens, end.hidden),
            legend="[T, hidden]",
            device=end.where,
        )
        for one in given
    )


def _check_out(end: Endpoint, out: object, handle: Handle, y: torch.Tensor) -> torch.Tensor:
    shape = (handle.num_tokens, end.hidden)
    if out is None:
        return torch.empty(shape, dtype=y.dtype, device=end.where)
    target = check_tensor("out", out, dtypes=(y.dtype,), shape=shape, legend="[T, hidden]", device=end.where)
    if _overlap(target, y):
        raise ValueError("out overlaps y, which other ranks are still reading; pass another tensor")
    return target


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def lend_rows(end: Endpoint, back: Returning) -> Loan:
    """Lend y where it lies, or a copy of it; CapacityError without memory for the copy."""
    if back.way.wire == "none" and (place := end.transport.locate(back.y.data_ptr(), back.y.nbytes)) is not None:
        return Loan(place, None)
    plan, rows = back.handle.send, sum(back.handle.counts)
    blocks = (plan.geometry.shape.num_local, plan.field("counts"), plan.field("block_start"))
    if back.way.wire == "logfmt10":
        block = end.transport.allocate(rows * logfmt_row_bytes(end.hidden))
        end.kernels.logfmt_encode(back.y.data_ptr(), end.hidden, *blocks, block.address)
        end.kernels.fence()
        return Loan(place=block.place, block=block, dense=True)
    if not plan.geometry.padded:
        return lend(end, back.y)
    block = end.transport.allocate(rows * back.way.row_bytes)
    packed = torch.tensor([block.address], dtype=torch.int64, device="cpu")
    num_bins, rows_addr, start_addr = blocks
    end.kernels.pack(back.way.row_bytes, 1, num_bins, rows_addr, start_addr, back.y.data_ptr(), packed.data_ptr())
    end.kernels.fence()
    end.counters.add(copied_in_bytes=rows * back.way.row_bytes)
    return Loan(place=block.place, block=block, dense=True)


def lend(end: Endpoint, tensor: torch.Tensor) -> Loan:
    """Lend a whole tensor where it lies, or a copy of it."""
    if tensor.nbytes == 0:
        return NOWHERE
    place = end.transport.locate(tensor.data_ptr(), tensor.nbytes)
    if place is not None:
        return Loan(place=place, block=None)
    block = end.transport.allocate(tensor.nbytes)
    end.workers.copy(end.kernels, tensor.data_ptr(), block.address, tensor.nbytes)
    end.counters.add(copied_in_bytes=tensor.nbytes)
    return Loan(place=block.place, block=block)


def empty_output(end: Endpoint, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor of a batch's shape in the arena: combine reads it where it lies."""
    block = end.transport.allocate(handle.num_rows * end.hidden * dtype.itemsize)
    return tensor_on(block, (*handle.shape, end.hidden), dtype)
