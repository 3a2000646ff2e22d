"""A host's dispatch and combine, whose results go on to a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from anyep.exchange.combine import Combine
from anyep.exchange.device.devices import allocate
from anyep.exchange.device.pinned import Move
from anyep.exchange.device.streams import Visit
from anyep.exchange.event import Operation, Targets
from anyep.exchange.handle import Combined, Handle, Received
from anyep.exchange.returning import Returning

if TYPE_CHECKING:
    from anyep.exchange.device.staged import StagedEndpoint

Result = TypeVar("Result")


class _Staged(Generic[Result]):
    """What both have in common: all is the host's, in whatever thread, but ``land``, which the caller's thread does.

    So the host's half may go on in the background while the device computes, and no other thread than the caller's
    launches anything.
    """

    def __init__(self, end: StagedEndpoint, inner: Operation[Result], visit: Visit) -> None:
        self._end = end
        self._visit = visit
        self.label: str = inner.label
        self.post = inner.post
        self.wants_background = inner.wants_background
        self.may_answer = inner.may_answer
        self.ready = inner.ready
        self.size_up = inner.size_up
        self.finish = inner.finish

    def _give(self, moves: Iterable[Move], borrowed: Iterable[torch.Tensor | None]) -> None:
        """Launch copies to the device between what the caller has launched and what it launches next.

        ``borrowed``: tensors of the stream on which the call began.
        """
        self._visit.again()
        try:
            self._end.passage.give(moves)
        finally:  # whatever happened: a copy that was launched is over before the caller's stream uses its memory
            self._visit.end(borrowed)


class StagedDispatch(_Staged[Received]):
    """One dispatch of one rank."""

    def targets(self) -> Targets | None:
        """Return None: where a batch will lie on the device is known when it has come to the host."""
        return None

    def land(self, came: Received) -> Received:
        """Launch the copies of a batch that is in the host's memory. CapacityError where the device has no room."""
        received = self._allocate(came)
        self._give(batch_moves(came, received), ())
        return received

    def _allocate(self, came: Received) -> Received:
        """Make memory like a batch's on the device. CapacityError on this rank alone: all others have theirs."""

        def like(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            return allocate(self._end.device, tensor.shape, tensor.dtype, self._end.account.__str__)

        x = like(came.x)
        assert x is not None
        if came.handle.send.geometry.padded and came.scales is not None:
            turned = like(came.scales.transpose(1, 2))
            scales = None if turned is None else turned.transpose(1, 2)
        else:
            scales = like(came.scales)
        return Received(
            x=x,
            scales=scales,
            topk_idx=like(came.topk_idx),
            topk_weights=like(came.topk_weights),
            counts=came.counts,
            handle=came.handle,
            source_begin=like(came.source_begin),
            source_count=like(came.source_count),
            source_token=like(came.source_token),
        )


class StagedCombine(_Staged[torch.Tensor | Combined]):
    """One combine of one rank; ``back`` is the caller's, ``on_host`` what the host's combine works on."""

    def __init__(self, end: StagedEndpoint, back: Returning, on_host: Returning, visit: Visit) -> None:
        super().__init__(end, Combine(end.host, on_host), visit)
        self._back = back
        self._on_host = on_host

    def targets(self) -> Targets:
        """Return where the sums go."""
        return Targets(x=self._back.out, topk_weights=self._back.weights_out)

    def land(self, _: torch.Tensor | Combined) -> torch.Tensor | Combined:
        """Launch the copies of sums that are in the host's memory."""
        back, there = self._back, self._on_host
        moves = [Move(there.out, back.out)]
        if back.weights_out is not None:
            assert there.weights_out is not None
            moves.append(Move(there.weights_out, back.weights_out))
        self._give(moves, [back.out, back.weights_out])
        return back.out if back.weights_out is None else Combined(x=back.out, topk_weights=back.weights_out)


def batch_moves(source: Received, target: Received) -> Iterator[Move]:
    """Return what makes one batch of another: all that is defined of it."""
    for name in ("x", "source_token"):
        yield from _moves(getattr(source, name), getattr(target, name), source.handle)
    for name in ("topk_idx", "topk_weights", "source_begin", "source_count"):
        if getattr(source, name) is not None:
            yield Move(getattr(source, name), getattr(target, name))
    if source.scales is None:
        return
    assert target.scales is not None
    if not source.handle.send.geometry.padded:
        yield Move(source.scales, target.scales)
        return
    for block, there, rows in zip(source.scales, target.scales, source.handle.counts, strict=True):
        yield Move(block[:rows].t(), there[:rows].t())


def defined_moves(source: torch.Tensor, target: torch.Tensor, handle: Handle) -> Iterator[Move]:
    """Return moves of a batch's rows: all, or in the padded layout the first of each expert's block."""
    return _moves(source, target, handle)


def _moves(source: torch.Tensor | None, target: torch.Tensor | None, handle: Handle) -> Iterator[Move]:
    if source is None or target is None:
        return
    if not handle.send.geometry.padded:
        yield Move(source, target)
        return
    for block, there, rows in zip(source, target, handle.counts, strict=True):
        yield Move(block[:rows], there[:rows])
