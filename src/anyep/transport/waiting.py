"""How a rank waits for messages: in slices, between which it looks who has left and whether time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from anyep.transport.arena import Arena
from anyep.transport.base import Ranks, Words
from anyep.transport.board import Board, anybody_left
from anyep.transport.inquiry import RECENT_NS, Inquiry
from anyep.transport.liveness import Departure, Wait, given_up
from anyep.transport.slots import Slot

SLICE_NS, LONGEST_SLICE_NS = 20_000_000, 100_000_000
"""How long a wait sleeps before it looks whether the peers live and whether Ctrl-C was pressed: a quarter of what it
has waited so far, between these two."""
SPINS, YIELDS = 64, 16
"""Looks before a wait sleeps: some with a pause (about 1 us in all), some that let others run."""
NAP_S = 0.0005
_EPOCHS = 1 << 32


class PeerMemory(Protocol):
    """What differs between ranks that are threads and ranks that are processes."""

    def segment_address(self, rank: int, index: int) -> int:
        """Return where a segment of ``rank`` lies here. Raises ProcessLookupError when the rank is gone."""
        ...

    def departures(self) -> Mapping[int, Departure]:
        """Return the ranks that ended without a word."""
        ...

    def names(self) -> Mapping[int, str]:
        """Return what error messages call each rank, for example its process."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """What a transport has until it is closed. A call holds it, so that nothing is unmapped that the call uses."""

    arena: Arena
    memories: PeerMemory
    controls_R: NDArray[np.int64]
    members_R: NDArray[np.int64]
    """where the control memory of those lies that share memory with this rank"""
    boards: Mapping[int, Board]
    slots: Sequence[Sequence[Slot]]


class Waiter:
    """Waits on one rank's doorbell."""

    def __init__(
        self,
        signals: ModuleType,
        *,
        rank: int,
        num_ranks: int,
        doorbell: int,
        timeout_s: float,
        inquiry: Inquiry,
    ) -> None:
        self._signals = signals
        self._inquiry = inquiry
        self._await_each = signals.await_each
        self._rank = rank
        self._doorbell = doorbell
        self._timeout_s = timeout_s
        self._timeout_ns = max(1, int(timeout_s * 1e9))
        self._first_slice_ns = min(SLICE_NS, self._timeout_ns)
        self.sleeps = bool(signals.HAS_FUTEX)
        self.waited_ns: Words = np.zeros(num_ranks, np.int64)
        """[R]: how much later than a wait's begin each rank's messages were posted"""
        self.messengers: Mapping[int, int] = {}
        """who posts here in the name of a rank of another host"""

    def look(self, slot: Slot, epoch: int, ranks: Ranks, began_ns: int) -> int:
        """Look, let others run, sleep up to one slice; return how many messages are missing, -1 if a rank is none."""
        until_ns = began_ns + self._first_slice_ns if self.sleeps else 0
        missing: int = self._await_each(
            self._doorbell, slot.first, slot.stride, ranks, epoch, SPINS, YIELDS, until_ns, began_ns, self.waited_ns
        )
        return missing

    def _sleep(self, slot: Slot, epoch: int, ranks: Ranks, began_ns: int, now_ns: int) -> int:
        """Sleep up to one slice; return how many messages are missing."""
        waited_ns = now_ns - began_ns
        left_ns = max(0, self._timeout_ns - waited_ns)
        until_ns = now_ns + min(max(SLICE_NS, waited_ns // 4), LONGEST_SLICE_NS, left_ns) if self.sleeps else 0
        missing: int = self._await_each(
            self._doorbell, slot.first, slot.stride, ranks, epoch, 0, 0, until_ns, began_ns, self.waited_ns
        )
        return missing

    def keep_waiting(
        self, open_now: Callable[[], Opened], slot: Slot, epoch: int, step: str, ranks: Ranks, began_ns: int
    ) -> None:
        """Wait slice by slice until every message is here, a rank that owes one has left, or time is up.

        ``open_now`` raises once the transport is closed.
        """
        opened = open_now()
        while True:
            # First who has left, then which messages are here: what a rank posted before it left counts.
            departures = departures_of(self._signals, opened)
            open_now()
            now_ns = time.monotonic_ns()
            missing = self.missing(slot, epoch, ranks)
            arrived = sorted({*ranks.tolist()}.difference(missing))
            missing = self._answerable(opened, missing, departures)
            self._inquiry.waits(missing, began_ns)
            overdue = now_ns - began_ns >= self._timeout_ns
            if overdue:
                missing = self._held_back(opened, missing, now_ns - RECENT_NS)
            if missing and (overdue or not departures.keys().isdisjoint(missing)):
                wait = self.facts(opened, epoch, step, missing, arrived, (now_ns - began_ns) / 1e9)
                still = self._inquiry.standing_still(missing, began_ns, departures)
                raise given_up(wait, departures, still)
            if self._sleep(slot, epoch, ranks, began_ns, now_ns) == 0:
                self._inquiry.over()
                return
            if not self.sleeps:
                time.sleep(NAP_S)

    def _answerable(self, opened: Opened, missing: Sequence[int], departures: Mapping[int, Departure]) -> list[int]:
        """Return who owes the missing messages.

        For a rank of another host its messenger, if that one is at fault itself: it has left, owes its own message, or
        does something else than to pass on what comes.
        """
        owing = set()
        for rank in missing:
            other = self.messengers.get(rank, rank)
            at_fault = other in departures or other in missing or not self._passes_on(opened, other)
            owing.add(other if at_fault else rank)
        return sorted(owing)

    def _held_back(self, opened: Opened, missing: Sequence[int], since_ns: int) -> list[int]:
        """Return who owes the missing messages where some have come to a messenger, who passes all on together.

        It says for whom it waits: not for those whose messages it has. They may have left since.
        """
        owing = set()
        for rank in missing:
            other = self.messengers.get(rank, self._rank)
            waits = opened.boards[other].waits_for(since_ns) if other != self._rank and other in opened.boards else ()
            owing.add(other if waits and rank not in waits else rank)
        return sorted(owing)

    def _passes_on(self, opened: Opened, rank: int) -> bool:
        board = opened.boards.get(rank)
        return board is not None and board.passes_on

    def facts(
        self,
        opened: Opened,
        epoch: int | None,
        step: str,
        missing: Sequence[int],
        arrived: Sequence[int],
        elapsed_s: float = 0.0,
    ) -> Wait:
        """Return what an error says about a wait in ``step``; ``epoch`` None: of no operation."""
        return Wait(
            step=step,
            epoch=epoch,
            rank=self._rank,
            missing=missing,
            arrived=arrived,
            elapsed_s=elapsed_s,
            timeout_s=self._timeout_s,
            names=opened.memories.names(),
            holders=self._inquiry.holders,
            culprits=self._inquiry.culprits(),
        )

    def missing(self, slot: Slot, epoch: int, ranks: Ranks) -> list[int]:
        """Return the ranks whose message of ``epoch`` is not in ``slot``, ascending."""
        tag = epoch % _EPOCHS
        words = {source: self._signals.read_word(slot.first + source * slot.stride) for source in ranks.tolist()}
        return sorted(s for s, word in words.items() if (word >> 32) % _EPOCHS != tag or not word % _EPOCHS)


def departures_of(signals: ModuleType, opened: Opened) -> dict[int, Departure]:
    """Return who has left; a rank's own words outweigh what was seen of its end."""
    departures = dict(opened.memories.departures())
    if anybody_left(signals, opened.members_R):
        departures |= told_by(opened)
    return departures


def told_by(opened: Opened) -> dict[int, Departure]:
    """Return what ranks that have left said about it."""
    told = {rank: board.departure() for rank, board in opened.boards.items()}
    return {rank: left for rank, left in told.items() if left is not None}
