"""Pinned memory that tensors pass through: all bytes arrive, in pieces that fit, and nobody looks too early."""

from __future__ import annotations

import random

import pytest
import torch

from anyep.errors import CapacityError
from anyep.exchange.device.pinned import Move, Passage, fill
from anyep.testing.lazy_device import LazyDevice
from anyep.testing.pretend_device import PretendDevice

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.int64)


def draw(seed):
    """Tensors of any dtype, dense or every second column, and poisoned ones of the same shapes."""
    chance, moves = random.Random(seed), []
    for _ in range(chance.randint(1, 6)):
        shape = [chance.choice([0, 1, 3, 7, 40]) for _ in range(chance.randint(1, 3))]
        dtype, stride = chance.choice(DTYPES), chance.choice([1, 1, 2])
        wide = [*shape[:-1], shape[-1] * stride]
        source = torch.randint(0, 100, wide, generator=torch.Generator().manual_seed(seed)).to(dtype)[..., ::stride]
        moves.append(Move(source, torch.full(wide, 111).to(dtype)[..., ::stride]))
    return moves


@pytest.mark.parametrize("seed", range(60))
def test_everything_arrives_in_pieces_that_fit(seed):
    moves, slot_bytes = draw(seed), random.Random(seed).choice([8, 100, 128, 1000])
    for pieces in fill(moves, slot_bytes):
        ends = [piece.offset + piece.source.numel() * piece.source.element_size() for piece in pieces]
        assert pieces
        assert max(ends) <= slot_bytes
        assert all(piece.offset >= end for piece, end in zip(pieces[1:], ends, strict=False))
        for piece in pieces:
            piece.target.copy_(piece.source)
    assert all(torch.equal(move.source, move.target) for move in moves)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("way", ["bring", "give"])
def test_a_device_that_copies_as_late_as_it_may_brings_everything(seed, way):
    device, slot_bytes = LazyDevice(seed), random.Random(seed).choice([8, 100, 1000])
    passage = Passage(device, device.new_stream(), slot_bytes)
    for number in (seed, seed + 1000):
        moves, wanted = draw(number), draw(number)
        getattr(passage, way)(moves)
        if way == "give":
            for move in moves:  # it has been read, and may be written over
                move.source.fill_(0)
            device.follow(device.current_stream(), device.mark(passage.stream))
        for move, expected in zip(moves, wanted, strict=True):
            assert torch.equal(move.target, expected.source)


def test_a_host_that_cannot_pin_says_how_much_was_wanted(monkeypatch):
    device = PretendDevice()

    def none_left(num_bytes):
        raise CapacityError(f"the host cannot pin {num_bytes} bytes")

    monkeypatch.setattr(device, "pinned", none_left)
    with pytest.raises(CapacityError, match="cannot pin 64 bytes"):
        Passage(device, device.new_stream(), 64)
