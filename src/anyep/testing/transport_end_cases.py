"""The exam of a transport, ends: ranks that close, leave or stay silent, and who is blamed for it."""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

from anyep.errors import ClosedError, PeerError, PeerLost, PeerTimeout
from anyep.kernels.registry import load
from anyep.testing.transport_steps import (
    DONE,
    OPEN,
    SILENCE_S,
    TIMEOUT_S,
    WIDE,
    Make,
    check_error,
    check_messages,
    expect,
    meet,
    opened,
    post,
    require,
    swap_places,
    wait,
)
from anyep.transport.base import Blame, Place, Transport


def closed(make: Make, rank: int) -> None:
    """A closed transport says so, closes again without effect, and does not disturb what has arrived."""
    with opened(make) as transport:
        post(transport, OPEN, 0)
        if rank == 0:
            wait(transport, OPEN, 0)
            transport.close()
            transport.close()
            words = np.zeros((transport.size, 1), np.int64)
            place = Place(segment=0, offset=0)
            expect(ClosedError, lambda: transport.post(OPEN, 1, words), "post after close")
            expect(ClosedError, lambda: transport.wait(OPEN, 1, "exam 1"), "wait after close")
            expect(ClosedError, lambda: transport.allocate(8), "allocate after close")
            expect(ClosedError, lambda: transport.address(0, place), "address after close")
            return
        time.sleep(0.1)  # rank 0 has left by now; its message counts
        wait(transport, OPEN, 0)
        post(transport, OPEN, 1)
        began = time.monotonic()
        error = expect(PeerLost, lambda: transport.wait(OPEN, 1, "exam 1: open"), "a rank that closed")
        check_error(error, (0,), "exam 1: open")
        require(time.monotonic() - began < TIMEOUT_S / 3, "a rank that closed was waited for")


def silent(make: Make, rank: int) -> None:
    """A rank that stays silent is a PeerTimeout with its name; everybody, also itself, then names the same rank."""
    with opened(make, timeout_s=SILENCE_S) as transport:
        post(transport, OPEN, 0)
        wait(transport, OPEN, 0)
        quiet = transport.size - 1
        if rank == quiet:
            time.sleep(3 * SILENCE_S)
        post(transport, OPEN, 1)
        began = time.monotonic()
        if rank == quiet:
            error = expect(PeerError, lambda: _wait_after_failure(transport), "others that have given this rank up")
        else:
            error = expect(PeerTimeout, lambda: transport.wait(OPEN, 1, "exam 1: open"), "a silent rank")
            waited_s = time.monotonic() - began
            require(waited_s < 2.5 * SILENCE_S, f"timeout_s={SILENCE_S}, and it took {waited_s:.2f} s")
            check_error(error, (quiet,), "exam 1: open")
        require(error.ranks == (quiet,), f"rank {rank} names {error.ranks}, expected the silent rank {quiet}: {error}")
        transport.leave(Blame(ranks=error.ranks, timeout=True))


def expelled(make: Make, rank: int) -> None:
    """Whether a rank takes part is decided once: it claims, or others expel it, and all of them learn the same."""
    with opened(make) as transport:
        for contended in range(transport.size):
            post(transport, DONE, contended)
            wait(transport, DONE, contended)  # all at once
            own = rank == contended
            verdict = not transport.claim(1) if own else transport.expel(contended, 1)
            words = np.full((transport.size, 1), int(verdict), np.int64)
            transport.post(WIDE, contended, words)
            told = transport.wait(WIDE, contended, f"exam {contended}: verdicts")[:, 0].tolist()
            require(len(set(told)) == 1, f"ranks differ in whether rank {contended} was expelled: {told}")
            again = not transport.claim(2) if own else transport.expel(contended, 1)
            require(again == verdict, f"rank {contended}: expelled {verdict}, and then {again}")


def _wait_after_failure(transport: Transport) -> None:
    """The others' messages of the failed operation did arrive; those of the next never come."""
    transport.wait(OPEN, 1, "exam 1: open")
    post(transport, OPEN, 2)
    transport.wait(OPEN, 2, "exam 2: open")


