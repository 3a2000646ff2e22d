"""Memory as device functions see it: integers that become pointers, and bytes that move 16 at a time where they can.

Where an address is a multiple of 16 is known when a kernel runs, not when it is compiled: peers' addresses come out of
tables. So each kernel has both ways, and chooses for a whole row at once.

Legend: PIECE bytes of a row that one program moves.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl


@triton.jit
def bytes_at(address):
    return tl.cast(tl.cast(address, tl.int64), tl.pointer_type(tl.uint8))


@triton.jit
def start_of(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to numbers of TYPE; ALIGNED says that the address is a multiple of 16.

    The compiler forgets what it knows of an integer when it becomes a pointer, and what it is told of a pointer to
    wider numbers does not outlast an addition: told of bytes and cast last, it moves 16 bytes at a time. Triton 3.6
    also forgets what it is told of a function's result, so the first cast stands here and is not :func:`bytes_at`.
    """
    start = tl.cast(tl.cast(address, tl.int64), tl.pointer_type(tl.uint8))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return tl.cast(start, tl.pointer_type(TYPE))


@triton.jit
def words_at(address):
    """Return a pointer to int32 for an address that is a multiple of 16."""
    return start_of(address, tl.int32, True)


@triton.jit
def i32_at(address):
    return tl.cast(tl.cast(address, tl.int64), tl.pointer_type(tl.int32))


@triton.jit
def i64_at(address):
    return tl.cast(tl.cast(address, tl.int64), tl.pointer_type(tl.int64))


@triton.jit
def load_indices(address, position, inside, IDX_BYTES: tl.constexpr):
    """Return int64 [.] of int32 or int64 indices; -1 where ``inside`` is false."""
    if IDX_BYTES == 8:
        return tl.load(i64_at(address) + position, mask=inside, other=-1)
    return tl.load(i32_at(address) + position, mask=inside, other=-1).to(tl.int64)


@triton.jit
def store_indices(address, position, values, inside, IDX_BYTES: tl.constexpr):
    if IDX_BYTES == 8:
        tl.store(i64_at(address) + position, values, mask=inside)
    else:
        tl.store(i32_at(address) + position, values.to(tl.int32), mask=inside)


@triton.jit
def base_of(table_addr, rank):
    """Return where that rank's array begins; 0 for nowhere: rank -1, no table, or a rank that is skipped."""
    named = rank | tl.where(table_addr == 0, -1, 0)  # no `&`: some versions refuse it between a block and a number
    return tl.load(i64_at(table_addr) + named, mask=named >= 0, other=0)


@triton.jit
def copy_stretch(source, destination, num_bytes, first, step, PIECE: tl.constexpr):
    """Copy pieces ``first``, ``first + step``, ... of a stretch: 16 bytes at a time, and what is left one by one."""
    aligned = ((source | destination) & 15) == 0
    num_words = tl.where(aligned, num_bytes // 16, 0) * 4
    words = tl.arange(0, PIECE // 4)
    for word in range(first * (PIECE // 4), num_words, step * (PIECE // 4)):
        inside = word + words < num_words
        there = tl.cast(word, tl.int64) * 4
        moved = tl.load(words_at(source + there) + words, mask=inside)
        tl.store(words_at(destination + there) + words, moved, mask=inside)
    rest = tl.arange(0, PIECE // 4)  # a whole piece of single bytes would take more registers than the words do
    for byte in range(num_words * 4 + first * (PIECE // 4), num_bytes, step * (PIECE // 4)):
        inside = byte + rest < num_bytes
        tl.store(bytes_at(destination + byte) + rest, tl.load(bytes_at(source + byte) + rest, mask=inside), mask=inside)


@triton.jit
def fill_stretch(destination, num_bytes, byte, first, step, PIECE: tl.constexpr):
    """Fill pieces ``first``, ``first + step``, ... of a stretch with ``byte``."""
    aligned = (destination & 15) == 0
    num_words = tl.where(aligned, num_bytes // 16, 0) * 4
    words = tl.arange(0, PIECE // 4)
    filling = tl.zeros([PIECE // 4], tl.int32) + tl.cast(byte * 0x01010101, tl.int32)
    for word in range(first * (PIECE // 4), num_words, step * (PIECE // 4)):
        tl.store(words_at(destination + tl.cast(word, tl.int64) * 4) + words, filling, mask=word + words < num_words)
    rest = tl.arange(0, PIECE // 4)
    few = tl.zeros([PIECE // 4], tl.uint8) + tl.cast(byte, tl.uint8)
    for start in range(num_words * 4 + first * (PIECE // 4), num_bytes, step * (PIECE // 4)):
        tl.store(bytes_at(destination + start) + rest, few, mask=start + rest < num_bytes)
