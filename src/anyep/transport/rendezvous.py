"""How ranks find each other: one verb, taken from whatever started them."""

from __future__ import annotations

import os
from typing import Protocol, runtime_checkable

import torch.distributed as dist

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@runtime_checkable
class Rendezvous(Protocol):
    """Only the constructor of a buffer talks through this; nothing afterwards does.

    An mpi4py communicator is one as it is: it has ``rank``, ``size`` and a pickling ``allgather``.
    """

    rank: int
    size: int

    def allgather(self, item: bytes) -> list[bytes]:
        """Return every rank's item, in rank order. Collective, bounded by the group's own timeout."""
        ...


class TorchRendezvous:
    """Ranks of a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def allgather(self, item: bytes) -> list[bytes]:
        items: list[bytes] = [b""] * self.size
        dist.all_gather_object(items, item, group=self._group)
        return items


class StoreRendezvous:
    """Ranks that share a torch store, for example torchrun's. The store counts instances, so a job may make many."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        instance = store.add(f"anyep/instances/{rank}", 1)
        self._store = dist.PrefixStore(f"anyep/{instance}", store)
        self._round = 0

    def allgather(self, item: bytes) -> list[bytes]:
        self._round += 1
        self._store.set(f"{self._round}/{self.rank}", item)
        return [self._store.get(f"{self._round}/{rank}") for rank in range(self.size)]


def torchrun_rendezvous() -> StoreRendezvous:
    """Meet the ranks of the torchrun job that this process belongs to; ValueError outside of one."""
    absent = [name for name in _TORCHRUN if name not in os.environ]
    if absent:
        raise ValueError(
            f"group is None, which means the ranks of a torchrun job, but {', '.join(absent)} is not set: "
            "start with torchrun, or pass a group"
        )
    store, rank, size = next(dist.rendezvous("env://"))
    return StoreRendezvous(store, rank, size)


def find_rendezvous(group: object) -> Rendezvous:
    """Return how the ranks of ``group`` meet. TypeError lists what a group can be."""
    if group is None:
        return torchrun_rendezvous()
    if isinstance(group, dist.ProcessGroup):
        return TorchRendezvous(group)
    if isinstance(group, Rendezvous):
        return group
    raise TypeError(
        "group must be a torch.distributed process group, an mpi4py communicator, a member of anyep.local_group(R), "
        f"or None inside a torchrun job; got {group!r} ({type(group).__name__})"
    )
