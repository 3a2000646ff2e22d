"""Slots in which a padded batch's rows arrive with their announcement, so that they leave before anybody is awaited.

A *slot* holds what one source sends one receiver in one operation: compact rows, each token once, of which the receiver
makes the rows of its experts' blocks (``second_half``). As no rank knows the others' counts when it sends, a slot has
room for all of a rank's tokens, and places are known from the start. Rows are not written over before they are read: a
rank comes round to a slot again when all ranks have launched the end of the operation that read it, which on streams of
their own all wait for (``concurrent``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from anyep.exchange.device.devices import Device
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
    slot_bytes = sum(aligned(part) for part in parts)
    area, asked = options.ring * num_ranks * slot_bytes, options.eager_bytes
    if asked is None:
        fits = area <= AREA_BYTES
        room = f"the slots of {options.ring} operations take {area / 2**20:.1f} MiB of at most {AREA_BYTES >> 20}"
        return SlotRule(slot_bytes, room) if fits else SlotRule(0, f"{room}; eager_bytes={sum(parts)} makes them")
    given = f"eager_bytes={asked} was given, a pair's rows take up to {sum(parts)}"
    return SlotRule(slot_bytes if asked >= sum(parts) else 0, given)


def _part_bytes(row: RowBytes, max_tokens: int) -> list[int]:
    """Return the bytes of each part of a slot; weights stay at the source, which multiplies with them."""
    return [part * max_tokens for part in (row.x, row.scales, row.topk_idx, 0, row.token)]


class Slots:
    """The slots of one rank, for each operation in flight one a source, and where its own lie on all ranks.

    ``places``: where the parts of a row begin in a slot, -1 for what such rows do not have. It is what a rank announces
    of them: each receiver adds where that rank's slot lies (``receiving_addr``), and has the address of every part.
    """

    def __init__(
        self,
        device: Device,
        reach: Reach,
        num_ranks: int,
        rule: SlotRule,
        options: BufferOptions,
        account: Callable[[], object],
    ) -> None:
        """Raise CapacityError with ``account()`` where the device has no room."""
        self._device = device
        self._num_ranks = num_ranks
        self._ring = options.ring
        self._slot_bytes = rule.slot_bytes
        parts = _part_bytes(options.row_bytes(), options.max_tokens_per_rank)
        starts = [sum(aligned(part) for part in parts[:number]) for number in range(NUM_PLACES)]
        x, scales, idx, weights, token = (start if part else NOWHERE for start, part in zip(starts, parts, strict=True))
        self.places = x, scales, idx, weights, token
        num_bytes = self._ring * num_ranks * rule.slot_bytes
        self.memory = reach.room((num_bytes,), torch.uint8, account)

    def meet(self, rank: int, first_addr_R: list[int]) -> None:
        """Learn where every rank's slots begin."""

        def slot(first: int, index: int, source: int) -> int:
            return first + (index * self._num_ranks + source) * self._slot_bytes

        ring, ranks = range(self._ring), range(self._num_ranks)
        there = [
            [[slot(first, index, rank) + place if place >= 0 else 0 for first in first_addr_R] for place in self.places]
            for index in ring
        ]
        here = [[slot(self.memory.data_ptr(), index, source) for source in ranks] for index in ring]
        self._there, self._here = (
            torch.tensor(table, dtype=torch.int64, device=self._device.where) for table in (there, here)
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return all that lives as long as the buffer."""
        return self.memory, self._there, self._here

    def table_addr(self, epoch: int) -> list[int]:
        """Return, for each part of a row, where the peer table of this rank's slots lies."""
        first = self._there.data_ptr() + 8 * (epoch % self._ring) * NUM_PLACES * self._num_ranks
        return [first + 8 * part * self._num_ranks for part in range(NUM_PLACES)]

    def receiving_addr(self, epoch: int) -> int:
        """Return where int64 [R] lies: where each source's slot begins here."""
        return self._here.data_ptr() + 8 * (epoch % self._ring) * self._num_ranks
