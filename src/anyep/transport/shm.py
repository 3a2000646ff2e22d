"""Ranks as processes of one host: memory without a name that peers map, and ends that the kernel tells.

Nothing is left behind however a rank ends: memory files have no name in any file system and go with their last user.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import ModuleType

from anyep.errors import CapacityError, Unavailable
from anyep.machine import linux, processes
from anyep.transport.arena import Arena
from anyep.transport.base import Lane
from anyep.transport.board import Board
from anyep.transport.elsewhere import name_of, this_process
from anyep.transport.identity import Identity
from anyep.transport.liveness import Departure, name_ranks
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.segments import SegmentMaker
from anyep.transport.shared import SharedTransport
from anyep.transport.together import agree_on_sizes, load_signals, together

_RANDOM_ADDRESSES = (
    "random in each program that is started, unless ranks are forks of one; where ranks share cores, setarch -R before "
    "the command saves them time"
)


def check_one_host(identities: Mapping[int, Identity]) -> None:
    """Raise Unavailable unless all ranks run on one host and can name each other's processes."""
    by_host: dict[str, list[int]] = {}
    for rank, identity in identities.items():
        by_host.setdefault(identity.host, []).append(rank)
    if len(by_host) > 1:
        where = "; ".join(f"{name_ranks(ranks)} on {host!r}" for host, ranks in by_host.items())
        raise Unavailable(
            f"transport 'shm' needs all ranks on one host, and there are {len(by_host)}: {where}. "
            "Start all ranks on one; if these are one host, give it one name (ANYEP_HOST_ID)"
        )
    namespaces = {identity.process_namespace for identity in identities.values()}
    if len(namespaces) > 1:
        raise Unavailable(
            "transport 'shm' needs ranks that can see each other's processes, and these run in "
            f"{len(namespaces)} PID namespaces: let the containers share one"
        )


class ShmTransport(SharedTransport):
    """Ranks are processes of one host. Made by all of them, collectively.

    ``members``: the ranks of this host, where others live on other hosts. Raises Unavailable (with the ranks and their
    hosts), CapacityError, ValueError: on every rank if on one.
    """

    name = "shm"

    def __init__(
        self,
        rendezvous: Rendezvous,
        *,
        lanes: Sequence[Lane],
        ring: int,
        heap_bytes: int,
        timeout_s: float,
        poison: bool = False,
        members: Sequence[int] | None = None,
    ) -> None:
        here = range(rendezvous.size) if members is None else members
        layout, told = agree_on_sizes(
            rendezvous,
            lanes=lanes,
            ring=ring,
            heap_bytes=heap_bytes,
            timeout_s=timeout_s,
            identity=asdict(Identity.own()),
            members=here,
        )
        identities = {rank: Identity(**told[rank]) for rank in here}
        together(rendezvous, lambda: check_one_host(identities))
        signals = load_signals()
        maker = SegmentMaker(linux.shared_memory, signals, rendezvous.size)
        arena = Arena(maker, poison=poison)
        memories = _Processes(signals, rendezvous.rank, rendezvous.size, identities, arena)

        def offer() -> dict[str, int]:
            arena.begin(reserved_bytes=layout.num_bytes, heap_bytes=heap_bytes)
            first = arena.segments[0]
            token = Board(signals, first.address, rendezvous.size).token = secrets.randbits(62)
            return {"fd": first.fd, "inode": first.inode, "size": first.size, "token": token}

        try:
            cards = together(rendezvous, offer)
            together(rendezvous, lambda: memories.meet(cards))
        except BaseException:
            memories.close()
            arena.close()
            raise
        super().__init__(
            rendezvous,
            layout=layout,
            timeout_s=timeout_s,
            arena=arena,
            maker=maker,
            memories=memories,
            controls={rank: memories.segment_address(rank, 0) for rank in here},
            holders=[name_of(Identity(**other)) for other in told],
            holder=this_process(),
        )

    def describe(self) -> dict[str, str]:
        alike = "the same in ranks that were started alike" if processes.lie_alike() else _RANDOM_ADDRESSES
        return {**super().describe(), "addresses": alike}


class _Processes:
    """Memory of ranks in other processes: their segments as mapped here, and a watch on their ends."""

    def __init__(
        self, signals: ModuleType, rank: int, size: int, identities: Mapping[int, Identity], arena: Arena
    ) -> None:
        self._signals = signals
        self._rank = rank
        self._size = size
        self._pids = {rank: identity.pid for rank, identity in identities.items()}
        self._mapped: dict[tuple[int, int], linux.Memory] = {}
        self._mapping = threading.Lock()
        self._own = arena
        self._watch: processes.ProcessWatch | None = None

    def meet(self, cards: Sequence[dict[str, int]]) -> None:
        """Map every rank's first segment and watch its process, while all wait for each other and so are alive.

        Raises Unavailable where this process may not, CapacityError for lack of descriptors or memory.
        """
        try:
            self._watch = processes.ProcessWatch(pid for pid in self._pids.values() if pid != os.getpid())
            for rank in self._pids:
                if rank != self._rank:
                    self._meet(rank, cards[rank])
        except PermissionError as error:
            raise Unavailable(
                f"transport 'shm' needs to map the memory of other ranks through /proc, and may not ({error}): "
                "run all ranks as one user, in containers that allow it"
            ) from error
        except OSError as error:
            raise CapacityError(
                f"could not map the memory of {len(self._pids) - 1} other ranks ({error}): raise the limits on files "
                "(ulimit -n) and address space (ulimit -v)"
            ) from error

    def _meet(self, rank: int, card: dict[str, int]) -> None:
        memory = linux.map_peer_memory(self._pids[rank], card["fd"], card["inode"], card["size"])
        if Board(self._signals, memory.address, self._size).token != card["token"]:
            raise Unavailable(
                f"what process {self._pids[rank]} shares is not the memory of rank {rank}: its process number means "
                "another process here; let the ranks' containers share a PID namespace"
            )
        self._mapped[rank, 0] = memory

    def segment_address(self, rank: int, index: int) -> int:
        if rank == self._rank:
            return self._own.segments[index].address
        memory = self._mapped.get((rank, index))
        if memory is None:
            with self._mapping:
                memory = self._mapped.get((rank, index)) or self._map(rank, index)
        return memory.address

    def _map(self, rank: int, index: int) -> linux.Memory:
        """Map a segment that its owner has added since the start."""
        fd, inode, size = Board(self._signals, self._mapped[rank, 0].address, self._size).segment(index)
        try:
            memory = self._mapped[rank, index] = linux.map_peer_memory(self._pids[rank], fd, inode, size)
        except ProcessLookupError:
            raise
        except OSError as error:
            raise CapacityError(
                f"could not map {size / (1 << 20):.1f} MiB more of rank {rank} ({error}): raise the limits on files "
                "(ulimit -n) and address space (ulimit -v), or begin with a larger arena"
            ) from error
        return memory

    def departures(self) -> Mapping[int, Departure]:
        dead = self._watch.dead() if self._watch is not None else set()
        if not dead:
            return {}
        return {rank: Departure(how="died") for rank, pid in self._pids.items() if pid in dead}

    def names(self) -> Mapping[int, str]:
        return {
            rank: f"process {pid}" + ", stopped by a signal or a debugger" * processes.is_stopped(pid)
            for rank, pid in self._pids.items()
        }

    def close(self) -> None:
        """Stop watching. Mappings go with their last user: another thread may still be in a wait."""
        if self._watch is not None:
            self._watch.close()
