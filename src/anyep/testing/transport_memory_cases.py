"""The exam of a transport, memory: bytes are there before the words, blocks lie where they say and come back."""

from __future__ import annotations

import gc
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from anyep.kernels.registry import load
from anyep.testing.transport_steps import (
    Make,
    expect,
    meet,
    opened,
    require,
    swap_places,
)
from anyep.transport.base import Block, Place, Transport


def _stamp_and_inspect(transport: Transport, epoch: int, block: Block, source: torch.Tensor, what: str) -> None:
    """Let every rank stamp its part of every rank's block, past the caches, and post; then all stamps must be there."""
    kernels, rank, size = load("cpu"), transport.rank, transport.size
    places = swap_places(transport, epoch, block.place)
    source.fill_(epoch * size + rank)
    for i in range(size):
        d = (rank + i) % size
        kernels.copy(source.data_ptr(), transport.address(d, places[d]) + rank * source.nbytes, source.nbytes)
    meet(transport, epoch)
    got = np.frombuffer(block.memory, np.int64).reshape(size, -1)
    stale = (got != epoch * size + np.arange(size)[:, None]).sum()
    require(stale == 0, f"{what}: rank {rank} found {stale} of {got.size} words stale at the signal of epoch {epoch}")


def bytes_before_words(make: Make, rank: int, rounds: int, part_words: int) -> None:
    """What was written to a peer before the post is there after its wait; non-temporal stores too."""
    source = torch.empty(part_words, dtype=torch.int64)
    with opened(make, heap_bytes=1 << 20) as transport:
        block = transport.allocate(transport.size * source.nbytes)
        for epoch in range(rounds):
            _stamp_and_inspect(transport, epoch, block, source, "one block")


def growth(make: Make, rank: int) -> None:
    """Blocks do not overlap, lie where they say, are poisoned, and peers reach those in segments added later."""
    part = 1 << 15
    source = torch.empty(part // 8, dtype=torch.int64)
    with opened(make, heap_bytes=1 << 20) as transport:
        blocks: list[Block] = []
        for epoch in range(24):
            block = transport.allocate(transport.size * part * (1 + epoch % 3))
            _check_block(transport, block)
            blocks.append(block)
            whole = torch.frombuffer(block.memory, dtype=torch.uint8)
            require(bool((whole == 0xFF).all()), "a fresh block of a poisoned transport is not 0xFF throughout")
            first = transport.allocate(transport.size * part)
            _stamp_and_inspect(transport, epoch, first, source, f"segment {first.place.segment}")
            blocks.append(first)
        spans = sorted((block.address, block.address + block.num_bytes) for block in blocks)
        require(all(a[1] <= b[0] for a, b in pairwise(spans)), "blocks overlap")
        require(any(block.place.segment > 0 for block in blocks), "the arena did not grow by a segment")
        meet(transport, 24)  # nobody leaves while others look


def _check_block(transport: Transport, block: Block) -> None:
    require(block.address % 128 == 0, f"a block at {block.address:#x} is not 128-byte aligned")
    require(len(block.memory) == block.num_bytes, "a block's memory has another size than the block")
    require(not block.memory.readonly, "a block's memory is read-only")
    require(transport.locate(block.address, block.num_bytes) == block.place, "locate does not find a block")
    inner = transport.locate(block.address + 7, 1)
    require(inner == Place(segment=block.place.segment, offset=block.place.offset + 7), "locate misses inside a block")
    own = transport.address(transport.rank, block.place)
    require(own == block.address, "a rank's own place is not at its own address")


def strangers(make: Make, rank: int) -> None:
    """What is not in the arena is not located; empty blocks are blocks."""
    with opened(make) as transport:
        outside = torch.zeros(1000)
        require(transport.locate(outside.data_ptr(), 4000) is None, "locate found memory that is not the arena's")
        block = transport.allocate(1 << 10)
        require(transport.locate(block.address - (1 << 40), 8) is None, "locate found an address before the arena")
        require(transport.locate(block.address, 1 << 50) is None, "locate found more bytes than there are")
        empty = transport.allocate(0)
        require((empty.num_bytes, len(empty.memory)) == (0, 0), "an empty block is not empty")
        require(bool(transport.describe()), "describe() says nothing")
        meet(transport, 0)


def blocks_return(make: Make, rank: int, seed: int, rounds: int) -> None:
    """A block returns when its last tensor dies, not before; steady work does not make the arena grow for ever."""
    rng = np.random.default_rng([seed, rank])
    with opened(make, heap_bytes=4 << 20) as transport:
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
                require(bool((kept == stamp).all()), "a block was given out again while a tensor was on it")
                del kept
        half = len(segments) // 2
        require(max(segments[half:]) <= max(segments[:half]), "the arena still grows after many equal rounds")
        meet(transport, 0)


def trimmed_blocks(make: Make, rank: int, rounds: int) -> None:
    """The rest of a trimmed block is given out again, and nothing else is; what is kept stays as it was."""
    with opened(make, heap_bytes=1 << 20) as transport:
        held: list[tuple[torch.Tensor, int]] = []
        for number in range(rounds):
            block = transport.allocate(600_000)
            whole = torch.frombuffer(block.memory, dtype=torch.uint8).fill_(number % 251)
            del whole
            transport.trim(block, number * 37 % 20_000)
            require(len(block.memory) == block.num_bytes == number * 37 % 20_000, "a trimmed block has another size")
            expect(ValueError, partial(transport.trim, block, block.num_bytes + 1), "trim to more than there is")
            if block.num_bytes:
                held.append((torch.frombuffer(block.memory, dtype=torch.uint8), number % 251))
            require(block.place.segment == 0, "the rest of trimmed blocks is lost to the arena")
            del held[:-8], block
            for kept, stamp in held:
                require(bool((kept == stamp).all()), "what was kept of a trimmed block was given out again")
        held.clear()
        require(transport.allocate(900_000).place.segment == 0, "trimmed blocks did not come back whole")
        meet(transport, 0)


def valid_after_close(make: Make, rank: int) -> None:
    """Tensors outlive the transport."""
    with opened(make) as transport:
        blocks = [transport.allocate(n) for n in (1, 1000, 3 << 20)]
        tensors = [torch.frombuffer(block.memory, dtype=torch.uint8).fill_(rank + 1) for block in blocks]
        meet(transport, 0)
    del blocks, transport
    gc.collect()
    for tensor in tensors:
        require(bool((tensor == rank + 1).all()), "a tensor changed when its transport closed")
        tensor.fill_(77)
