"""Why a wait is so long: who is waited for may wait itself, and who stands still at the end of that is to blame.

Limits end in any order. A rank whose time is up first would name its neighbour, which may have waited nearly as long
for the one that is stopped. So a rank that waits says for whom: on its board to the ranks of its host
(``board.py``), and to those of other hosts when they ask (``questions.py``), shortly before their time is up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from anyep.transport.board import Board
from anyep.transport.liveness import Departure, standing_still

RECENT_NS = 1_000_000_000
"""How long before a wait's end others must have said that they wait: a rank that is stopped says nothing any more. Ten
times the longest that a waiting rank sleeps (``waiting.py``), for busy machines."""


class Others(Protocol):
    """Ranks of other hosts (:class:`anyep.transport.questions.Questions`)."""

    def ask(self, since_ns: int) -> None:
        """Ask everybody for whom they wait, unless that was done since ``since_ns``."""

    def answer(self, missing: Sequence[int]) -> None:
        """Tell who has asked that this rank waits for ``missing``."""

    def answers(self, since_ns: int) -> Mapping[int, Sequence[int]]:
        """Return for whom each rank waits that has answered since then."""


class Inquiry:
    """What one rank says of its waits, and learns of others'. Times are CLOCK_MONOTONIC."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        timeout_ns = int(timeout_s * 1e9)
        self.others: Others | None = None
        self._rank = rank
        self._after_ns = timeout_ns - min(RECENT_NS, timeout_ns // 2)
        self._saying = threading.Lock()
        self._said: dict[int, Sequence[int]] = {}
        """by thread: an operation in the background waits beside one in the foreground"""

    def waits(self, board: Board, missing: Sequence[int], began_ns: int) -> None:
        """Say, on this rank's ``board`` too, for whom this thread waits: once in each slice of a wait."""
        now_ns = time.monotonic_ns()
        with self._saying:
            awaited = self._change(board, missing)
            board.say_waiting(missing, now_ns)
        if self.others is not None:
            self.others.answer(awaited)
            if now_ns - began_ns >= self._after_ns:
                self.others.ask(began_ns + self._after_ns)

    def over(self, board: Board) -> None:
        """This thread does not wait any more. Not after an error: its rank stands still for that of others, and says
        so when it leaves."""
        with self._saying:
            self._change(board, ())

    def _change(self, board: Board, missing: Sequence[int]) -> list[int]:
        """Note for whom this thread waits, and take back what no thread says any more; return what all of them say."""
        thread = threading.get_ident()
        before = self._said.pop(thread, ())
        if missing:
            self._said[thread] = missing
        awaited = {rank for ranks in self._said.values() for rank in ranks}
        board.say_waiting({*before} - awaited, 0)
        return sorted(awaited)

    def standing_still(
        self, boards: Mapping[int, Board], missing: Sequence[int], began_ns: int, departures: Mapping[int, Departure]
    ) -> list[int]:
        """Return who is to blame for a wait that began at ``began_ns`` and is up."""
        since_ns = began_ns + self._after_ns
        far = self.others.answers(since_ns) if self.others is not None else {}

        def waits_for(rank: int) -> Sequence[int]:
            left = departures.get(rank)
            if left is not None:
                return left.blame.ranks if left.blame is not None else ()
            return boards[rank].waits_for(since_ns) if rank in boards else far.get(rank, ())

        return standing_still(missing, waits_for, self._rank)
