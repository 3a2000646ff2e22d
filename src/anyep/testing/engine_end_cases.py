"""The exam of an engine: mistakes, waits that end, and ranks that leave.

Every function is ``case(make, rank, ...)`` and runs on all ranks.
"""

from __future__ import annotations

import time
import weakref
from contextlib import suppress
from functools import partial

import numpy as np

from anyep.errors import ClosedError, PeerLost
from anyep.testing.engine_steps import Make, arrive, finish, meet, opened, peers, receive, send, settle
from anyep.testing.transport_steps import expect, require
from anyep.transport.engine import NUM_TAGS, Transfer

_SILENCE_S = 0.4


def wrong_size(make: Make, rank: int, expected: int, came: int, receive_first: bool) -> None:
    """A message of another size is an error that names both, and the tag and the engine are as good as before."""
    with opened(make) as engine:
        wrong = [receive(engine, peer, 2, expected) for peer in peers(engine)] if receive_first else []
        meet(engine)
        sent = [send(engine, peer, 2, came) for peer in peers(engine)]
        meet(engine)
        wrong = wrong or [receive(engine, peer, 2, expected) for peer in peers(engine)]
        for message in wrong:
            error = settle(engine, message.transfer)
            require(isinstance(error, ValueError), f"a message of {came} bytes for {expected} raised {error!r}")
            told = str(error)
            require(str(expected) in told and str(came) in told, f"the error does not name both sizes: {told}")
        finish(engine, sent)
        meet(engine)
        incoming = [receive(engine, peer, 2, expected) for peer in peers(engine)]
        finish(engine, [send(engine, peer, 2, expected) for peer in peers(engine)])
        arrive(engine, incoming)
        meet(engine)


def forgets_who_looked(make: Make, rank: int) -> None:
    """An error that a transfer raises each time it is looked at does not keep what the stacks of those looks held."""

    class Batch:
        """Stands for what a caller has in hand."""

    def look(transfer: Transfer) -> weakref.ref[Batch]:
        batch = Batch()
        with suppress(ValueError):
            transfer.done()
        return weakref.ref(batch)

    with opened(make) as engine:
        wrong = [receive(engine, peer, 2, 8).transfer for peer in peers(engine)]
        sent = [send(engine, peer, 2, 9) for peer in peers(engine)]
        for transfer in wrong:
            require(isinstance(settle(engine, transfer), ValueError), "a message of 9 bytes for 8 was no error")
            require(look(transfer)() is None, "the error of a transfer keeps the stack of who looked at it")
        finish(engine, sent)
        meet(engine)


def bad_arguments(make: Make, rank: int) -> None:
    """What cannot be a message is refused at once, and nothing is sent."""
    good = np.zeros(8, np.uint8)
    with opened(make) as engine:
        peer = peers(engine)[0]
        for verb in (engine.send, engine.receive):
            for other in (-1, engine.size, engine.rank):
                expect(ValueError, partial(verb, other, 0, good), f"{verb.__name__} with rank {other}")
            for tag in (-1, NUM_TAGS):
                expect(ValueError, partial(verb, peer, tag, good), f"{verb.__name__} with tag {tag}")
            expect(TypeError, partial(verb, peer, 0, good.view(np.int64)), f"{verb.__name__} with int64")
            for memory in (good[::2], good.reshape(2, 4)):
                expect(ValueError, partial(verb, peer, 0, memory), f"{verb.__name__} with other memory")
        require(engine.sent_bytes == 0, "a message that was refused counts as sent")
        meet(engine)


def patience(make: Make, rank: int) -> None:
    """wait() for what does not come ends in time, and does not burn a core."""
    with opened(make) as engine:
        incoming = [receive(engine, peer, 0, 10) for peer in peers(engine)]
        meet(engine)
        time.sleep(0.05)  # others may still be busy with what ended the meeting
        began, burnt = time.monotonic(), time.process_time()
        while (waited_s := time.monotonic() - began) < _SILENCE_S:
            engine.wait([message.transfer for message in incoming], _SILENCE_S - waited_s)
        burnt_s = time.process_time() - burnt
        require(waited_s < _SILENCE_S + 5.0, f"wait() for {_SILENCE_S} s took {waited_s:.2f} s")
        require(burnt_s < 0.5 * waited_s, f"wait() burnt {burnt_s:.2f} s of a core in {waited_s:.2f} s")
        meet(engine)
        finish(engine, [send(engine, peer, 0, 10) for peer in peers(engine)])
        arrive(engine, incoming)
        meet(engine)


