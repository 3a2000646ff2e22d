"""Where ranks find what all of them announced: a board for each operation in flight, in every rank's memory."""

from __future__ import annotations

import torch

from anyep.exchange.device.devices import Device
from anyep.exchange.device.reach import Reach
from anyep.kernels.spec_device import message_bytes


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
        return self.memory, self._messages

    def board_addr(self, epoch: int) -> int:
        """Return where the messages of all ranks to this one lie."""
        return self.first_addr + epoch % self.ring * self._board_bytes

    def messages_addr(self, epoch: int) -> int:
        """Return where the peer table of this rank's messages lies."""
        return self._messages.data_ptr() + epoch % self.ring * 8 * self.num_ranks
