"""Scales turned from one row a token to one row a group of channels, tile by tile."""

from __future__ import annotations

from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import LINE, load_i32, stack_block, store_i32, stream_line

_TILE = LINE // 4
"""Rows and columns of a tile: what it reads and what it writes are whole lines, where the arrays begin with one."""
_tile_on_stack = stack_block(LINE * _TILE)


@inlined
def transpose_tile(
    source: int, source_columns: int, num_rows: int, destination: int, destination_columns: int, num_columns: int
) -> None:
    for column in range(num_columns):
        for row in range(num_rows):
            store_i32(destination, column * destination_columns + row, load_i32(source, row * source_columns + column))


@inlined
def stream_columns(tile: int, num_columns: int, destination: int, destination_columns: int) -> None:
    """Write the columns of a tile of 16 rows as lines past the caches."""
    for column in range(num_columns):
        stream_line(destination + 4 * column * destination_columns, tile + LINE * column, 0)


@compiled("void(int64, int64, int64, int64, int64, int64)")
def transpose_scales(
    num_blocks: int,
    block_rows: int,
    columns: int,
    counts_addr: int,
    source_addr: int,
    destination_addr: int,
) -> None:
    tile = _tile_on_stack()
    is_aligned = (destination_addr | (4 * block_rows)) % LINE == 0
    for block in range(num_blocks):
        source = source_addr + 4 * block * block_rows * columns
        destination = destination_addr + 4 * block * block_rows * columns
        count = load_i32(counts_addr, block)
        for row in range(0, count, _TILE):
            num_rows = min(_TILE, count - row)
            for column in range(0, columns, _TILE):
                here, there = source + 4 * (row * columns + column), destination + 4 * (column * block_rows + row)
                num_columns = min(_TILE, columns - column)
                if is_aligned and num_rows == _TILE:
                    transpose_tile(here, columns, num_rows, tile, _TILE, num_columns)
                    stream_columns(tile, num_columns, there, block_rows)
                else:
                    transpose_tile(here, columns, num_rows, there, block_rows, num_columns)
