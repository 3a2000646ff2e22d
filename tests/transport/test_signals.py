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
        for rank in range(num_ranks):
            ctypes.c_int32.from_address(int(self.controls_R[rank]) + DOORBELL_OFFSET).value = counter

    def post(self, rank: int, epoch: int, words: np.ndarray) -> None:
        offset = self.layout.mailbox_offset(0, epoch % self.ring, rank)
        self.signals.post_all(self.controls_R, DOORBELL_OFFSET, offset, rank, words, epoch % 2**32)

    def wait(self, rank: int, epoch: int, *, spins: int = 0, yields: int = 0, seconds: float = FAR_S) -> int:
        base = int(self.controls_R[rank])
        deadline_ns = time.monotonic_ns() + int(seconds * 1e9) if seconds else 0
        first = base + self.layout.mailbox_offset(0, epoch % self.ring, 0)
        stride = self.layout.mailbox_bytes(0)
        return self.signals.await_all(
            base + DOORBELL_OFFSET, first, stride, self.num_ranks, epoch % 2**32, spins, yields, deadline_ns
        )

    def mailbox(self, rank: int, epoch: int, source: int) -> np.ndarray:
        begin = self.layout.mailbox_offset(0, epoch % self.ring, source) // 8 + 1
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


def test_words_are_published_and_read():
    signals = load_signals()
    word = np.zeros(1, np.int64)
    signals.publish_word(word.ctypes.data, -(2**62))
    assert signals.read_word(word.ctypes.data) == -(2**62) == word[0]
