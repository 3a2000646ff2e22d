"""Where ranks find what all of them announced: a board for each operation in flight, in every rank's memory."""

from __future__ import annotations

from collections.abc import Collection

import torch

from anyep.exchange.device.announced import board_of
from anyep.exchange.device.devices import Device
from anyep.exchange.device.reach import Reach
from anyep.kernels.spec_device import DeviceKernels, message_bytes


class Boards:
    """The boards of one rank, one for each operation in flight, and where its messages lie on all ranks' boards."""

    def __init__(self, device: Device, reach: Reach, num_ranks: int, num_experts: int, ring: int) -> None:
        self.message_bytes = message_bytes(num_ranks, num_experts)
        self.ring = ring
        self._board_bytes = num_ranks * self.message_bytes
        self._device = device
        self.num_ranks = num_ranks
        self.memory = reach.room((ring * self._board_bytes // 8,), torch.int64, lambda: "boards").zero_()
        self.first_addr = self.memory.data_ptr()
        self._nothing = board_of(
            torch.zeros((1, num_ranks + num_experts), dtype=torch.int32, device=device.where), num_ranks
        )
        """the message of a rank that has nothing to send and wants nothing"""

    @staticmethod
    def bytes_of(num_ranks: int, num_experts: int, ring: int) -> int:
        """Return how many bytes the boards of a rank take."""
        return ring * num_ranks * message_bytes(num_ranks, num_experts)

    def meet(self, rank: int, first_addr_R: list[int]) -> None:
        """Learn where every rank's boards begin."""
        own = [
            [first + index * self._board_bytes + rank * self.message_bytes for first in first_addr_R]
            for index in range(self.ring)
        ]
        self._messages = torch.tensor(own, dtype=torch.int64, device=self._device.where)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return all that lives as long as the buffer."""
        return self.memory, self._messages, self._nothing

    def speak_for(self, absent: Collection[int], kernels: DeviceKernels, epoch: int) -> None:
        """Launch what lets ranks that take no part have told this one that they have nothing."""
        for rank in absent:
            there = self.board_addr(epoch) + rank * self.message_bytes
            kernels.copy(self._nothing.data_ptr(), there, self.message_bytes)

    def board_addr(self, epoch: int) -> int:
        """Return where the messages of all ranks to this one lie."""
        return self.first_addr + epoch % self.ring * self._board_bytes

    def messages_addr(self, epoch: int) -> int:
        """Return where the peer table of this rank's messages lies."""
        return self._messages.data_ptr() + epoch % self.ring * 8 * self.num_ranks
