"""The engine that is always there: gloo, which every torch has, over TCP.

Of a gloo message one can only learn that it is done by waiting for it: ``is_completed()`` stays False until ``wait()``,
there is no future, and a wait that times out closes the connections to all ranks. So nothing here waits for messages.
One thread for each other rank awaits *notes* (``engine_talk.py``), which arrive in order and behind the data they tell
of; data itself is received without anybody waiting. What was sent is free again once the other side says that it has
heard the note behind it. To close is to let a wait time out, after the other sides have answered a BYE: a connection
that is closed with words of theirs unread would take it back from them.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from anyep.errors import ClosedError
from anyep.transport.engine import NUM_TAGS, Bytes, Transfer
from anyep.transport.engine_checks import check_message, check_writable
from anyep.transport.engine_parcel import Note, NoteKind, Parcel
from anyep.transport.engine_talk import Talk, part
from anyep.transport.gloo_group import FOR_EVER, GlooGroup, open_gloo, tensor_of
from anyep.transport.liveness import Departure
from anyep.transport.rendezvous import Rendezvous

EAGER_BYTES = 16 << 10
"""Up to here a copy costs less than the answer of a rank."""
_RING = 64
"""Notes that a rank can take before it has looked at the first. gloo holds back what exceeds them, and says that there
is room again behind all data that waits to be sent: with 16 the link stood still for 20 % of the time, where many
messages of 256 KiB were under way."""
_CREDIT_EVERY = 8
"""After so many notes the other side is told that they were heard, if nothing else is told to it."""
_HEADER = struct.Struct("<IIQQ")
"""NoteKind, tag, bytes, and how many notes of the other side were heard."""
_NOTES, _DATA, _NOBODY = 0, 1, NUM_TAGS + 1
"""gloo's tags: of notes, of data (plus ours), and one that nothing is ever sent under."""
_JOIN_S = 1.0
_LOOK_S = 0.01
"""How often a flush looks whether anything has moved."""
_SHORT_LOOK_S = 0.001


