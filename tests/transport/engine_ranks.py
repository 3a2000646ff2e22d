"""Functions that rank processes run with an engine; light to import."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from anyep.errors import AnyEPError, PeerLost
from anyep.testing.engine_steps import arrive, finish, meet, opened, peers, receive, send, settle
from anyep.transport.engine_gloo import GlooEngine
from anyep.transport.engines import open_engine


def _engine(group: Any, name: str) -> Any:
    """Open an engine over TCP of this host."""
    if name == "gloo":
        return GlooEngine(group, interface="lo")
    from anyep.transport.engine_nixl import NixlEngine

    os.environ["ANYEP_RANKS_PER_HOST"] = "1"
    return NixlEngine(group)


def with_gloo(group: Any, rank: int, case: Any, *args: Any) -> Any:
    """Run an exam's case on gloo over the loopback interface."""
    return case(partial(_engine, group, "gloo"), rank, *args)


def with_nixl(group: Any, rank: int, case: Any, *args: Any) -> Any:
    """Run an exam's case on NIXL over TCP, as between hosts."""
    return case(partial(_engine, group, "nixl"), rank, *args)


def _arrive(directory: str, name: object) -> None:
    Path(directory, str(name)).touch()


def stream_for_ever(group: Any, rank: int, name: str, directory: str) -> Any:
    """Send and receive 4 MiB again and again, until a rank is lost."""
    engine = _engine(group, name)
    memory = np.zeros(4 << 20, np.uint8)
    try:
        for number in range(1_000_000):
            transfers = [engine.receive(peer, number, memory.copy()) for peer in peers(engine)]
            transfers += [engine.send(peer, number, memory) for peer in peers(engine)]
            finish(engine, transfers)
            _arrive(directory, rank)
    except PeerLost as error:
        time.sleep(0.5)  # so that nobody sees this rank leave before it has seen who was first
        return type(error).__name__, error.ranks, str(error)
    finally:
        engine.close()


def go_on_without(group: Any, rank: int, name: str, directory: str) -> Any:
    """Rank 1 is killed; the others exchange messages afterwards."""
    engine = _engine(group, name)
    meet(engine)
    awaited = receive(engine, 1, 0, 100) if rank != 1 else None
    _arrive(directory, rank)
    if awaited is None:
        time.sleep(60)
        return None
    assert isinstance(settle(engine, awaited.transfer), PeerLost)
    other = 2 - rank
    incoming = receive(engine, other, 1, 1 << 20)
    finish(engine, [send(engine, other, 1, 1 << 20)])
    arrive(engine, [incoming])
    how = engine.departures()[1].how
    finish(engine, [send(engine, other, 2, 1), (last := receive(engine, other, 2, 1)).transfer])
    arrive(engine, [last])
    engine.close()
    return how


def how_it_left(group: Any, rank: int, name: str) -> str | None:
    engine = _engine(group, name)
    meet(engine)
    if rank == 0:
        engine.close()
        return None
    error = settle(engine, receive(engine, 0, 0, 1).transfer)
    engine.close()
    return engine.departures()[0].how if isinstance(error, PeerLost) else repr(error)


def how_it_left_while_spoken_to(group: Any, rank: int, name: str) -> list[str]:
    """Rank 0 closes while rank 1 sends to it; return what rank 1 sees, of several engines."""
    seen = []
    for _ in range(5):
        engine = _engine(group, name)
        meet(engine)
        if rank == 1:
            awaited, tag = receive(engine, 0, 0, 1), 0
            with suppress(PeerLost):
                while not awaited.transfer.done():
                    send(engine, 0, tag, 100)
                    tag += 1
            seen.append(engine.departures()[0].how)
        engine.close()
        group.allgather(b"")
    return seen


def _open_things() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def open_and_close(group: Any, rank: int, cycles: int) -> tuple[tuple[int, int], tuple[int, int]]:
    def cycle() -> None:
        engine = GlooEngine(group, interface="lo")
        meet(engine)
        engine.close()
        group.allgather(b"")
        del engine
        gc.collect()

    cycle()
    before = _open_things()
    for _ in range(cycles):
        cycle()
    return before, _open_things()


def surroundings(group: Any, rank: int, name: str) -> tuple[bool, bool]:
    os.environ["ANYEP_RANKS_PER_HOST"] = "1"
    before = dict(os.environ)
    engine = _engine(group, name)
    meet(engine)
    engine.close()
    return dict(os.environ) == before, not dist.is_initialized()


def send_read_only(group: Any, rank: int, name: str) -> bool:
    engine = _engine(group, name)
    memory = np.arange(1 << 20, dtype=np.uint8)
    memory.flags.writeable = False
    into = np.zeros_like(memory)
    finish(engine, [engine.receive(1 - rank, 0, into), engine.send(1 - rank, 0, memory)])
    meet(engine)
    engine.close()
    return bool((into == memory).all())


