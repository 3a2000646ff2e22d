"""What a rank tells its peers beside messages: the header of its control memory (``transport/control.py``)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from anyep.machine.linux import Memory
from anyep.transport.base import Blame
from anyep.transport.control import (
    BLAMED,
    CLAIM,
    GROWING,
    NETWORK,
    OUTSIDE,
    OUTSIDER,
    SEGMENTS,
    STATE,
    TABLE,
    TOKEN,
)
from anyep.transport.elsewhere import Outsider
from anyep.transport.liveness import Departure

FRESH_NS = 1_000_000_000
"""How long a rank's word holds that it looks after the network. It says so every 50 ms, on a busy machine later."""
_OPEN, _CLOSED, _LOST, _TIMEOUT = 0, 1, 2, 3


class Board:
    """One rank's words, at ``address``. Its owner writes, everybody reads. ``signals``: transport/signals.py."""

    def __init__(self, signals: ModuleType, address: int, size: int) -> None:
        self._signals = signals
        self._address = address
        self._size = size

    def _read(self, word: int) -> int:
        return int(self._signals.read_word(self._address + 8 * word))

    def _publish(self, word: int, value: int) -> None:
        self._signals.publish_word(self._address + 8 * word, value)

    @property
    def token(self) -> int:
        return self._read(TOKEN)

    @token.setter
    def token(self, value: int) -> None:
        self._publish(TOKEN, value)

    @property
    def growing_bytes(self) -> int:
        return self._read(GROWING)

    @growing_bytes.setter
    def growing_bytes(self, value: int) -> None:
        self._publish(GROWING, value)

    @property
    def passes_on(self) -> bool:
        """Whether this rank is busy with what comes from other hosts: what does not come then is not its fault.

        A rank that has not said so again for a while is stopped.
        """
        said_ns = self._read(NETWORK)
        return said_ns != 0 and time.monotonic_ns() - said_ns < FRESH_NS

    @passes_on.setter
    def passes_on(self, value: bool) -> None:
        self._publish(NETWORK, time.monotonic_ns() if value else 0)

    def say_waiting(self, ranks: Iterable[int], now_ns: int) -> None:
        """Say that this rank waits for ``ranks`` at the moment; ``now_ns`` 0: not any more."""
        for rank in ranks:
            self._publish(BLAMED + self._size + rank, now_ns)

    def waits_for(self, since_ns: int) -> tuple[int, ...]:
        """Return for whom it has said since then that it waits."""
        first = BLAMED + self._size
        return tuple(rank for rank in range(self._size) if self._read(first + rank) >= since_ns)

    def say_outsider(self, outsider: Outsider, now_ns: int) -> None:
        """Say that it waits in another of its transports for one who takes no part here; 0: not any more."""
        self._publish(OUTSIDER, outsider.rank)
        self._publish(BLAMED + 2 * self._size, outsider.holder)
        self._publish(OUTSIDE, now_ns)

    def outsider(self, since_ns: int) -> Outsider | None:
        """Return for which one it has said since then that it waits."""
        if self._read(OUTSIDE) < since_ns:
            return None
        return Outsider(self._read(OUTSIDER), self._read(BLAMED + 2 * self._size))

    def claim(self, epoch: int) -> bool:
        """Say that this rank takes part in ``epoch``; False where the others have begun one without it."""
        known = self._read(CLAIM)
        return known >= 0 and self._exchange(CLAIM, known, epoch) == known

    def expel(self, epoch: int) -> bool:
        """Begin ``epoch`` without this rank; False where it has said that it takes part. All who ask learn the same."""
        known = self._read(CLAIM)
        while 0 <= known < epoch:
            found = self._exchange(CLAIM, known, -1 - epoch)
            if found == known:
                return True
            known = found
        return known < 0

    def _exchange(self, word: int, expected: int, value: int) -> int:
        return int(self._signals.exchange_word(self._address + 8 * word, expected, value))

    def add_segment(self, memory: Memory) -> None:
        """Let peers find a segment."""
        count = self._read(SEGMENTS)
        for i, value in enumerate((memory.fd, memory.inode, memory.size)):
            self._publish(TABLE + 3 * count + i, value)
        self._publish(SEGMENTS, count + 1)

    def segment(self, index: int) -> tuple[int, int, int]:
        """Return a segment's (fd, inode, bytes). Raises IndexError when its owner has not that many."""
        count = self._read(SEGMENTS)
        if not 0 <= index < count:
            raise IndexError(f"segment {index} of {count}")
        first = TABLE + 3 * index
        return self._read(first), self._read(first + 1), self._read(first + 2)

    def leave(self, blame: Blame | None) -> None:
        """Say that nothing more will be posted, and why."""
        if blame is not None:
            for rank in blame.ranks:
                self._publish(BLAMED + rank, 1)
        self._publish(STATE, _CLOSED if blame is None else _TIMEOUT if blame.timeout else _LOST)

    def departure(self) -> Departure | None:
        """Return why this rank left; None while it is open."""
        state = self._read(STATE)
        if state == _OPEN:
            return None
        if state == _CLOSED:
            return Departure(how="closed")
        ranks = tuple(rank for rank in range(self._size) if self._read(BLAMED + rank))
        return Departure(how="failed", blame=Blame(ranks=ranks, timeout=state == _TIMEOUT))


def anybody_left(signals: ModuleType, controls_R: NDArray[np.int64]) -> bool:
    """Whether a rank has left. One call for all ranks: those that wait ask it each time they wake."""
    return bool(signals.any_word_above(controls_R, 8 * STATE, _OPEN))


def anybody_failed(signals: ModuleType, controls_R: NDArray[np.int64]) -> bool:
    """Whether a rank has left because of an error."""
    return bool(signals.any_word_above(controls_R, 8 * STATE, _CLOSED))
