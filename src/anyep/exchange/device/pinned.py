"""Pinned host memory through which a device's tensors come to the host's memory, and go back.

Two slots, taken when the buffer is made: while a copy of the device fills one, or empties it, the host is at the other.
Nothing is pinned later, as that would wait until the whole device has nothing to do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import cycle
from math import prod
from typing import NamedTuple

import torch

from anyep.exchange.device.devices import Device, Event, Stream
from anyep.layout.regions import aligned

SLOT_BYTES = 4 << 20
"""A copy of so much takes 80 us at 50 GB/s, where its launch takes a few."""
NUM_SLOTS = 2


class Move(NamedTuple):
    """A tensor, and one of the same shape and dtype where it goes; one of both on the device."""

    source: torch.Tensor
    target: torch.Tensor


class Piece(NamedTuple):
    """What lies in a slot from ``offset`` on, dense."""

    source: torch.Tensor
    target: torch.Tensor
    offset: int


def fill(moves: Iterable[Move], slot_bytes: int) -> Iterator[list[Piece]]:
    """Cut moves into pieces, in order, and gather as many pieces as a slot holds.

    >>> rows, there = torch.zeros(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    >>> [[(len(piece.source), piece.offset) for piece in pieces] for pieces in fill([Move(rows, there)] * 2, 132)]
    [[(5, 0), (4, 128)], [(1, 0)]]
    """
    pieces: list[Piece] = []
    begin = 0
    for source, target in (part for move in moves for part in _parts(move, slot_bytes)):
        row_bytes = source.element_size() * prod(source.shape[1:])
        first = 0
        while first < len(source):
            num_rows = min(len(source) - first, max(0, slot_bytes - begin) // row_bytes)
            if num_rows:
                last = first + num_rows
                pieces.append(Piece(source[first:last], target[first:last], begin))
                begin, first = aligned(begin + num_rows * row_bytes), last
            if first < len(source):
                yield pieces
                pieces, begin = [], 0
    if pieces:
        yield pieces


def _parts(move: Move, slot_bytes: int) -> Iterator[Move]:
    """Take dense tensors as bytes, which can be cut anywhere; others by rows, and those alone that fit no slot."""
    source, target = move
    if source.numel() == 0:
        return
    if source.is_contiguous() and target.is_contiguous():
        # a dimension of size 1 may have any stride, also in a contiguous tensor, and then cannot be looked at as bytes
        yield Move(*(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8) for tensor in move))
    elif source.element_size() * prod(source.shape[1:]) <= slot_bytes:
        yield move
    else:
        for row in zip(source, target, strict=True):
            yield from _parts(Move(*row), slot_bytes)


class _Slot:
    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.copied: Event | None = None
        """when the device is done with it"""

    def hold(self, piece: Piece) -> torch.Tensor:
        """Return a piece's memory here."""
        num_bytes = piece.source.element_size() * piece.source.numel()
        there = self.memory[piece.offset : piece.offset + num_bytes]
        return there.view(piece.source.dtype).view(piece.source.shape)


class Passage:
    """One rank's slots, and the stream that copies. Threads take turns."""

    def __init__(self, device: Device, stream: Stream, slot_bytes: int) -> None:
        """Raise CapacityError where the host cannot pin so much memory."""
        self._device = device
        self.stream = stream
        self._slot_bytes = slot_bytes
        with torch.inference_mode(False):  # else the slots could not be written outside of it
            self._slots = [_Slot(device.pinned(slot_bytes)) for _ in range(NUM_SLOTS)]
        self._turn = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return NUM_SLOTS * self._slot_bytes

    def bring(self, moves: Iterable[Move]) -> None:
        """Copy from the device to the host's memory, behind what its stream follows; return when all is there."""
        with self._turn, torch.inference_mode():  # bytes have no gradients, and callers' tensors may be of either mode
            before: tuple[_Slot, list[Piece]] | None = None
            for slot, pieces in zip(cycle(self._slots), fill(moves, self._slot_bytes), strict=False):
                self._settle(slot)
                with self._device.on(self.stream):
                    for piece in pieces:
                        self._device.copy(piece.source, slot.hold(piece))
                slot.copied = self._device.mark(self.stream)
                if before is not None:
                    self._empty(*before)
                before = slot, pieces
            if before is not None:
                self._empty(*before)

    def give(self, moves: Iterable[Move]) -> None:
        """Copy from the host's memory to the device; return when all copies are launched, and sources are read."""
        with self._turn, torch.inference_mode():  # bytes have no gradients, and callers' tensors may be of either mode
            for slot, pieces in zip(cycle(self._slots), fill(moves, self._slot_bytes), strict=False):
                self._settle(slot)
                for piece in pieces:
                    slot.hold(piece).copy_(piece.source)
                with self._device.on(self.stream):
                    for piece in pieces:
                        self._device.copy(slot.hold(piece), piece.target)
                slot.copied = self._device.mark(self.stream)

    def _empty(self, slot: _Slot, pieces: list[Piece]) -> None:
        self._settle(slot)
        for piece in pieces:
            piece.target.copy_(slot.hold(piece))

    def _settle(self, slot: _Slot) -> None:
        """Wait until the device is done with a slot."""
        if slot.copied is not None:
            self._device.wait(slot.copied)
            slot.copied = None