class GlooEngine:
    """See :class:`anyep.transport.engine.Engine`. Made by all ranks, collectively; needs no process group.

    ``interface``: the network interface to use; None: that of GLOO_SOCKET_IFNAME, else that of the default route.
    Raises Unavailable on all ranks where one cannot be reached, or has no such interface.
    """

    name = "gloo"

    def __init__(self, rendezvous: Rendezvous, *, interface: str | None = None, timeout_s: float = 60.0) -> None:
        self.rank = rendezvous.rank
        self.size = rendezvous.size
        self.sent_bytes = 0
        self._group: GlooGroup | None = open_gloo(rendezvous, interface, timeout_s)
        self._interface = self._group.interface
        self._changed = threading.Condition()
        self._lines = {rank: _Line(self, rank, self._group.process_group) for rank in self._others()}

    def send(self, rank: int, tag: int, memory: Bytes) -> Transfer:
        talk = self._talk(rank, tag, memory)
        parcel = talk.send(tag, memory)
        with self._changed:
            self.sent_bytes += memory.size
        return parcel

    def receive(self, rank: int, tag: int, memory: Bytes) -> Transfer:
        talk = self._talk(rank, tag, memory)
        check_writable(memory)
        return talk.receive(tag, memory)

    def wait(self, transfers: Sequence[Transfer], timeout_s: float) -> None:
        self._check_open()
        with self._changed:
            self._changed.wait_for(lambda: self._group is None or any(map(_settled, transfers)), timeout_s)

    def flush(self, quiet_s: float, without: Collection[int] = ()) -> bool:
        self._check_open()
        lines = [line for rank, line in self._lines.items() if rank not in without]
        for line in lines:
            line.talk.ask()
        moved = time.monotonic()
        unheard = -1
        while not all(line.talk.is_heard for line in lines):
            now_unheard = sum(line.num_unheard for line in lines if not line.talk.is_heard)
            if now_unheard != unheard:
                unheard, moved = now_unheard, time.monotonic()
            elif time.monotonic() - moved >= quiet_s:
                return False
            with self._changed:
                self._changed.wait(_LOOK_S)
        return True

    def departures(self) -> Mapping[int, Departure]:
        talks = {rank: line.talk for rank, line in self._lines.items()}
        return {rank: talk.departure for rank, talk in talks.items() if talk.departure is not None}

    def describe(self) -> dict[str, str]:
        interface = self._interface
        return {
            "engine": f"gloo of torch {torch.__version__}, TCP",
            "interface": f"{interface.name} ({interface.address}): {interface.reason}",
            "window": f"as many messages as are sent; up to {EAGER_BYTES >> 10} KiB go at once",
            "engine memory": f"{(self.size - 1) * _RING * (EAGER_BYTES + _HEADER.size) >> 10} KiB for notes",
        }

    def close(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        part([line.talk for line in self._lines.values()], lambda: time.sleep(_SHORT_LOOK_S))
        for line in self._lines.values():
            line.talk.close(_closed)
        for rank in self._others():
            group.hang_up(rank, _NOBODY)
        for line in self._lines.values():
            line.join()
        group.close()
        self.settled()

    def settled(self) -> None:
        """Wake who waits."""
        with self._changed:
            self._changed.notify_all()

    @property
    def is_open(self) -> bool:
        return self._group is not None

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _talk(self, rank: int, tag: int, memory: Bytes) -> Talk:
        self._check_open()
        check_message(self.rank, self.size, rank, tag, memory)
        return self._lines[rank].talk

    def _check_open(self) -> None:
        if self._group is None:
            raise _closed()


class _Line:
    """The connection to one rank: its thread, its notes, and what was sent and not yet heard of."""

    eager_bytes = EAGER_BYTES

    def __init__(self, engine: GlooEngine, rank: int, process_group: Any) -> None:
        self._engine = engine
        self._rank = rank
        self._group = process_group
        self._lock = threading.RLock()
        self._told = 0
        self._heard = 0
        self._acknowledged = 0
        """how many heard notes the other side knows of"""
        self._unheard: deque[tuple[int, Any, Any, Parcel | None]] = deque()
        """(number of the note behind it, what gloo works on, its memory, whose memory it is)"""
        self.talk = Talk(rank, engine.rank, self, self._lock)
        self._notes = [torch.empty(_HEADER.size + EAGER_BYTES, dtype=torch.uint8) for _ in range(_RING)]
        self._works = [process_group.recv([note], rank, _NOTES) for note in self._notes]
        self._thread = threading.Thread(target=self._listen, name=f"anyep-gloo-{rank}", daemon=True)
        self._thread.start()

    def tell(self, rank: int, kind: NoteKind, tag: int, num_bytes: int, rest: Bytes) -> None:
        note = torch.empty(_HEADER.size + rest.size, dtype=torch.uint8)
        view = note.numpy()
        _HEADER.pack_into(view.data, 0, kind, tag, num_bytes, self._heard)
        view[_HEADER.size :] = rest
        self._acknowledged = self._heard
        self._told += 1
        self._post(note, _NOTES, self._told, None)

    def expose(self, parcel: Parcel) -> Bytes:
        """gloo finds the place by the tag."""
        parcel.registration = self._try(lambda: self._group.recv([tensor_of(parcel.memory)], self._rank, _tag(parcel)))
        return np.zeros(0, np.uint8)

    def withdraw(self, parcel: Parcel) -> None:
        parcel.registration = None

    def put(self, parcel: Parcel, count: int, place: Bytes, told_bytes: int) -> None:
        """The note that this was READY came behind gloo's own: the data leaves at once, and DONE behind it."""
        if count:
            self._post(tensor_of(parcel.memory[:count]), _tag(parcel), self._told + 1, parcel)
        self.tell(self._rank, NoteKind.DONE, parcel.tag, told_bytes, np.zeros(0, np.uint8))
        if not count:
            self.talk.sent(parcel)

    @property
    def num_unheard(self) -> int:
        """Notes and data that the other side has not heard of."""
        return len(self._unheard)

    def settled(self) -> None:
        self._engine.settled()

    def look(self) -> None:
        """gloo's own thread moves the bytes."""

    def join(self) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def _post(self, tensor: torch.Tensor, tag: int, number: int, parcel: Parcel | None) -> None:
        work = self._try(lambda: self._group.send([tensor], self._rank, tag))
        self._unheard.append((number, work, tensor, parcel))

    def _try(self, act: Any) -> Any:
        """A broken connection is the listening thread's to tell of: it knows of it as soon as anybody."""
        try:
            return act()
        except RuntimeError as error:
            self._break(error)
            return None

    def _listen(self) -> None:
        slot = 0
        try:
            while True:
                self._works[slot].wait(FOR_EVER)
                self._take(self._notes[slot].numpy())
                self._works[slot] = self._group.recv([self._notes[slot]], self._rank, _NOTES)
                slot = (slot + 1) % _RING
        except Exception as error:  # a broken connection, or a note that is none: nothing more can be understood
            self._break(error)

    def _take(self, raw: Bytes) -> None:
        kind, tag, num_bytes, heard = _HEADER.unpack_from(raw.data)
        rest = raw[_HEADER.size : _HEADER.size + (num_bytes if kind == NoteKind.EAGER else 0)]
        with self._lock:
            self._heard += 1
            self._free(heard)
            self.talk.heard(Note(NoteKind(kind), tag, num_bytes, rest))
            owed = self._heard - self._acknowledged
            if owed and self.talk.departure is None and (kind == NoteKind.DONE or owed >= _CREDIT_EVERY):
                self.tell(self._rank, NoteKind.CREDIT, 0, 0, np.zeros(0, np.uint8))

    def _free(self, heard: int) -> None:
        """Give back the memory of what the other side has heard of."""
        while self._unheard and self._unheard[0][0] <= heard:
            _, _, _, parcel = self._unheard.popleft()
            if parcel is not None:
                self.talk.sent(parcel)

    def _break(self, error: Exception) -> None:
        if self._engine.is_open:
            why = str(error).partition(". This is typically")[0].partition("] ")[2] or str(error)
            self.talk.end(Departure(how="died"), why)
        with self._lock:
            self._unheard.clear()


def _tag(parcel: Parcel) -> int:
    return _DATA + parcel.tag


def _settled(transfer: Transfer) -> bool:
    return not isinstance(transfer, Parcel) or transfer.settled


def _closed() -> ClosedError:
    return ClosedError("this engine was closed; make a new one on all ranks")
