"""Both transports pass the exam; transports with a fault do not."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from anyep.errors import PeerLost
from anyep.testing import TransportExamError, check_transport
from anyep.testing import transport_cases as cases
from anyep.testing import transport_end_cases as end_cases
from anyep.testing import transport_memory_cases as memory_cases
from anyep.testing.processes import run_processes
from anyep.testing.transport_exam import Exam, transport_exams
from anyep.transport.base import Place
from anyep.transport.inprocess import InProcessTransport, local_group
from tests.transport import ranks

EXAMS = transport_exams()


def run_threads(num_ranks: int, case: Any, *args: Any, kind: Any = InProcessTransport) -> list[Any]:
    return local_group(num_ranks).run(lambda m: case(partial(kind, m), m.rank, *args))


def run_shm(num_ranks: int, case: Any, *args: Any) -> list[Any]:
    return run_processes(num_ranks, ranks.with_shm, case, *args)


@pytest.mark.parametrize("exam", EXAMS, ids=lambda exam: exam.name)
@pytest.mark.parametrize("run", [run_threads, run_shm], ids=["inprocess", "shm"])
def test_transport_passes(run, exam):
    check_transport(run, [exam])


class LosesAWord(InProcessTransport):
    def post(self, lane, epoch, words, ranks=None):
        words = words.copy()
        if words.shape[1] > 5 and epoch == 40:
            words[:, 5] = 0
        super().post(lane, epoch, words, ranks)


class MixesUpDestinations(InProcessTransport):
    def post(self, lane, epoch, words, ranks=None):
        super().post(lane, epoch, np.roll(words, 1, axis=0), ranks)


class DoesNotWait(InProcessTransport):
    def wait(self, lane, epoch, step, ranks=None):
        return self._opened().slots[lane.index][epoch % self._ring].view


class TakesAnOldEpoch(InProcessTransport):
    """Compares only 8 bits of the epoch."""

    def post(self, lane, epoch, words, ranks=None):
        super().post(lane, epoch % 2, words, ranks)

    def wait(self, lane, epoch, step, ranks=None):
        return super().wait(lane, epoch % 2, step, ranks)


class PostsBeforeTheBytes(InProcessTransport):
    """Holds back each rank's signal for nobody: the last rank's bytes are announced one operation early."""

    def wait(self, lane, epoch, step, ranks=None):
        if lane.name == "done" and epoch % 50 == 49:
            return self._opened().slots[lane.index][epoch % self._ring].view
        return super().wait(lane, epoch, step, ranks)


class LocatesEverything(InProcessTransport):
    def locate(self, address, num_bytes):
        return super().locate(address, num_bytes) or Place(segment=0, offset=0)


class MisplacesSegments(InProcessTransport):
    def address(self, rank, place):
        return super().address(rank, Place(segment=0, offset=place.offset))


class GivesOutTwice(InProcessTransport):
    """Forgets who has a block."""

    def allocate(self, num_bytes):
        block = super().allocate(num_bytes)
        arena = self._opened().arena
        if num_bytes:
            _, whole_bytes = arena._out.pop(block.position)
            arena._heap.give(block.position, whole_bytes)
        return block


class NeverTakesBack(InProcessTransport):
    def allocate(self, num_bytes):
        block = super().allocate(num_bytes)
        self.__dict__.setdefault("hoard", []).append(block.memory)
        return block


class BlamesTheMessenger(InProcessTransport):
    def leave(self, blame=None):
        super().leave()


class CallsSilenceALoss(InProcessTransport):
    def wait(self, lane, epoch, step, ranks=None):
        try:
            return super().wait(lane, epoch, step, ranks)
        except Exception as error:
            raise PeerLost(str(error), ranks=[0], step=step) from error


class ForgetsItIsClosed(InProcessTransport):
    def allocate(self, num_bytes):
        return super().allocate(num_bytes) if self._open else None


class AwaitsEverybody(InProcessTransport):
    def wait(self, lane, epoch, step, ranks=None):
        return super().wait(lane, epoch, step)


class CountsRowsFromTheFirst(InProcessTransport):
    """Sends row i to the i-th of some ranks, not row d to rank d."""

    def post(self, lane, epoch, words, ranks=None):
        if ranks is not None:
            words[ranks] = words[: ranks.size].copy()
        super().post(lane, epoch, words, ranks)


class NotesNoLateness(InProcessTransport):
    def wait(self, lane, epoch, step, ranks=None):
        before = self.waited_ns.copy()
        words = super().wait(lane, epoch, step, ranks)
        self.waited_ns[:] = before
        return words


class BlamesTheFirstForLateness(InProcessTransport):
    def wait(self, lane, epoch, step, ranks=None):
        before = self.waited_ns.copy()
        words = super().wait(lane, epoch, step, ranks)
        late = (self.waited_ns - before).sum()
        self.waited_ns[:] = before
        self.waited_ns[0] += late
        return words


class MissesWhoIsLeftOut(InProcessTransport):
    def leave_out(self, ranks):
        super().leave_out(())


class StaysWhenItLeaves(InProcessTransport):
    def leave(self, blame=None):
        if self._kept is None:
            super().leave(blame)


class LosesWhatIsTrimmed(InProcessTransport):
    def trim(self, block, num_bytes):
        block.memory = block.memory[:num_bytes]
        block.num_bytes = num_bytes


class TrimsTooMuch(InProcessTransport):
    def trim(self, block, num_bytes):
        super().trim(block, num_bytes // 2)
        block.num_bytes = num_bytes


@pytest.mark.parametrize(
    ("kind", "case", "num_ranks", "arguments"),
    [
        (LosesAWord, cases.messages, 2, (0, 60, 0, 0.0)),
        (MixesUpDestinations, cases.messages, 3, (0, 5, 0, 0.0)),
        (DoesNotWait, cases.messages, 3, (0, 60, 0, 0.0)),
        (TakesAnOldEpoch, cases.messages, 3, (0, 60, 0, 0.05)),
        (PostsBeforeTheBytes, memory_cases.bytes_before_words, 3, (100, 8191)),
        (LocatesEverything, memory_cases.strangers, 1, ()),
        (MisplacesSegments, memory_cases.growth, 2, ()),
        (GivesOutTwice, memory_cases.growth, 1, ()),
        (GivesOutTwice, memory_cases.blocks_return, 1, (0, 100)),
        (NeverTakesBack, memory_cases.blocks_return, 1, (0, 300)),
        (BlamesTheMessenger, end_cases.blame, 4, (True,)),
        (CallsSilenceALoss, end_cases.silent, 2, ()),
        (ForgetsItIsClosed, end_cases.closed, 2, ()),
        (AwaitsEverybody, cases.subsets, 3, (0, 60, 1.0)),
        (AwaitsEverybody, end_cases.silent_for_some, 3, ()),
        (CountsRowsFromTheFirst, cases.subsets, 3, (0, 60)),
        (NotesNoLateness, cases.lateness, 2, ()),
        (BlamesTheFirstForLateness, cases.lateness, 3, ()),
        (MissesWhoIsLeftOut, end_cases.left_out, 3, (5,)),
        (StaysWhenItLeaves, end_cases.leaves, 2, ()),
        (LosesWhatIsTrimmed, memory_cases.trimmed_blocks, 1, (60,)),
        (TrimsTooMuch, memory_cases.trimmed_blocks, 1, (60,)),
    ],
)
def test_a_fault_is_found(kind, case, num_ranks, arguments):
    exam = Exam(case=case, num_ranks=num_ranks, arguments=arguments)
    with pytest.raises(TransportExamError, match=case.__name__):
        check_transport(partial(run_threads, kind=kind), [exam])
