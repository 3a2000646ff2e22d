"""The owner's half of a combine: check the experts' outputs, and put them where their origins can read them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from anyep.exchange.arguments import check_choice, check_integer, check_tensor
from anyep.exchange.crossing import check_forwarders
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.handle import Handle
from anyep.exchange.receive import fresh, tensor_on
from anyep.exchange.wire import ELEMENTS
from anyep.numerics.logfmt import logfmt_row_bytes
from anyep.transport.base import Block, Place

REDUCES = ("rank", "expert", "column")
COMBINE_WIRES = ("none", "logfmt10")


class Returning(NamedTuple):
    """Checked outputs of this rank's experts, and where the sum goes."""

    y: torch.Tensor
    topk_weights: torch.Tensor | None
    """[N, K]: travel back beside the rows"""
    factors: torch.Tensor | None
    """[T, K]: what the origin multiplies rows with (padded layout)"""
    bias: tuple[torch.Tensor, ...]
    out: torch.Tensor
    reduce: str
    wire: str
    handle: Handle
    row_bytes: int
    """of a row of y"""
    weights_out: torch.Tensor | None
    """[T, K]: where the sum of the weights that travel back goes"""
    group: int
    """partial sums of so many consecutive ranks are rounded to y's dtype before they are added; 0: none are"""


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
    how = ("expert" if padded else "rank") if reduce is None else check_choice("reduce", reduce, REDUCES)
    if how == "expert" and not handle.send.geometry.by_expert:
        raise ValueError(
            f"reduce='expert' sums one row for each (token, expert), but this handle's layout is {handle.layout!r}: "
            "dispatch with layout='expert', or use reduce='rank'"
        )
    rounded_group = check_integer("group", group, at_least=0)
    if rounded_group and (how == "expert" or handle.layout != "compact"):
        raise ValueError(f"group sums hosts' ranks of layout='compact', and this handle's layout is {handle.layout!r}")
    if rounded_group and end.across is not None and not end.across.has_groups_of(rounded_group):
        raise ValueError(f"group={rounded_group} must be the ranks of a host, in order, where ranks live on several")
    if how == "column" and not handle.send.by_column:
        raise ValueError(
            "reduce='column' takes a handle of the compact layout of a buffer with a raw wire; use reduce='rank'"
        )
    if how == "column" and rounded_group and end.across is None:
        raise ValueError("reduce='column' sums groups of one host's ranks with a handle of by_group; leave group out")
    legend = "[L, R * Tmax, hidden]" if padded else "[N, hidden]"
    checked = check_tensor(
        "y", y, dtypes=tuple(ELEMENTS), shape=[*handle.shape, end.hidden], legend=legend, device=end.where
    )
    target = _check_out(end, out, handle, checked)
    biases = _check_bias(end, bias, handle, checked.dtype)
    if biases and any(_overlap(target, one) and target.data_ptr() != one.data_ptr() for one in biases):
        raise ValueError(
            "out overlaps bias in other rows, which would be read after they were written; pass another out"
        )
    weights = _check_weights(end, topk_weights, handle)
    return Returning(
        y=checked,
        topk_weights=None if padded else weights,
        factors=(handle.topk_weights if weights is None else weights) if padded else None,
        bias=biases,
        out=target,
        reduce=how,
        wire=_check_wire(wire, handle, checked),
        handle=handle,
        row_bytes=checked.itemsize * end.hidden,
        weights_out=None
        if padded or weights is None
        else fresh((handle.num_tokens, end.num_topk), torch.float32, end.where),
        group=rounded_group,
    )


def _check_weights(end: Endpoint, topk_weights: object, handle: Handle) -> torch.Tensor | None:
    """Padded: [T, K], applied at the origin. Otherwise [N, K], which travel back."""
    if topk_weights is None:
        return None
    padded = handle.send.geometry.padded
    rows, legend = (handle.num_tokens, "[T, num_topk]") if padded else (handle.num_rows, "[N, num_topk]")
    shape = [rows, end.num_topk]
    return check_tensor(
        "topk_weights", topk_weights, dtypes=[torch.float32], shape=shape, legend=legend, device=end.where
    )


def _check_wire(wire: object, handle: Handle, y: torch.Tensor) -> str:
    if wire is None:
        return "none"
    name = check_choice("wire", wire, COMBINE_WIRES[1:])
    if not handle.send.geometry.padded or y.dtype != torch.bfloat16:
        raise ValueError(
            f"wire='logfmt10' takes bfloat16 outputs of layout='padded', got {str(y.dtype).removeprefix('torch.')} of "
            f"layout={handle.layout!r}; leave wire out"
        )
    return name


def _check_bias(end: Endpoint, bias: object, handle: Handle, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if bias is None:
        return ()
    given = bias if isinstance(bias, (tuple, list)) else (bias,)
    if len(given) > 2:
        raise ValueError(f"bias takes at most 2 tensors, got {len(given)}")
    return tuple(
        check_tensor(
            "bias",
            one,
            dtypes=[dtype],
            shape=[handle.num_tokens, end.hidden],
            legend="[T, hidden]",
            device=end.where,
        )
        for one in given
    )


def _check_out(end: Endpoint, out: object, handle: Handle, y: torch.Tensor) -> torch.Tensor:
    shape = [handle.num_tokens, end.hidden]
    if out is None:
        return torch.empty(shape, dtype=y.dtype, device=end.where)
    target = check_tensor("out", out, dtypes=[y.dtype], shape=shape, legend="[T, hidden]", device=end.where)
    if _overlap(target, y):
        raise ValueError("out overlaps y, which other ranks are still reading; pass another tensor")
    return target


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def lend_rows(end: Endpoint, back: Returning) -> Loan:
    """Lend y where it lies, or a copy of it; CapacityError without memory for the copy."""
    plan, rows = back.handle.send, sum(back.handle.counts)
    blocks = (plan.geometry.shape.num_local, plan.field("counts"), plan.field("block_start"))
    if back.wire == "logfmt10":
        block = end.transport.allocate(rows * logfmt_row_bytes(end.hidden))
        end.kernels.logfmt_encode(back.y.data_ptr(), end.hidden, *blocks, block.address)
        end.kernels.fence()
        return Loan(place=block.place, block=block, dense=True)
    place = end.transport.locate(back.y.data_ptr(), back.y.nbytes)
    if place is not None or not plan.geometry.padded:
        return lend(end, back.y)
    block = end.transport.allocate(rows * back.row_bytes)
    packed = torch.tensor([block.address], dtype=torch.int64, device="cpu")
    num_bins, rows_addr, start_addr = blocks
    end.kernels.pack(back.row_bytes, 1, num_bins, rows_addr, start_addr, back.y.data_ptr(), packed.data_ptr())
    end.kernels.fence()
    end.counters.add(copied_in_bytes=rows * back.row_bytes)
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
    return tensor_on(block, 0, (*handle.shape, end.hidden), dtype)
