"""What every operation of one rank on a device stands on: an endpoint whose tables and boards lie there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyep.exchange.device.devices import Device, Stream
from anyep.exchange.device.faults import Faults
from anyep.exchange.device.order import PhaseSplit
from anyep.exchange.endpoint import Endpoint
from anyep.kernels.spec_device import message_bytes
from anyep.layout.regions import MemoryAccount


class Boards:
    """The boards of one rank, one for each operation in flight, and where its messages lie on all ranks' boards."""

    def __init__(self, device: Device, num_ranks: int, num_experts: int, ring: int) -> None:
        self.message_bytes = message_bytes(num_ranks, num_experts)
        self._ring = ring
        self._board_bytes = num_ranks * self.message_bytes
        self._device = device
        self._memory = torch.zeros(ring * self._board_bytes // 8, dtype=torch.int64, device=device.where)
        self.num_ranks = num_ranks
        self.first_addr = self._memory.data_ptr()

    @staticmethod
    def bytes_of(num_ranks: int, num_experts: int, ring: int) -> int:
        """Return how many bytes the boards of a rank take."""
        return ring * num_ranks * message_bytes(num_ranks, num_experts)

    def meet(self, rank: int, first_addr_R: list[int]) -> None:
        """Learn where every rank's boards begin."""
        own = [
            [first + index * self._board_bytes + rank * self.message_bytes for first in first_addr_R]
            for index in range(self._ring)
        ]
        self._messages = torch.tensor(own, dtype=torch.int64, device=self._device.where)

    def board_addr(self, epoch: int) -> int:
        """Return where the messages of all ranks to this one lie."""
        return self.first_addr + epoch % self._ring * self._board_bytes

    def messages_addr(self, epoch: int) -> int:
        """Return where the peer table of this rank's messages lies."""
        return self._messages.data_ptr() + epoch % self._ring * 8 * self.num_ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceEndpoint(Endpoint):
    """One rank's side of a buffer on a device; what it inherits of a host's eager rows is empty."""

    device: Device
    stream: Stream
    """the stream of the exchange; one for all ranks"""
    order: PhaseSplit
    boards: Boards
    base_addr: int
    """int64 [R] on the device: what places of a rank are counted from"""
    account: MemoryAccount
    faults: Faults
    kept: tuple[torch.Tensor, ...]
    """tables on the device, whose addresses are known elsewhere"""

    @property
    def where(self) -> torch.device:
        return self.device.where
