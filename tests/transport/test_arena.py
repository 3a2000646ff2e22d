"""Blocks come back when, and only when, nobody can reach their bytes; arenas grow no further than needed."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from anyep.errors import CapacityError, ClosedError
from anyep.machine import linux
from anyep.transport.arena import SEGMENT_UNIT_BYTES, Arena
from anyep.transport.base import Place

MIB = 1 << 20


class Machine:
    """Commits private memory up to a limit, and notes what it was asked for."""

    def __init__(self, limit_bytes: int = 1 << 40):
        self.limit_bytes = limit_bytes
        self.asked: list[int] = []

    def __call__(self, num_bytes: int) -> linux.Memory:
        self.asked.append(num_bytes)
        if num_bytes > self.limit_bytes:
            raise CapacityError(f"{num_bytes} bytes are too many")
        return linux.private_memory(num_bytes)


def make_arena(heap_bytes: int = MIB, *, machine: Machine | None = None, poison: bool = False) -> Arena:
    arena = Arena(machine or Machine(), poison=poison)
    arena.begin(reserved_bytes=1000, heap_bytes=heap_bytes)
    return arena


def _block(block):
    return block


def _memory(block):
    return block.memory


def _part(block):
    return block.memory[3:4]


def _tensor(block):
    return torch.frombuffer(block.memory, dtype=torch.uint8)


def _slice(block):
    return torch.frombuffer(block.memory[100:200], dtype=torch.uint8)


def _view_of_view(block):
    return torch.frombuffer(block.memory, dtype=torch.uint8).view(-1, 10)[3:5].t()


def _array(block):
    return np.frombuffer(block.memory, np.uint8)[5:9]


def _storage(block):
    return torch.frombuffer(block.memory, dtype=torch.uint8).untyped_storage()


@pytest.mark.parametrize("use", [_block, _memory, _part, _tensor, _slice, _view_of_view, _array, _storage])
def test_block_stays_while_anything_reaches_it(use):
    arena = make_arena()
    user = use(arena.allocate(1000))
    gc.collect()
    assert arena.used_bytes == 1024
    first = arena.allocate(1000)
    assert first.place.offset >= 1024 + 1024, "not where the user is"
    del user
    assert arena.used_bytes == 1024, "back at once, without the garbage collector"


def test_dropped_block_is_given_out_again():
    arena = make_arena()
    places = {arena.allocate(50_000).place for _ in range(100)}
    assert len(places) == 1


def test_autograd_keeps_a_block():
    arena = make_arena()
    x = torch.frombuffer(arena.allocate(400).memory, dtype=torch.float32).fill_(3.0)
    weight = torch.ones(100, requires_grad=True)
    loss = (x * weight).sum()
    del x
    assert arena.used_bytes == 512
    loss.backward()
    assert weight.grad is not None
    assert bool((weight.grad == 3.0).all())
    del loss
    assert arena.used_bytes == 0


def test_finalizers_on_other_threads():
    arena = make_arena(8 * MIB)
    stop = threading.Event()
    handed: list[list[torch.Tensor]] = [[], []]

    def drop(mine):
        while not stop.is_set() or mine:
            if mine:
                mine.pop()

    threads = [threading.Thread(target=drop, args=(mine,)) for mine in handed]
    for thread in threads:
        thread.start()
    for number in range(3000):
        handed[number % 2].append(_tensor(arena.allocate(1 + number % 2000)))
    stop.set()
    for thread in threads:
        thread.join()
    assert arena.used_bytes == 0
    assert arena.allocate(arena.committed_bytes - 2048).place == Place(segment=0, offset=1024), "one range again"


def test_concurrent_allocation_never_overlaps():
    arena = make_arena(8 * MIB)
    wrong: list[str] = []

    def work(stamp):
        for _ in range(300):
            tensor = _tensor(arena.allocate(3000)).fill_(stamp)
            if not bool((tensor == stamp).all()):
                wrong.append(f"thread {stamp} found other bytes in its block")

    threads = [threading.Thread(target=work, args=(stamp,)) for stamp in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_poison_fills_every_fresh_block():
    arena = make_arena(poison=True)
    for num_bytes in (1, 4, 128, 5000):
        tensor = _tensor(arena.allocate(num_bytes))
        assert bool((tensor == 0xFF).all())
        tensor.zero_()
    assert bool(torch.frombuffer(arena.allocate(4).memory, dtype=torch.float32).isnan().all())


def test_empty_blocks_take_nothing():
    arena = make_arena(0)
    block = arena.allocate(0)
    assert (block.num_bytes, len(block.memory), block.place) == (0, 0, Place(segment=0, offset=0))
    assert arena.used_bytes == 0
    assert block.address == arena.segments[0].address


def test_negative_size_is_the_callers_mistake():
    with pytest.raises(ValueError, match=r"num_bytes must be at least 0, got -1"):
        make_arena().allocate(-1)


def test_trimmed_block_gives_back_its_rest():
    arena = make_arena()
    block = arena.allocate(10_000)
    early = torch.frombuffer(block.memory[:3000], dtype=torch.uint8).fill_(5)
    place, address = block.place, block.address
    arena.trim(block, 3000)
    assert (block.num_bytes, len(block.memory), block.place, block.address) == (3000, 3000, place, address)
    assert arena.used_bytes == 3072
    assert arena.allocate(100).place == Place(segment=0, offset=place.offset + 3072), "the rest is free"
    arena.trim(block, 3000)
    arena.trim(block, 2900)
    del block
    assert arena.used_bytes == 2944, "a tensor from before keeps it"
    assert bool((early == 5).all())
    del early
    assert arena.used_bytes == 0
    assert arena.allocate(arena.committed_bytes - 2048).place == Place(segment=0, offset=1024), "one range again"


def test_block_trimmed_to_nothing_has_its_place_for_itself():
    arena = make_arena()
    block = arena.allocate(5000)
    arena.trim(block, 0)
    assert (block.num_bytes, len(block.memory), arena.used_bytes) == (0, 0, 128)
    assert arena.allocate(1).place != block.place
    arena.trim(block, 0)
    del block
    assert arena.used_bytes == 0
    empty = arena.allocate(0)
    arena.trim(empty, 0)
    assert arena.used_bytes == 0


@pytest.mark.parametrize("num_bytes", [-1, 1001, 1 << 50])
def test_trim_does_not_grow(num_bytes):
    arena = make_arena()
    block = arena.allocate(1000)
    with pytest.raises(ValueError, match=f"a block of 1000 bytes can be trimmed .* got {num_bytes}"):
        arena.trim(block, num_bytes)
    assert (block.num_bytes, arena.used_bytes) == (1000, 1024)


def test_locate_knows_the_heap_and_nothing_else():
    arena = make_arena()
    block = arena.allocate(1000)
    base = arena.segments[0].address
    assert arena.locate(block.address, 1000) == block.place
    assert arena.locate(block.address + 999, 1) == Place(segment=0, offset=block.place.offset + 999)
    assert arena.locate(base, 8) is None, "control memory"
    assert arena.locate(base + arena.segments[0].size - 4, 8) is None, "across the end"
    assert arena.locate(base + arena.segments[0].size, 0) == Place(segment=0, offset=arena.segments[0].size)
    assert arena.locate(torch.zeros(4).data_ptr(), 16) is None


def test_growth_is_at_least_half_of_what_there_is():
    machine = Machine()
    arena = make_arena(16 * MIB - 2048, machine=machine)
    held = [arena.allocate(15 * MIB), arena.allocate(3 * MIB), arena.allocate(11 * MIB)]
    assert [block.place.segment for block in held] == [0, 1, 2]
    assert machine.asked == [16 * MIB, 8 * MIB, 12 * MIB]


def test_growth_takes_as_little_as_serves_when_more_is_refused():
    machine = Machine()
    arena = make_arena(20 * MIB - 2048, machine=machine)
    held = arena.allocate(19 * MIB)
    machine.limit_bytes = 4 * MIB
    block = arena.allocate(3 * MIB)
    assert block.place == Place(segment=1, offset=0)
    assert machine.asked == [20 * MIB, 10 * MIB, 4 * MIB]
    with pytest.raises(CapacityError, match="too many"):
        arena.allocate(5 * MIB)
    assert held.num_bytes == 19 * MIB
    assert arena.allocate(1000).num_bytes == 1000, "an arena that could not grow still works"


def test_segments_are_whole_units():
    machine = Machine()
    make_arena(1, machine=machine)
    assert machine.asked == [SEGMENT_UNIT_BYTES]


def test_the_segment_table_is_never_overrun():
    machine = Machine()
    arena = make_arena(0, machine=machine)
    machine.limit_bytes = SEGMENT_UNIT_BYTES  # growth by half is refused, so that segments stay small
    held = [arena.allocate(SEGMENT_UNIT_BYTES - 128) for _ in range(63)]
    with pytest.raises(CapacityError, match=r"64 segments.*begin with more memory"):
        arena.allocate(SEGMENT_UNIT_BYTES - 128)
    assert len(arena.segments) == 64
    assert len({block.place for block in held}) == 63


def test_steady_work_reaches_a_plateau():
    arena = make_arena(2 * MIB)
    rng = np.random.default_rng(0)
    committed = []
    held: list[torch.Tensor] = []
    for _ in range(4000):
        held.append(_tensor(arena.allocate(int(rng.integers(1, 700_000)))))
        while len(held) > 6:
            held.pop(int(rng.integers(0, len(held))))
        committed.append(arena.committed_bytes)
    assert committed[-1] == committed[1000]
    assert committed[-1] <= 4 * 7 * 700_000


def test_closed_arena_gives_out_nothing_and_keeps_its_tensors():
    arena = make_arena()
    tensor = _tensor(arena.allocate(5000)).fill_(9)
    arena.close()
    arena.close()
    with pytest.raises(ClosedError, match="closed"):
        arena.allocate(1)
    del arena
    gc.collect()
    assert bool((tensor == 9).all())
    tensor.fill_(1)
