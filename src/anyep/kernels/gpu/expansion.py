"""From one row a token to one row for each of its experts here.

A row's place is how many pairs of its source name the same expert before it: each program reads the keys of a source
and counts those of its own expert, and nothing is handed from program to program. Rows and what is beside them are
written by different programs of one launch.

Legend: S sources, K top-k, L local experts; KEYS keys looked at in one go, FEW_KEYS together with their columns;
COLUMNS: K up to the next power of two.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.jit import kernel_of_registers
from anyep.kernels.gpu.memory import base_of, copy_stretch, i32_at, i64_at, load_indices, store_indices


@triton.jit
def keys_of(rows_addr, x_addr, source, num_topk):
    """Return how many keys a source has; 0 for one that is skipped."""
    there = tl.load(i64_at(x_addr) + source)
    return tl.where(there != 0, tl.load(i32_at(rows_addr) + source) * tl.cast(num_topk, tl.int32), 0)


@triton.jit
def number_keys(idx, begin, num_keys, expert, before, IDX_BYTES: tl.constexpr, KEYS: tl.constexpr):
    """Return int32 [KEYS]: the numbers of the keys that name ``expert``, -1 beside others; and the next free number."""
    key = tl.cast(begin, tl.int32) + tl.arange(0, KEYS)
    ours = tl.where(load_indices(idx, key, key < num_keys, IDX_BYTES) == expert, 1, 0)
    return tl.where(ours != 0, before + tl.cumsum(ours) - 1, -1), before + tl.sum(ours)


@triton.jit
def expand_rows(
    x_bytes,
    scale_bytes,
    num_topk,
    num_keys,
    start,
    x_base,
    scales_base,
    idx,
    out_x_addr,
    out_scales_addr,
    expert,
    first,
    step,
    IDX_BYTES: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Copy every ``step``-th of the rows that an expert gets from a source, and its scales."""
    following = num_keys * 0
    for begin in range(0, num_keys, KEYS):
        mine = following + (first + step - following % step) % step
        number, following = number_keys(idx, begin, num_keys, expert, following, IDX_BYTES, KEYS)
        key = tl.cast(begin, tl.int32) + tl.arange(0, KEYS)
        for one in range(mine, following, step):
            row = (tl.max(tl.where(number == one, key, -1)) // tl.cast(num_topk, tl.int32)).to(tl.int64)
            there = tl.cast(start + one, tl.int64)
            zero = x_base * 0
            copy_stretch(x_base + row * x_bytes, out_x_addr + there * x_bytes, x_bytes, zero, zero + 1, PIECE)
            scales = scales_base + row * scale_bytes
            copy_stretch(scales, out_scales_addr + there * scale_bytes, scale_bytes, zero, zero + 1, PIECE)


@triton.jit
def expand_routing(
    num_topk,
    num_keys,
    start,
    idx,
    weights_base,
    token_base,
    out_idx_addr,
    out_weights_addr,
    out_token_addr,
    expert,
    IDX_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write the routing beside all rows that an expert gets from a source, [KEYS, COLUMNS] at a time."""
    column = tl.arange(0, COLUMNS)[None, :]
    following = num_keys * 0
    for begin in range(0, num_keys, KEYS):
        number, following = number_keys(idx, begin, num_keys, expert, following, IDX_BYTES, KEYS)
        key = tl.cast(begin, tl.int32) + tl.arange(0, KEYS)
        row = key // tl.cast(num_topk, tl.int32)
        served = (key - row * tl.cast(num_topk, tl.int32))[:, None]
        out = (start + number).to(tl.int64)
        place = out[:, None] * num_topk + column
        written = (number >= 0)[:, None] & (column < num_topk)
        if out_idx_addr != 0:
            store_indices(out_idx_addr, place, tl.where(column == served, expert, -1), written, IDX_BYTES)
        if out_weights_addr != 0:
            weight = tl.load(i32_at(weights_base) + key, mask=number >= 0, other=0)[:, None]
            tl.store(i32_at(out_weights_addr) + place, tl.where(column == served, weight, 0), mask=written)
        if out_token_addr != 0:
            token = tl.load(i32_at(token_base) + row, mask=number >= 0, other=0)
            tl.store(i32_at(out_token_addr) + out, token, mask=number >= 0)


@kernel_of_registers(80)
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
    IDX_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    FEW_KEYS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Grid (S, L, step + 1): the last one writes the routing, the others share the rows. Bytes are 0 of no output."""
    source, expert = tl.program_id(0), tl.program_id(1)
    part, step = tl.program_id(2), tl.num_programs(2) - 1
    start = tl.load(i32_at(start_addr) + source.to(tl.int64) * num_local + expert)
    num_keys = keys_of(rows_addr, x_addr, source, num_topk)
    idx = tl.load(i64_at(idx_addr) + source)
    if part < step:
        expand_rows(
            *(x_bytes, scale_bytes, num_topk, num_keys, start, base_of(x_addr, source), base_of(scales_addr, source)),
            *(idx, out_x_addr, out_scales_addr, expert, part, step, IDX_BYTES, KEYS, PIECE),
        )
    else:
        expand_routing(
            *(num_topk, num_keys, start, idx, base_of(weights_addr, source), base_of(token_addr, source)),
            *(out_idx_addr, out_weights_addr, out_token_addr, expert, IDX_BYTES, COLUMNS, FEW_KEYS),
        )
