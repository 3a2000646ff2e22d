"""Rows of several ranks to one sum a token: one pass over all of a token's rows, fp32, a fixed order."""

from __future__ import annotations

import numpy as np

from anyep.kernels.cpu.codec import FP32, add, load, load_part, store, store_part
from anyep.kernels.cpu.rows import place_of
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import fill_bytes, load_i32, load_i64, store_i64
from anyep.machine.vectors import LANES


@inlined
def collect(
    first_entry: int,
    width: int,
    by_rank: int,
    entry_rank_addr: int,
    entry_row_addr: int,
    peer_addr: int,
    row_bytes: int,
    terms_addr: int,
    ranks_addr: int,
    num_terms: int,
) -> int:
    """Append the addresses of a token's rows to the terms, by rank or by column; return how many terms there are."""
    first_term = num_terms
    for entry in range(first_entry, first_entry + width):
        place = place_of(peer_addr, entry_rank_addr, entry_row_addr, entry, row_bytes)
        if place == 0:
            continue
        rank = load_i32(entry_rank_addr, entry)
        at = num_terms
        while by_rank and at > first_term and load_i64(ranks_addr, at - 1) > rank:
            store_i64(ranks_addr, at, load_i64(ranks_addr, at - 1))
            store_i64(terms_addr, at, load_i64(terms_addr, at - 1))
            at -= 1
        store_i64(ranks_addr, at, rank)
        store_i64(terms_addr, at, place)
        num_terms += 1
    return num_terms


@inlined
def sum_rows(
    element: int, hidden: int, terms_addr: int, num_terms: int, out_addr: int, past_caches: int
) -> None:
    """out = term 0 + term 1 + ..., in this order."""
    element_bytes = 4 if element == FP32 else 2
    whole = hidden // LANES * LANES
    for channel in range(0, whole, LANES):
        offset = channel * element_bytes
        total = load(element, load_i64(terms_addr, 0) + offset)
        for term in range(1, num_terms):
            total = add(total, load(element, load_i64(terms_addr, term) + offset))
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
    row_bytes = hidden * (4 if element == FP32 else 2)
    past_caches = int((out_addr | row_bytes) % 64 == 0)
    scratch = np.empty(2 * (width + 2), np.int64)
    terms, ranks = scratch.ctypes.data, scratch[width + 2 :].ctypes.data
    for token in range(first_token, last_token):
        num_terms = 0
        if bias0_addr != 0:
            store_i64(terms, num_terms, bias0_addr + token * row_bytes)
            num_terms += 1
        if bias1_addr != 0:
            store_i64(terms, num_terms, bias1_addr + token * row_bytes)
            num_terms += 1
        num_terms = collect(
            token * width,
            width,
            by_rank,
            entry_rank_addr,
            entry_row_addr,
            peer_addr,
            row_bytes,
            terms,
            ranks,
            num_terms,
        )
        out = out_addr + token * row_bytes
        if num_terms == 0:
            fill_bytes(out, row_bytes, 0)
        else:
            sum_rows(element, hidden, terms, num_terms, out, past_caches)


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
