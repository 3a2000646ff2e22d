"""From one row a token to one row for each of its experts here.

A row's place is how many pairs of its source name the same expert before it, so each program reads the keys of a source
and copies every STEP-th of the rows that one expert gets; nothing is handed from program to program.

Legend: S sources, K top-k, L local experts; KEYS keys looked at in one go; COLUMNS: K up to the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import copy_stretch, i32_at, i64_at, load_indices, store_indices


@triton.jit
def copy_row(table_addr, source, row, row_bytes, out_addr, out_row, PIECE: tl.constexpr):
    """Copy row ``row`` of a source; nothing without an output."""
    if out_addr != 0:
        base = tl.load(i64_at(table_addr) + source)
        copy_stretch(base + row * row_bytes, out_addr + out_row * row_bytes, row_bytes, row * 0, row * 0 + 1, PIECE)


@kernel
def expand(
    x_bytes: tl.int64,
    scale_bytes: tl.int64,
    num_topk: tl.int64,
    num_local: tl.int64,
    rows_addr: tl.int64,
    start_addr: tl.int64,
    x_addr: tl.int64,
    scales_addr: tl.int64,
    idx_addr: tl.int64,
    weights_addr: tl.int64,
    token_addr: tl.int64,
    out_x_addr: tl.int64,
    out_scales_addr: tl.int64,
    out_idx_addr: tl.int64,
    out_weights_addr: tl.int64,
    out_token_addr: tl.int64,
    step: tl.int64,
    IDX_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Grid (S * L, step)."""
    pair = tl.program_id(0).to(tl.int64)
    source, expert = pair // num_local, pair % num_local
    start = tl.load(i32_at(start_addr) + pair).to(tl.int64)
    there = tl.load(i64_at(x_addr) + source)
    num_keys = tl.where(there != 0, tl.load(i32_at(rows_addr) + source).to(tl.int64) * num_topk, 0)
    idx = tl.load(i64_at(idx_addr) + source)
    columns = tl.arange(0, COLUMNS)
    inside = columns < num_topk
    total = num_keys * 0
    for begin in range(0, num_keys, KEYS):
        key = tl.cast(begin, tl.int64) + tl.arange(0, KEYS)
        ours = tl.where(load_indices(idx, key, key < num_keys, IDX_BYTES) == expert, 1, 0)
        number = tl.where(ours != 0, total + tl.cumsum(ours) - 1, -1)
        following = total + tl.sum(ours)
        first = total + (tl.program_id(1) + step - total % step) % step
        for one in range(first, following, step):
            flat = tl.max(tl.where(number == one, key, -1))
            row, column, out = flat // num_topk, flat % num_topk, start + one
            copy_row(x_addr, source, row, x_bytes, out_x_addr, out, PIECE)
            copy_row(scales_addr, source, row, scale_bytes, out_scales_addr, out, PIECE)
            if out_idx_addr != 0:
                alone = tl.where(columns == column, expert, -1)
                store_indices(out_idx_addr, out * num_topk + columns, alone, inside, IDX_BYTES)
            if out_weights_addr != 0:
                weight = tl.load(i32_at(tl.load(i64_at(weights_addr) + source)) + flat)
                alone = tl.where(columns == column, weight, 0)
                tl.store(i32_at(out_weights_addr) + out * num_topk + columns, alone, mask=inside)
            if out_token_addr != 0:
                token = tl.load(i32_at(tl.load(i64_at(token_addr) + source)) + row)
                tl.store(i32_at(out_token_addr) + out, token)
        total = following
