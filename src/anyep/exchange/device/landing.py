"""Memory of a device in which a batch arrives: one tensor for each part of a row, cut where rows are known or fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from anyep.exchange.device.devices import Rooms, Wanted
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.reach import Reach
from anyep.exchange.geometry import Geometry


class PartShape(NamedTuple):
    """An array of a batch: numbers a row, () for one, and their dtype. ``blocks``: of a padded batch [L, R * Tmax]."""

    blocks: tuple[int, ...]
    columns: tuple[int, ...]
    dtype: torch.dtype


def part_shapes(end: DeviceEndpoint, geometry: Geometry) -> tuple[PartShape | None, ...]:
    """Return the parts of a batch: x, scales, topk_idx, topk_weights, source token; None for what rows do not have."""
    row, wire, shape = geometry.row, end.wire, geometry.shape
    blocks = (shape.num_local, shape.block_rows) if geometry.padded else ()
    return (
        PartShape(blocks, (wire.hidden,), wire.dtype),
        PartShape(blocks, (wire.scale_columns,), wire.scale_dtype) if row.scales else None,
        PartShape(blocks, (end.num_topk,), geometry.idx_dtype) if row.topk_idx else None,
        PartShape(blocks, (end.num_topk,), torch.float32) if row.topk_weights else None,
        PartShape(blocks, (), torch.int32) if row.token else None,
    )


class LandingShapes:
    """What :func:`cut_landing` asks for; worked out again only where there shall be room for another number of rows."""

    def __init__(self, parts: tuple[PartShape | None, ...]) -> None:
        self.parts = parts
        self._last: tuple[int, tuple[Wanted | None, ...]] = (-1, ())

    def of(self, capacity: int) -> tuple[Wanted | None, ...]:
        """Return the tensors of a batch of up to ``capacity`` rows."""
        known = self._last
        if known[0] != capacity:
            known = self._last = capacity, tuple(self._wanted(one, capacity) for one in self.parts)
        return known[1]

    def _wanted(self, part: PartShape | None, capacity: int) -> Wanted | None:
        return None if part is None else Wanted((*(part.blocks or (capacity,)), *part.columns), part.dtype)


class Landing(NamedTuple):
    """Room for ``capacity`` rows of the parts of :func:`part_shapes`, in blocks or one behind the other."""

    parts: Rooms
    capacity: int

    def addresses(self, reach: Reach) -> tuple[int, Sequence[int], Sequence[int]]:
        """Return for how many rows there is room, where each part lies, and what peers are told of it."""
        where = [0 if part is None else part.data_ptr() for part in self.parts]
        return self.capacity, where, reach.places(where)

    def cut(self, num_rows: int) -> Landing:
        """Return the first ``num_rows`` rows."""
        if num_rows == self.capacity:
            return self
        return Landing(parts=tuple(None if part is None else part[:num_rows] for part in self.parts), capacity=num_rows)


def cut_landing(end: DeviceEndpoint, shapes: LandingShapes, capacity: int) -> Landing:
    """Allocate room for ``capacity`` rows on the caller's stream; CapacityError where the device has none."""
    return Landing(end.reach.rooms(shapes.of(capacity), end.account.__str__), capacity)
