"""Rank processes of one host: memory files that every peer maps, and goes with the last process that does."""

from __future__ import annotations

import json
import mmap
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from anyep import config
from anyep.errors import CapacityError, Unavailable
from anyep.machine import linux
from anyep.transport.arena import Arena, Segment, address_of, shared_segment
from anyep.transport.base import Lane, Place
from anyep.transport.control import ControlLayout
from anyep.transport.memory import MemoryTransport
from anyep.transport.rendezvous import Rendezvous


def host_identity() -> str:
    """Return what ranks that share memory have in common: ANYEP_HOST_ID, or hostname, boot and network namespace.

    Never "can I see its memory": across network namespaces of one machine that is possible, and they are
    the hosts of a test.
    """
    given = config.host_id()
    if given is not None:
        return given
    boot = Path("/proc/sys/kernel/random/boot_id")
    network = Path("/proc/self/ns/net")
    parts = [platform.node(), boot.read_text().strip() if boot.exists() else "", str(network.stat().st_ino)]
    return "/".join(parts)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a rank tells the others about itself."""

    pid: int
    host: str
    control: int
    """descriptor of the control segment in that process"""
    error: str


class ShmTransport(MemoryTransport):
    """Ranks are processes of one host that map each other's arenas."""

    name = "shm"
    _num_made = 0

    def __init__(
        self,
        rendezvous: Rendezvous,
        *,
        lanes: Sequence[Lane],
        ring: int,
        heap_bytes: int,
        timeout_s: float,
        poison: bool = False,
    ) -> None:
        layout = ControlLayout.of(lanes, ring, rendezvous.size)
        self._segments: dict[tuple[int, int], Segment] = {}
        self._pidfds: dict[int, int] = {}
        self._peer_controls: list[Segment] = []
        failure: Exception | None = None
        try:
            super().__init__(rendezvous.rank, lanes, layout, shared_segment(layout.num_bytes), timeout_s)
            self._arena = Arena(self._new_segment, poison=poison)
            self._arena.grow(max(heap_bytes, 1))
        except (CapacityError, Unavailable, OSError) as error:
            failure = error
        self._cards = _exchange_cards(rendezvous, -1 if failure is not None else self._control.descriptor, failure)
        failure = self._meet_peers()
        _agree(rendezvous, failure)

    def address(self, rank: int, place: Place) -> int:
        known = self._segments.get((rank, place.segment))
        if known is None:
            known = self._map_segment(rank, place.segment)
        return known.address + place.offset

    def _new_segment(self, num_bytes: int) -> Segment:
        segment = shared_segment(num_bytes)
        struct.pack_into("q", self._control.memory, self._layout.directory_offset(self._num_made), segment.descriptor)
        self._num_made += 1
        return segment

    def _meet_peers(self) -> Exception | None:
        try:
            for rank, card in enumerate(self._cards):
                self._meet(rank, card)
            self.connect([peer.address for peer in self._peer_controls])
        except (Unavailable, OSError) as error:
            return error
        return None

    def _meet(self, rank: int, card: Card) -> None:
        if rank == self.rank:
            self._peer_controls.append(self._control)
            return
        pidfd = linux.watch_process(card.pid)  # while it is known to be alive, so that its number cannot be another's
        if pidfd is not None:
            self._pidfds[rank] = pidfd
        self._peer_controls.append(_map_peer(card.pid, card.control))
        self._map_segment(rank, 0)

    def _map_segment(self, rank: int, segment: int) -> Segment:
        if rank == self.rank:
            known = self._arena.segments[segment]
        else:
            directory = self._peer_controls[rank].memory
            (descriptor,) = struct.unpack_from("q", directory, self._layout.directory_offset(segment))
            known = _map_peer(self._cards[rank].pid, descriptor)
        self._segments[rank, segment] = known
        return known

    def _release(self) -> None:
        for descriptor in self._pidfds.values():
            os.close(descriptor)
        self._pidfds.clear()
        for segment in (self._control, *self._arena.segments):
            os.close(segment.descriptor)

    def _arena_of(self) -> Arena:
        return self._arena

    def _control_memory(self, rank: int) -> Segment:
        return self._peer_controls[rank]

    def _dead(self, ranks: Sequence[int]) -> dict[int, str]:
        watched = {rank: self._pidfds[rank] for rank in ranks if rank in self._pidfds}
        return {rank: f"(process {self._cards[rank].pid}) died" for rank in linux.ended(watched)}

    def _hint(self, ranks: Sequence[int]) -> str:
        return f"py-spy dump --pid {self._cards[ranks[0]].pid}"


def _map_peer(pid: int, descriptor: int) -> Segment:
    """Map a segment of another process, page tables and all."""
    opened = linux.open_peer_memory(pid, descriptor)
    try:
        memory = mmap.mmap(opened, 0)
    finally:
        os.close(opened)
    linux.populate(memory, write=False)
    return Segment(memory=memory, address=address_of(memory), descriptor=-1)


def _exchange_cards(rendezvous: Rendezvous, control: int, failure: Exception | None) -> list[Card]:
    card = Card(pid=os.getpid(), host=host_identity(), control=control, error=_text(failure))
    cards = [Card(**json.loads(raw)) for raw in rendezvous.allgather(json.dumps(asdict(card)).encode())]
    _raise_first([card.error for card in cards], failure)
    hosts = {rank: other.host for rank, other in enumerate(cards) if other.host != card.host}
    if hosts:
        raise Unavailable(
            f"transport 'shm' serves the ranks of one host; this is rank {rendezvous.rank} on {card.host!r}, elsewhere are "
            + ", ".join(f"rank {rank} on {host!r}" for rank, host in hosts.items())
        )
    return cards


def _agree(rendezvous: Rendezvous, failure: Exception | None) -> None:
    """Raise on every rank if one could not map its peers; nobody posts before everybody has."""
    _raise_first([raw.decode() for raw in rendezvous.allgather(_text(failure).encode())], failure)


def _raise_first(errors: Sequence[str], own: Exception | None) -> None:
    if own is not None:
        raise own
    for rank, error in enumerate(errors):
        if error:
            kind, _, text = error.partition(": ")
            raise (CapacityError if kind == "CapacityError" else Unavailable)(f"rank {rank}: {text}")


def _text(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"
