"""Words that say how far a rank is: the GPU's memory order, written down once.

A word is int64, ``epoch << 32 | count``: epochs only grow, so that no word is ever reset. They lie in device memory,
where ``tick`` makes the next one, so that a captured graph that is replayed counts on. Each (receiver, sender) pair has
a word of its own, which lies at the receiver.

- *Publish* is an exchange with release at system scope. What this device wrote before is visible to whoever acquires
  the word: rows of earlier kernels too, for a kernel begins after those before it on its stream, and release passes on
  what came before. The barrier gathers the writes of all threads of the program, which the one thread that exchanges
  could not vouch for.
- *Await* adds 0 with acquire at system scope until the epoch has come, and then a barrier lets the other threads in. It
  looks ``limit`` times at most: a rank that is late for longer leaves a word in ``errors`` instead of a hanging device.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import i32_at, i64_at


@kernel
def tick(clock_addr: tl.int64, epoch_addr: tl.int64):
    """Grid (1)."""
    epoch = tl.load(i64_at(clock_addr)) + 1
    tl.store(i64_at(clock_addr), epoch)
    tl.store(i64_at(epoch_addr), epoch)


@triton.jit
def publish(peer_word_addr, epoch, counts_addr):
    """Write this program's word, that of the rank of its number."""
    rank = tl.program_id(0)
    word_addr = tl.load(i64_at(peer_word_addr) + rank)
    count = tl.load(i32_at(counts_addr) + rank, mask=counts_addr != 0, other=0).to(tl.int64)
    tl.debug_barrier()
    if word_addr != 0:
        word = (epoch << 32) | count
        tl.atomic_xchg(i64_at(word_addr), word, sem="release", scope="sys")


@triton.jit
def await_word(words_addr, epoch, limit, errors_addr, error_bytes):
    """Look at this program's word, until it has reached the epoch, at most ``limit`` times; return what was seen."""
    rank = tl.program_id(0)
    word = i64_at(words_addr) + rank
    nothing = tl.cast(limit, tl.int64) * 0
    seen = tl.atomic_add(word, nothing, sem="acquire", scope="sys")
    left = tl.cast(limit, tl.int64) - 1
    while ((seen >> 32) < epoch) & (left > 0):
        seen = tl.atomic_add(word, nothing, sem="acquire", scope="sys")
        left -= 1
    tl.debug_barrier()
    if (seen >> 32) < epoch:
        tl.store(i64_at(errors_addr + rank * error_bytes), (epoch << 32) | (seen >> 32))
    return seen


@kernel
def signal(peer_word_addr: tl.int64, epoch_addr: tl.int64, counts_addr: tl.int64):
    """Grid (R)."""
    publish(peer_word_addr, tl.load(i64_at(epoch_addr)), counts_addr)


@kernel
def wait(
    words_addr: tl.int64,
    epoch_addr: tl.int64,
    limit: tl.int64,
    counts_addr: tl.int64,
    errors_addr: tl.int64,
    error_bytes: tl.int64,
):
    """Grid (R)."""
    epoch = tl.load(i64_at(epoch_addr))
    seen = await_word(words_addr, epoch, limit, errors_addr, error_bytes)
    if ((seen >> 32) >= epoch) & (counts_addr != 0):
        tl.store(i32_at(counts_addr) + tl.program_id(0), (seen & 0xFFFFFFFF).to(tl.int32))


@kernel
def meet(
    peer_word_addr: tl.int64,
    words_addr: tl.int64,
    epoch_addr: tl.int64,
    limit: tl.int64,
    errors_addr: tl.int64,
    error_bytes: tl.int64,
):
    """Grid (R): each program tells a rank and waits for that rank, so that none waits for another one of its own."""
    epoch = tl.load(i64_at(epoch_addr))
    publish(peer_word_addr, epoch, epoch * 0)
    await_word(words_addr, epoch, limit, errors_addr, error_bytes)
