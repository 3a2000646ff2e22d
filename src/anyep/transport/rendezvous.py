"""How ranks find each other: one verb, taken from whatever started them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

from anyep.errors import PeerLost, PeerTimeout, Unavailable
from anyep.transport.identity import Identity
from anyep.transport.liveness import name_ranks

_STORE_TIMEOUT = timedelta(minutes=5)
_MAKING = "the making of a buffer or transport"
_LOOK_S = 0.5
"""How often a rank that waits at a store looks whether those that have not come still live."""
_SHORT_NAP_S, _LONG_NAP_S = 0.0005, 0.05


@runtime_checkable
class Rendezvous(Protocol):
    """Only the constructor of a buffer talks through this; nothing afterwards does."""

    rank: int
    size: int

    def allgather(self, item: bytes) -> list[bytes]:
        """Return every rank's item, in rank order. Collective, bounded by the group's own timeout."""
        ...


class TorchRendezvous:
    """A torch.distributed process group (or None: the default one).

    How soon a rank that died is noticed is up to the group's backend: gloo sees a broken connection at once, others
    may wait for the group's timeout (``init_process_group(timeout=)``). A rank that never comes takes that long anyhow.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        self.group = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError(
                "this process is not a member of the process group; only its members may make a buffer on it"
            )

    def allgather(self, item: bytes) -> list[bytes]:
        import torch.distributed as dist

        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items


class StoreRendezvous:
    """A torch.distributed store that all ranks reach, for example torchrun's.

    ``name`` keeps users of one store apart. Several rendezvous of one name in one job are matched by order: the store
    itself counts each rank's. A rank of this host whose process has ended is noticed within a second, any other that
    does not come after ``timeout``.
    """

    def __init__(
        self, store: Any, rank: int, size: int, *, name: str = "anyep", timeout: timedelta = _STORE_TIMEOUT
    ) -> None:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        self.rank = rank
        self.size = size
        self._timeout = timeout
        own: Any = PrefixStore(name, store)
        own.set(_process_key(rank), json.dumps(asdict(Identity.own())))  # before anybody can miss this rank
        self._own = own
        self._store: Any = PrefixStore(str(own.add(f"opened/{rank}", 1)), own)
        self._calls = 0

    def allgather(self, item: bytes) -> list[bytes]:
        self._calls += 1
        keys = [f"{self._calls}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], item)
        self._await(keys)
        items = [bytes(self._store.get(key)) for key in keys]
        if self._store.add(f"{self._calls}/read", 1) == self.size:
            for key in (*keys, f"{self._calls}/read"):
                self._store.delete_key(key)
        return items

    def _await(self, keys: Sequence[str]) -> None:
        """Look again and again: a store's own wait writes two lines of warnings each time that it gives up."""
        timeout_s, look_s = self._timeout.total_seconds(), _LOOK_S
        began = time.monotonic()
        while not self._store.check(list(keys)):
            waited_s = time.monotonic() - began
            if waited_s >= timeout_s:
                missing = self._missing(keys)
                if missing:
                    text = f"{name_ranks(missing)} did not come to {_MAKING} within {timeout_s:g} s"
                    raise PeerTimeout(self._tale(text), ranks=missing, step="opening")
            if waited_s >= look_s:
                self._check_lives(keys)
                look_s = waited_s + _LOOK_S
            time.sleep(min(max(waited_s / 4, _SHORT_NAP_S), _LONG_NAP_S))

    def _missing(self, keys: Sequence[str]) -> list[int]:
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def _check_lives(self, keys: Sequence[str]) -> None:
        """Raise PeerLost for missing ranks whose processes can be seen to have ended."""
        ended = [rank for rank in self._missing(keys) if self._has_ended(rank)]
        ended = [rank for rank in ended if not self._store.check([keys[rank]])]  # nor left its item before its end
        if ended:
            who = ", ".join(f"{rank} (process {self._identity(rank).pid})" for rank in ended)
            raise PeerLost(self._tale(f"rank {who} ended before it came to {_MAKING}"), ranks=ended, step="opening")

    def _has_ended(self, rank: int) -> bool:
        return bool(self._own.check([_process_key(rank)])) and self._identity(rank).has_ended()

    def _identity(self, rank: int) -> Identity:
        return Identity(**json.loads(self._own.get(_process_key(rank))))

    def _tale(self, text: str) -> str:
        return f"{text}; all {self.size} ranks have to make it: look at their output"


def _process_key(rank: int) -> str:
    return f"process/{rank}"


class MpiRendezvous:
    """An mpi4py communicator.

    MPI has no timeout: a rank that never comes is waited for. One that dies is its launcher's to notice, which by
    default ends the whole job at once (mpiexec).
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank = int(comm.Get_rank())
        self.size = int(comm.Get_size())

    def allgather(self, item: bytes) -> list[bytes]:
        return list(self._comm.allgather(item))


_POSSIBLE = (
    "group must be a torch.distributed process group, an mpi4py communicator, a member of anyep.local_group(R), "
    "an object with rank, size and allgather(bytes), or None inside a torchrun job"
)


def find_rendezvous(group: object) -> Rendezvous:
    """Return how to reach the ranks of ``group``. Raises TypeError with the list of what it can be."""
    if group is None:
        return _from_environment()
    if _is_process_group(group):
        return TorchRendezvous(group)
    if _is_communicator(group):
        return MpiRendezvous(group)
    if isinstance(group, Rendezvous) and isinstance(group.rank, int) and isinstance(group.size, int):
        return group
    raise TypeError(f"{_POSSIBLE}; got {type(group).__name__}")


def _is_process_group(group: object) -> bool:
    import torch.distributed as dist

    return dist.is_available() and isinstance(group, dist.ProcessGroup)


def _is_communicator(group: object) -> bool:
    mpi = sys.modules.get("mpi4py.MPI")  # whoever has a communicator has imported it
    return mpi is not None and isinstance(group, mpi.Comm)


def _from_environment() -> Rendezvous:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return TorchRendezvous()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise TypeError(
            f"{_POSSIBLE}; got None, and torchrun's agent did not start this process: call "
            "torch.distributed.init_process_group() first, or pass a group"
        )
    if not dist.is_available():
        raise Unavailable("this torch was built without torch.distributed; pass an mpi4py communicator as group")
    store, rank, size = next(dist.rendezvous("env://", timeout=_STORE_TIMEOUT))  # type: ignore[attr-defined]
    return StoreRendezvous(store, rank, size)
