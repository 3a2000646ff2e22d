"""Rows of several ranks to one sum a token: one pass over all of a token's rows, fp32, a fixed order."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyep.kernels.cpu.codec import (
    FP32,
    add,
    bytes_of,
    load,
    load_number,
    load_part,
    multiply,
    prefetch_lanes,
    store,
    store_part,
)
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import (
    LINE,
    allocate,
    fill_bytes,
    load_i32,
    load_i64,
    release,
    store_i32,
    store_i64,
)
from anyep.machine.vectors import LANES, broadcast

_AHEAD = 1024
"""Bytes between a load and its prefetch, a row's end being the beginning of the next token's: 19 % faster than none."""
NOTHING = np.float32(-0.0)
"""What leaves every number as it is when added, zeros of both signs too."""


@inlined
def collect_terms(
    first_entry: int,
    width: int,
    by_rank: int,
    entry_rank_addr: int,
    entry_row_addr: int,
    peer_addr: int,
    row_bytes: int,
    weights_addr: int,
    terms_addr: int,
    factors_addr: int,
    ranks_addr: int,
) -> int:
    """Write the addresses of a token's rows in the order of the sum, and their weights if there are any.

    ``terms`` and ``ranks`` are int64 [width], ``factors`` fp32 [width]. Returns how many rows there are.
    """
    num_terms = 0
    for entry in range(first_entry, first_entry + width):
        rank = load_i32(entry_rank_addr, entry)
        if rank < 0:
            continue
        at = num_terms
        while by_rank and at > 0 and load_i64(ranks_addr, at - 1) > rank:  # compact entries ascend: never true for them
            store_i64(ranks_addr, at, load_i64(ranks_addr, at - 1))
            store_i64(terms_addr, at, load_i64(terms_addr, at - 1))
            store_i32(factors_addr, at, load_i32(factors_addr, at - 1))
            at -= 1
        store_i64(ranks_addr, at, rank)
        store_i64(terms_addr, at, load_i64(peer_addr, rank) + load_i32(entry_row_addr, entry) * row_bytes)
        if weights_addr != 0:
            store_i32(factors_addr, at, load_i32(weights_addr, entry))
        num_terms += 1
    return num_terms


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


@inlined
def sum_weighted_rows(
    element: int,
    hidden: int,
    biases_addr: int,
    num_biases: int,
    terms_addr: int,
    factors_addr: int,
    num_terms: int,
    out_addr: int,
    past_caches: int,
) -> None:
    """out = bias 0 + bias 1 + factor 0 * term 0 + ..., in this order; it begins with -0, which changes no number."""
    element_bytes = bytes_of(element)
    whole = hidden // LANES * LANES
    for channel in range(0, whole, LANES):
        offset = channel * element_bytes
        total = broadcast(NOTHING)
        for bias in range(num_biases):
            total = add(total, load_and_prefetch(element, load_i64(biases_addr, bias) + offset))
        for term in range(num_terms):
            row = load_and_prefetch(element, load_i64(terms_addr, term) + offset)
            total = add(total, multiply(row, load_number(factors_addr, term)))
        store(element, out_addr + offset, total, past_caches)
    if whole < hidden:
        offset, count = whole * element_bytes, hidden - whole
        total = broadcast(NOTHING)
        for bias in range(num_biases):
            total = add(total, load_part(element, load_i64(biases_addr, bias) + offset, count))
        for term in range(num_terms):
            row = load_part(element, load_i64(terms_addr, term) + offset, count)
            total = add(total, multiply(row, load_number(factors_addr, term)))
        store_part(element, out_addr + offset, total, count)


@inlined
def collect_biases(bias0_addr: int, bias1_addr: int, offset: int, biases_addr: int) -> int:
    """Write the addresses of a token's biases; return how many there are."""
    num_biases = 0
    if bias0_addr != 0:
        store_i64(biases_addr, num_biases, bias0_addr + offset)
        num_biases += 1
    if bias1_addr != 0:
        store_i64(biases_addr, num_biases, bias1_addr + offset)
        num_biases += 1
    return num_biases


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
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
    weights_addr: int,
    bias0_addr: int,
    bias1_addr: int,
    out_addr: int,
) -> None:
    row_bytes = hidden * bytes_of(element)
    past_caches = int((out_addr | row_bytes) % LINE == 0)
    biases = allocate(8 * (2 + 3 * width))
    ranks = biases + 8 * (2 + width)
    factors = ranks + 8 * width
    for token in range(first_token, last_token):
        num_biases = collect_biases(bias0_addr, bias1_addr, token * row_bytes, biases)
        rows = biases + 8 * num_biases  # behind them, so that without weights all are terms of one list
        num_rows = collect_terms(
            *(token * width, width, by_rank, entry_rank_addr, entry_row_addr, peer_addr, row_bytes, weights_addr),
            *(rows, factors, ranks),
        )
        out = out_addr + token * row_bytes
        if num_biases + num_rows == 0:
            fill_bytes(out, row_bytes, 0)
        elif weights_addr != 0:
            sum_weighted_rows(element, hidden, biases, num_biases, rows, factors, num_rows, out, past_caches)
        else:
            sum_rows(element, hidden, biases, num_biases + num_rows, out, past_caches)
    release(biases)


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
        0,
        out_addr,
    )
