"""What every operation of one rank on a device stands on: an endpoint whose tables and boards lie there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from anyep.errors import Unavailable
from anyep.exchange.device.boards import Boards
from anyep.exchange.device.devices import Device, Stream
from anyep.exchange.device.faults import Faults, Limits
from anyep.exchange.device.order import Order
from anyep.exchange.device.reach import Reach
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.wire import Wire
from anyep.layout.regions import MemoryAccount


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceEndpoint(Endpoint):
    """One rank's side of a buffer on a device; what it inherits of a host's eager rows is empty."""

    device: Device
    stream: Stream
    """the stream of the exchange: one for all ranks, or this rank's own"""
    order: Order
    boards: Boards
    reach: Reach
    base_addr: int
    """int64 [R] on the device: what places of a rank are counted from"""
    account: MemoryAccount
    faults: Faults
    abandoned: list[object] = field(default_factory=list)
    """operations that broke off, whose memory peers may still write to"""
    kept: tuple[torch.Tensor, ...]
    """tables on the device, whose addresses are known elsewhere"""

    @property
    def where(self) -> torch.device:
        return self.device.where

    @property
    def limits(self) -> Limits:
        """What a batch must fit."""
        return Limits(
            num_topk=self.num_topk,
            num_experts=self.placement.num_experts,
            static_rows=-1 if self.static_rows is None else self.static_rows,
            block_rows=self.num_ranks * self.max_tokens,
            timeout_s=self.faults.limits.timeout_s,
        )

    def variant(
        self, *, wire: Wire, num_topk: int, max_tokens: int, static_rows: int | None, source_tokens: bool
    ) -> Endpoint:
        """Return the same for rows of another kind; rows of a raw wire are summed by rank, not by column."""
        if wire.by_column:
            raise Unavailable(
                "a raw wire, whose rows are summed by column, works on CPU tensors; a device sums by rank"
            )
        return super().variant(
            wire=wire, num_topk=num_topk, max_tokens=max_tokens, static_rows=static_rows, source_tokens=source_tokens
        )
