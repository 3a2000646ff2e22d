"""Scales turned round, tile by tile. Legend: B blocks."""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton.language as tl

from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import i32_at


@kernel
def transpose_scales(
    block_rows: tl.int64,
    columns: tl.int64,
    counts_addr: tl.int64,
    source_addr: tl.int64,
    destination_addr: tl.int64,
    TILE: tl.constexpr,
):
    """Grid (B, tiles down, tiles across)."""
    block = tl.program_id(0).to(tl.int64)
    count = tl.load(i32_at(counts_addr) + block)
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(2).to(tl.int64) * TILE + tl.arange(0, TILE)
    base = block * block_rows * columns
    if tl.program_id(1) * TILE < count:
        tile = tl.load(
            i32_at(source_addr) + base + row[:, None] * columns + column[None, :],
            mask=(row[:, None] < count) & (column[None, :] < columns),
        )
        tl.store(
            i32_at(destination_addr) + base + column[:, None] * block_rows + row[None, :],
            tl.trans(tile),
            mask=(row[None, :] < count) & (column[:, None] < columns),
        )
