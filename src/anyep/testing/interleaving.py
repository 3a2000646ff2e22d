"""Several ranks' GPU kernels in one interpreter, one step at a time, in an order that a seed decides.

A rank is a function that launches interpreted kernels, one after the other. It runs until its next atomic; then the
scheduler draws who goes on. The same seed draws the same order. Where all ranks do nothing but look at words that
nobody changes any more, that is a deadlock, and it is named.

With ``weak_memory`` ranks see of one another only what a device promises (testing/weak_memory.py). ``weakened`` takes a
promise away, ``"release"`` or ``"acquire"``, as if the kernels did not ask for it: a test of the test.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyep.testing.weak_memory import WeakMemory

_PATIENCE = 3
_JOIN_S = 60.0


class InterleavingDeadlock(AssertionError):
    """Every rank that is left waits for a word that nobody will write."""


class _Stopped(BaseException):
    """Another rank failed: this one ends too."""


class Interleaving:
    """One run of several ranks. Needs a process in which kernels are interpreted (testing/interpreter.py)."""

    def __init__(
        self,
        seed: int,
        memory: NDArray[np.uint8],
        *,
        weak_memory: bool = False,
        weakened: str | None = None,
        patience: int = _PATIENCE,
    ) -> None:
        """``memory`` holds all that ranks share. After ``patience`` looks of every rank at words that nobody changes
        there is a deadlock; a test of bounded waits needs more of them than a wait has looks.
        """
        self._chance = random.Random(seed)
        self._memory = memory
        self._is_weak = weak_memory
        self._weakened = weakened
        self._patience = patience
        self.trace: list[tuple[int, int, int]] = []
        """(rank, address, value that the word had) of every atomic, in order."""

    def run(self, ranks: Sequence[Callable[[], None]]) -> None:
        """Run all ranks to their ends. Raises what a rank raised, or InterleavingDeadlock."""
        from anyep.testing.interpreter_hooks import Hooks

        self._weak = WeakMemory(self._memory, len(ranks), self._chance) if self._is_weak else None
        self._turns = [threading.Semaphore(0) for _ in ranks]
        self._grids: list[Any] = [None] * len(ranks)
        self._left = set(range(len(ranks)))
        self._looks: dict[int, int] = {}
        self._waits_for: dict[int, int] = {}
        self._error: BaseException | None = None
        self._hooks = Hooks(self)
        threads = [threading.Thread(target=self._rank, args=pair, daemon=True) for pair in enumerate(ranks)]
        with self._hooks:
            for thread in threads:
                thread.start()
            self._hand_over()
            for thread in threads:
                thread.join(_JOIN_S)
        if any(thread.is_alive() for thread in threads):
            raise AssertionError(f"ranks did not end within {_JOIN_S} s")
        if self._error is not None:
            raise self._error

    def before_atomic(self, *, releases: bool) -> None:
        """Give the others a turn, and make this rank's stores visible if the atomic releases."""
        self._switch()
        if self._weak is not None:
            if self._weak.trickle():
                self._looks.clear()
            if releases and self._weakened != "release":
                self._weak.release(self._now)

    def after_atomic(self, address: int, before: int, after: int, *, acquires: bool) -> None:
        """Note what an atomic found, and renew this rank's view if it acquires."""
        rank = self._now
        self.trace.append((rank, address, before))
        if self._weak is not None and acquires and self._weakened != "acquire":
            self._weak.acquire(rank)
        if before != after:
            self._looks.clear()
            return
        self._looks[rank] = self._looks.get(rank, 0) + 1
        self._waits_for[rank] = address
        self._check_progress()

    def store(self, addresses: NDArray[np.uint64], values: NDArray[np.generic]) -> bool:
        """Take over a store to the shared memory; say whether it was one."""
        self._looks.clear()
        if self._weak is None or not self._weak.holds(addresses):
            return False
        self._weak.store(self._now, addresses, values)
        return True

    def load(self, addresses: NDArray[np.uint64], values: NDArray[np.generic]) -> None:
        """Turn what a load read into what this rank sees."""
        if self._weak is not None and self._weak.holds(addresses):
            self._weak.load(self._now, addresses, values)

    def _rank(self, rank: int, function: Callable[[], None]) -> None:
        self._turns[rank].acquire()
        try:
            if self._error is None:
                self._resume(rank)
                function()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
        self._left.discard(rank)
        self._looks.clear()
        if self._weak is not None:
            self._weak.release(rank)
        self._hand_over()

    def _hand_over(self) -> None:
        if self._left:
            self._turns[self._chance.choice(sorted(self._left))].release()

    def _switch(self) -> None:
        rank = self._now
        self._grids[rank] = self._hooks.grid()
        self._hand_over()
        self._turns[rank].acquire()
        if self._error is not None:
            raise _Stopped
        self._resume(rank)

    def _resume(self, rank: int) -> None:
        self._now = rank
        if self._grids[rank] is not None:
            self._hooks.set_grid(self._grids[rank])

    def _check_progress(self) -> None:
        all_look = all(self._looks.get(rank, 0) >= self._patience for rank in self._left)
        if all_look and (self._weak is None or self._weak.is_quiet()):
            base = int(self._memory.ctypes.data)
            waits = [f"rank {rank} for the word at {self._waits_for[rank] - base}" for rank in sorted(self._left)]
            self._error = InterleavingDeadlock("nobody goes on: " + ", ".join(waits))
            raise _Stopped
