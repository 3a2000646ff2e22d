"""Barrier: the first message of an operation and nothing else."""

from __future__ import annotations

from anyep.exchange.endpoint import Endpoint
from anyep.exchange.opening import BODY, Kind, RefusedError, check_agreement, make_header
from anyep.exchange.retract import retract
from anyep.transport.base import Words

_HEADER = make_header(kind=Kind.BARRIER)


class Barrier:
    """Ends when every rank has begun it."""

    label = "barrier"

    def __init__(self, end: Endpoint) -> None:
        self._end = end
        self._epoch = 0

    def wants_background(self) -> bool:
        return False

    def may_answer(self) -> bool:
        """Nobody waits for a second half that sends nothing."""
        return False

    def ready(self) -> bool:
        """Whether every rank's announcement is here."""
        return self._end.transport.arrived(self._end.lanes.open, self._epoch)

    def post(self, epoch: int) -> None:
        """Tell every rank."""
        self._epoch = epoch
        words_RW = self._end.desk(epoch).places_RW
        words_RW[:, :BODY] = _HEADER
        self._end.announce(epoch, words_RW)

    def size_up(self) -> None:
        """Nothing is left to learn."""

    def targets(self) -> None:
        """There is no result."""

    def finish(self) -> None:
        """Wait for every rank. Raises RefusedError, PeerLost and PeerTimeout."""
        step = f"{self.label} {self._epoch}"
        opened_RW = self._end.hear(self._epoch, step, _HEADER)
        if not self._end.books.agree(opened_RW, _HEADER):
            self._refuse(opened_RW, step)
        self._end.counters.add(barriers=1, rounds=1)

    def _refuse(self, opened_RW: Words, step: str) -> None:
        try:
            check_agreement(_HEADER, opened_RW, step)
        except RefusedError:
            if self._end.across is not None:  # others may have sent more than their announcements
                retract(self._end.across.transport, self._epoch, [])
            raise