def leaves(make: Make, rank: int, num_bytes: int) -> None:
    """Whoever needs a rank that has closed is told which; messages between the others still come."""
    with opened(make) as engine:
        gone = engine.size - 1
        others = [peer for peer in peers(engine) if peer != gone]
        awaited = None if rank == gone else receive(engine, gone, 4, num_bytes)
        meet(engine)
        if rank == gone:
            return
        assert awaited is not None
        _check_lost(settle(engine, awaited.transfer), gone, "a receive that was under way")
        _check_lost(settle(engine, receive(engine, gone, 6, num_bytes).transfer), gone, "a new receive")
        require(gone in engine.departures(), f"departures() does not name rank {gone}: {engine.departures()}")
        sent = [send(engine, peer, 7, num_bytes) for peer in others]
        arrive(engine, [receive(engine, peer, 7, num_bytes) for peer in others])
        finish(engine, sent)


def last_words(make: Make, rank: int, num_bytes: int, count: int) -> None:
    """What was sent before flush() arrives, though its sender closes right behind it."""
    with opened(make) as engine:
        speaker = engine.size - 1
        awaited = [] if rank == speaker else [receive(engine, speaker, number, num_bytes) for number in range(count)]
        meet(engine)
        if rank == speaker:
            for number in range(count):
                for peer in peers(engine):
                    send(engine, peer, number, num_bytes)
            require(engine.flush(30.0), "flush() gave up, though everybody is there")
            return
        arrive(engine, awaited)


def lost_sends(make: Make, rank: int, num_bytes: int) -> None:
    """A message to a rank that closes instead of receiving it is an error that names the rank."""
    with opened(make) as engine:
        gone = engine.size - 1
        sent = None if rank == gone else send(engine, gone, 4, num_bytes)
        meet(engine)
        if rank == gone:
            return
        assert sent is not None
        _check_lost(settle(engine, sent), gone, "a send that was under way")
        try:
            error = settle(engine, send(engine, gone, 5, num_bytes))
        except PeerLost as at_once:
            error = at_once
        _check_lost(error, gone, "a new send")


def _check_lost(error: Exception | None, gone: int, what: str) -> None:
    require(isinstance(error, PeerLost), f"{what} raised {error!r}, expected PeerLost")
    assert isinstance(error, PeerLost)
    require(error.ranks == (gone,), f"{what} blames ranks {error.ranks}, expected {gone}: {error}")
    require(str(gone) in str(error), f"{what} does not name rank {gone}: {error}")


def closed(make: Make, rank: int) -> None:
    """close() may be called again, ends what is under way, and leaves nothing that can be called."""
    engine = make()
    meet(engine)
    incoming = receive(engine, peers(engine)[0], 0, 100)
    engine.close()
    engine.close()
    memory = np.zeros(1, np.uint8)
    peer = peers(engine)[0]
    expect(ClosedError, lambda: engine.send(peer, 1, memory), "send after close")
    expect(ClosedError, lambda: engine.receive(peer, 1, memory), "receive after close")
    expect(ClosedError, lambda: engine.wait([incoming.transfer], 0.1), "wait after close")
    error = settle_closed(incoming.transfer)
    require(isinstance(error, (ClosedError, PeerLost)), f"done() of what was under way at close raised {error!r}")


def settle_closed(transfer: Transfer) -> Exception | None:
    """Return what done() raises after close(): that, or that the other side had closed before."""
    try:
        transfer.done()
    except Exception as error:
        return error
    return None


def opened_often(make: Make, rank: int, cycles: int) -> None:
    """Engines come and go, and the next one of the same ranks works."""
    for _ in range(cycles):
        with opened(make) as engine:
            meet(engine)
