"""From one row a token to one row for each of its experts here: each row read once, written to all its places."""

from __future__ import annotations

from anyep.kernels.cpu.routing import increment, load_index, store_index
from anyep.kernels.cpu.rows import spread
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import (
    allocate,
    copy_bytes,
    fill_bytes,
    load_i32,
    load_i64,
    release,
    store_i32,
    store_i64,
)


@inlined
def draw_rows(idx_addr: int, idx_bytes: int, num_topk: int, next_addr: int, columns_addr: int, rows_addr: int) -> int:
    """Write which columns of a row name an expert, and the rows they get (int64 [K] each); return how many do."""
    num_rows = 0
    for column in range(num_topk):
        expert = load_index(idx_addr, idx_bytes, column)
        if expert >= 0:
            store_i64(columns_addr, num_rows, column)
            store_i64(rows_addr, num_rows, increment(next_addr, expert))
            num_rows += 1
    return num_rows


@inlined
def spread_to_rows(source: int, row_bytes: int, base: int, rows_addr: int, num_rows: int, places_addr: int) -> None:
    """Copy one row to rows of ``base``."""
    for i in range(num_rows):
        store_i64(places_addr, i, base + load_i64(rows_addr, i) * row_bytes)
    spread(source, row_bytes, places_addr, num_rows)


@inlined
def write_lone_index(row_addr: int, idx_bytes: int, num_topk: int, column: int, idx_addr: int) -> None:
    fill_bytes(row_addr, num_topk * idx_bytes, 0xFF)
    store_index(row_addr, idx_bytes, column, load_index(idx_addr, idx_bytes, column))


@inlined
def write_lone_weight(row_addr: int, num_topk: int, column: int, weights_addr: int) -> None:
    fill_bytes(row_addr, 4 * num_topk, 0)
    store_i32(row_addr, column, load_i32(weights_addr, column))


@inlined
def column_base(table_addr: int, source: int, out_addr: int) -> int:
    """Return where a source's array begins; 0 where its table is not read, because nothing is made of it."""
    return load_i64(table_addr, source) if out_addr != 0 else 0


@compiled("void(" + ", ".join(["int64"] * 19) + ")")
def expand(
    x_bytes: int,
    scale_bytes: int,
    num_topk: int,
    idx_bytes: int,
    num_sources: int,
    num_local: int,
    rows_addr: int,
    start_addr: int,
    scratch_addr: int,
    x_addr: int,
    scales_addr: int,
    idx_addr: int,
    weights_addr: int,
    token_addr: int,
    out_x_addr: int,
    out_scales_addr: int,
    out_idx_addr: int,
    out_weights_addr: int,
    out_token_addr: int,
) -> None:
    columns = allocate(24 * num_topk)
    out_rows = columns + 8 * num_topk
    places = columns + 16 * num_topk
    for source in range(num_sources):
        x = load_i64(x_addr, source)
        if x == 0:
            continue
        copy_bytes(scratch_addr, start_addr + 4 * source * num_local, 4 * num_local)
        scales = column_base(scales_addr, source, out_scales_addr)
        weights = column_base(weights_addr, source, out_weights_addr)
        token = column_base(token_addr, source, out_token_addr)
        for row in range(load_i32(rows_addr, source)):
            idx = load_i64(idx_addr, source) + row * num_topk * idx_bytes
            num_rows = draw_rows(idx, idx_bytes, num_topk, scratch_addr, columns, out_rows)
            if num_rows == 0:
                continue
            if out_x_addr != 0:
                spread_to_rows(x + row * x_bytes, x_bytes, out_x_addr, out_rows, num_rows, places)
            if out_scales_addr != 0:
                spread_to_rows(scales + row * scale_bytes, scale_bytes, out_scales_addr, out_rows, num_rows, places)
            for i in range(num_rows):
                out, column = load_i64(out_rows, i), load_i64(columns, i)
                if out_idx_addr != 0:
                    write_lone_index(out_idx_addr + out * num_topk * idx_bytes, idx_bytes, num_topk, column, idx)
                if out_weights_addr != 0:
                    there = out_weights_addr + 4 * out * num_topk
                    write_lone_weight(there, num_topk, column, weights + 4 * row * num_topk)
                if out_token_addr != 0:
                    store_i32(out_token_addr, out, load_i32(token, row))
    release(columns)
