"""Publish, await and reuse: the only file in which one rank's stores become another rank's loads.

*Mailbox.* For each lane, ring slot and source rank one signal word, ``epoch << 32 | count``, the time at which it was
posted, and the message behind them, in the memory of the rank that receives. ``count`` is the number of words + 1, so
that fresh memory is no message. The signal is never reset: a slot's next message has another epoch. Epochs are compared
modulo 2**32, and a slot would have to sleep through exactly 2**32 operations to be mistaken.

*Publish* (:func:`post_each`): one fence for everything this thread has written, non-temporal stores too; then, for each
destination, time and message, the signal word with **release** order, and one ring of the doorbell.

*Await* (:func:`await_each`): load signal words with **acquire** order until none is missing; from then on times and
messages, and everything their senders wrote before they posted, are visible.

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
    add_i64,
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
from anyep.machine.intrinsics import copy_bytes, load_i64, store_fence, store_i64
from anyep.transport.control import TIME_OFFSET, WORDS_OFFSET

__all__ = [
    "HAS_FUTEX",
    "any_word_above",
    "await_each",
    "exchange_word",
    "post_each",
    "publish_word",
    "read_word",
]

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
def _count_missing(mailbox: int, stride: int, ranks_n: Any, first: int, epoch: int) -> int:
    missing = 0
    for i in range(first, ranks_n.size):
        if not _has_arrived(mailbox + ranks_n[i] * stride, epoch):
            missing += 1
    return missing


@inlined
def _are_ranks(ranks_n: Any, size: int) -> bool:
    outside = 0
    for i in range(ranks_n.size):
        outside += ranks_n[i] < 0 or ranks_n[i] >= size
    return outside == 0


@inlined
def _note_lateness(mailbox: int, stride: int, ranks_n: Any, began_ns: int, waited_ns_R: Any) -> None:
    for i in range(ranks_n.size):
        late_ns = load_i64(mailbox + ranks_n[i] * stride + TIME_OFFSET, 0) - began_ns
        if late_ns > 0:
            add_i64(waited_ns_R.ctypes.data + 8 * ranks_n[i], late_ns)  # several threads of the rank may wait


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


@compiled("boolean(int64[::1], int64, int64, int64[:, ::1], int64, int64[::1], int64, int64)")
def post_each(
    controls_R: Any,
    doorbell_offset: int,
    mailbox_offset: int,
    words_RN: Any,
    most_words: int,
    ranks_n: Any,
    epoch: int,
    now_ns: int,
) -> bool:
    """Publish row d of ``words`` to rank d for each d of ``ranks``, in their order.

    ``controls`` int64 [R]: where each rank's control memory lies; the offsets are the same in all of them, and the
    mailbox is the one this rank fills. Return False, with nothing done, unless there are R rows of at most
    ``most_words`` and all of ``ranks`` are ranks.
    """
    size, count = words_RN.shape
    if size != controls_R.size or count > most_words or not _are_ranks(ranks_n, size):
        return False
    store_fence()
    source = words_RN.ctypes.data
    signal = ((epoch & _LOW) << 32) | (count + 1)
    for i in range(ranks_n.size):
        d = ranks_n[i]
        mailbox = controls_R[d] + mailbox_offset
        store_i64(mailbox + TIME_OFFSET, 0, now_ns)
        copy_bytes(mailbox + WORDS_OFFSET, source + d * count * 8, count * 8)
        store_release_i64(mailbox, signal)
        _ring(controls_R[d] + doorbell_offset)
    return True


@compiled("int64(int64, int64, int64, int64[::1], int64, int64, int64, int64, int64, int64[::1])")
def await_each(
    doorbell: int,
    mailbox: int,
    stride: int,
    ranks_n: Any,
    epoch: int,
    spins: int,
    yields: int,
    deadline_ns: int,
    began_ns: int,
    waited_ns_R: Any,
) -> int:
    """Await the messages of ``ranks``; return how many are still missing when time is up, 0 when none is.

    ``mailbox``: that of source 0; source s's lies ``s * stride`` bytes further. First ``spins`` looks with a pause
    between them, then ``yields`` looks that let others run, then sleep until ``deadline_ns`` of the monotonic clock
    (0: do not sleep). Returns early when a signal handler has to run. When all are here, ``waited_ns`` [R] grows by
    what each was posted later than ``began_ns``. Return -1, with nothing done, unless all of ``ranks`` are ranks.
    """
    if not _are_ranks(ranks_n, waited_ns_R.size):
        return -1
    epoch &= _LOW
    first = 0
    for turn in range(spins + yields):
        while first < ranks_n.size and _has_arrived(mailbox + ranks_n[first] * stride, epoch):
            first += 1
        if first == ranks_n.size:
            _note_lateness(mailbox, stride, ranks_n, began_ns, waited_ns_R)
            return 0
        if turn < spins:
            pause()
        else:
            give_way()
    while True:
        seen = load_ordered_i32(doorbell)
        missing = _count_missing(mailbox, stride, ranks_n, first, epoch)
        if missing == 0:
            _note_lateness(mailbox, stride, ranks_n, began_ns, waited_ns_R)
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
            deadline_ns = 0  # look once more


@compiled("void(int64, int64)")
def publish_word(address: int, value: int) -> None:
    """Write one word after everything this thread has written, non-temporal stores too: release."""
    store_fence()
    store_release_i64(address, value)


@compiled("int64(int64)")
def read_word(address: int) -> int:
    """Read one word; what its writer wrote before it is visible from here on: acquire."""
    return load_acquire_i64(address)


@compiled("int64(int64, int64, int64)")
def exchange_word(address: int, expected: int, value: int) -> int:
    """Write a word if it is as expected, and return what it was: ordered, so that all ranks see one winner."""
    return exchange_if_i64(address, expected, value)


@compiled("boolean(int64[::1], int64, int64)")
def any_word_above(bases_n: Any, offset: int, value: int) -> bool:
    """Whether a word at ``offset`` from one of ``bases`` is above ``value``: acquire."""
    highest = value
    for i in range(bases_n.size):
        highest = max(highest, load_acquire_i64(bases_n[i] + offset))
    return highest > value
