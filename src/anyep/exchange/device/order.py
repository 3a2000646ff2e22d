"""How the ranks' halves follow one another on a device.

An order launches a rank's second half when all ranks' first halves are on their way, so that it finds what they
announced, and lets what is launched later find all that they wrote.

*Phase-split*, for ranks that share one stream: all first halves, then all second halves, then what comes after. Who has
heard from all ranks first launches the second half of each, in rank order; the others find them launched. The other is
``concurrent.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

import torch

Half = Callable[[Collection[int]], None]
"""Launches what a rank does, where these ranks take no part."""


class Turn(NamedTuple):
    """An operation, and which of its second halves: 0, or more where memory was offered again."""

    epoch: int
    number: int


_Party = tuple[Turn, tuple[int, ...]]
"""An operation, and who takes no part: those who do may be several parties."""
_MOST_TURNS = 64
"""More than are in flight."""


class Order(Protocol):
    """How halves follow one another, as one rank sees it."""

    is_concurrent: bool
    """whether ranks wait for one another on the device"""

    def hand_in(self, turn: Turn, rank: int, half: Half) -> None:
        """Say what is to be launched for a rank that has launched its announcement, before it tells the others so."""
        ...

    def pass_by(self, turn: Turn) -> None:
        """Count an operation in which there is nothing to launch."""
        ...

    def launch(self, turn: Turn, absent: Collection[int]) -> None:
        """Launch the half, when all have told but those who take no part. Every other rank calls this once."""
        ...

    def drop(self, turn: Turn) -> None:
        """Forget what was handed in: all ranks refuse the operation."""
        ...

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return all that lives as long as the buffer."""
        ...


class PhaseSplit:
    """One object for all ranks of a group. Ranks are threads, or calls of one thread."""

    is_concurrent = False

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._launching = threading.Lock()
        self._halves: dict[Turn, dict[int, Half]] = {}
        self._left: dict[_Party, int] = {}
        self._errors: dict[_Party, BaseException] = {}

    def hand_in(self, turn: Turn, rank: int, half: Half) -> None:
        """Say what is to be launched for a rank; before it tells the others that it has posted."""
        with self._launching:
            self._halves.setdefault(turn, {})[rank] = half

    def pass_by(self, turn: Turn) -> None:
        """Nothing to do: nothing is counted."""

    def launch(self, turn: Turn, absent: Collection[int]) -> None:
        """Launch every rank's half, unless somebody has.

        Every rank that takes part calls this once, after all have handed in. Raises on every rank of a party what
        launching raised.
        """
        party = turn, tuple(absent)
        with self._launching:
            if party not in self._left:
                halves = self._take(turn, absent)
                self._left[party] = len(halves)
                try:
                    for _, half in sorted(halves.items()):
                        half(absent)
                except BaseException as error:
                    self._errors[party] = error
            failure = self._errors.get(party)
            self._leave(party)
        if failure is not None:
            raise failure

    def drop(self, turn: Turn) -> None:
        """Forget what was handed in: all ranks refuse the operation."""
        with self._launching:
            self._halves.pop(turn, None)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Nothing lies on the device."""
        return ()

    def _take(self, turn: Turn, absent: Collection[int]) -> dict[int, Half]:
        """Take the halves of all but the absent, who may be a party of their own."""
        handed_in = self._halves[turn]
        halves = {rank: handed_in.pop(rank) for rank in sorted(handed_in) if rank not in absent}
        assert len(halves) == self._num_ranks - len(absent), "a rank hands in before it posts"
        if not handed_in:
            del self._halves[turn]
        elif len(self._halves) > _MOST_TURNS:  # what ranks have left that called although they take no part
            del self._halves[next(iter(self._halves))]
        return halves

    def _leave(self, party: _Party) -> None:
        self._left[party] -= 1
        if not self._left[party]:
            del self._left[party]
            self._errors.pop(party, None)
