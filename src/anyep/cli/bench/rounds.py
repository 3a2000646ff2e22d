"""Contests: every operation takes its turn in each round, so that all of them see the same machine.

A turn is one call behind a barrier, or several in a row. A single call begins with the first rank that leaves the
barrier and ends with the last, which with more ranks than cores leaves it long after, and it finds other operations'
memory in the caches; calls in a row follow each other as the steps of a program do.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Spans = NDArray[np.int64]
"""[rounds, operations, 2]: begin and end in ns of the clock that all processes of a host share."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something that all ranks do together."""

    name: str
    run: Callable[[], object]
    """its result is dropped outside of the timing"""


def contest(
    operations: Sequence[Operation],
    *,
    rounds: int,
    warm_up: int,
    barrier: Callable[[], None],
    after_round: Callable[[], None],
    in_a_row: int = 1,
) -> Spans:
    """Give every operation its turn in each round; return one rank's spans of the rounds after ``warm_up``.

    A turn is ``in_a_row`` calls, one behind the other, behind one barrier.

    Each round has another order, the same on all ranks: what ran before decides what lies in the caches.
    """
    spans = np.zeros((warm_up + rounds, len(operations), 2), np.int64)
    shuffler = random.Random(0)
    for number in range(warm_up + rounds):
        for position in shuffler.sample(range(len(operations)), len(operations)):
            barrier()
            begin = time.perf_counter_ns()
            for _ in range(in_a_row - 1):
                operations[position].run()
            result = operations[position].run()
            spans[number, position] = begin, time.perf_counter_ns()
            del result
        after_round()
    return spans[warm_up:]


def durations_us(spans_of_ranks: Sequence[Spans], in_a_row: int = 1) -> NDArray[np.float64]:
    """Return [rounds, operations]: from the first rank's begin to the last rank's end, for each call of the turn.

    Not the slowest rank's own time: with more ranks than cores, ranks begin one after another.
    """
    together = np.stack(spans_of_ranks)
    elapsed: NDArray[np.float64] = (together[..., 1].max(axis=0) - together[..., 0].min(axis=0)) / (1e3 * in_a_row)
    return elapsed
