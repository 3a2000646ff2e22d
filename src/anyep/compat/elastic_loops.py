"""The loops over tokens that a translation needs. Importing compiles: a buffer does, when it is made.

*Side words* (int32 [., P]) travel beside each row: its scales, then its K raw weights, where a dispatch has them.
Legend: T tokens, N received rows, K top-k, G packs of scales, R ranks, L local experts.
"""

from __future__ import annotations

from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import allocate, fill_bytes, load_i32, load_i64, release, store_i8, store_i32

_MINUS_ONE = 0xFF


@inlined
def _index(base: int, index_bytes: int, index: int) -> int:
    value: int = load_i64(base, index) if index_bytes == 8 else load_i32(base, index)
    return value


@compiled("void(int64, int64, int64, int64, int64)")
def note_columns(idx_addr: int, idx_bytes: int, num_rows: int, num_topk: int, bits_addr: int) -> None:
    """Note which columns of ``idx`` [N, K] name a local expert: a bit each, uint8 [N, ceil(K / 8)], low bits first.

    >>> # idx=[[-1, 3, 0], [2, -1, -1]]: bits=[[6], [1]]
    """
    width, entry = (num_topk + 7) // 8, 0
    for place in range(num_rows * width):
        noted = 0
        for k in range(min(8, num_topk - place % width * 8)):
            sign = _index(idx_addr, idx_bytes, entry) >> 63  # -1 where no expert is named, else 0
            noted |= (1 + sign) << k
            entry += 1
        store_i8(bits_addr, place, noted)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def pack_side(
    num_tokens: int,
    num_packs: int,
    num_topk: int,
    scales_addr: int,
    row_stride: int,
    column_stride: int,
    weights_addr: int,
    side_addr: int,
) -> None:
    """Write the side words of T tokens. ``scales`` of 4-byte words, with strides in words; ``weights`` fp32."""
    width = num_packs + num_topk
    for token in range(num_tokens):
        row = token * width
        for pack in range(num_packs):
            store_i32(side_addr, row + pack, load_i32(scales_addr, token * row_stride + pack * column_stride))
        for k in range(num_topk):
            store_i32(side_addr, row + num_packs + k, load_i32(weights_addr, token * num_topk + k))


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def describe_rows(
    idx_addr: int,
    idx_bytes: int,
    num_rows: int,
    num_topk: int,
    token_addr: int,
    pair_addr: int,
    num_ranks: int,
    rank: int,
    max_tokens: int,
    place_addr: int,
    cursor_addr: int,
    metadata_addr: int,
) -> None:
    """Write ``EPHandle.recv_src_metadata`` int32 [rows, K + 2] for rows whose local experts are ``idx`` [rows, K].

    ``token`` int32 [N]: each row's token at its source; ``pair`` int32 [R, R]: tokens from each rank to each; rows that
    nobody sent are -1. ``place`` int64 [N] or 0: row n of the exchange is row ``place[n]`` of the batch. ``cursor``
    int32 [L] or 0: with it each (row, column) has a row of its own, the next of its expert, which begin at ``cursor``.

    >>> # R=1, K=2, max_tokens=4, pair=[[1]], idx=[[-1, 0]], token=[3]: metadata=[[3, 1, -1, 0]]
    """
    width = num_topk + 2
    n = 0
    for source in range(num_ranks):
        for _ in range(load_i32(pair_addr, source * num_ranks + rank)):
            row = load_i64(place_addr, n) if place_addr != 0 else n
            first = row * width
            master = -1
            for k in range(num_topk):
                expert = _index(idx_addr, idx_bytes, n * num_topk + k)
                served = -1
                if expert >= 0:
                    master, served = k, row
                    if cursor_addr != 0:
                        served = load_i32(cursor_addr, expert)
                        store_i32(cursor_addr, expert, served + 1)
                store_i32(metadata_addr, first + 2 + k, served)
            store_i32(metadata_addr, first, source * max_tokens + load_i32(token_addr, n))
            store_i32(metadata_addr, first + 1, source * num_topk + master)
            n += 1
    if n < num_rows:
        fill_bytes(metadata_addr + 4 * n * width, 4 * (num_rows - n) * width, _MINUS_ONE)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def number_slots(
    idx_addr: int,
    idx_bytes: int,
    num_tokens: int,
    num_topk: int,
    num_ranks: int,
    experts_per_rank: int,
    first_id: int,
    slots_addr: int,
) -> None:
    """Write ``EPHandle.dst_buffer_slot_idx`` int32 [T, K]: slots of each rank in token order, at master columns."""
    cursors = allocate(8 * num_ranks)
    last_tokens = cursors + 4 * num_ranks
    fill_bytes(cursors, 4 * num_ranks, 0)
    fill_bytes(last_tokens, 4 * num_ranks, _MINUS_ONE)
    for token in range(num_tokens):
        for k in range(num_topk):
            flat = (token + 1) * num_topk - 1 - k  # from the last column on: the first that names a rank is its master
            expert = _index(idx_addr, idx_bytes, flat)
            slot = -1
            if expert >= 0:
                rank = expert // experts_per_rank
                if load_i32(last_tokens, rank) != token:
                    store_i32(last_tokens, rank, token)
                    slot = first_id + load_i32(cursors, rank)
                    store_i32(cursors, rank, load_i32(cursors, rank) + 1)
            store_i32(slots_addr, flat, slot)
    release(cursors)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def take_side(
    num_rows: int,
    num_packs: int,
    num_topk: int,
    side_addr: int,
    place_addr: int,
    scales_addr: int,
    row_stride: int,
    column_stride: int,
    weights_addr: int,
) -> None:
    """Write the scales and weights of a compact batch: row n of the exchange is its row ``place[n]``, or n for 0.

    G or K is 0 where there are none. ``scales`` of 4-byte words with strides in words; ``weights`` fp32 [rows, K].
    """
    width = num_packs + num_topk
    for n in range(num_rows):
        row = load_i64(place_addr, n) if place_addr != 0 else n
        for pack in range(num_packs):
            store_i32(scales_addr, row * row_stride + pack * column_stride, load_i32(side_addr, n * width + pack))
        for k in range(num_topk):
            store_i32(weights_addr, row * num_topk + k, load_i32(side_addr, n * width + num_packs + k))


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def spread_side(
    num_rows: int,
    num_packs: int,
    num_topk: int,
    side_addr: int,
    served_addr: int,
    has_weights: int,
    scales_addr: int,
    row_stride: int,
    column_stride: int,
    weights_addr: int,
) -> None:
    """Give every (row, column) its scales and its weight: ``served`` int32 [N, K] names its row, or -1.

    ``scales`` of 4-byte words with strides in words, G of them or none; ``weights`` fp32 [rows], where there are any.
    """
    width = num_packs + (num_topk if has_weights != 0 else 0)
    for n in range(num_rows):
        for k in range(num_topk):
            row = load_i32(served_addr, n * num_topk + k)
            if row < 0:
                continue
            for pack in range(num_packs):
                word = load_i32(side_addr, n * width + pack)
                store_i32(scales_addr, row * row_stride + pack * column_stride, word)
            if has_weights != 0:
                store_i32(weights_addr, row, load_i32(side_addr, n * width + num_packs + k))


@compiled("void(int64, int64, int64, int64, int64, int64)")
def gather_weights(
    num_rows: int, num_topk: int, served_addr: int, by_column: int, weights_addr: int, out_addr: int
) -> None:
    """Write the weights that this rank answers for, fp32 [N, K], 0 in columns of other ranks.

    ``served`` int32 [N, K] as above; ``weights`` fp32 [rows], or with ``by_column`` [rows, K].
    """
    for flat in range(num_rows * num_topk):
        row = load_i32(served_addr, flat)
        word = 0
        if row >= 0:
            word = load_i32(weights_addr, row * num_topk + flat % num_topk if by_column else row)
        store_i32(out_addr, flat, word)
