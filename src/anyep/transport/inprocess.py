"""Ranks as threads of one process: the smallest group there is, on any platform, and the fake for users' tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

from anyep.errors import PeerError, PeerLost, PeerTimeout
from anyep.machine import linux
from anyep.transport.arena import Arena
from anyep.transport.base import Lane
from anyep.transport.elsewhere import Holder, this_thread
from anyep.transport.liveness import Departure, blame_of, follows_from_peer, name_ranks
from anyep.transport.segments import SegmentMaker
from anyep.transport.shared import SharedTransport
from anyep.transport.together import agree_on_sizes, load_signals, together

Result = TypeVar("Result")


def local_group(num_ranks: int, *, timeout_s: float = 60.0) -> LocalGroup:
    """Return a group of ``num_ranks`` ranks for the threads of this process.

    ``timeout_s`` bounds how long a rank that makes a buffer waits for the others to make theirs.

    >>> local_group(3).run(lambda member: member.rank * 10)
    [0, 10, 20]
    """
    if isinstance(num_ranks, bool) or not isinstance(num_ranks, int):
        raise TypeError(f"num_ranks must be an int, got {num_ranks!r}")
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    return LocalGroup(num_ranks, timeout_s)


class Member:
    """One rank of a local group; pass it as ``group``."""

    def __init__(self, group: LocalGroup, rank: int) -> None:
        self.group = group
        self.rank = rank
        self.size = len(group)
        self.holder: Holder | None = None
        """who this rank is in all its transports: the thread that opened the first"""

    def allgather(self, item: bytes) -> list[bytes]:
        """Return every rank's item. Collective; PeerLost when a rank has ended, PeerTimeout after the group's time."""
        return self.group._exchange(self.rank, item)

    def exchange(self, item: Any) -> list[Any]:
        """The same for any object of this process."""
        return self.group._exchange(self.rank, item)

    def __repr__(self) -> str:
        return f"<rank {self.rank} of a local group of {self.size}>"


class LocalGroup(Sequence[Member]):
    """The members of a group, by rank."""

    def __init__(self, num_ranks: int, timeout_s: float) -> None:
        self._size = num_ranks
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._calls = [0] * num_ranks
        self._rounds: dict[int, dict[int, Any]] = {}
        self._readers: dict[int, int] = {}
        self._ended: dict[int, BaseException | None] = {}
        self._running = False
        self._members = [Member(self, rank) for rank in range(num_ranks)]

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Member: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Member]: ...
    def __getitem__(self, index: int | slice) -> Member | Sequence[Member]:
        return self._members[index]

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def departures(self) -> dict[int, Departure]:
        """Return the same as their peers see it."""
        names = [member.holder.name if member.holder is not None else 0 for member in self]
        return {rank: Departure(how="failed", blame=blame_of(error, names)) for rank, error in self.failed().items()}

    def failed(self) -> dict[int, BaseException]:
        """Return the ranks whose function raised in the run that is under way."""
        return {rank: error for rank, error in dict(self._ended).items() if error is not None}

    def run(self, function: Callable[[Member], Result]) -> list[Result]:
        """Call ``function(member)`` in a thread for each rank; return the results in rank order.

        If ranks raise, raises the first error: the root cause, not a PeerError that followed from it elsewhere.
        """
        with self._changed:
            if self._running:
                raise ValueError("this group is already running a function; make another group, or wait for its end")
            self._running = True
            self._ended = {}
        results: list[Any] = [None] * self._size
        threads = [
            threading.Thread(target=self._run_rank, args=(function, member, results), name=f"anyep-rank-{member.rank}")
            for member in self
        ]
        try:
            self._finish(threads)
        finally:
            self._running = False
        errors = list(self.failed().values())
        if errors:
            raise next((error for error in errors if not follows_from_peer(error)), errors[0])
        return results

    def _finish(self, threads: Sequence[threading.Thread]) -> None:
        for thread in threads:
            thread.daemon = True
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as interruption:  # Ctrl-C: ranks that wait find everybody gone
            for rank in range(self._size):
                self._end(rank, interruption)
            deadline = time.monotonic() + 5.0
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join(max(0.0, deadline - time.monotonic()))
            raise

    def _run_rank(self, function: Callable[[Member], Result], member: Member, results: list[Any]) -> None:
        try:
            results[member.rank] = function(member)
        except BaseException as error:
            self._end(member.rank, error)
        else:
            self._end(member.rank, None)

    def _end(self, rank: int, error: BaseException | None) -> None:
        with self._changed:
            self._ended.setdefault(rank, error)
            self._changed.notify_all()

    def _exchange(self, rank: int, item: Any) -> list[Any]:
        with self._changed:
            number = self._calls[rank]
            self._calls[rank] += 1
            items = self._rounds.setdefault(number, {})
            items[rank] = item
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: len(items) == self._size or self._stuck(items), self._timeout_s):
                raise self._absent(items, PeerTimeout, f"did not come within {self._timeout_s:g} s")
            if len(items) < self._size:
                raise self._absent(items, PeerLost, "ended before it came")
            self._readers[number] = self._readers.get(number, 0) + 1
            if self._readers[number] == self._size:
                del self._readers[number], self._rounds[number]
            return [items[source] for source in range(self._size)]

    def _stuck(self, items: Mapping[int, Any]) -> bool:
        return any(rank not in items for rank in self._ended)

    def _absent(self, items: Mapping[int, Any], kind: type[PeerError], how: str) -> PeerError:
        missing = [rank for rank in range(self._size) if rank not in items]
        if kind is PeerLost:
            missing = [rank for rank in missing if rank in self._ended]
        text = (
            f"{name_ranks(missing)} {how} to the making of a buffer or transport, which takes all "
            f"{self._size} ranks of the local group; let every rank make it"
        )
        return kind(text, ranks=missing, step="opening")


class _Threads:
    """Memory of ranks in the same process: their addresses are ours. Keeps all of it while this rank is open."""

    def __init__(self, group: LocalGroup, arenas: Sequence[Arena]) -> None:
        self._group = group
        self._arenas = arenas

    def segment_address(self, rank: int, index: int) -> int:
        return self._arenas[rank].segments[index].address

    def departures(self) -> Mapping[int, Departure]:
        return self._group.departures()

    def names(self) -> Mapping[int, str]:
        return {rank: f"{type(error).__name__}: {error}" for rank, error in self._group.failed().items()}

    def close(self) -> None:
        """Nothing to give back: memory goes with its last reader."""


class InProcessTransport(SharedTransport):
    """Ranks are threads of this process. Made by all members of a local group, collectively.

    ``members``: those that share memory with this rank, where some play ranks of other hosts.
    """

    name = "inprocess"

    def __init__(
        self,
        member: Member,
        *,
        lanes: Sequence[Lane],
        ring: int,
        heap_bytes: int,
        timeout_s: float,
        poison: bool = False,
        members: Sequence[int] | None = None,
    ) -> None:
        layout, _ = agree_on_sizes(member, lanes=lanes, ring=ring, heap_bytes=heap_bytes, timeout_s=timeout_s)
        maker = SegmentMaker(linux.private_memory, load_signals(), member.size)
        arena = Arena(maker, poison=poison)
        together(member, lambda: arena.begin(reserved_bytes=layout.num_bytes, heap_bytes=heap_bytes))
        arenas: list[Arena] = member.exchange(arena)
        holder = member.holder = member.holder or this_thread()
        holders: list[int] = member.exchange(holder.name)
        super().__init__(
            member,
            layout=layout,
            timeout_s=timeout_s,
            arena=arena,
            maker=maker,
            memories=_Threads(member.group, arenas),
            controls={rank: arenas[rank].segments[0].address for rank in members or range(member.size)},
            holders=holders,
            holder=holder,
        )
