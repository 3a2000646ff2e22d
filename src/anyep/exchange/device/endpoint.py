"""What every operation of one rank on a device stands on: an endpoint whose tables and boards lie there."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from anyep.exchange.device.boards import Boards
from anyep.exchange.device.devices import Device, Stream
from anyep.exchange.device.faults import Faults, Limits, limits_of
from anyep.exchange.device.forms import Forms
from anyep.exchange.device.offers import Offers
from anyep.exchange.device.order import Order
from anyep.exchange.device.reach import Reach
from anyep.exchange.device.slots import SlotKind, Slots
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.geometry import Geometry
from anyep.layout.regions import MemoryAccount


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceEndpoint(Endpoint):
    """One rank's side of a buffer on a device; what it inherits of a host's eager rows is empty."""

    device: Device
    stream: Stream
    """the stream of the exchange: one for all ranks, or this rank's own"""
    order: Order
    offers: Offers
    boards: Boards
    reach: Reach
    padded_slots: Slots | None
    """where rows of padded batches arrive with their announcement; None: they go to their final place later"""
    base_addr: int
    """int64 [R] on the device: what places of a rank are counted from"""
    account: MemoryAccount
    faults: Faults
    owner_E: torch.Tensor
    """int32 [E] on the device: which rank has each expert"""
    abandoned: list[object] = field(default_factory=list)
    """operations that broke off, whose memory peers may still write to"""
    forms: Forms = field(default_factory=Forms, init=False)
    """of this rank's calls with rows of this kind"""
    kept: tuple[torch.Tensor, ...]
    """tables on the device, whose addresses are known elsewhere"""

    def slots_of(self, geometry: Geometry, max_tokens: int) -> SlotKind | None:
        """Return the slots in which up to so many rows arrive with their announcement; None where they do not."""
        if self.padded_slots is None or not geometry.padded:
            return None
        return self.padded_slots.kind(geometry.eager_row, max_tokens)

    @property
    def where(self) -> torch.device:
        return self.device.where

    @cached_property
    def limits(self) -> Limits:
        """What a batch must fit."""
        return limits_of(
            num_topk=self.num_topk,
            num_experts=self.placement.num_experts,
            num_ranks=self.num_ranks,
            max_tokens=self.max_tokens,
            static_rows=self.static_rows,
            timeout_s=self.faults.limits.timeout_s,
        )
