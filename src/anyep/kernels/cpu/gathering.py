"""Rows fetched by number from the memory of all ranks: random reads, dense writes."""

from __future__ import annotations

from anyep.kernels.cpu.routing import load_index
from anyep.kernels.cpu.rows import stream
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import LINE, load_i64, prefetch

_ROWS_AHEAD = 4
"""Rows between a copy and the prefetch of what it will read: no processor foresees a random row."""
_PREFETCHED = 1024
"""Bytes of a row that are asked for early; a longer row's rest is prefetched by its own copy."""


@inlined
def row_address(index_addr: int, idx_bytes: int, position: int, rows_per_rank: int, peer_addr: int, width: int) -> int:
    number = load_index(index_addr, idx_bytes, position)
    rank = number // rows_per_rank
    return load_i64(peer_addr, rank) + (number - rank * rows_per_rank) * width


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def gather(
    row_bytes: int,
    num_rows: int,
    index_addr: int,
    idx_bytes: int,
    rows_per_rank: int,
    num_ranks: int,
    peer_addr: int,
    out_addr: int,
) -> int:
    most = num_ranks * rows_per_rank
    for position in range(num_rows):
        number = load_index(index_addr, idx_bytes, position)
        if number < 0 or number >= most:
            return position
    early = min(row_bytes, _PREFETCHED)
    for position in range(num_rows):
        if position + _ROWS_AHEAD < num_rows:
            ahead = row_address(index_addr, idx_bytes, position + _ROWS_AHEAD, rows_per_rank, peer_addr, row_bytes)
            for offset in range(0, early, LINE):
                prefetch(ahead + offset)
        source = row_address(index_addr, idx_bytes, position, rows_per_rank, peer_addr, row_bytes)
        stream(out_addr + position * row_bytes, source, row_bytes)
    return -1
