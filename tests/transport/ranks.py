"""Functions that rank processes run; light to import."""

from __future__ import annotations

import gc
import os
import resource
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from anyep.errors import AnyEPError, ClosedError, PeerError
from anyep.transport.base import Blame, Lane, Place
from anyep.transport.inprocess import InProcessTransport, local_group
from anyep.transport.registry import open_transport
from anyep.transport.rendezvous import find_rendezvous
from anyep.transport.shm import ShmTransport


def python_path() -> str:
    """Return the PYTHONPATH with which another program finds this module too."""
    return os.pathsep.join(path for path in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if path)


def whoami(group: Any, rank: int, extra: int) -> tuple[int, int, int, list[bytes]]:
    return rank, group.size, extra, group.allgather(bytes([rank]))


def fail_on(group: Any, rank: int, culprit: int) -> int:
    if rank == culprit:
        raise ValueError(f"rank {rank} fails on purpose")
    return rank


def die_on(group: Any, rank: int, culprit: int) -> int:
    if rank == culprit:
        os._exit(7)
    return rank


def sleep_on(group: Any, rank: int, culprit: int, seconds: float) -> int:
    if rank == culprit:
        time.sleep(seconds)
    return rank


def with_shm(group: Any, rank: int, case: Any, *args: Any) -> Any:
    """Run an exam's case on the shared-memory transport."""
    return case(partial(ShmTransport, group), rank, *args)


LANES = [Lane(index=0, name="open", words=3), Lane(index=1, name="done", words=1)]


def open_shm(group: Any, *, heap_bytes: int = 1 << 20, timeout_s: float = 20.0, poison: bool = True) -> ShmTransport:
    return ShmTransport(group, lanes=LANES, ring=2, heap_bytes=heap_bytes, timeout_s=timeout_s, poison=poison)


def exchange(transport: Any, epoch: int, step: str = "exchange") -> list[int]:
    transport.post(LANES[0], epoch, np.full((transport.size, 1), transport.rank, np.int64))
    return transport.wait(LANES[0], epoch, step)[:, 0].tolist()


def interrupted_run(group: Any, rank: int) -> list[str]:
    """Run threads that wait for one that never posts; press Ctrl-C meanwhile."""
    seen: list[str] = []
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    def work(member: Any) -> None:
        transport = InProcessTransport(member, lanes=LANES, ring=2, heap_bytes=0, timeout_s=50.0)
        try:
            if member.rank:
                exchange(transport, 0)
            else:
                time.sleep(2.0)
        except PeerError as error:
            seen.append(type(error).__name__)
        transport.close()

    try:
        local_group(3).run(work)
    except KeyboardInterrupt:
        seen.insert(0, "KeyboardInterrupt")
    return seen


def _arrive(directory: str, name: object) -> None:
    Path(directory, f"rank-{name}").touch()


def _told(call: Any) -> tuple[str, Any, str, str, float]:
    try:
        call()
    except PeerError as error:
        return type(error).__name__, error.ranks, error.step, str(error), time.monotonic()
    raise AssertionError("no error")


def until_lost(group: Any, rank: int, directory: str, victim: int, busy: bool) -> Any:
    """Exchange for ever, or wait for the victim, until it is gone."""

    def work(transport: Any) -> None:
        exchange(transport, 0)
        _arrive(directory, rank)
        if rank == victim and not busy:
            time.sleep(60)
        epoch = 0
        while True:
            epoch += 1
            exchange(transport, epoch, f"step {epoch}")

    transport = open_shm(group)
    told = _told(lambda: work(transport))
    transport.leave(Blame(ranks=told[1], timeout=False))
    return told


def until_silent(group: Any, rank: int, directory: str) -> Any:
    """Exchange for ever; rank 1 is stopped by the test in the middle of it."""

    def work(transport: Any) -> None:
        exchange(transport, 0)
        _arrive(directory, rank)
        while True:
            work.epoch += 1
            exchange(transport, work.epoch, f"step {work.epoch}")
            if rank == 1:
                time.sleep(0.01)  # so that it is stopped outside of its posts

    work.epoch = 0
    transport = open_shm(group, timeout_s=0.5)
    kind, culprits, _, text, _ = _told(lambda: work(transport))
    transport.leave(Blame(ranks=culprits, timeout=True))
    if rank != 1:
        _arrive(directory, f"{rank}-left")
    return kind, culprits, text


