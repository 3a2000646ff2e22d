"""What each rank does in the exam of a transport. Every function is ``case(make, rank, ...)`` and runs on all ranks.

``make(lanes=, ring=, heap_bytes=, timeout_s=, poison=)`` opens the transport under test, collectively.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from anyep.errors import ClosedError, PeerError, PeerLost, PeerTimeout
from anyep.kernels.registry import load
from anyep.transport.base import Blame, Block, Lane, Place, Ranks, Transport, Words

OPEN = Lane(index=0, name="open", words=7)
DONE = Lane(index=1, name="done", words=1)
WIDE = Lane(index=2, name="wide", words=300)
LANES = (OPEN, DONE, WIDE)
_TIMEOUT_S = 30.0
_SILENCE_S = 0.4

Make = Callable[..., Transport]


class TransportExamError(AssertionError):
    """A transport did what the seam forbids, or did not do what it promises."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise TransportExamError(what)


@contextmanager
def _opened(
    make: Make, *, ring: int = 2, heap_bytes: int = 1 << 20, timeout_s: float = _TIMEOUT_S
) -> Iterator[Transport]:
    transport = make(lanes=LANES, ring=ring, heap_bytes=heap_bytes, timeout_s=timeout_s, poison=True)
    try:
        yield transport
    finally:
        transport.close()


def _expect(kind: type[Exception], call: Callable[[], object], what: str) -> Any:
    try:
        call()
    except kind as error:
        return error
    except Exception as error:
        raise TransportExamError(f"{what}: expected {kind.__name__}, got {type(error).__name__}: {error}") from error
    raise TransportExamError(f"{what}: expected {kind.__name__}, got no error")


def _message(lane: Lane, epoch: int, source: int, destination: int) -> Words:
    """What ``source`` says: of another length in each epoch, with every bit of a word in use."""
    count = 1 + epoch % lane.words
    seed = np.int64((epoch % (1 << 31)) * 1_000_003 + source * 1009 + destination * 31 + lane.index)
    words: Words = (np.arange(count, dtype=np.int64) * np.int64(-0x61C8864680B583EB)) ^ seed
    return words


def _jitter(rng: np.random.Generator, probability: float) -> None:
    if rng.random() < probability:
        time.sleep(rng.random() * 0.002)


def _post(transport: Transport, lane: Lane, epoch: int) -> None:
    rows = [_message(lane, epoch, transport.rank, d) for d in range(transport.size)]
    transport.post(lane, epoch, np.stack(rows))


def _wait(transport: Transport, lane: Lane, epoch: int) -> Words:
    words = transport.wait(lane, epoch, f"exam {epoch}: {lane.name}")
    _require(words.shape == (transport.size, lane.words), f"wait returned {words.shape} on lane {lane.name}")
    _check_messages(transport, lane, epoch, words)
    return words


def _check_messages(transport: Transport, lane: Lane, epoch: int, words: Words, sources: Ranks | None = None) -> None:
    for source in range(transport.size) if sources is None else sources.tolist():
        expected = _message(lane, epoch, source, transport.rank)
        _require(
            np.array_equal(words[source, : expected.size], expected),
            f"rank {transport.rank}, lane {lane.name}, epoch {epoch}: wrong words from rank {source}",
        )


def messages(make: Make, rank: int, seed: int, rounds: int, first_epoch: int, jitter: float) -> None:
    """Words arrive whole, from and for the right rank, and stay until one's next post; ranks are fast and slow."""
    rng = np.random.default_rng([seed, rank])
    with _opened(make) as transport:
        _require((transport.rank, transport.size > 0) == (rank, True), f"rank {rank} was told it is {transport.rank}")
        for epoch in range(first_epoch, first_epoch + rounds):
            arrived: list[tuple[Lane, Words]] = []
            for lane in LANES:
                _jitter(rng, jitter)
                _post(transport, lane, epoch)
                _jitter(rng, jitter)
                arrived.append((lane, _wait(transport, lane, epoch)))
            _jitter(rng, jitter)  # others may be a whole operation ahead by now
            for lane, words in arrived:
                _check_messages(transport, lane, epoch, words)


