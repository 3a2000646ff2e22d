"""Memory of GPUs that all ranks of a host can address: torch's symmetric memory, one process a GPU.

Every rank has a heap of the same size, mapped by all. A *place* is an offset in a rank's heap; ``SymmetricHeap.base_R``
says where each rank's heap begins here. Headers travel over the host's transport (``shm.py``).
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from anyep.errors import CapacityError, Unavailable
from anyep.layout.regions import aligned
from anyep.transport.arena import Heap
from anyep.transport.rendezvous import Rendezvous, TorchRendezvous
from anyep.transport.together import together


class SymmetricHeap:
    """One rank's memory, cut into tensors that give it back when their last view dies.

    It returns at once, whatever still runs: streams that used a tensor must have been joined before it dies.
    """

    def __init__(self, memory: torch.Tensor, base_R: list[int], rank: int, mapping: object = None) -> None:
        """``mapping`` keeps the other ranks' memory mapped here."""
        self.mapping = mapping
        self.memory = memory
        """uint8 [n]; kept as long as anything lies in it"""
        self.base_R = base_R
        self._base = base_R[rank]
        self._heap = Heap()
        self._heap.add_segment(memory.numel())
        self._returned: deque[tuple[int, int]] = deque()  # by finalizers, which may run in the middle of take

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 [num_bytes] with any content; CapacityError where there is no room."""
        while self._returned:
            self._heap.give(*self._returned.popleft())
        size = max(aligned(num_bytes), aligned(1))
        begin = self._heap.take(size)
        if begin is None:
            mib, free = self.memory.numel() / 2**20, self._heap.free_bytes / 2**20
            raise CapacityError(
                f"the symmetric heap of {mib:.1f} MiB, {free:.1f} of them free, has no room for "
                f"{num_bytes / 2**20:.1f} MiB; release received tensors, or make the buffer with a larger arena_bytes"
            )
        owner = _owner_of(self.memory, begin, num_bytes)
        weakref.finalize(owner, self._returned.append, (begin, size)).atexit = False
        owner.kept = self.memory
        return _tensor_of(owner, self.memory.device)

    def offset(self, address: int, num_bytes: int) -> int | None:
        """Return where [address, address + num_bytes) lies in this rank's heap, or None."""
        offset = address - self._base
        return offset if 0 <= offset <= self.memory.numel() - num_bytes else None


class _DeviceBytes:
    """A piece of device memory as ``torch.as_tensor`` reads it: a tensor's memory keeps this object."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _owner_of(memory: torch.Tensor, begin: int, num_bytes: int) -> Any:
    """Return an object that stands for a piece of ``memory``."""
    address = memory.data_ptr() + begin
    if memory.is_cuda:
        return _DeviceBytes(address, num_bytes)
    kind: Any = type("_HostBytes", (ctypes.c_uint8 * max(1, num_bytes),), {})  # a class of its own has attributes
    return kind.from_address(address)


def _tensor_of(owner: Any, device: torch.device) -> torch.Tensor:
    if isinstance(owner, _DeviceBytes):
        return torch.as_tensor(owner, device=device)
    return torch.frombuffer(owner, dtype=torch.uint8)


def open_heap(rendezvous: Rendezvous, num_bytes: int, device: torch.device) -> SymmetricHeap:
    """Map a heap of ``num_bytes`` of every rank's GPU. Collective. Raises Unavailable with what is missing."""
    if not isinstance(rendezvous, TorchRendezvous):
        raise Unavailable(
            "ranks with a GPU each need a torch.distributed process group, through which torch maps their memory; "
            "pass one as group"
        )
    import torch.distributed._symmetric_memory as symmetric

    made: list[torch.Tensor] = []

    def allocate() -> None:
        try:
            made.append(symmetric.empty(num_bytes, dtype=torch.uint8, device=device))
        except RuntimeError as error:
            raise Unavailable(
                f"torch could not allocate {num_bytes / 2**10:.1f} KiB that other GPUs map: {error}"
            ) from error

    together(rendezvous, allocate, what="allocate its heap")  # torch would wait for a rank that has none
    (memory,) = made
    try:
        group: Any = rendezvous.group
        handle = symmetric.rendezvous(memory, group)
    except RuntimeError as error:
        raise Unavailable(
            f"torch could not map {num_bytes / 2**20:.1f} MiB between these GPUs: {error}; docs/gpu.md says what to "
            "look at"
        ) from error
    return SymmetricHeap(memory, _bases(rendezvous, memory, handle.buffer_ptrs), rendezvous.rank, handle)


def _bases(rendezvous: Rendezvous, memory: torch.Tensor, buffer_ptrs: Sequence[int]) -> list[int]:
    """Return where every rank's memory begins here. Collective.

    A rank's pointer is that of the block which torch has mapped. The tensor may lie anywhere in it, as torch may cut
    it out of a pool, so each rank tells where.
    """
    inside = memory.data_ptr() - int(buffer_ptrs[rendezvous.rank])
    told = [int(item) for item in rendezvous.allgather(str(inside).encode())]
    return [int(base) + there for base, there in zip(buffer_ptrs, told, strict=True)]