def wait_long(group: Any, rank: int, seconds: float) -> float:
    """Return the CPU seconds of a rank that waits for rank 0."""
    transport = open_shm(group)
    exchange(transport, 0)
    if rank == 0:
        time.sleep(seconds)
    before = time.process_time()
    exchange(transport, 1)
    used = time.process_time() - before
    transport.close()
    return used


def interrupted(group: Any, rank: int, directory: str) -> Any:
    """Rank 0 waits for rank 1, which waits for rank 0's next message."""
    transport = open_shm(group, timeout_s=50.0)
    exchange(transport, 0)
    _arrive(directory, rank)
    try:
        if rank == 0:
            transport.wait(LANES[0], 1, "for ever")
        exchange(transport, 1)
    except KeyboardInterrupt:
        usable = transport.locate(transport.allocate(100).address, 100) is not None
        transport.close()
        return "KeyboardInterrupt", usable
    except PeerError as error:
        transport.close()
        return type(error).__name__, error.ranks
    return None


def leave_in_turn(group: Any, rank: int) -> Any:
    """Rank 3 is slow; rank 0 has the least patience and leaves because of it; the others notice only in step 2."""
    transport = open_shm(group, timeout_s=0.4 if rank == 0 else 20.0)
    exchange(transport, 0)
    if rank == 3:
        time.sleep(1.2)

    def work() -> None:
        exchange(transport, 1, "step 1")
        exchange(transport, 2, "step 2")

    kind, culprits, step, *_ = _told(work)
    transport.leave(Blame(ranks=culprits, timeout=kind == "PeerTimeout"))
    return kind, culprits, step


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mappings() -> int:
    return sum("memfd:anyep" in line for line in Path("/proc/self/maps").read_text().splitlines())


