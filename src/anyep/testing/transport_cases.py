"""The exam of a transport, words: they arrive whole, from and for the right ranks, and say who was late.

Every function is ``case(make, rank, ...)`` and runs on all ranks.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from anyep.testing.transport_steps import (
    DONE,
    LANES,
    OPEN,
    TIMEOUT_S,
    Make,
    check_messages,
    meet,
    message,
    opened,
    pause_sometimes,
    post,
    require,
    wait,
)
from anyep.transport.base import Lane, Transport, Words


def messages(make: Make, rank: int, seed: int, rounds: int, first_epoch: int, jitter: float) -> None:
    """Words arrive whole, from and for the right rank, and stay until one's next post; ranks are fast and slow."""
    rng = np.random.default_rng([seed, rank])
    with opened(make) as transport:
        require((transport.rank, transport.size > 0) == (rank, True), f"rank {rank} was told it is {transport.rank}")
        for epoch in range(first_epoch, first_epoch + rounds):
            arrived: list[tuple[Lane, Words]] = []
            for lane in LANES:
                pause_sometimes(rng, jitter)
                post(transport, lane, epoch)
                pause_sometimes(rng, jitter)
                arrived.append((lane, wait(transport, lane, epoch)))
            pause_sometimes(rng, jitter)  # others may be a whole operation ahead by now
            for lane, words in arrived:
                check_messages(transport, lane, epoch, words)


def skewed_messages(make: Make, rank: int, seed: int, rounds: int) -> None:
    """One rank is much slower than the others in each stretch; the others run ahead as far as the seam lets them."""
    rng = np.random.default_rng(seed)
    with opened(make) as transport:
        slow_ranks = rng.integers(0, transport.size, 1 + rounds // 16)
        for epoch in range(rounds):
            if rank == slow_ranks[epoch // 16]:
                time.sleep(0.0005)
            post(transport, OPEN, epoch)
            wait(transport, OPEN, epoch)
            if epoch % 3:  # an operation need not use every lane
                post(transport, DONE, epoch)
                wait(transport, DONE, epoch)


def operations_in_flight(make: Make, rank: int, seed: int, rounds: int, flights: int) -> None:
    """F threads of each rank, each with every F-th operation, share one transport with a ring of 2 F."""
    failures: list[BaseException] = []

    def operate(transport: Transport, flight: int) -> None:
        rng = np.random.default_rng([seed, rank, flight])
        try:
            for epoch in range(flight, rounds, flights):
                for lane in (OPEN, DONE):
                    pause_sometimes(rng, 0.02)
                    post(transport, lane, epoch)
                    wait(transport, lane, epoch)
        except BaseException as error:
            failures.append(error)

    with opened(make, ring=2 * flights) as transport:
        threads = [threading.Thread(target=operate, args=(transport, f), daemon=True) for f in range(flights)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def subsets(make: Make, rank: int, seed: int, rounds: int, timeout_s: float = TIMEOUT_S) -> None:
    """On later lanes messages go to some ranks, or none, and are awaited from those alone."""
    rng = np.random.default_rng(seed)  # the same on every rank: who sends to whom
    own_rng = np.random.default_rng([seed, rank])
    with opened(make, timeout_s=timeout_s) as transport:
        for epoch in range(rounds):
            post(transport, OPEN, epoch)
            wait(transport, OPEN, epoch)
            lane = LANES[1 + epoch % 2]
            sends = rng.random((transport.size, transport.size)) < rng.random()
            to, sources = (own_rng.permutation(np.flatnonzero(some)) for some in (sends[rank], sends[:, rank]))
            rows = [message(lane, epoch, rank, d) for d in range(transport.size)]
            transport.post(lane, epoch, np.stack(rows), to)
            words = transport.wait(lane, epoch, f"exam {epoch}: some", sources)
            require(words.shape == (transport.size, lane.words), f"wait for some ranks returned {words.shape}")
            check_messages(transport, lane, epoch, words, sources)
        meet(transport, rounds)


def lateness(make: Make, rank: int) -> None:
    """What a wait takes is put down to the rank that was late, in time that never goes back."""
    late, late_s = 1, 0.3
    with opened(make) as transport:
        require(transport.waited_ns.shape == (transport.size,), f"waited_ns is {transport.waited_ns.shape}")
        for epoch in range(3):
            meet(transport, 2 * epoch)
            before = transport.waited_ns.copy()
            if rank == late:
                time.sleep(late_s)
            post(transport, OPEN, 2 * epoch + 1)
            wait(transport, OPEN, 2 * epoch + 1)
            told_s = (transport.waited_ns - before) / 1e9
            require(bool((told_s >= 0).all()), f"waited_ns fell by {told_s} s")
            if rank != late:
                require(told_s[late] > 0.5 * late_s, f"rank {late} was {late_s} s late, and waited_ns says {told_s}")
                require(told_s.argmax() == late, f"rank {late} was late, and waited_ns says {told_s}")
            else:
                require(told_s.max() < 0.5 * late_s, f"nobody but this rank was late, and waited_ns says {told_s}")


def several(make: Make, rank: int) -> None:
    """Transports of one group do not mix, open together or one after the other."""
    for _ in range(2):
        with opened(make) as one, opened(make, ring=3) as other:
            for epoch in range(20):
                post(one, OPEN, epoch)
                post(other, OPEN, epoch + 1000)
                wait(other, OPEN, epoch + 1000)
                wait(one, OPEN, epoch)
            meet(other, 2000)
            meet(one, 2000)
