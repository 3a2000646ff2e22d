"""Scales turned from one row a token to one row a group of channels, tile by tile."""

from __future__ import annotations

from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import LINE, load_i32, store_i32

_TILE = LINE // 4
"""Rows and columns of a tile: what it reads and what it writes are whole lines, where the arrays begin with one."""


@inlined
def transpose_tile(
    source: int, source_columns: int, num_rows: int, destination: int, destination_columns: int, num_columns: int
) -> None:
    for column in range(num_columns):
        for row in range(num_rows):
            store_i32(destination, column * destination_columns + row, load_i32(source, row * source_columns + column))


@compiled("void(int64, int64, int64, int64, int64, int64)")
def transpose_scales(
    num_blocks: int,
    block_rows: int,
    columns: int,
    counts_addr: int,
    source_addr: int,
    destination_addr: int,
) -> None:
    for block in range(num_blocks):
        source = source_addr + 4 * block * block_rows * columns
        destination = destination_addr + 4 * block * block_rows * columns
        count = load_i32(counts_addr, block)
        for row in range(0, count, _TILE):
            for column in range(0, columns, _TILE):
                there = destination + 4 * (column * block_rows + row)
                here = source + 4 * (row * columns + column)
                num_rows, num_columns = min(_TILE, count - row), min(_TILE, columns - column)
                transpose_tile(here, columns, num_rows, there, block_rows, num_columns)
