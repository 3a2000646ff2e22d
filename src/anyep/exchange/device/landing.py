"""Memory of a device in which a batch arrives: one tensor for each part of a row, cut where rows are known or fit."""

from __future__ import annotations

from typing import NamedTuple

import torch

from anyep.exchange.device.devices import allocate
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.reach import NOWHERE, Reach
from anyep.exchange.geometry import Geometry


class Landing(NamedTuple):
    """Room for ``capacity`` rows: x, scales, topk_idx, topk_weights, source token; None for what rows do not have."""

    parts: tuple[torch.Tensor | None, ...]
    capacity: int

    def places(self, reach: Reach) -> tuple[int, int, int, int, int]:
        """Return what peers are told: the place of each part."""
        x, scales, idx, weights, token = (NOWHERE if part is None else _known(reach.place(part)) for part in self.parts)
        return x, scales, idx, weights, token

    def cut(self, num_rows: int) -> Landing:
        """Return the first ``num_rows`` rows."""
        if num_rows == self.capacity:
            return self
        return Landing(parts=tuple(None if part is None else part[:num_rows] for part in self.parts), capacity=num_rows)


def cut_landing(end: DeviceEndpoint, geometry: Geometry, capacity: int) -> Landing:
    """Allocate room for ``capacity`` rows on the caller's stream; CapacityError where the device has none."""
    row, wire = geometry.row, end.wire

    def room(wanted: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return end.reach.room(shape, dtype, end.account.__str__) if wanted else None

    parts = (
        room(1, (capacity, wire.hidden), wire.dtype),
        room(row.scales, (capacity, wire.scale_columns), wire.scale_dtype),
        room(row.topk_idx, (capacity, end.num_topk), geometry.idx_dtype),
        room(row.topk_weights, (capacity, end.num_topk), torch.float32),
        room(row.token, (capacity,), torch.int32),
    )
    return Landing(parts=parts, capacity=capacity)


def room_to_turn(end: DeviceEndpoint, geometry: Geometry) -> torch.Tensor | None:
    """Return memory for a padded batch's scales in column-major order, [L, G, R * Tmax]; None where rows have none."""
    if not geometry.row.scales:
        return None
    shape = (geometry.shape.num_local, end.wire.scale_columns, geometry.shape.block_rows)
    return allocate(end.device, shape, end.wire.scale_dtype, end.account.__str__)


def _known(place: int | None) -> int:
    assert place is not None, "a landing is cut where others can reach it"
    return place
