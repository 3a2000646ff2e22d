"""Rows that travel packed: each peer's bins one behind the other, and back to where they belong."""

from __future__ import annotations

from anyep.kernels.cpu.rows import stream
from anyep.machine.compiler import compiled
from anyep.machine.intrinsics import load_i32, load_i64


@compiled("void(int64, int64, int64, int64, int64, int64)")
def unpack(
    row_bytes: int,
    num_sources: int,
    rows_addr: int,
    start_addr: int,
    packed_addr: int,
    base_addr: int,
) -> None:
    for source in range(num_sources):
        packed = load_i64(packed_addr, source)
        if packed != 0:
            destination = base_addr + load_i32(start_addr, source) * row_bytes
            stream(destination, packed, load_i32(rows_addr, source) * row_bytes)


@compiled("void(int64, int64, int64, int64, int64, int64, int64)")
def pack(
    row_bytes: int,
    num_peers: int,
    num_bins: int,
    rows_addr: int,
    start_addr: int,
    base_addr: int,
    packed_addr: int,
) -> None:
    for peer in range(num_peers):
        destination = load_i64(packed_addr, peer)
        if destination == 0:
            continue
        for flat in range(peer * num_bins, (peer + 1) * num_bins):
            num_bytes = load_i32(rows_addr, flat) * row_bytes
            stream(destination, base_addr + load_i32(start_addr, flat) * row_bytes, num_bytes)
            destination += num_bytes