def skewed_messages(make: Make, rank: int, seed: int, rounds: int) -> None:
    """One rank is much slower than the others in each stretch; the others run ahead as far as the seam lets them."""
    rng = np.random.default_rng(seed)
    with _opened(make) as transport:
        slow_ranks = rng.integers(0, transport.size, 1 + rounds // 16)
        for epoch in range(rounds):
            if rank == slow_ranks[epoch // 16]:
                time.sleep(0.0005)
            _post(transport, OPEN, epoch)
            _wait(transport, OPEN, epoch)
            if epoch % 3:  # an operation need not use every lane
                _post(transport, DONE, epoch)
                _wait(transport, DONE, epoch)


def operations_in_flight(make: Make, rank: int, seed: int, rounds: int, flights: int) -> None:
    """F threads of each rank, each with every F-th operation, share one transport with a ring of 2 F."""
    failures: list[BaseException] = []

    def operate(transport: Transport, flight: int) -> None:
        rng = np.random.default_rng([seed, rank, flight])
        try:
            for epoch in range(flight, rounds, flights):
                for lane in (OPEN, DONE):
                    _jitter(rng, 0.02)
                    _post(transport, lane, epoch)
                    _wait(transport, lane, epoch)
        except BaseException as error:
            failures.append(error)

    with _opened(make, ring=2 * flights) as transport:
        threads = [threading.Thread(target=operate, args=(transport, f), daemon=True) for f in range(flights)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def subsets(make: Make, rank: int, seed: int, rounds: int, timeout_s: float = _TIMEOUT_S) -> None:
    """On later lanes messages go to some ranks, or none, and are awaited from those alone."""
    rng = np.random.default_rng(seed)  # the same on every rank: who sends to whom
    own_rng = np.random.default_rng([seed, rank])
    with _opened(make, timeout_s=timeout_s) as transport:
        for epoch in range(rounds):
            _post(transport, OPEN, epoch)
            _wait(transport, OPEN, epoch)
            lane = LANES[1 + epoch % 2]
            sends = rng.random((transport.size, transport.size)) < rng.random()
            to, sources = (own_rng.permutation(np.flatnonzero(some)) for some in (sends[rank], sends[:, rank]))
            rows = [_message(lane, epoch, rank, d) for d in range(transport.size)]
            transport.post(lane, epoch, np.stack(rows), to)
            words = transport.wait(lane, epoch, f"exam {epoch}: some", sources)
            _require(words.shape == (transport.size, lane.words), f"wait for some ranks returned {words.shape}")
            _check_messages(transport, lane, epoch, words, sources)
        _meet(transport, rounds)


def silent_for_some(make: Make, rank: int) -> None:
    """Only ranks that are awaited are missed; no rank is no wait."""
    quiet, nobody = 0, np.array([], np.int64)
    with _opened(make, timeout_s=_SILENCE_S) as transport:
        _post(transport, OPEN, 0)
        _wait(transport, OPEN, 0)
        transport.wait(DONE, 0, "exam 0: nobody", nobody)
        transport.post(WIDE, 0, np.zeros((transport.size, 1), np.int64), nobody)
        if rank != quiet:
            _post(transport, DONE, 0)
            others = np.arange(1, transport.size)
            _check_messages(transport, DONE, 0, transport.wait(DONE, 0, "exam 0: others", others), others)
            some = np.array([quiet, rank])
            error = _expect(PeerTimeout, lambda: transport.wait(DONE, 0, "exam 0: quiet", some), "a silent rank")
            _check_error(error, (quiet,), "exam 0: quiet")
        else:
            time.sleep(2 * _SILENCE_S)
        transport.leave(Blame(ranks=(quiet,), timeout=True))


def lateness(make: Make, rank: int) -> None:
    """What a wait takes is put down to the rank that was late, in time that never goes back."""
    late, late_s = 1, 0.3
    with _opened(make) as transport:
        _require(transport.waited_ns.shape == (transport.size,), f"waited_ns is {transport.waited_ns.shape}")
        for epoch in range(3):
            _meet(transport, 2 * epoch)
            before = transport.waited_ns.copy()
            if rank == late:
                time.sleep(late_s)
            _post(transport, OPEN, 2 * epoch + 1)
            _wait(transport, OPEN, 2 * epoch + 1)
            told_s = (transport.waited_ns - before) / 1e9
            _require(bool((told_s >= 0).all()), f"waited_ns fell by {told_s} s")
            if rank != late:
                _require(told_s[late] > 0.5 * late_s, f"rank {late} was {late_s} s late, and waited_ns says {told_s}")
                _require(told_s.argmax() == late, f"rank {late} was late, and waited_ns says {told_s}")
            else:
                _require(told_s.max() < 0.5 * late_s, f"nobody but this rank was late, and waited_ns says {told_s}")


def leaves(make: Make, rank: int) -> None:
    """To leave ends waits in other threads and refuses calls, and leaves memory where it is."""
    ended: list[BaseException] = []
    with _opened(make) as transport:
        block = transport.allocate(1 << 10)
        place = _swap_places(transport, 0, block.place)[(rank + 1) % transport.size]
        address = transport.address((rank + 1) % transport.size, place)

        def wait() -> None:
            try:
                transport.wait(OPEN, 1, "exam 1: for ever")
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        _meet(transport, 0)
        time.sleep(0.05)  # by now it is asleep
        began = time.monotonic()
        transport.leave()
        transport.leave(Blame(ranks=(0,), timeout=False))
        thread.join(_TIMEOUT_S / 2)
        _require([type(error) for error in ended] == [ClosedError], f"a wait under way ended with {ended}")
        _require(time.monotonic() - began < _TIMEOUT_S / 10, "a wait under way outlived its transport")
        _expect(ClosedError, lambda: transport.check(1, "exam 1"), "check after leave")
        _expect(ClosedError, lambda: transport.trim(block, 8), "trim after leave")
        source = torch.full((1 << 10,), rank, dtype=torch.uint8)
        load("cpu").copy(source.data_ptr(), address, source.nbytes)  # a copy that is under way goes on
        time.sleep(0.1)


def _swap_places(transport: Transport, epoch: int, place: Place) -> list[Place]:
    words = np.tile(np.array([place.segment, place.offset], np.int64), (transport.size, 1))
    transport.post(OPEN, epoch, words)
    told = transport.wait(OPEN, epoch, f"exam {epoch}: places")
    return [Place(segment=int(segment), offset=int(offset)) for segment, offset in told[:, :2]]


def _meet(transport: Transport, epoch: int) -> None:
    transport.post(DONE, epoch, np.zeros((transport.size, 1), np.int64))
    transport.wait(DONE, epoch, f"exam {epoch}: done")


def _stamp_and_inspect(transport: Transport, epoch: int, block: Block, source: torch.Tensor, what: str) -> None:
    """Let every rank stamp its part of every rank's block, past the caches, and post; then all stamps must be there."""
    kernels, rank, size = load("cpu"), transport.rank, transport.size
    places = _swap_places(transport, epoch, block.place)
    source.fill_(epoch * size + rank)
    for i in range(size):
        d = (rank + i) % size
        kernels.copy(source.data_ptr(), transport.address(d, places[d]) + rank * source.nbytes, source.nbytes)
    _meet(transport, epoch)
    got = np.frombuffer(block.memory, np.int64).reshape(size, -1)
    stale = (got != epoch * size + np.arange(size)[:, None]).sum()
    _require(stale == 0, f"{what}: rank {rank} found {stale} of {got.size} words stale at the signal of epoch {epoch}")


def bytes_before_words(make: Make, rank: int, rounds: int, part_words: int) -> None:
    """What was written to a peer before the post is there after its wait; non-temporal stores too."""
    source = torch.empty(part_words, dtype=torch.int64)
    with _opened(make, heap_bytes=1 << 20) as transport:
        block = transport.allocate(transport.size * source.nbytes)
        for epoch in range(rounds):
            _stamp_and_inspect(transport, epoch, block, source, "one block")


def growth(make: Make, rank: int) -> None:
    """Blocks do not overlap, lie where they say, are poisoned, and peers reach those in segments added later."""
    part = 1 << 15
    source = torch.empty(part // 8, dtype=torch.int64)
    with _opened(make, heap_bytes=1 << 20) as transport:
        blocks: list[Block] = []
        for epoch in range(24):
            block = transport.allocate(transport.size * part * (1 + epoch % 3))
            _check_block(transport, block)
            blocks.append(block)
            whole = torch.frombuffer(block.memory, dtype=torch.uint8)
            _require(bool((whole == 0xFF).all()), "a fresh block of a poisoned transport is not 0xFF throughout")
            first = transport.allocate(transport.size * part)
            _stamp_and_inspect(transport, epoch, first, source, f"segment {first.place.segment}")
            blocks.append(first)
        spans = sorted((block.address, block.address + block.num_bytes) for block in blocks)
        _require(all(a[1] <= b[0] for a, b in pairwise(spans)), "blocks overlap")
        _require(any(block.place.segment > 0 for block in blocks), "the arena did not grow by a segment")
        _meet(transport, 24)  # nobody leaves while others look


def _check_block(transport: Transport, block: Block) -> None:
    _require(block.address % 128 == 0, f"a block at {block.address:#x} is not 128-byte aligned")
    _require(len(block.memory) == block.num_bytes, "a block's memory has another size than the block")
    _require(not block.memory.readonly, "a block's memory is read-only")
    _require(transport.locate(block.address, block.num_bytes) == block.place, "locate does not find a block")
    inner = transport.locate(block.address + 7, 1)
    _require(inner == Place(segment=block.place.segment, offset=block.place.offset + 7), "locate misses inside a block")
    own = transport.address(transport.rank, block.place)
    _require(own == block.address, "a rank's own place is not at its own address")


def strangers(make: Make, rank: int) -> None:
    """What is not in the arena is not located; empty blocks are blocks."""
    with _opened(make) as transport:
        outside = torch.zeros(1000)
        _require(transport.locate(outside.data_ptr(), 4000) is None, "locate found memory that is not the arena's")
        block = transport.allocate(1 << 10)
        _require(transport.locate(block.address - (1 << 40), 8) is None, "locate found an address before the arena")
        _require(transport.locate(block.address, 1 << 50) is None, "locate found more bytes than there are")
        empty = transport.allocate(0)
        _require((empty.num_bytes, len(empty.memory)) == (0, 0), "an empty block is not empty")
        _require(bool(transport.describe()), "describe() says nothing")
        _meet(transport, 0)


def blocks_return(make: Make, rank: int, seed: int, rounds: int) -> None:
    """A block returns when its last tensor dies, not before; steady work does not make the arena grow for ever."""
    rng = np.random.default_rng([seed, rank])
    with _opened(make, heap_bytes=4 << 20) as transport:
        held: list[tuple[torch.Tensor, int]] = []
        segments: list[int] = []
        for number in range(rounds):
            block = transport.allocate(int(rng.integers(1, 600_000)))
            segments.append(block.place.segment)
            tensor = torch.frombuffer(block.memory, dtype=torch.uint8)
            tensor.fill_(number % 251)
            held.append((tensor[tensor.numel() // 2 :], number % 251))  # a view keeps the block as well
            del block, tensor
            while len(held) > 1 + number % 8:
                kept, stamp = held.pop(int(rng.integers(0, len(held))))
                _require(bool((kept == stamp).all()), "a block was given out again while a tensor was on it")
                del kept
        half = len(segments) // 2
        _require(max(segments[half:]) <= max(segments[:half]), "the arena still grows after many equal rounds")
        _meet(transport, 0)


def trimmed_blocks(make: Make, rank: int, rounds: int) -> None:
    """The rest of a trimmed block is given out again, and nothing else is; what is kept stays as it was."""
    with _opened(make, heap_bytes=1 << 20) as transport:
        held: list[tuple[torch.Tensor, int]] = []
        for number in range(rounds):
            block = transport.allocate(600_000)
            whole = torch.frombuffer(block.memory, dtype=torch.uint8).fill_(number % 251)
            del whole
            transport.trim(block, number * 37 % 20_000)
            _require(len(block.memory) == block.num_bytes == number * 37 % 20_000, "a trimmed block has another size")
            _expect(ValueError, partial(transport.trim, block, block.num_bytes + 1), "trim to more than there is")
            if block.num_bytes:
                held.append((torch.frombuffer(block.memory, dtype=torch.uint8), number % 251))
            _require(block.place.segment == 0, "the rest of trimmed blocks is lost to the arena")
            del held[:-8], block
            for kept, stamp in held:
                _require(bool((kept == stamp).all()), "what was kept of a trimmed block was given out again")
        held.clear()
        _require(transport.allocate(900_000).place.segment == 0, "trimmed blocks did not come back whole")
        _meet(transport, 0)


def valid_after_close(make: Make, rank: int) -> None:
    """Tensors outlive the transport."""
    with _opened(make) as transport:
        blocks = [transport.allocate(n) for n in (1, 1000, 3 << 20)]
        tensors = [torch.frombuffer(block.memory, dtype=torch.uint8).fill_(rank + 1) for block in blocks]
        _meet(transport, 0)
    del blocks, transport
    gc.collect()
    for tensor in tensors:
        _require(bool((tensor == rank + 1).all()), "a tensor changed when its transport closed")
        tensor.fill_(77)


def closed(make: Make, rank: int) -> None:
    """A closed transport says so, closes again without effect, and does not disturb what has arrived."""
    with _opened(make) as transport:
        _post(transport, OPEN, 0)
        if rank == 0:
            _wait(transport, OPEN, 0)
            transport.close()
            transport.close()
            words = np.zeros((transport.size, 1), np.int64)
            place = Place(segment=0, offset=0)
            _expect(ClosedError, lambda: transport.post(OPEN, 1, words), "post after close")
            _expect(ClosedError, lambda: transport.wait(OPEN, 1, "exam 1"), "wait after close")
            _expect(ClosedError, lambda: transport.allocate(8), "allocate after close")
            _expect(ClosedError, lambda: transport.address(0, place), "address after close")
            return
        time.sleep(0.1)  # rank 0 has left by now; its message counts
        _wait(transport, OPEN, 0)
        _post(transport, OPEN, 1)
        began = time.monotonic()
        error = _expect(PeerLost, lambda: transport.wait(OPEN, 1, "exam 1: open"), "a rank that closed")
        _check_error(error, (0,), "exam 1: open")
        _require(time.monotonic() - began < _TIMEOUT_S / 3, "a rank that closed was waited for")


def _check_error(error: PeerError, ranks: tuple[int, ...], step: str) -> None:
    _require(error.ranks == ranks, f"{type(error).__name__} names ranks {error.ranks}, expected {ranks}: {error}")
    _require(step in str(error) and error.step == step, f"the error does not say in which step: {error}")


def silent(make: Make, rank: int) -> None:
    """A rank that stays silent is a PeerTimeout with its name; everybody, also itself, then names the same rank."""
    with _opened(make, timeout_s=_SILENCE_S) as transport:
        _post(transport, OPEN, 0)
        _wait(transport, OPEN, 0)
        quiet = transport.size - 1
        if rank == quiet:
            time.sleep(3 * _SILENCE_S)
        _post(transport, OPEN, 1)
        began = time.monotonic()
        if rank == quiet:
            error = _expect(PeerError, lambda: _wait_after_failure(transport), "others that have given this rank up")
        else:
            error = _expect(PeerTimeout, lambda: transport.wait(OPEN, 1, "exam 1: open"), "a silent rank")
            waited_s = time.monotonic() - began
            _require(waited_s < 2.5 * _SILENCE_S, f"timeout_s={_SILENCE_S}, and it took {waited_s:.2f} s")
            _check_error(error, (quiet,), "exam 1: open")
        _require(error.ranks == (quiet,), f"rank {rank} names {error.ranks}, expected the silent rank {quiet}: {error}")
        transport.leave(Blame(ranks=error.ranks, timeout=True))


def _wait_after_failure(transport: Transport) -> None:
    """The others' messages of the failed operation did arrive; those of the next never come."""
    transport.wait(OPEN, 1, "exam 1: open")
    _post(transport, OPEN, 2)
    transport.wait(OPEN, 2, "exam 2: open")


def blame(make: Make, rank: int, timeout: bool) -> None:
    """Whoever leaves because of another rank is not blamed for it."""
    culprit, messenger = 1, 0
    with _opened(make) as transport:
        _post(transport, OPEN, 0)
        _wait(transport, OPEN, 0)
        if rank == messenger:
            transport.leave(Blame(ranks=(culprit,), timeout=timeout))
        elif rank != culprit:
            _post(transport, OPEN, 1)
            kind = PeerTimeout if timeout else PeerLost
            error = _expect(kind, lambda: transport.wait(OPEN, 1, "exam 1: open"), "a rank that left blaming another")
            _check_error(error, (culprit,), "exam 1: open")
            transport.leave(Blame(ranks=error.ranks, timeout=timeout))
        else:
            time.sleep(0.2)


def several(make: Make, rank: int) -> None:
    """Transports of one group do not mix, open together or one after the other."""
    for _ in range(2):
        with _opened(make) as one, _opened(make, ring=3) as other:
            for epoch in range(20):
                _post(one, OPEN, epoch)
                _post(other, OPEN, epoch + 1000)
                _wait(other, OPEN, epoch + 1000)
                _wait(one, OPEN, epoch)
            _meet(other, 2000)
            _meet(one, 2000)
