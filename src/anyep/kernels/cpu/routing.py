"""Who gets what: routes in one pass over topk_idx, rows from slots, and the routing beside each row."""

from __future__ import annotations

from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import (
    allocate,
    count_trailing_zeros,
    fill_bytes,
    load_i32,
    load_i64,
    release,
    store_i32,
    store_i64,
)


@inlined
def load_index(base: int, index_bytes: int, index: int) -> int:
    return load_i64(base, index) if index_bytes == 8 else load_i32(base, index)


@inlined
def store_index(base: int, index_bytes: int, index: int, value: int) -> None:
    if index_bytes == 8:
        store_i64(base, index, value)
    else:
        store_i32(base, index, value)


@inlined
def increment(base: int, index: int) -> int:
    """Add 1 to int32 base[index] and return what it was."""
    value = load_i32(base, index)
    store_i32(base, index, value + 1)
    return value


@inlined
def set_bit(base: int, bit: int) -> None:
    store_i32(base, bit >> 5, load_i32(base, bit >> 5) | (1 << (bit & 31)))


@inlined
def load_bits(base: int, word: int) -> int:
    return load_i32(base, word) & 0xFFFFFFFF


@inlined
def emit(entry: int, rank: int, slot: int, entry_rank_addr: int, entry_slot_addr: int) -> None:
    store_i32(entry_rank_addr, entry, rank)
    store_i32(entry_slot_addr, entry, slot)


@inlined
def emit_ranks(
    entry: int,
    num_words: int,
    word_addr: int,
    summary_addr: int,
    rank_rows_addr: int,
    entry_rank_addr: int,
    entry_slot_addr: int,
) -> int:
    """Write an entry for every rank whose bit is set, ascending, and clear the bits; return the next free entry.

    Bit r of the words says that rank r gets this token, bit w of the summary that word w is not 0: the time is that
    of the bits, not of the ranks.
    """
    for group in range((num_words + 31) >> 5):
        summary = load_bits(summary_addr, group)
        store_i32(summary_addr, group, 0)
        while summary != 0:
            word = (group << 5) + count_trailing_zeros(summary)
            summary &= summary - 1
            bits = load_bits(word_addr, word)
            store_i32(word_addr, word, 0)
            while bits != 0:
                rank = (word << 5) + count_trailing_zeros(bits)
                bits &= bits - 1
                emit(entry, rank, increment(rank_rows_addr, rank), entry_rank_addr, entry_slot_addr)
                entry += 1
    return entry


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def route(
    topk_idx_addr: int,
    idx_bytes: int,
    num_tokens: int,
    num_topk: int,
    num_experts: int,
    num_ranks: int,
    expert_rank_addr: int,
    by_expert: int,
    entry_rank_addr: int,
    entry_slot_addr: int,
    rank_rows_addr: int,
    expert_rows_addr: int,
    scratch_addr: int,
) -> int:
    fill_bytes(rank_rows_addr, 4 * num_ranks, 0)
    fill_bytes(expert_rows_addr, 4 * num_experts, 0)
    num_words = (num_ranks + 31) >> 5
    summary_addr = scratch_addr + 4 * num_words
    fill_bytes(scratch_addr, 4 * (num_words + ((num_words + 31) >> 5)), 0)
    width = num_topk if by_expert else min(num_topk, num_ranks)
    for token in range(num_tokens):
        for flat in range(token * num_topk, (token + 1) * num_topk):
            expert = load_index(topk_idx_addr, idx_bytes, flat)
            if expert < -1 or expert >= num_experts:
                return flat
            rank, slot = -1, -1
            if expert >= 0:
                rank = load_i32(expert_rank_addr, expert)
                slot = increment(expert_rows_addr, expert)
                if by_expert:
                    increment(rank_rows_addr, rank)
                else:
                    set_bit(scratch_addr, rank)
                    set_bit(summary_addr, rank >> 5)
            if by_expert:
                emit(flat, rank, slot, entry_rank_addr, entry_slot_addr)
        if not by_expert:
            entry = emit_ranks(
                token * width, num_words, scratch_addr, summary_addr, rank_rows_addr, entry_rank_addr, entry_slot_addr
            )
            for empty in range(entry, (token + 1) * width):
                emit(empty, -1, -1, entry_rank_addr, entry_slot_addr)
    return -1


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def place(
    entry_rank_addr: int,
    entry_slot_addr: int,
    num_tokens: int,
    width: int,
    topk_idx_addr: int,
    idx_bytes: int,
    by_expert: int,
    start_addr: int,
    entry_row_addr: int,
) -> None:
    for entry in range(num_tokens * width):
        rank = load_i32(entry_rank_addr, entry)
        row = -1
        if rank >= 0:
            origin = load_index(topk_idx_addr, idx_bytes, entry) if by_expert else rank
            row = load_i32(entry_slot_addr, entry) + load_i32(start_addr, origin)
        store_i32(entry_row_addr, entry, row)


