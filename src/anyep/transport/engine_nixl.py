"""The engine for clusters: NIXL, which writes into other ranks' memory, by RDMA where there is RDMA.

Messages go as ``engine_talk.py`` says. What is not eager is written in pieces into a *window*: registered memory of the
receiver, a few slots for each sender, from where the receiver copies it to its place. The sender has as many slots
from which it writes. Registering the places themselves would save these copies, but every rank keeps what it was ever
told of another's registrations, so that memory that is registered anew for each message would fill theirs, and an old
key could be used for new memory. A sender knows which slots are free; the receiver gives each back by a note.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import numpy as np

from anyep.errors import ClosedError, Unavailable
from anyep.transport.engine import Bytes, Transfer
from anyep.transport.engine_checks import check_message, check_writable
from anyep.transport.engine_parcel import Note, NoteKind, Parcel
from anyep.transport.engine_talk import Talk, part
from anyep.transport.liveness import Departure, name_ranks
from anyep.transport.nixl_agent import HOW_TO_REACH, NixlAgent
from anyep.transport.nixl_streams import PIECE_BYTES, PIECE_KIND, SLOTS, Streams
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.together import together

EAGER_BYTES = 16 << 10
_HEADER = struct.Struct("<IIQ")
"""NoteKind, tag, bytes."""
_HELLO, _PING = 17, 18
_YIELDS = 30
_SHORT_NAP_S, _LONG_NAP_S = 0.00005, 0.0003
_QUIET_NAP_S, _IDLE_NAP_S = 0.002, 0.02
"""How long the background sleeps at most: while messages are awaited, none of which comes, and while there are none."""
_PING_S = 0.5
_NOTHING = np.zeros(0, np.uint8)


class NixlEngine:
    """See :class:`anyep.transport.engine.Engine`. Made by all ranks, collectively; needs ``anyep[nixl]``.

    ``interface``: a network device by UCX's name, such as ``eth0`` or ``mlx5_0:1``; None: UCX chooses. Raises
    Unavailable on all ranks where NIXL is missing, does not work, or a rank cannot be reached within ``timeout_s``.
    """

    name = "nixl"
    eager_bytes = EAGER_BYTES

    def __init__(self, rendezvous: Rendezvous, *, interface: str | None = None, timeout_s: float = 60.0) -> None:
        self.rank = rendezvous.rank
        self.size = rendezvous.size
        self.sent_bytes = 0
        self._lock = threading.RLock()
        self._changed = threading.Event()
        self._hello: set[int] = set()
        self._gone: dict[int, Exception] = {}
        self._looked = self._pinged = 0.0
        self._open = True
        self._agent = NixlAgent(rendezvous, window_bytes=SLOTS * PIECE_BYTES, interface=interface)
        others = [rank for rank in range(self.size) if rank != self.rank]
        self._talks = {rank: Talk(rank, self.rank, self, self._lock) for rank in others}
        self._streams = Streams(self._agent, self._talks, self.tell, self._lose)
        try:
            together(rendezvous, lambda: self._meet(timeout_s), what="reach the other ranks by NIXL")
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._move_on, name="anyep-nixl", daemon=True)
        self._thread.start()

    def send(self, rank: int, tag: int, memory: Bytes) -> Transfer:
        with self._lock:
            parcel = self._talk(rank, tag, memory).send(tag, memory)
            self.sent_bytes += memory.size
            return parcel

    def receive(self, rank: int, tag: int, memory: Bytes) -> Transfer:
        with self._lock:
            talk = self._talk(rank, tag, memory)
            check_writable(memory)
            return talk.receive(tag, memory)

    def wait(self, transfers: Sequence[Transfer], timeout_s: float) -> None:
        self._check_open()
        deadline = time.monotonic() + timeout_s
        looks, nap_s = 0, _SHORT_NAP_S
        while self._open and not any(map(_settled, transfers)):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            if self._progress():
                looks, nap_s = 0, _SHORT_NAP_S
            elif looks < _YIELDS:
                looks += 1
                time.sleep(0)  # give way: the peer may be on this core
            else:
                time.sleep(min(left_s, nap_s))
                nap_s = min(2 * nap_s, _LONG_NAP_S)

    def flush(self, quiet_s: float, without: Collection[int] = ()) -> bool:
        self._check_open()
        talks = [talk for rank, talk in self._talks.items() if rank not in without]
        for talk in talks:
            talk.ask()
        moved = time.monotonic()
        while not all(talk.is_heard for talk in talks):
            if self._progress():
                moved = time.monotonic()
            elif time.monotonic() - moved >= quiet_s:
                return False
            else:
                time.sleep(_SHORT_NAP_S)
        return True

    def departures(self) -> Mapping[int, Departure]:
        return {rank: talk.departure for rank, talk in self._talks.items() if talk.departure is not None}

    def describe(self) -> dict[str, str]:
        own = self._agent.remotes[self.rank].where
        return {
            "engine": "NIXL, UCX inside",
            "ucx": ", ".join(f"{key}={value}" for key, value in self._agent.options.items()) or "chooses by itself",
            "here": own,
            "ucx memory": ", ".join(self._agent.kinds),
            "window": f"{SLOTS} pieces of {PIECE_BYTES >> 10} KiB a rank; up to {EAGER_BYTES >> 10} KiB go at once",
            "engine memory": f"{2 * self.size * SLOTS * PIECE_BYTES >> 10} KiB of windows",
        }

    def close(self) -> None:
        if not self._open:
            return
        part(self._talks.values(), self._look_or_nap)
        with self._lock:
            if not self._open:
                return
            self._open = False
            for talk in self._talks.values():
                talk.close(_closed)
        thread = getattr(self, "_thread", None)
        self._changed.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock, suppress(Exception):  # what a lost peer keeps NIXL from giving back ends with the agent
            list(self._agent.notes())  # a last chance for our notes to leave
            self._agent.close()

    def tell(self, rank: int, kind: NoteKind, tag: int, num_bytes: int, rest: Bytes) -> None:
        if kind == NoteKind.HEARD or self._talks[rank].departure is None:
            self._notify(rank, _HEADER.pack(kind, tag, num_bytes) + rest.tobytes())

    def expose(self, parcel: Parcel) -> Bytes:
        """The window is there already; ``registration`` counts the bytes that have come."""
        parcel.registration = 0
        return _NOTHING

    def withdraw(self, parcel: Parcel) -> None:
        """Nobody but this rank writes there."""

    def put(self, parcel: Parcel, count: int, place: Bytes, told_bytes: int) -> None:
        if count:
            self._streams.put(parcel, count, told_bytes)
        else:
            self.tell(parcel.rank, NoteKind.DONE, parcel.tag, told_bytes, _NOTHING)
            self._talks[parcel.rank].sent(parcel)

    def settled(self) -> None:
        """Who waits here looks by itself."""

    def _look_or_nap(self) -> None:
        if not self._progress():
            time.sleep(_SHORT_NAP_S)

    def look(self) -> None:
        if self._open:
            self._progress()

    def _progress(self) -> bool:
        """Take what has come and look after what is on its way; return whether anything happened.

        That somebody else is there too is nothing: two ranks that flush would keep each other waiting.
        """
        if not self._lock.acquire(blocking=False):
            return False  # another thread is at it
        try:
            if not self._open:
                return False
            self._looked = time.monotonic()
            happened = False
            gone, self._gone = self._gone, {}
            for rank, raw in self._agent.notes():
                happened |= self._hear(rank, raw)
            for rank, error in gone.items():
                self._talks[rank].end(Departure(how="died"), f"NIXL: {error}")
            return self._streams.look_after_writes() or happened
        finally:
            self._lock.release()

    def _hear(self, rank: int, raw: bytes) -> bool:
        """Act on a note; return whether it was more than a sign of life."""
        kind, tag, num_bytes = _HEADER.unpack_from(raw)
        if kind == PIECE_KIND:
            self._streams.take(rank, raw)
        elif kind == NoteKind.CREDIT:
            self._streams.free(rank, num_bytes)
        elif kind == _HELLO:
            self._hello.add(rank)
        elif kind != _PING:
            rest = np.frombuffer(raw, np.uint8, offset=_HEADER.size)
            self._talks[rank].heard(Note(NoteKind(kind), tag, num_bytes, rest))
        return bool(kind != _PING)

    def _notify(self, rank: int, note: bytes) -> None:
        if rank in self._gone:
            return
        try:
            self._agent.notify(rank, note)
        except Exception as error:  # its errors have no common kind
            self._lose(rank, error)

    def _lose(self, rank: int, error: Exception) -> None:
        """Count a rank as dead once all has been heard that it told before: its BYE may be there already."""
        self._gone.setdefault(rank, error)

    def _meet(self, timeout_s: float) -> None:
        """Exchange a word with every rank: connections are made by the first."""
        for rank in self._talks:
            self._agent.notify(rank, _HEADER.pack(_HELLO, 0, 0))
        deadline = time.monotonic() + timeout_s
        while len(self._hello) < len(self._talks):
            if not self._progress():
                time.sleep(_LONG_NAP_S)
            missing = sorted(set(self._talks) - self._hello)
            if missing and time.monotonic() > deadline:
                where = "; ".join(f"rank {rank}: {self._agent.remotes[rank].where}" for rank in missing)
                raise Unavailable(
                    f"nothing came from {name_ranks(missing)} within {timeout_s:g} s ({where}; this is "
                    f"{self._agent.remotes[self.rank].where}). {HOW_TO_REACH}"
                )

    def _move_on(self) -> None:
        """Let messages move on while this rank computes, and find out who has died."""
        nap_s = _LONG_NAP_S
        while self._open:
            busy = self._streams.is_writing or any(talk.is_busy for talk in self._talks.values())
            self._changed.wait(min(nap_s, _QUIET_NAP_S if busy else _IDLE_NAP_S))
            nap_s = min(2 * nap_s, _IDLE_NAP_S)
            others_look = time.monotonic() - self._looked < _LONG_NAP_S
            if (self._open and not others_look and self._progress()) or self._streams.is_writing:
                nap_s = _LONG_NAP_S
            if time.monotonic() - self._pinged >= _PING_S:
                self._ping()

    def _ping(self) -> None:
        """Ask nothing, and learn from the attempt that a rank has gone."""
        self._pinged = time.monotonic()
        with self._lock:
            for rank, talk in self._talks.items():
                if self._open and talk.is_busy:
                    self._notify(rank, _HEADER.pack(_PING, 0, 0))

    def _talk(self, rank: int, tag: int, memory: Bytes) -> Talk:
        self._check_open()
        check_message(self.rank, self.size, rank, tag, memory)
        return self._talks[rank]

    def _check_open(self) -> None:
        if not self._open:
            raise _closed()


def _settled(transfer: Transfer) -> bool:
    return not isinstance(transfer, Parcel) or transfer.settled


def _closed() -> ClosedError:
    return ClosedError("this engine was closed; make a new one on all ranks")
