"""Ranks that meet again after some of them have died, without starting those that live anew.

A buffer is over when a rank of it dies. The ranks that are left keep their processes; new ones take the places of the
dead. Each time they all meet is a *generation*: who was in the last one goes on to the next, who is new joins the one
that is being formed.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from anyep.transport.rendezvous import StoreRendezvous


class Generations:
    """One rank's place among ``size``, whatever process holds it. ``store``: a torch.distributed store that outlives
    them all: of a process that does no work, or of the launcher; all ranks reach it.

    ``timeout_s``: how long those that have come wait for the others, a new host's start included::

        generations = anyep.Generations(store, rank, size)
        while True:
            try:
                with anyep.Buffer(generations.meet(), ...) as ep:
                    work(ep)
                break
            except anyep.PeerError:
                restore()      # what the ranks that died knew
    """

    def __init__(
        self, store: Any, rank: int, size: int, *, name: str = "anyep-generations", timeout_s: float = 300.0
    ) -> None:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        if not 0 <= rank < size:
            raise ValueError(f"rank must be from 0 to size - 1 = {size - 1}, got {rank}")
        self.rank = rank
        self.size = size
        self.number = 0
        """of the generation that this process is in, from 1 on; 0 before it has met anybody"""
        self._store: Any = PrefixStore(name, store)
        self._timeout = timedelta(seconds=timeout_s)

    def meet(self) -> StoreRendezvous:
        """Return the group of the next generation, for a buffer. The buffer of the last one must be closed.

        Alone: waiting for the others is the constructor's of the buffer, which raises PeerTimeout with those that have
        not come, and PeerLost for one that came and died; then meet again.
        """
        self.number = self.number + 1 if self.number else self._joined()
        if self._store.add(f"begun/{self.number}", 1) == 1:
            self._store.add("last", 1)
        self._store.add(f"member/{self.number}/{self.rank}", 1)
        return StoreRendezvous(
            self._store, self.rank, self.size, name=f"generation/{self.number}", timeout=self._timeout
        )

    def _joined(self) -> int:
        """Return the generation for a new process: the last that has begun, unless its rank was in there already."""
        last = int(self._store.add("last", 0))
        taken = last == 0 or self._store.add(f"member/{last}/{self.rank}", 0) > 0
        return last + 1 if taken else last
