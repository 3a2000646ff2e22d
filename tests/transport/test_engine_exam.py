"""The engines pass the exam; engines with a fault do not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from anyep.testing import EngineExamError, check_engine
from anyep.testing import engine_cases as cases
from anyep.testing import engine_end_cases as end_cases
from anyep.testing.engine_exam import engine_exams
from anyep.testing.processes import run_processes
from anyep.testing.transport_exam import Exam
from anyep.transport.engine_inprocess import InProcessEngine
from anyep.transport.inprocess import local_group
from tests.engines import skip_without
from tests.transport import engine_ranks


def run_threads(num_ranks: int, case: Any, *args: Any, kind: Any = InProcessEngine) -> list[Any]:
    return local_group(num_ranks).run(lambda m: case(partial(kind, m), m.rank, *args))


def run_gloo(num_ranks: int, case: Any, *args: Any) -> list[Any]:
    return run_processes(num_ranks, engine_ranks.with_gloo, case, *args)


def run_nixl(num_ranks: int, case: Any, *args: Any) -> list[Any]:
    return run_processes(num_ranks, engine_ranks.with_nixl, case, *args)


@pytest.mark.parametrize("exam", engine_exams(), ids=lambda exam: exam.name)
def test_the_engine_between_threads_passes(exam):
    check_engine(run_threads, [exam])


@pytest.mark.parametrize("exam", engine_exams(), ids=lambda exam: exam.name)
def test_gloo_passes(exam):
    check_engine(run_gloo, [exam])


@pytest.fixture(scope="module")
def _nixl():
    skip_without("nixl")


@pytest.mark.usefixtures("_nixl")
@pytest.mark.parametrize("exam", engine_exams(), ids=lambda exam: exam.name)
def test_nixl_passes(exam):
    check_engine(run_nixl, [exam])


class LosesAByte(InProcessEngine):
    def send(self, rank, tag, memory):
        memory = memory.copy()
        if memory.size > 5000:
            memory[5000] ^= 1
        return super().send(rank, tag, memory)


class MixesUpTags(InProcessEngine):
    def send(self, rank, tag, memory):
        return super().send(rank, tag ^ 1 if tag < 8 else tag, memory)


class IsDoneTooSoon(InProcessEngine):
    def receive(self, rank, tag, memory):
        transfer = super().receive(rank, tag, memory)
        transfer.done = lambda: True
        return transfer


class CutsToFit(InProcessEngine):
    def send(self, rank, tag, memory):
        return super().send(rank, tag, memory[:100])


class ForgetsItIsClosed(InProcessEngine):
    def _check_open(self):
        pass


class BlamesTheFirst(InProcessEngine):
    def obstacle(self, rank, tag, verb):
        failure = super().obstacle(rank, tag, verb)

        def blamed():
            error = failure()
            if hasattr(error, "ranks"):
                error.ranks = (0,)
            return error

        return failure and blamed


class KeepsItsError(InProcessEngine):
    def receive(self, rank, tag, memory):
        transfer = super().receive(rank, tag, memory)
        look, kept = transfer.done, []

        def done():
            if not kept:
                try:
                    return look()
                except ValueError as error:
                    kept.append(error)
            raise kept[0]

        transfer.done = done
        return transfer


class Spins(InProcessEngine):
    def wait(self, transfers, timeout_s):
        for _ in range(1000):
            super().wait(transfers, 0)


class CountsMessages(InProcessEngine):
    def send(self, rank, tag, memory):
        transfer = super().send(rank, tag, memory)
        self.sent_bytes += 16
        return transfer


@pytest.mark.parametrize(
    ("kind", "case", "num_ranks", "arguments"),
    [
        (LosesAByte, cases.send_first, 2, (1 << 20,)),
        (MixesUpTags, cases.several_in_flight, 2, (0, 20)),
        (IsDoneTooSoon, cases.receive_first, 2, (100,)),
        (CutsToFit, end_cases.wrong_size, 2, (100, 200, True)),
        (ForgetsItIsClosed, end_cases.closed, 2, ()),
        (BlamesTheFirst, end_cases.leaves, 3, (10,)),
        (KeepsItsError, end_cases.forgets_who_looked, 2, ()),
        (Spins, end_cases.patience, 2, ()),
        (CountsMessages, cases.facts, 2, ()),
    ],
)
def test_a_fault_is_found(kind, case, num_ranks, arguments):
    exam = Exam(case=case, num_ranks=num_ranks, arguments=arguments)
    with pytest.raises(EngineExamError, match=case.__name__):
        check_engine(partial(run_threads, kind=kind), [exam])