def send_to_all(group: Any, rank: int, name: str) -> bool:
    """Send the same memory, and overlapping parts of it, to several ranks at a time."""
    engine = _engine(group, name)
    memory = np.arange(1 << 20, dtype=np.uint32).view(np.uint8)
    parts = [memory, memory, memory[1000:], memory[: 1 << 20]]
    into = {(peer, tag): np.zeros_like(part) for peer in peers(engine) for tag, part in enumerate(parts)}
    for _ in range(3):
        transfers = [engine.receive(peer, tag, space) for (peer, tag), space in into.items()]
        transfers += [engine.send(peer, tag, part) for peer in peers(engine) for tag, part in enumerate(parts)]
        finish(engine, transfers)
        meet(engine)
    engine.close()
    return all(bool((space == parts[tag]).all()) for (_, tag), space in into.items())


def compute_meanwhile(group: Any, rank: int, name: str) -> bool:
    """A message arrives while neither side calls its engine."""
    engine = _engine(group, name)
    meet(engine)
    incoming = receive(engine, 1 - rank, 0, 4 << 20)
    sent = send(engine, 1 - rank, 0, 4 << 20)
    for _ in range(1000):
        time.sleep(0.01)
        if incoming.transfer.settled and sent.settled:  # attributes: done() might help the engine on
            break
    arrived = bool(incoming.transfer.settled and sent.settled)
    finish(engine, [sent])
    arrive(engine, [incoming])
    meet(engine)
    engine.close()
    return arrived


def open_on(group: Any, rank: int, interfaces: list[str | None], timeout_s: float = 20.0) -> str:
    try:
        engine = GlooEngine(group, interface=interfaces[rank], timeout_s=timeout_s)
    except AnyEPError as error:
        return f"{type(error).__name__}: {error}"
    engine.close()
    return "opened"


def meet_and_describe(group: Any, rank: int) -> dict[str, str]:
    engine = GlooEngine(group)
    meet(engine)
    told = engine.describe()
    engine.close()
    return told


def talk_over_a_cut(group: Any, rank: int, directory: str) -> tuple[bool, bool]:
    """Whether a message came while the link was cut, and whether it came once it was mended."""
    engine = GlooEngine(group)
    meet(engine)
    _arrive(directory, f"met-{rank}")
    while not Path(directory, "cut").exists():
        time.sleep(0.01)
    incoming = receive(engine, 1 - rank, 0, 100_000)
    sent = send(engine, 1 - rank, 0, 100_000)
    engine.wait([incoming.transfer], 0.5)
    early = incoming.transfer.done()
    _arrive(directory, f"waited-{rank}")
    arrive(engine, [incoming])
    finish(engine, [sent])
    meet(engine)
    engine.close()
    return early, True


def open_by_name(
    group: Any,
    rank: int,
    names: list[str],
    last_lacks_nixl: bool,
    timeout_s: float = 20.0,
    interface: str | None = None,
) -> tuple[str, str]:
    """Return the engine's name and the reason for it, or the error's kind and text."""
    os.environ["ANYEP_RANKS_PER_HOST"] = "1"
    if last_lacks_nixl and rank == group.size - 1:
        sys.modules["nixl_cu12"] = sys.modules["nixl"] = None  # type: ignore[assignment]
    try:
        engine, reason = open_engine(names[rank], group, interface, timeout_s)
    except (AnyEPError, ValueError) as error:
        return type(error).__name__, str(error)
    meet(engine)
    engine.close()
    return engine.name, reason


def speak_and_go(group: Any, rank: int, num_messages: int) -> Any:
    """Rank 1 sends messages that go at once, and closes; rank 0 tells how many came, and how it left."""
    with opened(partial(GlooEngine, group)) as engine:
        incoming = [receive(engine, 1, number, 16 << 10) for number in range(num_messages)] if rank == 0 else []
        group.allgather(b"")
        if rank == 1:
            for number in range(num_messages):
                send(engine, 0, number, 16 << 10)
            return engine.flush(3.0)
        arrive(engine, incoming)
        deadline = time.monotonic() + 10
        while not engine.departures() and time.monotonic() < deadline:
            time.sleep(0.01)
        return engine.departures()[1].how


def flush_beside_a_stopped_one(group: Any, rank: int, name: str, directory: str) -> list[bool] | None:
    """Rank 2 is stopped; the others await messages of everybody, and flush, without it and for all. Return whether all
    was heard."""
    engine = _engine(group, name)
    meet(engine)
    awaited = [receive(engine, peer, 1, 8) for peer in peers(engine)]
    _arrive(directory, f"here {rank}")
    if rank == 2:
        time.sleep(60)
    while not Path(directory, "stopped").exists():
        time.sleep(0.01)
    heard = [engine.flush(20.0, without=[2]), engine.flush(1.0)]
    _arrive(directory, f"flushed {rank}")
    del awaited
    engine.close()
    return heard


def open_without_ports(group: Any, rank: int) -> str:
    """Leave rank 0's host no port to choose; return what is told."""
    taken = []
    if rank == 0:
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40001")
        taken = [
            socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True) for port in (40000, 40001)
        ]
    told = open_on(group, rank, [None, None], 5.0)
    for ear in taken:
        ear.close()
    return told
