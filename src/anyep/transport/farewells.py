"""Last words between hosts: that a rank leaves, and whom it blames, so that the culprit is named there too."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import numpy as np

from anyep.errors import AnyEPError
from anyep.transport.base import Blame, Words
from anyep.transport.engine import Engine, Transfer, has_come
from anyep.transport.liveness import Departure

QUIET_S = 1.0
"""A rank that leaves waits for its last messages to be heard, whose receivers wait already, while anything moves."""
GRACE_S = 0.1
"""For those that it blames, which may be stopped: one that is alive, and busy, has heard it by then."""
_LOOK_S = 0.05


class Farewells:
    """One rank's last word to its ``partners``, and theirs, under one tag of the engine."""

    def __init__(self, engine: Engine, partners: Collection[int], tag: int) -> None:
        self._engine = engine
        self._said = False
        self._tag = tag
        self._awaited = {rank: self._expect(rank) for rank in partners}

    def _expect(self, rank: int) -> tuple[Transfer, Words]:
        words = np.zeros(2 + self._engine.size, np.int64)
        return self._engine.receive(rank, self._tag, words.view(np.uint8)), words

    def told(self) -> dict[int, Departure]:
        """Return who said that it leaves, and why."""
        departures = {}
        for rank, (transfer, words) in self._awaited.items():
            if has_come(transfer):
                blamed = tuple(np.flatnonzero(words[2:]).tolist())
                blame = Blame(ranks=blamed, timeout=bool(words[1])) if words[0] else None
                departures[rank] = Departure(how="failed" if words[0] else "closed", blame=blame)
        return departures

    def say(self, blame: Blame | None, under_way: Sequence[Transfer]) -> None:
        """Tell everybody once; wait until that, and what is ``under_way``, has been heard, as long as that moves.

        Those that are blamed are not waited for, but for a moment.
        """
        if self._said:
            return
        self._said = True
        words = np.zeros(2 + self._engine.size, np.int64)
        if blame is not None:
            words[0], words[1] = 1, blame.timeout
            words[2 + np.array(blame.ranks, np.int64)] = 1
        memory = words.view(np.uint8)
        sent = [*under_way, *(self._engine.send(rank, self._tag, memory) for rank in self._awaited)]
        deadline = time.monotonic() + QUIET_S
        while sent and (left_s := deadline - time.monotonic()) > 0:
            self._engine.wait(sent, min(left_s, _LOOK_S))
            remaining = [transfer for transfer in sent if not _is_over(transfer)]
            if len(remaining) < len(sent):
                sent, deadline = remaining, time.monotonic() + QUIET_S
        self._engine.flush(QUIET_S, blame.ranks if blame is not None else ())
        if blame is not None:
            self._engine.flush(GRACE_S)


def _is_over(transfer: Transfer) -> bool:
    """Whether a message has left, or never will."""
    try:
        return transfer.done()
    except AnyEPError:
        return True
