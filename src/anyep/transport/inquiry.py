"""Why a wait is so long: who is waited for may wait itself, and who stands still at the end of that is to blame.

Limits end in any order. A rank whose time is up first would name its neighbour, which may have waited nearly as long
for the one that is stopped. So a rank that waits says for whom: on its board to the ranks of its host
(``board.py``), and to those of other hosts when they ask (``questions.py``), shortly before their time is up.

It says so in all transports of its process (``elsewhere.py``), each in its own numbers: a rank that is missed in one
may wait in another. For somebody who takes no part here it says whom that one waits for, as far as its host's boards
tell; else that there is an *outsider*, and then it is named itself, with that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from anyep.errors import ClosedError
from anyep.transport.board import Board
from anyep.transport.elsewhere import Elsewhere, Holder, Outsider, seen_there
from anyep.transport.liveness import Departure, standing_still

RECENT_NS = 1_000_000_000
"""How long before a wait's end others must have said that they wait: a rank that is stopped says nothing any more. Ten
times the longest that a waiting rank sleeps (``waiting.py``), for busy machines; half of a limit below 2 s, so that
from 0.4 s down a rank that waits may not have said so, and is named."""


class Others(Protocol):
    """Ranks of other hosts (:class:`anyep.transport.questions.Questions`)."""

    def ask(self, since_ns: int) -> None:
        """Ask everybody for whom they wait, unless that was done since ``since_ns``."""

    def answer(self, missing: Sequence[int], outsider: Outsider | None) -> None:
        """Tell who has asked that this rank waits for ``missing``, and for an outsider."""

    def answers(self, since_ns: int) -> Mapping[int, Answer]:
        """Return for whom each rank waits that has answered since then."""


class Answer(NamedTuple):
    """For which ranks a rank waits, and for whom in another of its transports that takes no part here."""

    ranks: Sequence[int]
    outsider: Outsider | None = None


_NOTHING = Answer(())


class _Said(NamedTuple):
    source: object
    """the inquiry of the transport in which a thread waits"""
    ranks: Sequence[int]
    outsider: Outsider | None


class Inquiry:
    """What one rank says of its waits, and learns of others'. Times are CLOCK_MONOTONIC.

    ``boards``: of the ranks of this host, which ``memory`` keeps. ``holders``: names, by rank. ``holder``: this rank's.
    """

    def __init__(
        self,
        rank: int,
        timeout_s: float,
        *,
        boards: Mapping[int, Board],
        memory: object,
        holders: Sequence[int],
        holder: Holder,
    ) -> None:
        timeout_ns = int(timeout_s * 1e9)
        self.others: Others | None = None
        self.holders = holders
        self._rank = rank
        self._after_ns = timeout_ns - min(RECENT_NS, timeout_ns // 2)
        self._saying = threading.Lock()
        self._said: dict[int, _Said] = {}
        """by thread: an operation in the background waits beside one in the foreground"""
        self._boards = boards
        self._memory: object = memory
        self._is_over = False
        self._holder = holder
        self._rank_of = {name: rank for rank, name in enumerate(holders)}
        holder.join(self)

    def waits(self, missing: Sequence[int], began_ns: int) -> None:
        """Say for whom this thread waits, in all transports: once in each slice of a wait."""
        now_ns = time.monotonic_ns()
        self._say(_Said(self, missing, None), now_ns)
        if self.others is not None and now_ns - began_ns >= self._after_ns:
            self.others.ask(began_ns + self._after_ns)
        for other in self._holder.others(self):
            wait = seen_there(missing, self.holders, other.holders, lambda rank: self._near(rank, now_ns - RECENT_NS))
            other.hear(self, wait, now_ns)

    def over(self) -> None:
        """This thread does not wait any more. Not after an error: its rank stands still for that of others, and says
        so when it leaves."""
        self._say(_Said(self, (), None), 0)
        for other in self._holder.others(self):
            other.hear(self, Elsewhere(holders=(), outsider=None), 0)

    def hear(self, source: object, wait: Elsewhere, now_ns: int) -> None:
        """This thread waits in another transport of this rank's holder."""
        ranks = [rank for name in wait.holders if (rank := self._rank_of[name]) != self._rank]
        with suppress(ClosedError):  # of the engine: this transport leaves meanwhile
            self._say(_Said(source, ranks, wait.outsider), now_ns)

    def end(self) -> None:
        """This rank leaves: nothing more is said here, and what was said elsewhere of waits here grows old."""
        with self._saying:
            self._is_over = True
        self._holder.leave(self)
        self._memory = None
        for other in self._holder.others(self):
            other.forget(self)

    def forget(self, source: object) -> None:
        """Nobody waits in the transport ``source`` any more: its rank has left it."""
        with self._saying:
            self._said = {thread: said for thread, said in self._said.items() if said.source is not source}

    def after_fork(self) -> None:
        """Called in a child of this process, which may not speak for the rank."""
        self._saying = threading.Lock()
        self._is_over = True
        self._memory = None

    def _say(self, said: _Said, now_ns: int) -> None:
        """Note for whom this thread waits, take back what no thread says any more, and tell who asks."""
        thread = threading.get_ident()
        with self._saying:
            if self._is_over:
                return
            board = self._boards[self._rank]
            before = self._said.pop(thread, None)
            if said.ranks or said.outsider is not None:
                self._said[thread] = said
            awaited = {rank for other in self._said.values() for rank in other.ranks}
            outsider = next((s.outsider for s in self._said.values() if s.outsider is not None), None)
            if before is not None:
                board.say_waiting({*before.ranks} - awaited, 0)
                if before.outsider is not None and outsider is None:
                    board.say_outsider(before.outsider, 0)
            board.say_waiting(said.ranks, now_ns)
            if said.outsider is not None:
                board.say_outsider(said.outsider, now_ns)
        if self.others is not None and (awaited or outsider is not None):
            self.others.answer(sorted(awaited), outsider)

    def _near(self, rank: int, since_ns: int) -> Sequence[int]:
        return self._boards[rank].waits_for(since_ns) if rank in self._boards else ()

    def standing_still(
        self, missing: Sequence[int], began_ns: int, departures: Mapping[int, Departure]
    ) -> dict[int, int | None]:
        """Return who is to blame for a wait that began at ``began_ns`` and is up, each with its outsider."""
        since_ns = began_ns + self._after_ns
        far = self.others.answers(since_ns) if self.others is not None else {}

        def waits_for(rank: int) -> Sequence[int]:
            left = departures.get(rank)
            if left is not None:
                return left.blame.ranks if left.blame is not None else ()
            return self._near(rank, since_ns) if rank in self._boards else far.get(rank, _NOTHING).ranks

        def outsider_of(rank: int) -> int | None:
            outsider = self._outsider(rank, since_ns, far) if rank not in departures else None
            return outsider.rank if outsider is not None else None

        return {rank: outsider_of(rank) for rank in standing_still(missing, waits_for, self._rank)}

    def culprits(self) -> list[int]:
        """Return by rank who holds it, or the outsider for whom it waits: who is to blame where that rank is silent."""
        since_ns = time.monotonic_ns() - RECENT_NS
        far = self.others.answers(since_ns) if self.others is not None else {}
        outsiders = [self._outsider(rank, since_ns, far) for rank in range(len(self.holders))]
        return [own if o is None else o.holder for o, own in zip(outsiders, self.holders, strict=True)]

    def _outsider(self, rank: int, since_ns: int, far: Mapping[int, Answer]) -> Outsider | None:
        return self._boards[rank].outsider(since_ns) if rank in self._boards else far.get(rank, _NOTHING).outsider
