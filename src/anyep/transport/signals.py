"""Publish, await and reuse: the only file in which one rank's stores become another rank's loads.

*Mailbox.* For each lane, ring slot and source rank one signal word, ``epoch << 32 | count``, and the message behind it,
in the memory of the rank that receives. ``count`` is the number of words + 1, so that fresh memory is no message. The
word is never reset: a slot's next message has another epoch. Epochs are compared modulo 2**32, and a slot would have to
sleep through exactly 2**32 operations to be mistaken.

*Publish* (:func:`post_all`): one fence for everything this thread has written, non-temporal stores too; then, for each
destination, the message, the signal word with **release** order, and one ring of the doorbell.

*Await* (:func:`await_all`): load signal words with **acquire** order until none is missing; from then on the messages,
and everything their senders wrote before they posted, are visible.

*Reuse*: nobody acknowledges. A slot is written again ``ring`` operations later, and no sender gets that far ahead of
a receiver that has not finished with it (``transport/base.py`` says why).

*Doorbell*, two words a rank: an event ``counter`` (32 bits), which every message to the rank increments *after* its
signal word, and ``sleepers << 32 | wake_at``. A sleeper loads the counter, then counts the M missing messages. What it
saw missing had not rung when it loaded, so the last of them brings the counter at least to loaded + M, its target. It
publishes the target (the lowest of all sleepers' stands), looks at the counter again, and sleeps only while the counter
is below its target. A sender makes the system call only when somebody sleeps and its increment has reached ``wake_at``:
who waits for seven peers is woken once.

No wake-up is lost. Publishing the target (P), looking again (L), the sender's increment (I) and its look at the
sleepers (S) are sequentially consistent, P before L, I before S. If S does not see P, then S comes before P, so I comes
before L, and the sleeper sees its target reached and stays awake. If I comes after L, then S sees P and wakes; and if
that is before the thread is asleep, the kernel, which compares the counter with what L saw, does not let it sleep.
Messages of other operations ring too: they wake early, never late. Several threads of one rank may sleep: ``wake_at``
only falls while somebody sleeps, everybody is woken, and whoever wakes counts anew.
"""

from __future__ import annotations

from typing import Any

from anyep.machine.atomics import (
    HAS_FUTEX,
    add_ordered_i32,
    exchange_if_i64,
    futex_wait,
    futex_wake,
    give_way,
    load_acquire_i64,
    load_ordered_i32,
    load_ordered_i64,
    pause,
    store_release_i64,
)
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import copy_bytes, store_fence

__all__ = ["HAS_FUTEX", "await_all", "post_all", "publish_word", "read_word"]

SLEEPERS_OFFSET = 8
"""Bytes from a doorbell's counter to its sleepers; both in one cache line."""

_LOW = 0xFFFFFFFF
_HALF = 1 << 31


@inlined
def _ahead(counter: int, target: int) -> int:
    """counter - target as a signed 32-bit number: what counts is which came first, also after the counter wrapped."""
    return ((counter - target + _HALF) & _LOW) - _HALF


@inlined
def _has_arrived(mailbox: int, epoch: int) -> bool:
    word = load_acquire_i64(mailbox)
    return ((word >> 32) & _LOW) == epoch and (word & _LOW) != 0


@inlined
def _count_missing(mailbox: int, stride: int, first: int, size: int, epoch: int) -> int:
    missing = 0
    for source in range(first, size):
        if not _has_arrived(mailbox + source * stride, epoch):
            missing += 1
    return missing


@inlined
def _ring(doorbell: int) -> None:
    counter = add_ordered_i32(doorbell, 1) + 1
    sleepers = load_ordered_i64(doorbell + SLEEPERS_OFFSET)
    if sleepers != 0 and _ahead(counter, sleepers & _LOW) >= 0:
        futex_wake(doorbell)


@inlined
def _join_sleepers(sleepers: int, target: int) -> None:
    while True:
        word = load_ordered_i64(sleepers)
        wake_at = target & _LOW
        if word != 0 and _ahead(target, word & _LOW) > 0:
            wake_at = word & _LOW
        if exchange_if_i64(sleepers, word, (((word >> 32) + 1) << 32) | wake_at) == word:
            return


@inlined
def _leave_sleepers(sleepers: int) -> None:
    while True:
        word = load_ordered_i64(sleepers)
        others = (word >> 32) - 1
        rest = (others << 32) | (word & _LOW) if others > 0 else 0
        if exchange_if_i64(sleepers, word, rest) == word:
            return


@compiled("void(int64[::1], int64, int64, int64, int64[:, ::1], int64)")
def post_all(controls_R: Any, doorbell_offset: int, mailbox_offset: int, rank: int, words_RN: Any, epoch: int) -> None:
    """Publish row d of ``words`` to rank d for every d, oneself first.

    ``controls`` int64 [R]: where each rank's control memory lies; the offsets are the same in all of them, and the
    mailbox is the one this rank fills. ``epoch`` in [0, 2**32).
    """
    store_fence()
    size, count = words_RN.shape
    source = words_RN.ctypes.data
    signal = (epoch << 32) | (count + 1)
    for i in range(size):
        d = rank + i if rank + i < size else rank + i - size
        mailbox = controls_R[d] + mailbox_offset
        copy_bytes(mailbox + 8, source + d * count * 8, count * 8)
        store_release_i64(mailbox, signal)
        _ring(controls_R[d] + doorbell_offset)


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def await_all(
    doorbell: int, mailbox: int, stride: int, size: int, epoch: int, spins: int, yields: int, deadline_ns: int
) -> int:
    """Await the message of every source; return how many are still missing when time is up, 0 when none is.

    ``mailbox``: that of source 0; source s's lies ``s * stride`` bytes further. First ``spins`` looks with a pause
    between them, then ``yields`` looks that let others run, then sleep until ``deadline_ns`` of the monotonic clock
    (0: do not sleep). Returns early when a signal handler has to run.
    """
    first = 0
    for turn in range(spins + yields):
        while first < size and _has_arrived(mailbox + first * stride, epoch):
            first += 1
        if first == size:
            return 0
        if turn < spins:
            pause()
        else:
            give_way()
    while True:
        seen = load_ordered_i32(doorbell)
        missing = _count_missing(mailbox, stride, first, size, epoch)
        if missing == 0 or deadline_ns == 0:
            return missing
        target = seen + missing
        _join_sleepers(doorbell + SLEEPERS_OFFSET, target)
        counter = load_ordered_i32(doorbell)
        gave_up = False
        if _ahead(counter, target) < 0 and futex_wait(doorbell, counter, deadline_ns) != 0:
            gave_up = load_ordered_i32(doorbell) == counter
        _leave_sleepers(doorbell + SLEEPERS_OFFSET)
        if gave_up:
            return _count_missing(mailbox, stride, first, size, epoch)


@compiled("void(int64, int64)")
def publish_word(address: int, value: int) -> None:
    """Write one word after everything this thread has written, non-temporal stores too: release."""
    store_fence()
    store_release_i64(address, value)


@compiled("int64(int64)")
def read_word(address: int) -> int:
    """Read one word; what its writer wrote before it is visible from here on: acquire."""
    return load_acquire_i64(address)
