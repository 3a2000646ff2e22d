"""Ranks on several hosts: shared memory inside a host, an engine between hosts, one numbering of ranks.

A message to all ranks goes to the neighbours directly, and once to each other host: to the forwarder there, who posts
it in the sender's name to its own host. Or straight to every rank, each of which posts it to itself
(:meth:`HierarchicalTransport.announce_straight`). A message to some ranks only goes to neighbours.

Whoever waits for messages of all ranks first passes on what it has to forward. So messages cross while everybody does
what it does anyhow, and no thread runs in the background.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from anyep.errors import Unavailable
from anyep.layout.hosts import HostMap
from anyep.transport.base import Blame, Block, Lane, Place, Ranks, Words
from anyep.transport.engine import Bytes, Engine, Transfer, has_come
from anyep.transport.farewells import Farewells
from anyep.transport.liveness import Departure, Wait, given_up, name_ranks
from anyep.transport.questions import Questions
from anyep.transport.shared import SharedTransport

SLICE_NS = 50_000_000
"""How long a forwarder waits for the network before it looks after its neighbours."""
_LANE_BITS, _CHUNK_BITS, _EPOCH_BITS = 3, 15, 12
MAX_CHUNKS = 1 << _CHUNK_BITS
_ABOUT_ITSELF = 7
"""A kind beside the lanes' own and those of operations (exchange/courier.py): what a rank says of itself."""


def tag_of(kind: int, epoch: int, chunk: int = 0) -> int:
    """Return the engine's tag: kinds of messages, operations, and pieces of one message never meet.

    >>> tag_of(0, 1) == tag_of(0, 1 + (1 << 12)), tag_of(1, 1, 5) == tag_of(1, 1, 6)
    (True, False)
    """
    assert 0 <= chunk < MAX_CHUNKS, "longer messages are cut into larger pieces"
    return ((epoch % (1 << _EPOCH_BITS)) << (_LANE_BITS + _CHUNK_BITS)) | (kind << _CHUNK_BITS) | chunk


