"""The exam of a network engine: what ``transport/engine.py`` promises.

::

    def run(num_ranks, case, *args):  # start ranks; each calls case(make, rank, *args)
        return local_group(num_ranks).run(lambda m: case(partial(InProcessEngine, m), m.rank, *args))

    check_engine(run)                 # raises EngineExamError with the case and what went wrong
"""

from __future__ import annotations

from collections.abc import Iterable

from anyep.testing import engine_cases as cases
from anyep.testing import engine_end_cases as end_cases
from anyep.testing.engine_steps import SIZES
from anyep.testing.transport_exam import Exam, Run


class EngineExamError(AssertionError):
    """An engine did what the seam forbids, or did not do what it promises."""


_SMALL, _BIG = 100, 1 << 20


def engine_exams(*, seed: int = 0) -> list[Exam]:
    """Return the whole exam, one question after the other."""
    exams = [Exam(case=cases.facts, num_ranks=n) for n in (2, 4)]
    exams += [
        Exam(case=case, num_ranks=n, arguments=(num_bytes,))
        for case in (cases.send_first, cases.receive_first)
        for n, num_bytes in ((2, 0), (3, 1), (3, SIZES[-1]), (2, 16384))
    ]
    exams += [Exam(case=cases.overtaking, num_ranks=n, arguments=(tags,)) for n, tags in ((2, 40), (3, 40), (2, 400))]
    exams += [
        Exam(case=cases.several_in_flight, num_ranks=n, arguments=(seed, count)) for n, count in ((2, 60), (4, 20))
    ]
    exams += [Exam(case=cases.large, num_ranks=n) for n in (2, 3)]
    exams += [Exam(case=cases.tags_again, num_ranks=2, arguments=(30,))]
    exams += [Exam(case=cases.threads, num_ranks=2, arguments=(3, 12)), Exam(case=cases.two_engines, num_ranks=3)]
    exams += [
        Exam(case=end_cases.wrong_size, num_ranks=2, arguments=(expected, came, first))
        for expected, came in ((8, 9), (_SMALL, _BIG), (_BIG, _SMALL), (_BIG, _BIG + 1), (_BIG, _BIG - 1), (_BIG, 0))
        for first in (False, True)
    ]
    exams += [Exam(case=end_cases.forgets_who_looked, num_ranks=2)]
    exams += [Exam(case=end_cases.bad_arguments, num_ranks=2), Exam(case=end_cases.patience, num_ranks=2)]
    exams += [Exam(case=end_cases.leaves, num_ranks=n, arguments=(num_bytes,)) for n, num_bytes in ((2, 10), (3, _BIG))]
    exams += [Exam(case=end_cases.last_words, num_ranks=3, arguments=(n, 50)) for n in (_SMALL, 16384)]
    exams += [Exam(case=end_cases.lost_sends, num_ranks=3, arguments=(_BIG,))]
    exams += [Exam(case=end_cases.closed, num_ranks=2), Exam(case=end_cases.opened_often, num_ranks=2, arguments=(5,))]
    return exams


def check_engine(run: Run, exams: Iterable[Exam] | None = None) -> None:
    """Put every question (default: all of :func:`engine_exams`) to an engine.

    Raises EngineExamError at the first wrong answer. Takes about half a minute between processes.
    """
    for exam in engine_exams() if exams is None else exams:
        try:
            run(exam.num_ranks, exam.case, *exam.arguments)
        except Exception as error:
            raise EngineExamError(f"{exam.name}: {error}") from error
