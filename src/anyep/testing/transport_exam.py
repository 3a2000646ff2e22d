"""The exam of a transport: what ``transport/base.py`` promises, between threads or processes, with fast and slow ranks.

::

    def run(num_ranks, case, *args):  # start ranks; each calls case(make, rank, *args)
        return local_group(num_ranks).run(lambda m: case(partial(InProcessTransport, m), m.rank, *args))

    check_transport(run)              # raises TransportExamError with the case and what went wrong
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from anyep.testing import transport_cases as cases
from anyep.testing import transport_end_cases as end_cases
from anyep.testing import transport_memory_cases as memory_cases
from anyep.testing.transport_steps import TransportExamError

Run = Callable[..., list[Any]]
"""``run(num_ranks, case, *args)``: call ``case(make, rank, *args)`` on every rank; raise what a rank raises."""

_WRAP = 1 << 32


@dataclass(frozen=True, kw_only=True)
class Exam:
    """One question: a function of ``testing/transport_*cases.py``, and for how many ranks."""

    case: Callable[..., None]
    num_ranks: int
    arguments: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        told = "".join(f", {argument}" for argument in self.arguments)
        return f"{self.case.__name__}({self.num_ranks} ranks{told})"


def transport_exams(*, seed: int = 0, rounds: int = 300) -> list[Exam]:
    """Return the whole exam, one question after the other. ``rounds``: operations of the longer ones."""
    exams = [
        Exam(case=cases.messages, num_ranks=num_ranks, arguments=(seed, rounds, 0, 0.0)) for num_ranks in range(1, 10)
    ]
    exams += [
        Exam(case=cases.messages, num_ranks=3, arguments=(seed, rounds // 3, first, 0.05))
        for first in (0, _WRAP - 50, 3 * _WRAP - 20)
    ]
    exams += [Exam(case=cases.skewed_messages, num_ranks=n, arguments=(seed, rounds)) for n in (2, 5)]
    exams += [
        Exam(case=cases.operations_in_flight, num_ranks=n, arguments=(seed, rounds, flights))
        for n, flights in ((2, 2), (4, 3))
    ]
    exams += [Exam(case=cases.subsets, num_ranks=n, arguments=(seed, rounds)) for n in (1, 2, 5)]
    exams += [
        Exam(case=memory_cases.bytes_before_words, num_ranks=n, arguments=(rounds, words))
        for n, words in ((1, 1000), (2, 8191), (3, 1), (8, 1023))
    ]
    exams += [
        Exam(case=case, num_ranks=n)
        for case in (memory_cases.growth, memory_cases.strangers, memory_cases.valid_after_close, cases.several)
        for n in (1, 3)
    ]
    exams += [Exam(case=memory_cases.blocks_return, num_ranks=n, arguments=(seed, 2 * rounds)) for n in (1, 2)]
    exams += [Exam(case=memory_cases.trimmed_blocks, num_ranks=n, arguments=(rounds,)) for n in (1, 2)]
    exams += [
        Exam(case=case, num_ranks=n) for case in (end_cases.closed, end_cases.silent, end_cases.leaves) for n in (2, 4)
    ]
    exams += [Exam(case=case, num_ranks=3) for case in (end_cases.silent_for_some, cases.lateness)]
    exams += [Exam(case=end_cases.left_out, num_ranks=n, arguments=(rounds // 10,)) for n in (2, 5)]
    exams += [Exam(case=end_cases.expelled, num_ranks=n) for n in (1, 4)]
    exams += [Exam(case=end_cases.blame, num_ranks=4, arguments=(timeout,)) for timeout in (False, True)]
    return exams


def check_transport(run: Run, exams: Iterable[Exam] | None = None) -> None:
    """Put every question (default: all of :func:`transport_exams`) to a transport.

    Raises TransportExamError at the first wrong answer. Takes about half a minute.
    """
    for exam in transport_exams() if exams is None else exams:
        try:
            run(exam.num_ranks, exam.case, *exam.arguments)
        except Exception as error:
            raise TransportExamError(f"{exam.name}: {error}") from error
