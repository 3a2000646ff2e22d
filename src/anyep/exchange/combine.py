"""Combine: say where the experts' outputs lie, pull every token's rows, sum them once in fp32, done.

The owner's call returns when all ranks have read its rows, so that it may write over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from anyep.errors import CapacityError
from anyep.exchange.arguments import check_choice, check_tensor
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.handle import Combined, Handle
from anyep.exchange.opening import BODY, LAYOUT_CODES, REDUCE_CODES, Kind, Opening, check_agreement, message
from anyep.exchange.receive import tensor_on
from anyep.exchange.wire import ELEMENTS
from anyep.transport.base import Block, Place, Words

REDUCES = ("rank", "expert")
_BODY_WORDS = 4
"""Segment and offset of y, segment and offset of its weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Returning:
    """Checked outputs of this rank's experts, and where the sum goes."""

    y: torch.Tensor
    topk_weights: torch.Tensor | None
    bias: tuple[torch.Tensor, ...]
    out: torch.Tensor
    reduce: str
    handle: Handle


@dataclass(frozen=True, kw_only=True, eq=False)
class Loan:
    """A tensor's bytes where peers can read them; ``block`` keeps a copy alive, None if it lay there already."""

    place: Place
    block: Block | None


_NOWHERE = Loan(place=Place(segment=-1, offset=0), block=None)


def prepare(
    end: Endpoint, y: object, handle: Handle, *, topk_weights: object, bias: object, out: object, reduce: object
) -> Returning:
    """Check the caller's tensors. Raises TypeError and ValueError; exchanges nothing."""
    how = check_choice("reduce", reduce, REDUCES)
    if how == "expert" and handle.layout != "expert":
        raise ValueError(
            f"reduce='expert' sums one row for each (token, expert), but this handle's layout is {handle.layout!r}: "
            "dispatch with layout='expert', or use reduce='rank'"
        )
    checked = check_tensor("y", y, dtypes=tuple(ELEMENTS), shape=[handle.num_rows, end.hidden], legend="[N, hidden]")
    weights = None
    if topk_weights is not None:
        shape = [handle.num_rows, end.num_topk]
        weights = check_tensor(
            "topk_weights", topk_weights, dtypes=[torch.float32], shape=shape, legend="[N, num_topk]"
        )
    target = _check_out(end, out, handle, checked)
    biases = _check_bias(end, bias, handle, checked.dtype)
    if any(_overlap(target, one) and target.data_ptr() != one.data_ptr() for one in biases):
        raise ValueError(
            "out overlaps bias in other rows, which would be read after they were written; pass another out"
        )
    return Returning(
        y=checked,
        topk_weights=weights,
        bias=biases,
        out=target,
        reduce=how,
        handle=handle,
    )


def _check_bias(end: Endpoint, bias: object, handle: Handle, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if bias is None:
        return ()
    given = bias if isinstance(bias, (tuple, list)) else (bias,)
    if len(given) > 2:
        raise ValueError(f"bias takes at most 2 tensors, got {len(given)}")
    return tuple(
        check_tensor("bias", one, dtypes=[dtype], shape=[handle.num_tokens, end.hidden], legend="[T, hidden]")
        for one in given
    )


def _check_out(end: Endpoint, out: object, handle: Handle, y: torch.Tensor) -> torch.Tensor:
    shape = [handle.num_tokens, end.hidden]
    if out is None:
        return torch.empty(shape, dtype=y.dtype, device="cpu")
    target = check_tensor("out", out, dtypes=[y.dtype], shape=shape, legend="[T, hidden]")
    if _overlap(target, y):
        raise ValueError("out overlaps y, which other ranks are still reading; pass another tensor")
    return target


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def combine(end: Endpoint, epoch: int, back: Returning) -> torch.Tensor | Combined:
    """Run the protocol. Collective; raises RefusedError where all ranks refuse, PeerLost and PeerTimeout."""
    step = f"combine {epoch}"
    opening = Opening(
        kind=Kind.COMBINE,
        layout=LAYOUT_CODES[back.handle.layout],
        has_weights=int(back.topk_weights is not None),
        handle_epoch=back.handle.epoch,
        element=ELEMENTS[back.y.dtype],
        reduce=REDUCE_CODES[back.reduce],
    )
    words_RW, loans = _lend(end, opening, back)
    opened_RW = end.exchange(end.lanes.open, epoch, words_RW, step)
    check_agreement(opening, opened_RW, step)
    weights = _pull(end, back, opened_RW[:, BODY:])
    read = np.zeros((end.num_ranks, 1), np.int64)
    end.exchange(end.lanes.done, epoch, read, step)
    end.transport.check(epoch, step)  # a lender that gave up on somebody may have written over what was just read
    del loans  # kept until here: peers were reading them
    end.counters.returned(back.y.itemsize * end.hidden, int(back.handle.send.rank_rows.sum()))
    return back.out if weights is None else Combined(x=back.out, topk_weights=weights)


def _lend(end: Endpoint, opening: Opening, back: Returning) -> tuple[Words, list[Loan]]:
    """Put y and weights where peers can read them; without memory say so, and let all ranks refuse together."""
    try:
        loans = [
            _loan(end, back.y),
            _NOWHERE if back.topk_weights is None else _loan(end, back.topk_weights),
        ]
    except CapacityError:
        return message(opening, end.num_ranks, _BODY_WORDS, status=back.y.nbytes), []
    words_RW = message(opening, end.num_ranks, _BODY_WORDS)
    words_RW[:, BODY:] = [number for loan in loans for number in (loan.place.segment, loan.place.offset)]
    return words_RW, loans


def _loan(end: Endpoint, tensor: torch.Tensor) -> Loan:
    if tensor.nbytes == 0:
        return _NOWHERE
    place = end.transport.locate(tensor.data_ptr(), tensor.nbytes)
    if place is not None:
        return Loan(place=place, block=None)
    block = end.transport.allocate(tensor.nbytes)
    end.workers.copy(end.kernels, tensor.data_ptr(), block.address, tensor.nbytes)
    end.counters.copied_in_bytes += tensor.nbytes
    return Loan(place=block.place, block=block)


def _pull(end: Endpoint, back: Returning, places_RW: Words) -> torch.Tensor | None:
    places_WR = places_RW[:, :_BODY_WORDS].T
    table = end.peer_tables(places_WR[[0, 2]], places_WR[[1, 3]])
    send = back.handle.send
    entries = (send.width, int(back.reduce == "rank"), send.entry_rank.data_ptr(), send.entry_row.data_ptr())
    bias = [one.data_ptr() for one in back.bias] + [0, 0]
    weights = (
        None
        if back.topk_weights is None
        else torch.empty((send.num_tokens, end.num_topk), dtype=torch.float32, device="cpu")
    )

    def tokens(first: int, last: int) -> None:
        end.kernels.reduce(
            int(ELEMENTS[back.y.dtype]),
            end.hidden,
            first,
            last,
            *entries,
            table[0],
            0,
            bias[0],
            bias[1],
            back.out.data_ptr(),
        )
        if weights is not None:
            end.kernels.reduce_weights(end.num_topk, first, last, *entries, table[1], weights.data_ptr())
        end.kernels.fence()

    end.workers.over(send.num_tokens, end.row.y * send.width, tokens)
    return weights


def empty_output(end: Endpoint, handle: Handle, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised [N, H] tensor in the arena: combine reads it where it lies."""
    block = end.transport.allocate(handle.num_rows * end.hidden * dtype.itemsize)
    return tensor_on(block, 0, (handle.num_rows, end.hidden), dtype)