class HierarchicalTransport:
    """One rank of several hosts. ``transport/base.py`` says what each method promises.

    ``local`` reaches the ranks of this host and numbers messages by all ranks; ``engine`` reaches all others.
    """

    def __init__(self, local: SharedTransport, engine: Engine, hosts: HostMap, *, timeout_s: float) -> None:
        self.name = f"{local.name} inside hosts, {engine.name} between"
        self.rank, self.size = local.rank, local.size
        self.waited_ns = local.waited_ns
        self.holders = local.holders
        self._all_hosts = self.hosts = hosts
        self.engine = engine
        self.timeout_s = timeout_s
        self._local = local
        self._to: list[int] = []
        self._from: tuple[int, ...] = ()
        self._turn = threading.Lock()
        self._num_passing = 0
        partners = hosts.far_ranks(self.rank)
        self._farewells = Farewells(engine, partners, tag_of(_ABOUT_ITSELF, 0, 0))
        local.inquiry.others = Questions(
            engine, partners, asks=tag_of(_ABOUT_ITSELF, 0, 1), tells=tag_of(_ABOUT_ITSELF, 0, 2)
        )
        self._is_straight = False
        self.leave_out(())
        self._sent: dict[tuple[int, int], list[tuple[Transfer, Bytes]]] = {}
        self._awaited: dict[tuple[int, int], dict[int, tuple[Transfer, Bytes]]] = {}

    def leave_out(self, ranks: Collection[int]) -> None:
        """Let the ranks that are left forward for each other."""
        self._local.leave_out(ranks)
        self.hosts = hosts = self._all_hosts.without(ranks)
        own = int(hosts.host_R[self.rank])
        self._local.let_post({source: hosts.forwarder(source, own) for source in hosts.far_ranks(self.rank)})
        self.announce_straight(self._is_straight)

    def announce_straight(self, straight: bool) -> None:
        """Choose how messages to all ranks go to other hosts from now on, all ranks alike between the same two."""
        hosts, rank = self.hosts, self.rank
        self._is_straight = straight
        if straight:
            self._from = hosts.far_ranks(rank)
            self._to = sorted(self._from, key=lambda other: (other - rank) % self.size)
        else:
            self._to = [hosts.forwarder(rank, host) for host in hosts.far_hosts(rank)]
            self._from = hosts.sources_of(rank)

    def allocate(self, num_bytes: int) -> Block:
        return self._local.allocate(num_bytes)

    def trim(self, block: Block, num_bytes: int) -> None:
        self._local.trim(block, num_bytes)

    def locate(self, address: int, num_bytes: int) -> Place | None:
        return self._local.locate(address, num_bytes)

    def address(self, rank: int, place: Place) -> int:
        return self._local.address(rank, place)

    def post(self, lane: Lane, epoch: int, words: Words, ranks: Ranks | None = None) -> None:
        self._local.post(lane, epoch, words, ranks)
        if ranks is not None:
            return
        with self._turn:
            self._expect(lane, epoch)
            self._sent[lane.index, epoch] = [self._send(lane, epoch, rank, words) for rank in self._to]
            self._drop_what_was_sent()

    def post_for(self, source: int, lane: Lane, epoch: int, words: Words, ranks: Ranks | None = None) -> None:
        """Post to neighbours in the name of a rank of another host."""
        self._local.post_for(source, lane, epoch, words, ranks)

    def wait(self, lane: Lane, epoch: int, step: str, ranks: Ranks | None = None) -> Words:
        if ranks is None:
            with self.passing_on():
                self._pass_on(lane, epoch, step)
        return self._local.wait(lane, epoch, step, ranks)

    def arrived(self, lane: Lane, epoch: int) -> bool:
        with self._turn:
            awaited = self._awaited.get((lane.index, epoch), {})
            ready = all(self.is_done(transfer) for transfer, _ in awaited.values())
            if awaited and ready:
                self._post_awaited(lane, epoch)
        return ready and self._local.arrived(lane, epoch)

    def check(self, epoch: int, step: str) -> None:
        self._local.check(epoch, step)

    def claim(self, epoch: int) -> bool:
        raise Unavailable("ranks of several hosts forward for each other: none of them can be expelled")

    def expel(self, rank: int, epoch: int) -> bool:
        raise Unavailable("ranks of several hosts forward for each other: none of them can be expelled")

    def leave(self, blame: Blame | None = None) -> None:
        self._local.leave(blame)
        if self._local.is_fork:
            return  # the connections are the parent's: what a child sends there its partners take for the parent's
        with self._turn:
            under_way = [transfer for sent in self._sent.values() for transfer, _ in sent] if blame is None else []
        self._farewells.say(blame, under_way)

    def close(self) -> None:
        self.leave()
        self._local.close()
        if not self._local.is_fork:
            self.engine.close()

    def describe(self) -> dict[str, str]:
        told = map(name_ranks, self._all_hosts.members)
        return {
            **self._local.describe(),
            "hosts": f"{self.hosts.num_hosts} ({'; '.join(told)})",
            **self.engine.describe(),
        }

    @contextmanager
    def passing_on(self) -> Iterator[None]:
        """Look after what comes from other hosts, in one thread or several; neighbours that miss it may know."""
        with self._turn:
            self._num_passing += 1
            self._local.say_passing_on(True)
        try:
            yield
            self._local.say_waited()
        finally:
            with self._turn:
                self._num_passing -= 1
                self._local.say_passing_on(self._num_passing > 0)

    def is_done(self, transfer: Transfer) -> bool:
        """Return whether a message has come through; False too when it never will: waiting for it tells why."""
        return has_come(transfer)

    def await_transfers(self, transfers: Sequence[Transfer], epoch: int, step: str, began_ns: int) -> None:
        """Wait a slice for one of ``transfers``; raise PeerLost or PeerTimeout if one cannot come, or time is up."""
        self._local.check(epoch, step)
        self._local.say_passing_on(self._num_passing > 0)
        if time.monotonic_ns() - began_ns >= SLICE_NS:
            self._local.say_waiting(sorted({transfer.rank for transfer in transfers}), began_ns)
        self.engine.wait(transfers, SLICE_NS / 1e9)
        # First who has left, then what has come: what a rank sent, or took, before it left counts.
        departures = {**self.engine.departures(), **self._farewells.told()}
        elapsed_s = (time.monotonic_ns() - began_ns) / 1e9
        late = sorted({transfer.rank for transfer in transfers if not self.is_done(transfer)})
        if late and (elapsed_s >= self.timeout_s or not departures.keys().isdisjoint(late)):
            self._give_up(late, epoch, step, began_ns, departures)

    def _send(self, lane: Lane, epoch: int, rank: int, words: Words) -> tuple[Transfer, Bytes]:
        message = np.zeros(1 + lane.words, np.int64)
        message[0] = words.shape[1]
        message[1 : 1 + words.shape[1]] = words[rank]
        memory = message.view(np.uint8)
        return self.engine.send(rank, tag_of(lane.index, epoch), memory), memory

    def _expect(self, lane: Lane, epoch: int) -> None:
        """Give the engine memory for what has to be passed on."""
        if not self._from:
            return
        awaited = self._awaited[lane.index, epoch] = {}
        for source in self._from:
            memory = np.empty(8 * (1 + lane.words), np.uint8)
            awaited[source] = self.engine.receive(source, tag_of(lane.index, epoch), memory), memory

    def _drop_what_was_sent(self) -> None:
        for key, sent in list(self._sent.items()):
            self._sent[key] = [one for one in sent if not self.is_done(one[0])]
            if not self._sent[key]:
                del self._sent[key]

    def _pass_on(self, lane: Lane, epoch: int, step: str) -> None:
        began_ns = time.monotonic_ns()
        while True:
            with self._turn:
                awaited = self._awaited.get((lane.index, epoch), {})
                missing = [transfer for transfer, _ in awaited.values() if not self.is_done(transfer)]
                if not missing:
                    if awaited:
                        self._post_awaited(lane, epoch)
                    return
            self.await_transfers(missing, epoch, step, began_ns)

    def _post_awaited(self, lane: Lane, epoch: int) -> None:
        to = np.array([self.rank], np.int64) if self._is_straight else None
        for source, (_, memory) in self._awaited.pop((lane.index, epoch)).items():
            message = memory.view(np.int64)
            row = message[1 : 1 + int(message[0])]
            words = np.ascontiguousarray(np.broadcast_to(row, (self.size, row.size)))
            self._local.post_for(source, lane, epoch, words, to)

    def _give_up(
        self, late: list[int], epoch: int, step: str, began_ns: int, departures: Mapping[int, Departure]
    ) -> None:
        wait = Wait(
            step=step,
            epoch=epoch,
            rank=self.rank,
            missing=late,
            arrived=[rank for rank in self._from if rank not in late],
            elapsed_s=(time.monotonic_ns() - began_ns) / 1e9,
            timeout_s=self.timeout_s,
            names={rank: f"on host {int(self.hosts.host_R[rank])}" for rank in range(self.size)},
            holders=self.holders,
            culprits=self._local.inquiry.culprits(),
        )
        raise given_up(wait, departures, self._local.standing_still(late, began_ns, departures))
