"""Post and await on plain memory: order, wrap-around, and that no wake-up is ever lost."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import pytest

from anyep.transport.base import Lane
from anyep.transport.control import DOORBELL_OFFSET, ControlLayout
from anyep.transport.together import load_signals

FAR_S = 60.0
"""Longer than any test: a lost wake-up is a wait that ends only then."""


class Ranks:
    """The control memory of R ranks in one array, and the calls as a transport makes them."""

    def __init__(self, num_ranks: int, *, ring: int = 2, words: int = 4, counter: int = 0):
        self.layout = ControlLayout.of([Lane(index=0, name="lane", words=words)], ring, num_ranks)
        self.num_ranks, self.ring, self.words = num_ranks, ring, words
        self.signals = load_signals()
        stride = self.layout.num_bytes // 8
        self.memory = np.full(stride * num_ranks + 8, 0, np.int64)
        skip = (-self.memory.ctypes.data % 64) // 8
        self.control = self.memory[skip : skip + stride * num_ranks].reshape(num_ranks, stride)
        self.controls_R = np.array([row.ctypes.data for row in self.control], np.int64)
        self.waited_RR = np.zeros((num_ranks, num_ranks), np.int64)
        for rank in range(num_ranks):
            ctypes.c_int32.from_address(int(self.controls_R[rank]) + DOORBELL_OFFSET).value = counter

    def post(
        self, rank: int, epoch: int, words: np.ndarray, *, to: tuple[int, ...] | None = None, now: int = 0
    ) -> bool:
        offset = self.layout.mailbox_offset(0, epoch % self.ring, rank)
        ranks = np.array(range(self.num_ranks) if to is None else to, np.int64)
        return self.signals.post_each(self.controls_R, DOORBELL_OFFSET, offset, words, self.words, ranks, epoch, now)

    def wait(
        self,
        rank: int,
        epoch: int,
        *,
        sources: tuple[int, ...] | None = None,
        spins: int = 0,
        yields: int = 0,
        seconds: float = FAR_S,
        began: int = 0,
    ) -> int:
        base = int(self.controls_R[rank])
        ranks = np.array(range(self.num_ranks) if sources is None else sources, np.int64)
        deadline_ns = time.monotonic_ns() + int(seconds * 1e9) if seconds else 0
        first = base + self.layout.mailbox_offset(0, epoch % self.ring, 0)
        stride = self.layout.mailbox_bytes(0)
        doorbell, waited = base + DOORBELL_OFFSET, self.waited_RR[rank]
        return self.signals.await_each(doorbell, first, stride, ranks, epoch, spins, yields, deadline_ns, began, waited)

    def mailbox(self, rank: int, epoch: int, source: int) -> np.ndarray:
        begin = self.layout.mailbox_offset(0, epoch % self.ring, source) // 8 + 2
        return self.control[rank, begin : begin + self.words]

    def sleepers(self, rank: int) -> int:
        return int(self.control[rank, DOORBELL_OFFSET // 8 + 1])


def say(source: int, destination: int, epoch: int, count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64) + 1000 * source + 10 * destination - epoch


@pytest.mark.parametrize("epoch", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3])
def test_message_is_there_once_posted(epoch):
    ranks = Ranks(3)
    assert ranks.wait(1, epoch, spins=2, yields=2, seconds=0) == 3
    for source in (2, 0, 1):
        ranks.post(source, epoch, np.stack([say(source, d, epoch, 4) for d in range(3)]))
    for rank in range(3):
        assert ranks.wait(rank, epoch, seconds=0) == 0
        for source in range(3):
            np.testing.assert_array_equal(ranks.mailbox(rank, epoch, source), say(source, rank, epoch, 4))


def test_fresh_memory_is_no_message():
    ranks = Ranks(2)
    assert [ranks.wait(0, epoch, seconds=0) for epoch in (0, 1, 2**32)] == [2, 2, 2]


def test_a_slots_earlier_message_is_another():
    ranks = Ranks(1)
    for epoch in (2**32 - 2, 2**32, 2**32 + 2):
        assert ranks.wait(0, epoch, seconds=0) == 1
        ranks.post(0, epoch, np.zeros((1, 0), np.int64))
        assert ranks.wait(0, epoch, seconds=0) == 0
        assert ranks.wait(0, epoch - 2, seconds=0) == 1, "gone with the slot"


def test_short_messages_leave_the_rest_alone():
    ranks = Ranks(2)
    ranks.control[:] = 0
    for rank in range(2):
        ranks.mailbox(rank, 0, 0)[:] = -1
    ranks.post(0, 0, np.array([[7, 8], [9, 10]], np.int64))
    assert ranks.mailbox(0, 0, 0).tolist() == [7, 8, -1, -1]
    assert ranks.mailbox(1, 0, 0).tolist() == [9, 10, -1, -1]


def test_wait_returns_at_the_deadline_with_the_number_missing():
    ranks = Ranks(4)
    ranks.post(2, 0, np.zeros((4, 1), np.int64))
    assert ranks.wait(0, 0, spins=5, yields=5, seconds=0.01) == 3
    assert ranks.sleepers(0) == 0, "nobody is counted as asleep afterwards"


@pytest.mark.parametrize("counter", [0, 2**31 - 20, -20], ids=["from 0", "across 2**31", "across 2**32"])
@pytest.mark.parametrize(("spins", "yields"), [(0, 0), (20, 3)], ids=["asleep at once", "spinning first"])
def test_no_wake_up_is_lost(counter, spins, yields):
    """Waits would last a minute if one were: 4 threads, thousands of waits that all sleep, and no slices."""
    num_ranks, rounds = 4, 1500
    ranks = Ranks(num_ranks, counter=counter)
    wrong: list[str] = []

    def operate(rank):
        for epoch in range(rounds):
            ranks.post(rank, epoch, np.stack([say(rank, d, epoch, 4) for d in range(num_ranks)]))
            began = time.monotonic()
            missing = ranks.wait(rank, epoch, spins=spins, yields=yields)
            while missing and time.monotonic() - began < FAR_S / 2:  # a signal handler ran
                missing = ranks.wait(rank, epoch)
            got = [ranks.mailbox(rank, epoch, source).tolist() for source in range(num_ranks)]
            if missing or got != [say(source, rank, epoch, 4).tolist() for source in range(num_ranks)]:
                wrong.append(f"rank {rank}, epoch {epoch}: {missing} missing, {got}")
                return

    threads = [threading.Thread(target=operate, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FAR_S)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads), "a wake-up was lost"
    assert [ranks.sleepers(rank) for rank in range(num_ranks)] == [0] * num_ranks


def test_several_threads_of_a_rank_sleep_on_one_doorbell():
    """Each of rank 0's threads waits for its own operations; messages of the others' ring its doorbell too."""
    flights, rounds = 4, 1200
    ranks = Ranks(2, ring=2 * flights)
    late: list[str] = []

    def operate(rank, flight):
        for epoch in range(flight, rounds, flights):
            ranks.post(rank, epoch, np.full((2, 1), epoch, np.int64))
            if ranks.wait(rank, epoch, seconds=FAR_S / 2) and ranks.wait(rank, epoch, seconds=FAR_S / 2):
                late.append(f"rank {rank}, epoch {epoch}")
                return

    threads = [
        threading.Thread(target=operate, args=(rank, flight), daemon=True)
        for rank in range(2)
        for flight in range(flights)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FAR_S)
    assert not late
    assert not any(thread.is_alive() for thread in threads), "a wake-up was lost"
    assert [ranks.sleepers(0), ranks.sleepers(1)] == [0, 0]


def test_who_waits_for_many_is_woken_once():
    """The system call is made by the last sender only: wake_at is reached by it alone."""
    ranks = Ranks(5)
    waiter = threading.Thread(target=ranks.wait, args=(0, 0), daemon=True)
    waiter.start()
    while not ranks.sleepers(0):
        time.sleep(0.001)
    assert ranks.sleepers(0) == (1 << 32) | 5, "one sleeper, to be woken at the fifth message"
    for source in range(4):
        ranks.post(source, 0, np.zeros((5, 1), np.int64))
    time.sleep(0.05)
    assert ranks.sleepers(0) == (1 << 32) | 5, "asleep all the while"
    ranks.post(4, 0, np.zeros((5, 1), np.int64))
    waiter.join(FAR_S)
    assert not waiter.is_alive()


def test_messages_go_to_some_and_are_awaited_from_some():
    ranks = Ranks(4)
    words = np.arange(8, dtype=np.int64).reshape(4, 2)
    assert ranks.post(2, 0, words, to=(3, 0))
    assert ranks.post(1, 0, words, to=())
    assert [ranks.wait(rank, 0, seconds=0) for rank in range(4)] == [3, 4, 4, 3]
    assert [ranks.wait(rank, 0, sources=(2,), seconds=0) for rank in range(4)] == [0, 1, 1, 0]
    assert ranks.wait(0, 0, sources=(3, 2, 1), seconds=0) == 2
    assert ranks.wait(1, 0, sources=(), spins=1) == 0
    assert ranks.wait(1, 0, sources=()) == 0
    assert [ranks.mailbox(rank, 0, 2)[:2].tolist() for rank in (0, 3)] == [[0, 1], [6, 7]]


@pytest.mark.parametrize("wrong", [(4,), (-1,), (0, 1 << 40)])
def test_what_is_no_rank_is_refused_before_anything_is_done(wrong):
    ranks = Ranks(4)
    before = ranks.memory.copy()
    assert not ranks.post(0, 0, np.zeros((4, 1), np.int64), to=(0, *wrong))
    assert not ranks.post(0, 0, np.zeros((3, 1), np.int64))
    assert not ranks.post(0, 0, np.zeros((4, 5), np.int64))
    assert ranks.wait(0, 0, sources=wrong) == -1
    np.testing.assert_array_equal(ranks.memory, before)


def test_lateness_is_what_was_posted_after_the_wait_began():
    ranks = Ranks(3)
    for source, posted in enumerate((900, 1000, 1700)):
        ranks.post(source, 0, np.zeros((3, 1), np.int64), now=posted)
    assert ranks.wait(0, 0, sources=(2, 0), began=1000, seconds=0) == 0
    assert ranks.waited_RR[0].tolist() == [0, 0, 700]
    assert ranks.wait(0, 0, began=850, spins=1) == 0
    assert ranks.waited_RR[0].tolist() == [50, 150, 1550]
    assert ranks.wait(0, 1, began=0, seconds=0) == 3
    assert ranks.waited_RR[0].tolist() == [50, 150, 1550], "not before all are here"


def test_any_word_above():
    signals = load_signals()
    words = np.array([[0, 1], [0, 2], [0, 0]], np.int64)
    bases = np.array([row.ctypes.data for row in words])
    assert [signals.any_word_above(bases, 8, value) for value in (-1, 1, 2)] == [True, True, False]


def test_words_are_published_and_read():
    signals = load_signals()
    word = np.zeros(1, np.int64)
    signals.publish_word(word.ctypes.data, -(2**62))
    assert signals.read_word(word.ctypes.data) == -(2**62) == word[0]
