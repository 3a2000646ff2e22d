"""Slots in which a padded batch's rows arrive with their announcement, so that they leave before anybody is awaited.

A *slot* holds what one source sends one receiver in one operation: compact rows, each token once, of which the receiver
makes the rows of its experts' blocks (``dispatch_form``). As no rank knows the others' counts when it sends, a slot has
room for all of a rank's tokens, and places are known from the start. Rows are not written over before they are read: a
rank comes round to a slot again when all ranks have launched the end of the operation that read it, which on streams of
their own all wait for (``concurrent``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from anyep.errors import Unavailable
from anyep.exchange.device.devices import Device, Stream
from anyep.exchange.device.reach import NOWHERE, Reach
from anyep.exchange.options import BufferOptions
from anyep.kernels.spec_device import NUM_PLACES
from anyep.layout.regions import RowBytes, aligned

AREA_BYTES = 256 << 20
"""What all slots of a rank take at most by default."""


class SlotRule(NamedTuple):
    """How large slots are, 0 for none, and why."""

    slot_bytes: int
    reason: str


def slot_rule(options: BufferOptions, num_ranks: int) -> SlotRule:
    """Have slots where those of all operations in flight fit; or as ``eager_bytes`` says, where it is given."""
    parts = _part_bytes(options.row_bytes(), options.max_tokens_per_rank)
    slot_bytes, needed = sum(aligned(part) for part in parts), sum(parts)
    asked = options.eager_bytes
    if asked is not None:
        slot_bytes = max(slot_bytes, aligned(asked)) if asked >= needed > 0 else 0
        return SlotRule(slot_bytes, f"eager_bytes={asked} was given, a pair's rows take up to {needed}")
    area = options.ring * num_ranks * slot_bytes
    room = f"the slots of {options.ring} operations take {area / 2**20:.1f} MiB of at most {AREA_BYTES >> 20}"
    if area > AREA_BYTES:
        return SlotRule(0, f"{room}; eager_bytes={needed} makes them")
    return SlotRule(slot_bytes, room)


def _part_bytes(row: RowBytes, max_tokens: int) -> list[int]:
    """Return the bytes of each part of a slot; weights stay at the source, which multiplies with them."""
    return [part * max_tokens for part in (row.x, row.scales, row.topk_idx, 0, row.token)]


class Slots:
    """The slots of one rank, for each operation in flight one a source, and where its own lie on all ranks."""

    def __init__(
        self,
        device: Device,
        stream: Stream,
        reach: Reach,
        num_ranks: int,
        ring: int,
        slot_bytes: int,
        account: Callable[[], object],
    ) -> None:
        """Raise CapacityError with ``account()`` where the device has no room."""
        self._device = device
        self._stream = stream
        self._num_ranks = num_ranks
        self.ring = ring
        self._slot_bytes = slot_bytes
        self._kinds: dict[tuple[RowBytes, int], SlotKind | None] = {}
        self.memory = reach.room((ring * num_ranks * slot_bytes,), torch.uint8, account)

    def meet(self, rank: int, first_addr_R: list[int]) -> None:
        """Learn where every rank's slots begin."""
        sources = range(self._num_ranks)
        self._own = [[self._slot(first, index, rank) for first in first_addr_R] for index in range(self.ring)]
        first = self.memory.data_ptr()
        self.here = self._table(
            [[self._slot(first, index, source) for source in sources] for index in range(self.ring)]
        )
        """int64 [ring, R]: where each source's slot begins here"""
        self.here_addr = self.here.data_ptr()

    def _slot(self, first: int, index: int, source: int) -> int:
        return first + (index * self._num_ranks + source) * self._slot_bytes

    def _table(self, numbers: object) -> torch.Tensor:
        table = torch.tensor(numbers, dtype=torch.int64, device=self._device.where)
        self._device.lend(table, self._stream)
        return table

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return all that lives as long as the buffer, but tables of kinds."""
        return self.memory, self.here

    def kind(self, row: RowBytes, max_tokens: int) -> SlotKind | None:
        """Return how up to ``max_tokens`` such rows lie in a slot; None where it is too small for them.

        Made once: Unavailable where a graph is being captured that could not hold what makes it.
        """
        key = row, max_tokens
        if key not in self._kinds:
            if self._device.capturing():
                raise Unavailable(
                    "a graph is being captured, and tables of such rows have to come to the device first: make this "
                    "call once outside of it before"
                )
            self._kinds[key] = self._kind(_part_bytes(row, max_tokens))
        return self._kinds[key]

    def _kind(self, parts: list[int]) -> SlotKind | None:
        starts = [sum(aligned(part) for part in parts[:number]) for number in range(NUM_PLACES + 1)]
        if starts.pop() > self._slot_bytes:
            return None
        x, scales, idx, weights, token = (start if part else NOWHERE for start, part in zip(starts, parts, strict=True))
        places = x, scales, idx, weights, token
        there = [[[slot + place if place >= 0 else 0 for slot in own_R] for place in places] for own_R in self._own]
        return SlotKind(self, places, self._table(there))


class SlotKind:
    """How rows of one kind lie in slots.

    ``places``: where each part of a row begins, -1 for what such rows do not have. It is what a rank announces: each
    receiver adds where that rank's slot lies here (``receiving_addr``), and has the address of every part.
    """

    def __init__(self, slots: Slots, places: tuple[int, int, int, int, int], there: torch.Tensor) -> None:
        self._slots = slots
        self.places = places
        self._there = there  # int64 [ring, NUM_PLACES, R]
        self._first, self._step = there.data_ptr(), 8 * there.size(2)

    def first_table_addr(self, epoch: int) -> int:
        """Return where the peer table of the first part of this rank's slots lies; those of the others follow."""
        return self._first + epoch % self._slots.ring * NUM_PLACES * self._step

    def receiving_addr(self, epoch: int) -> int:
        """Return where int64 [R] lies: where each source's slot begins here."""
        return self._slots.here_addr + epoch % self._slots.ring * self._step