@inlined
def read_columns(
    topk_idx_addr: int,
    idx_bytes: int,
    num_topk: int,
    by_expert: int,
    expert_rank_addr: int,
    expert_local_addr: int,
    keys_addr: int,
    locals_addr: int,
) -> None:
    """Look a token's columns up once for all its rows: which row serves column k (a rank, or k itself), and as what."""
    for k in range(num_topk):
        expert = load_index(topk_idx_addr, idx_bytes, k)
        rank = load_i32(expert_rank_addr, expert) if expert >= 0 else -1
        store_i64(keys_addr, k, k if by_expert else rank)
        store_i64(locals_addr, k, load_i32(expert_local_addr, expert) if expert >= 0 else -1)


@inlined
def write_indices(
    row_addr: int, idx_bytes: int, num_topk: int, served_key: int, keys_addr: int, locals_addr: int
) -> None:
    for k in range(num_topk):
        serves = load_i64(keys_addr, k) == served_key
        store_index(row_addr, idx_bytes, k, load_i64(locals_addr, k) if serves else -1)


@inlined
def write_weights(row_addr: int, weights_addr: int, num_topk: int, served_key: int, keys_addr: int) -> None:
    for k in range(num_topk):
        serves = load_i64(keys_addr, k) == served_key
        store_i32(row_addr, k, load_i32(weights_addr, k) if serves else 0)  # bits: a NaN's payload too


@inlined
def base_of(table_addr: int, rank: int) -> int:
    """Return where that rank's array begins, 0 for nowhere: there is no table, or the rank is skipped."""
    return load_i64(table_addr, rank) if table_addr != 0 else 0


@compiled(
    "void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)"
)
def scatter_routing(
    topk_idx_addr: int,
    idx_bytes: int,
    topk_weights_addr: int,
    first_token: int,
    last_token: int,
    num_topk: int,
    width: int,
    by_expert: int,
    expert_rank_addr: int,
    expert_local_addr: int,
    entry_rank_addr: int,
    entry_row_addr: int,
    peer_idx_addr: int,
    peer_weights_addr: int,
    peer_token_addr: int,
) -> None:
    keys = allocate(16 * num_topk)
    locals_ = keys + 8 * num_topk
    weights_table_addr = peer_weights_addr if topk_weights_addr != 0 else 0
    for token in range(first_token, last_token):
        columns_are_read = False
        for column in range(width):
            entry = token * width + column
            rank = load_i32(entry_rank_addr, entry)
            if rank < 0:
                continue
            row = load_i32(entry_row_addr, entry)
            there_idx, there_weights = base_of(peer_idx_addr, rank), base_of(weights_table_addr, rank)
            there_token = base_of(peer_token_addr, rank)
            if there_token != 0:
                store_i32(there_token, row, token)
            if there_idx == 0 and there_weights == 0:
                continue
            if not columns_are_read:
                idx = topk_idx_addr + token * num_topk * idx_bytes
                read_columns(idx, idx_bytes, num_topk, by_expert, expert_rank_addr, expert_local_addr, keys, locals_)
                columns_are_read = True
            served, first = column if by_expert else rank, row * num_topk
            if there_idx != 0:
                write_indices(there_idx + first * idx_bytes, idx_bytes, num_topk, served, keys, locals_)
            if there_weights != 0:
                weights = topk_weights_addr + 4 * token * num_topk
                write_weights(there_weights + 4 * first, weights, num_topk, served, keys)
    release(keys)
