"""Which memory other ranks can address, and what it is called there.

A *place* is what a rank tells the others of a tensor, -1 for an empty one: its distance from the rank's base. Whoever
reads it adds the base, as seen from its own side. Devices of several hosts are within nobody's reach: ``staged``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol

import torch

from anyep.errors import CapacityError
from anyep.exchange.device.devices import Device, Rooms, Wanted, allocate, allocate_all
from anyep.transport.cuda_symmetric import SymmetricHeap

NOWHERE = -1


class Reach(Protocol):
    """One rank's side."""

    why: str
    """why rows can go straight to their final place"""
    base_R: list[int]
    """what places of each rank are counted from, as addresses here"""

    def room(self, shape: Sequence[int], dtype: torch.dtype, account: Callable[[], object]) -> torch.Tensor:
        """Return a tensor with any content that others can address; CapacityError with ``account()`` without memory."""
        ...

    def rooms(self, wanted: Sequence[Wanted | None], account: Callable[[], object]) -> Rooms:
        """Return a tensor as :meth:`room` does for each that is wanted."""
        ...

    def place(self, tensor: torch.Tensor) -> int | None:
        """Return a tensor's place; None where others cannot address it."""
        ...

    def places(self, addresses: Sequence[int]) -> Sequence[int]:
        """Return the places of what begins at these addresses of this rank's :meth:`rooms`; 0 is nowhere."""
        ...


class OneDevice:
    """All ranks share a device and one process: every tensor is within reach, and addresses are places."""

    why = "ranks share the device's memory"

    def __init__(self, device: Device, num_ranks: int) -> None:
        self._device = device
        self.base_R = [0] * num_ranks

    def room(self, shape: Sequence[int], dtype: torch.dtype, account: Callable[[], object]) -> torch.Tensor:
        return allocate(self._device, shape, dtype, account)

    def rooms(self, wanted: Sequence[Wanted | None], account: Callable[[], object]) -> Rooms:
        return allocate_all(self._device, wanted, account)

    def place(self, tensor: torch.Tensor) -> int | None:
        return tensor.data_ptr() if tensor.numel() else NOWHERE

    def places(self, addresses: Sequence[int]) -> Sequence[int]:
        return [address or NOWHERE for address in addresses]


class OwnDevices:
    """Each rank has a device, and a heap on it that the others have mapped.

    Memory that calls in a graph take stays taken, as a graph's end is told to nobody but torch's own allocator.
    """

    why = "each rank has mapped the others' heaps"

    def __init__(self, device: Device, heap: SymmetricHeap) -> None:
        self._device = device
        self._heap = heap
        self._in_graphs: list[torch.Tensor] = []
        self.base_R = heap.base_R

    def room(self, shape: Sequence[int], dtype: torch.dtype, account: Callable[[], object]) -> torch.Tensor:
        num_bytes = prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self._heap.memory.device)
        try:
            taken = self._heap.take(num_bytes)
        except CapacityError as error:
            raise CapacityError(f"{error}. This buffer: {account()}") from None
        if self._device.capturing():  # a replay writes there again, whoever has forgotten the tensor
            self._in_graphs.append(taken)
        return taken.view(dtype).view(tuple(shape))

    def rooms(self, wanted: Sequence[Wanted | None], account: Callable[[], object]) -> Rooms:
        return tuple([None if one is None else self.room(*one, account) for one in wanted])

    def place(self, tensor: torch.Tensor) -> int | None:
        return self._heap.offset(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else NOWHERE

    def places(self, addresses: Sequence[int]) -> Sequence[int]:
        first = self._heap.memory.data_ptr()
        return [address - first if address else NOWHERE for address in addresses]
