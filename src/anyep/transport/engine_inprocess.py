"""An engine between ranks that are threads of one process: the fake for tests, and the plainest reading of the seam.

All ranks share one *exchange* with a lock. Whoever comes second, sender or receiver, copies the bytes; both are done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from anyep.errors import ClosedError
from anyep.transport.engine import Bytes, Failure, Transfer
from anyep.transport.engine_checks import check_message, check_writable, peer_lost, tag_taken, wrong_size
from anyep.transport.inprocess import Member
from anyep.transport.liveness import Departure

_LOOK_S = 0.05
"""How often a rank that waits looks whether others have ended: their end does not wake it."""

_Key = tuple[int, int, int]
"""(source, destination, tag)"""


class _Exchange:
    """What the ranks of one group share: messages that miss their other half, and who has closed."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.sends: dict[_Key, _Message] = {}
        self.receives: dict[_Key, _Message] = {}
        self.closed: set[int] = set()

    def bring(self, key: _Key, message: _Message, mine: dict[_Key, _Message], theirs: dict[_Key, _Message]) -> None:
        """Let a message meet its other half, or wait for it."""
        with self.changed:
            if key in mine:
                raise tag_taken(message.rank, message.tag, message.taken)
            other = theirs.pop(key, None)
            if other is None:
                mine[key] = message
                return
            sent, received = (other, message) if theirs is self.sends else (message, other)
            _carry(sent, received)
            self.changed.notify_all()

    def close(self, rank: int) -> None:
        """Drop what a rank has under way, and wake all who may wait for it."""
        with self.changed:
            self.closed.add(rank)
            for messages, end in ((self.sends, 0), (self.receives, 1)):
                for key in [key for key in messages if key[end] == rank]:
                    del messages[key]
            self.changed.notify_all()


class _Message:
    """One half of a message: sent, or awaited."""

    def __init__(self, engine: InProcessEngine, rank: int, tag: int, memory: Bytes, verb: str, taken: str) -> None:
        self.rank = rank
        self.tag = tag
        self.memory = memory
        self.taken = taken
        self.finished = False
        self.failure: Failure | None = None
        self._engine = engine
        self._verb = verb

    def done(self) -> bool:
        if not self.finished and self.failure is None:
            self.failure = self._engine.obstacle(self.rank, self.tag, self._verb)
        if self.finished:  # looked at last: it may have come while this rank looked after its peer
            return True
        if self.failure is not None:
            raise self.failure()
        return False

    @property
    def settled(self) -> bool:
        return self.finished or self.failure is not None or self._engine.obstacle(self.rank, self.tag, "") is not None


def _carry(sent: _Message, received: _Message) -> None:
    if sent.memory.size == received.memory.size:
        received.memory[:] = sent.memory
        received.finished = True
    else:
        received.failure = partial(wrong_size, received.rank, received.tag, received.memory.size, sent.memory.size)
    sent.finished = True


class InProcessEngine:
    """See :class:`anyep.transport.engine.Engine`. Made by all members of a local group, collectively."""

    name = "inprocess"

    def __init__(self, member: Member) -> None:
        self.rank = member.rank
        self.size = member.size
        self.sent_bytes = 0
        self._group = member.group
        self._exchange: _Exchange = member.exchange(_Exchange())[0]
        self._open = True

    def send(self, rank: int, tag: int, memory: Bytes) -> Transfer:
        message = self._message(rank, tag, memory, "sends to", "sent to")
        exchange = self._exchange
        exchange.bring((self.rank, rank, tag), message, exchange.sends, exchange.receives)
        self.sent_bytes += memory.size
        return message

    def receive(self, rank: int, tag: int, memory: Bytes) -> Transfer:
        message = self._message(rank, tag, memory, "awaits from", "received from")
        check_writable(memory)
        exchange = self._exchange
        exchange.bring((rank, self.rank, tag), message, exchange.receives, exchange.sends)
        return message

    def wait(self, transfers: Sequence[Transfer], timeout_s: float) -> None:
        self._check_open()
        deadline = time.monotonic() + timeout_s
        with self._exchange.changed:
            while not any(_settled(transfer) for transfer in transfers):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                self._exchange.changed.wait(min(left_s, _LOOK_S))

    def flush(self, quiet_s: float, without: Collection[int] = ()) -> bool:
        """A message is where it belongs as soon as both sides know of it."""
        return True

    def departures(self) -> Mapping[int, Departure]:
        gone = {rank: Departure(how="closed") for rank in set(self._exchange.closed) if rank != self.rank}
        return gone | {rank: left for rank, left in self._group.departures().items() if rank != self.rank}

    def describe(self) -> dict[str, str]:
        return {"engine": "inprocess: ranks are threads of this process, messages are copied once"}

    def close(self) -> None:
        if self._open:
            self._open = False
            self._exchange.close(self.rank)

    def obstacle(self, rank: int, tag: int, verb: str) -> Failure | None:
        """Why a message between this rank and ``rank`` will never be done; None: it may."""
        if not self._open:
            return _closed
        departure = self.departures().get(rank)
        return None if departure is None else partial(peer_lost, rank, self.rank, tag, departure, verb)

    def _message(self, rank: int, tag: int, memory: Bytes, verb: str, taken: str) -> _Message:
        self._check_open()
        check_message(self.rank, self.size, rank, tag, memory)
        return _Message(self, rank, tag, memory, verb, taken)

    def _check_open(self) -> None:
        if not self._open:
            raise _closed()


def _settled(transfer: Transfer) -> bool:
    return transfer.settled if isinstance(transfer, _Message) else True


def _closed() -> ClosedError:
    return ClosedError("this engine was closed; make a new one on all ranks")