def open_and_close(group: Any, rank: int, cycles: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return open descriptors and mappings before and after; the garbage collector has no part in it."""
    gc.disable()

    def cycle() -> None:
        transport = open_shm(group)
        exchange(transport, 0)
        block = transport.allocate(3 << 20)  # a second segment, which the others map
        transport.post(LANES[0], 1, np.full((transport.size, 2), [block.place.segment, block.place.offset]))
        places = transport.wait(LANES[0], 1, "places").tolist()
        for source, (segment, offset, _) in enumerate(places):
            transport.address(source, Place(segment=segment, offset=offset))
        exchange(transport, 2)
        transport.close()

    cycle()
    before = _descriptors(), _mappings()
    for _ in range(cycles):
        cycle()
    return before, (_descriptors(), _mappings())


def mappings_over_life(group: Any, rank: int) -> dict[str, int]:
    gc.disable()
    transport = open_shm(group)
    counts = {"open": _mappings()}
    tensor = torch.frombuffer(transport.allocate(1000).memory, dtype=torch.uint8)
    exchange(transport, 0)
    transport.close()
    counts["with a tensor"] = _mappings()
    assert bool((tensor == 0xFF).all())
    del tensor
    counts["without"] = _mappings()
    return counts


def _try_to_open(group: Any, **options: Any) -> tuple[str, str]:
    try:
        transport = open_shm(group, **options)
    except AnyEPError as error:
        return type(error).__name__, str(error)
    exchange(transport, 0)
    transport.close()
    return "opened", transport.name


def open_with_few_files(group: Any, rank: int, culprit: int) -> tuple[str, str]:
    before = _descriptors()
    if rank == culprit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1, before + 100))  # counting took one more
    kind, text = _try_to_open(group)
    if rank == culprit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 100, before + 100))
    assert _descriptors() == before, "a transport that could not be opened leaves no descriptor"
    assert _mappings() == 0
    assert _try_to_open(group) == ("opened", "shm"), "and the group is as good as before"
    return kind, text


def open_too_much(group: Any, rank: int) -> tuple[str, str]:
    return _try_to_open(group, heap_bytes=1 << 46)


def open_on_hosts(group: Any, rank: int, hosts: list[str]) -> tuple[str, str]:
    os.environ["ANYEP_HOST_ID"] = hosts[rank]
    return _try_to_open(group)


def map_after_leaving(group: Any, rank: int, blame: bool | None) -> Any:
    """Rank 1 learns of a segment of rank 0 and maps it only when rank 0 has closed: by itself, or blaming rank 2."""
    transport = open_shm(group)
    block = transport.allocate(10 << 20)
    transport.post(LANES[0], 0, np.full((group.size, 2), [block.place.segment, block.place.offset]))
    segment, offset, _ = transport.wait(LANES[0], 0, "places")[0].tolist()
    if rank == 0:
        transport.leave(None if blame is None else Blame(ranks=(2,), timeout=blame))
        transport.close()
    group.allgather(b"")
    told = None
    if rank == 1:
        told = _told(lambda: transport.address(0, Place(segment=segment, offset=offset)))[:2]
    group.allgather(b"")
    transport.close()
    return told


def killed_before_opening(group: Any, rank: int, culprit: int, comes_first: bool) -> Any:
    if comes_first:
        group.allgather(b"here")
    else:
        time.sleep(0.2)  # so that the culprit has told the store of its process
    if rank == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    kind, culprits, _, text, now = _told(lambda: open_shm(group))
    return kind, culprits, text, now - began


def open_and_drop(group: Any, rank: int) -> Any:
    """Return descriptors and mappings before and after a transport that nobody closed."""
    gc.disable()
    before = _descriptors(), _mappings()
    transport = open_shm(group)
    exchange(transport, 0)
    tensor = torch.frombuffer(transport.allocate(3 << 20).memory, dtype=torch.uint8)
    group.allgather(b"")
    del transport, tensor
    return before, (_descriptors(), _mappings())


def fork_in_the_middle(group: Any, rank: int) -> Any:
    """Return what a forked child is told, whether its parent can go on, and what the child still maps."""
    transport = open_shm(group)
    results = [exchange(transport, 0)]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            exchange(transport, 1)
        except ClosedError as error:
            transport.leave(Blame(ranks=(0,), timeout=False))
            transport.close()
            os.write(writing, f"{_mappings()} {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    mappings, _, text = os.read(reading, 10_000).decode().partition(" ")
    os.close(reading)
    os.close(writing)
    results.append(exchange(transport, 1))
    transport.check(1, "check")
    transport.close()
    return text, results, int(mappings)


def scaled(group: Any, rank: int, x: torch.Tensor) -> torch.Tensor:
    return x * (rank + 1)


def unpicklable(group: Any, rank: int) -> Any:
    return lambda: rank


def fail_after_exchange(group: Any, rank: int, culprit: int) -> None:
    transport = open_shm(group)
    exchange(transport, 0)
    try:
        if rank == culprit:
            raise ValueError("the culprit")
        exchange(transport, 1)
    finally:
        transport.close()


def open_by_name(group: Any, rank: int, name: str, options: dict[str, Any]) -> str:
    try:
        opened = open_transport(group, transport=name, **options)
    except AnyEPError as error:
        return f"{type(error).__name__}: {error}"
    exchange(opened.transport, 0)
    opened.transport.close()
    return f"{opened.transport.name}: {opened.reason}"


def _meet(group: Any) -> str:
    rendezvous = find_rendezvous(group)
    return "-".join(item.decode() for item in rendezvous.allgather(str(dist.get_rank()).encode()))


def _exchange_on(group: Any) -> str:
    transport = open_shm(find_rendezvous(group))
    got = exchange(transport, 0)
    transport.close()
    return "-".join(str(dist.get_global_rank(group, rank)) for rank in got)


def meet_in_torch_groups(group: Any, rank: int) -> list[str]:
    store = dist.PrefixStore("torch", group._store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=group.size)
    part = dist.new_group([0, 2])
    told = [f"default {_meet(dist.group.WORLD)}", f"none {_meet(None)}"]
    told.append(f"part {_meet(part)}" if rank != 1 else "not a member")
    told.append(f"shm {_exchange_on(dist.group.WORLD)}")
    if rank != 1:
        told.append(f"shm {_exchange_on(part)}")
    dist.destroy_process_group()
    return told
