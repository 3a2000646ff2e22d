"""How the ranks' halves follow one another on a device.

An order launches a rank's second half when all ranks' first halves are on their way, so that it finds what they
announced, and lets what is launched later find all that they wrote.

*Phase-split*, for ranks that share one stream: all first halves, then all second halves, then what comes after. Who has
heard from all ranks first launches the second half of each, in rank order; the others find them launched. The other is
``concurrent.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

Half = Callable[[], None]


class Turn(NamedTuple):
    """An operation, and which of its second halves: 0, or more where memory was offered again."""

    epoch: int
    number: int


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

    def launch(self, turn: Turn) -> None:
        """Launch the half, when all have told. Every rank calls this once."""
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
        self._left: dict[Turn, int] = {}
        self._errors: dict[Turn, BaseException] = {}

    def hand_in(self, turn: Turn, rank: int, half: Half) -> None:
        """Say what is to be launched for a rank; before it tells the others that it has posted."""
        with self._launching:
            self._halves.setdefault(turn, {})[rank] = half

    def pass_by(self, turn: Turn) -> None:
        """Nothing to do: nothing is counted."""

    def launch(self, turn: Turn) -> None:
        """Launch every rank's half, unless somebody has. Every rank calls this once, after all have handed in.

        Raises on every rank what launching raised.
        """
        with self._launching:
            halves = self._halves.pop(turn, None)
            if halves is not None:
                assert len(halves) == self._num_ranks, "a rank hands in before it posts"
                self._left[turn] = self._num_ranks
                try:
                    for _, half in sorted(halves.items()):
                        half()
                except BaseException as error:
                    self._errors[turn] = error
            failure = self._errors.get(turn)
            self._leave(turn)
        if failure is not None:
            raise failure

    def drop(self, turn: Turn) -> None:
        """Forget what was handed in: all ranks refuse the operation."""
        with self._launching:
            self._halves.pop(turn, None)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Nothing lies on the device."""
        return ()

    def _leave(self, turn: Turn) -> None:
        self._left[turn] -= 1
        if not self._left[turn]:
            del self._left[turn]
            self._errors.pop(turn, None)