def silent_for_some(make: Make, rank: int) -> None:
    """Only ranks that are awaited are missed; no rank is no wait."""
    quiet, nobody = 0, np.array([], np.int64)
    with opened(make, timeout_s=SILENCE_S) as transport:
        post(transport, OPEN, 0)
        wait(transport, OPEN, 0)
        transport.wait(DONE, 0, "exam 0: nobody", nobody)
        transport.post(WIDE, 0, np.zeros((transport.size, 1), np.int64), nobody)
        if rank != quiet:
            post(transport, DONE, 0)
            others = np.arange(1, transport.size)
            check_messages(transport, DONE, 0, transport.wait(DONE, 0, "exam 0: others", others), others)
            some = np.array([quiet, rank])
            error = expect(PeerTimeout, lambda: transport.wait(DONE, 0, "exam 0: quiet", some), "a silent rank")
            check_error(error, (quiet,), "exam 0: quiet")
        else:
            time.sleep(2 * SILENCE_S)
        transport.leave(Blame(ranks=(quiet,), timeout=True))


def left_out(make: Make, rank: int, rounds: int) -> None:
    """Ranks that are left out are not awaited, and how they end is nobody's matter, until they are taken in again."""
    gone = 1
    with opened(make) as transport:
        post(transport, OPEN, 0)
        wait(transport, OPEN, 0)
        if rank == gone:
            transport.leave(Blame(ranks=(gone,), timeout=False))
            return
        transport.leave_out([gone])
        others = np.array([other for other in range(transport.size) if other != gone])
        for epoch in range(1, rounds + 1):
            post(transport, OPEN, epoch)
            words = transport.wait(OPEN, epoch, f"exam {epoch}: the others")
            check_messages(transport, OPEN, epoch, words, others)
            require(transport.arrived(OPEN, epoch), "messages of all that take part had come, and arrived() is False")
            transport.check(epoch, f"exam {epoch}")
        transport.leave_out(())
        step = f"exam {rounds + 1}: all"
        error = expect(PeerLost, lambda: transport.wait(OPEN, rounds + 1, step), "a lost rank that was taken in")
        check_error(error, (gone,), step)
        transport.leave(Blame(ranks=(gone,), timeout=False))


def leaves(make: Make, rank: int) -> None:
    """To leave ends waits in other threads and refuses calls, and leaves memory where it is."""
    ended: list[BaseException] = []
    with opened(make) as transport:
        block = transport.allocate(1 << 10)
        place = swap_places(transport, 0, block.place)[(rank + 1) % transport.size]
        address = transport.address((rank + 1) % transport.size, place)

        def wait_for_ever() -> None:
            try:
                transport.wait(OPEN, 1, "exam 1: for ever", np.array([rank]))  # peers that leave first do not end it
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=wait_for_ever, daemon=True)
        thread.start()
        meet(transport, 0)
        time.sleep(0.05)  # by now it is asleep
        began = time.monotonic()
        transport.leave()
        transport.leave(Blame(ranks=(0,), timeout=False))
        thread.join(TIMEOUT_S / 2)
        require([type(error) for error in ended] == [ClosedError], f"a wait under way ended with {ended}")
        require(time.monotonic() - began < TIMEOUT_S / 10, "a wait under way outlived its transport")
        expect(ClosedError, lambda: transport.check(1, "exam 1"), "check after leave")
        expect(ClosedError, lambda: transport.trim(block, 8), "trim after leave")
        source = torch.full((1 << 10,), rank, dtype=torch.uint8)
        load("cpu").copy(source.data_ptr(), address, source.nbytes)  # a copy that is under way goes on
        time.sleep(0.1)


def blame(make: Make, rank: int, timeout: bool) -> None:
    """Whoever leaves because of another rank is not blamed for it."""
    culprit, messenger = 1, 0
    with opened(make) as transport:
        post(transport, OPEN, 0)
        wait(transport, OPEN, 0)
        if rank == messenger:
            transport.leave(Blame(ranks=(culprit,), timeout=timeout))
        elif rank != culprit:
            post(transport, OPEN, 1)
            kind = PeerTimeout if timeout else PeerLost
            error = expect(kind, lambda: transport.wait(OPEN, 1, "exam 1: open"), "a rank that left blaming another")
            check_error(error, (culprit,), "exam 1: open")
            transport.leave(Blame(ranks=error.ranks, timeout=timeout))
        else:
            time.sleep(0.2)
