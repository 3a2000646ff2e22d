"""Publish, await and reuse: the one place where memory order between ranks is decided.

A rank's *control segment* holds a doorbell and its mailboxes. A mailbox is a signal word ``epoch << 32 | count`` and
``count`` int64 behind it; there is one for each lane, ring slot and source rank.

- **Publish** (:func:`post_words`): a store fence, so that rows written past the caches are visible; the payload; the word
  with release order; then the doorbell.
- **Await** (:func:`await_words`): the word with acquire order. What its sender wrote before is visible.
- **Reuse**: nobody acknowledges. A slot's word is compared with the whole epoch modulo 2**32, and the ring is long enough that it
  cannot be written again before it was read (transport/base.py has the argument), so epochs may wrap.

*Doorbell.* ``events`` counts every message to a rank; ``wake_at`` is the count at which a sleeper wants to be woken, or a
very large number. A waiter reads ``events``, then scans; each of the m messages it misses will add one, so it asks to be woken at
``events + m``: once, not once for each message. No wake-up is lost: a sender adds to ``events`` and then reads ``wake_at``, a
waiter lowers ``wake_at`` and then reads ``events``, all seq-cst, so at least one of them sees the other; and the
system call itself refuses to sleep if ``events`` has changed. Several threads of a rank may sleep: ``wake_at`` is only ever lowered, and
whoever wakes rings for all, who look again.
"""

from __future__ import annotations

from anyep.machine.atomics import (
    exchange,
    fetch_add,
    fetch_min,
    give_way,
    load_acquire,
    load_ordered,
    now_ns,
    pause,
    sleep_while_equal,
    store_release,
    wake_sleepers,
)
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import copy_bytes, load_i64, store_fence

EVENTS_AT, WAKE_AT, STATE_AT, BLAMED_AT = 0, 64, 128, 192
"""Offsets in the control segment: the doorbell's two words, the rank's state, and one byte a rank it blames."""
NEVER = 1 << 62
_EPOCH_MASK = 0xFFFFFFFF


@inlined
def ring(control_addr: int) -> None:
    """Count one event at a rank, and wake its sleepers if that is the one they wait for."""
    events = fetch_add(control_addr + EVENTS_AT, 1) + 1
    if events >= load_ordered(control_addr + WAKE_AT):
        exchange(control_addr + WAKE_AT, NEVER)
        wake_sleepers(control_addr + EVENTS_AT)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def post_words(
    peers_addr: int,
    num_ranks: int,
    rank: int,
    mailbox_offset: int,
    epoch: int,
    words_addr: int,
    row_words: int,
    num_words: int,
) -> None:
    """Publish ``num_words`` of row d of ``words`` (``row_words`` apart) to rank d: oneself first, then rank + 1 and on."""
    store_fence()
    word = (epoch & _EPOCH_MASK) << 32 | num_words
    for step in range(num_ranks):
        destination = (rank + step) % num_ranks
        control = load_i64(peers_addr, destination)
        mailbox = control + mailbox_offset
        copy_bytes(mailbox + 8, words_addr + 8 * destination * row_words, 8 * num_words)
        store_release(mailbox, word)
        ring(control)


@compiled("int64(int64, int64, int64, int64)")
def count_missing(mailboxes_addr: int, stride: int, num_ranks: int, epoch: int) -> int:
    """Return how many of the sources' words do not carry ``epoch`` yet."""
    missing = 0
    for source in range(num_ranks):
        if (load_acquire(mailboxes_addr + source * stride) >> 32) & _EPOCH_MASK != epoch & _EPOCH_MASK:
            missing += 1
    return missing


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def await_words(
    control_addr: int,
    mailboxes_addr: int,
    stride: int,
    num_ranks: int,
    epoch: int,
    num_spins: int,
    num_yields: int,
    limit_ns: int,
) -> int:
    """Wait until every source's word carries ``epoch``; return how many are missing after ``limit_ns``.

    Spins, gives way, then sleeps: quick when the others are, and without cost when they are not.
    """
    for attempt in range(num_spins + num_yields):
        if count_missing(mailboxes_addr, stride, num_ranks, epoch) == 0:
            return 0
        if attempt < num_spins:
            pause()
        else:
            give_way()
    deadline = now_ns() + limit_ns
    while True:
        events = load_acquire(control_addr + EVENTS_AT)
        missing = count_missing(mailboxes_addr, stride, num_ranks, epoch)
        if missing == 0:
            return 0
        left = deadline - now_ns()
        if left <= 0:
            return missing
        fetch_min(control_addr + WAKE_AT, events + missing)
        seen = load_ordered(control_addr + EVENTS_AT)
        if seen < events + missing:
            sleep_while_equal(control_addr + EVENTS_AT, seen, left)


@compiled("void(int64, int64, int64)")
def announce_state(control_addr: int, peer_addr: int, state: int) -> None:
    """Publish this rank's state, and wake a peer that it may concern."""
    store_release(control_addr + STATE_AT, state)
    fetch_add(peer_addr + EVENTS_AT, 1)
    wake_sleepers(peer_addr + EVENTS_AT)


@compiled("int64(int64)")
def state_of(control_addr: int) -> int:
    """Return a rank's state; whom it blames is visible if it has left."""
    return load_acquire(control_addr + STATE_AT)


@compiled("void(int64)")
def prepare_control(control_addr: int) -> None:
    """Make a fresh control segment ready: no event, no sleeper."""
    store_release(control_addr + WAKE_AT, NEVER)
