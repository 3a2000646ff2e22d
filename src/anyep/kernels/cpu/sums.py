"""Rows of several ranks to one sum a token: one pass over all of a token's rows, fp32, a fixed order."""

from __future__ import annotations

from typing import Any

from anyep.kernels.cpu.codec import FP32, add, bytes_of, load, load_part, prefetch_lanes, store, store_part
from anyep.kernels.cpu.rows import collect
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import LINE, allocate, fill_bytes, load_i32, load_i64, release, store_i64
from anyep.machine.vectors import LANES

_AHEAD = 1024
"""Bytes between a load and its prefetch, a row's end being the beginning of the next token's: 19 % faster than none."""


@inlined
def sort_by_rank(first_entry: int, width: int, entry_rank_addr: int, terms_addr: int, ranks_addr: int) -> None:
    """Bring the terms of a token, collected in column order, into ascending rank; the order within a rank stays."""
    num_sorted = 0
    for entry in range(first_entry, first_entry + width):
        rank = load_i32(entry_rank_addr, entry)
        if rank < 0:
            continue
        term = load_i64(terms_addr, num_sorted)
        at = num_sorted
        while at > 0 and load_i64(ranks_addr, at - 1) > rank:  # compact entries ascend: never true for them
            store_i64(ranks_addr, at, load_i64(ranks_addr, at - 1))
            store_i64(terms_addr, at, load_i64(terms_addr, at - 1))
            at -= 1
        store_i64(ranks_addr, at, rank)
        store_i64(terms_addr, at, term)
        num_sorted += 1


@inlined
def load_and_prefetch(element: int, address: int) -> Any:
    prefetch_lanes(element, address + _AHEAD)
    return load(element, address)


@inlined
def sum_rows(element: int, hidden: int, terms_addr: int, num_terms: int, out_addr: int, past_caches: int) -> None:
    """out = term 0 + term 1 + ..., in this order."""
    element_bytes = bytes_of(element)
    whole = hidden // LANES * LANES
    for channel in range(0, whole, LANES):
        offset = channel * element_bytes
        total = load_and_prefetch(element, load_i64(terms_addr, 0) + offset)
        for term in range(1, num_terms):
            total = add(total, load_and_prefetch(element, load_i64(terms_addr, term) + offset))
        store(element, out_addr + offset, total, past_caches)
    if whole < hidden:
        offset, count = whole * element_bytes, hidden - whole
        total = load_part(element, load_i64(terms_addr, 0) + offset, count)
        for term in range(1, num_terms):
            total = add(total, load_part(element, load_i64(terms_addr, term) + offset, count))
        store_part(element, out_addr + offset, total, count)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def reduce(
    element: int,
    hidden: int,
    first_token: int,
    last_token: int,
    width: int,
    by_rank: int,
    entry_rank_addr: int,
    entry_row_addr: int,
    peer_addr: int,
    bias0_addr: int,
    bias1_addr: int,
    out_addr: int,
) -> None:
    row_bytes = hidden * bytes_of(element)
    past_caches = int((out_addr | row_bytes) % LINE == 0)
    terms = allocate(8 * (2 * width + 2))
    ranks = terms + 8 * (width + 2)
    for token in range(first_token, last_token):
        num_biases = 0
        if bias0_addr != 0:
            store_i64(terms, num_biases, bias0_addr + token * row_bytes)
            num_biases += 1
        if bias1_addr != 0:
            store_i64(terms, num_biases, bias1_addr + token * row_bytes)
            num_biases += 1
        entry, rows = token * width, terms + 8 * num_biases
        num_rows = collect(entry, width, entry_rank_addr, entry_row_addr, peer_addr, row_bytes, rows)
        if by_rank:
            sort_by_rank(entry, width, entry_rank_addr, rows, ranks)
        out = out_addr + token * row_bytes
        if num_biases + num_rows == 0:
            fill_bytes(out, row_bytes, 0)
        else:
            sum_rows(element, hidden, terms, num_biases + num_rows, out, past_caches)
    release(terms)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def reduce_weights(
    num_topk: int,
    first_token: int,
    last_token: int,
    width: int,
    by_rank: int,
    entry_rank_addr: int,
    entry_row_addr: int,
    peer_addr: int,
    out_addr: int,
) -> None:
    reduce(
        FP32,
        num_topk,
        first_token,
        last_token,
        width,
        by_rank,
        entry_rank_addr,
        entry_row_addr,
        peer_addr,
        0,
        0,
        out_addr,
    )
