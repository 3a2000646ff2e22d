"""The exam of an engine: every message arrives whole, in its own memory, whoever comes first.

Every function is ``case(make, rank, ...)`` and runs on all ranks.
"""

from __future__ import annotations

import threading

import numpy as np

from anyep.testing.engine_steps import (
    LARGE,
    SIZES,
    Incoming,
    Make,
    arrive,
    finish,
    meet,
    opened,
    peers,
    receive,
    send,
)
from anyep.testing.transport_steps import require
from anyep.transport.engine import Engine, Transfer


def facts(make: Make, rank: int) -> None:
    """An engine knows who it is, describes itself, and counts the bytes that it sends."""
    with opened(make) as engine:
        require(engine.rank == rank and engine.size > rank, f"rank {rank} was told it is {engine.rank}")
        require(bool(engine.name), "an engine has a name")
        told = engine.describe()
        require(all(isinstance(text, str) for item in told.items() for text in item), f"describe() returned {told}")
        before = engine.sent_bytes
        meet(engine)
        sent = engine.sent_bytes - before
        require(sent == len(peers(engine)), f"sent_bytes grew by {sent} for {len(peers(engine))} messages of a byte")
        require(not engine.departures(), f"nobody has left, and departures() says {engine.departures()}")
        meet(engine)


def send_first(make: Make, rank: int, num_bytes: int) -> None:
    """A message that was sent before its receiver wanted it is not lost."""
    with opened(make) as engine:
        sent = [send(engine, peer, 1, num_bytes) for peer in peers(engine)]
        meet(engine)
        arrive(engine, [receive(engine, peer, 1, num_bytes) for peer in peers(engine)])
        finish(engine, sent)
        meet(engine)


def receive_first(make: Make, rank: int, num_bytes: int) -> None:
    """A receive may wait for its message."""
    with opened(make) as engine:
        incoming = [receive(engine, peer, 1, num_bytes) for peer in peers(engine)]
        meet(engine)
        require(not any(message.transfer.done() for message in incoming), "a message was done before it was sent")
        meet(engine)
        finish(engine, [send(engine, peer, 1, num_bytes) for peer in peers(engine)])
        arrive(engine, incoming)
        meet(engine)


def overtaking(make: Make, rank: int, num_tags: int) -> None:
    """Messages are awaited one by one, the last that was sent first."""
    with opened(make) as engine:
        sent = [send(engine, peer, tag, SIZES[tag % len(SIZES)]) for tag in range(num_tags) for peer in peers(engine)]
        for tag in reversed(range(num_tags)):
            arrive(engine, [receive(engine, peer, tag, SIZES[tag % len(SIZES)]) for peer in peers(engine)])
        finish(engine, sent)
        meet(engine)


def several_in_flight(make: Make, rank: int, seed: int, num_messages: int) -> None:
    """Many messages both ways between all pairs, in another order on every rank."""
    sizes = np.random.default_rng(seed).choice(SIZES, num_messages).tolist()
    rng = np.random.default_rng([seed, rank])
    with opened(make) as engine:
        halves = [(peer, tag, way) for peer in peers(engine) for tag in range(num_messages) for way in (0, 1)]
        sent: list[Transfer] = []
        incoming: list[Incoming] = []
        for index in rng.permutation(len(halves)).tolist():
            peer, tag, way = halves[index]
            if way:
                incoming.append(receive(engine, peer, tag, sizes[tag]))
            else:
                sent.append(send(engine, peer, tag, sizes[tag]))
        arrive(engine, incoming)
        finish(engine, sent)
        meet(engine)


def large(make: Make, rank: int) -> None:
    """16 MiB both ways between all pairs."""
    with opened(make) as engine:
        incoming = [receive(engine, peer, 3, LARGE) for peer in peers(engine)]
        finish(engine, [send(engine, peer, 3, LARGE) for peer in peers(engine)])
        arrive(engine, incoming)
        meet(engine)


def tags_again(make: Make, rank: int, rounds: int) -> None:
    """A tag whose message was sent and received carries the next one, of another size."""
    with opened(make) as engine:
        for index in range(rounds):
            num_bytes = SIZES[index % len(SIZES)]
            incoming = [receive(engine, peer, 5, num_bytes) for peer in peers(engine)]
            finish(engine, [send(engine, peer, 5, num_bytes) for peer in peers(engine)])
            arrive(engine, incoming)
            meet(engine)


def threads(make: Make, rank: int, num_threads: int, rounds: int) -> None:
    """Several threads of a rank share its engine, each with its own tags."""
    failures: list[BaseException] = []

    def work(engine: Engine, index: int) -> None:
        try:
            for number in range(rounds):
                num_bytes = SIZES[(index + number) % len(SIZES)]
                tag = index * rounds + number
                incoming = [receive(engine, peer, tag, num_bytes) for peer in peers(engine)]
                finish(engine, [send(engine, peer, tag, num_bytes) for peer in peers(engine)])
                arrive(engine, incoming)
        except BaseException as error:
            failures.append(error)

    with opened(make) as engine:
        workers = [threading.Thread(target=work, args=(engine, n), daemon=True) for n in range(num_threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]
        meet(engine)


def two_engines(make: Make, rank: int) -> None:
    """Two engines of one group do not mix their messages."""
    with opened(make) as one, opened(make) as other:
        first = [receive(one, peer, 9, 100) for peer in peers(one)]
        second = [receive(other, peer, 9, 5000) for peer in peers(other)]
        finish(other, [send(other, peer, 9, 5000) for peer in peers(other)])
        arrive(other, second)
        finish(one, [send(one, peer, 9, 100) for peer in peers(one)])
        arrive(one, first)
        meet(other)
        meet(one)
