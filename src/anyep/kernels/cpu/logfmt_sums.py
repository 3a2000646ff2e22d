"""LogFMT-10 rows of several ranks to one BF16 sum a token, decoded as they are added."""

from __future__ import annotations

from typing import Any

from anyep.kernels.cpu.codec import (
    BF16,
    add,
    load,
    load_lanes_i8,
    load_lanes_i16,
    load_number,
    load_part,
    multiply,
    store,
    store_part,
    widen_bf16,
)
from anyep.kernels.cpu.logfmt_codec import QUARTER, decode_log, write_decoding
from anyep.kernels.cpu.logfmt_rows import REST_BYTES, codes_offset, rest_offset, row_bytes_of
from anyep.kernels.cpu.scales import groups_of
from anyep.kernels.cpu.sums import NOTHING, collect_biases, collect_terms
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import (
    LINE,
    allocate,
    copy_bytes,
    fill_bytes,
    load_i32,
    load_i64,
    prefetch,
    release,
    stack_block,
    store_i32,
)
from anyep.machine.vectors import broadcast, broadcast_i32
from anyep.numerics.logfmt import CHANNELS, CODE_BYTES

_AHEAD = 1024
_SCALE_BYTES = 12
"""fp32 [3] a term and group."""
_ONE_BITS = 0x3F800000
_quarter_on_stack = stack_block(LINE)


@inlined
def read_headers(num_groups: int, terms_addr: int, num_terms: int, scales_addr: int) -> None:
    """Write what all headers of a token's rows say to ``scales`` fp32 [G, terms, 3], before anything waits for it."""
    for term in range(num_terms):
        row = load_i64(terms_addr, term)
        for group in range(num_groups):
            write_decoding(load_i32(row, group), scales_addr + _SCALE_BYTES * (group * num_terms + term))


@inlined
def load_raw(quarter: int, codes: int, rest: int) -> Any:
    """Return a quarter of a raw group, of which the third lies half among the codes and half in the rest."""
    if quarter < 2:
        return widen_bf16(load_lanes_i16(codes + 2 * QUARTER * quarter))
    if quarter == 3:
        return widen_bf16(load_lanes_i16(rest + QUARTER))
    whole = _quarter_on_stack()
    copy_bytes(whole, codes + 4 * QUARTER, QUARTER)
    copy_bytes(whole + QUARTER, rest, QUARTER)
    return widen_bf16(load_lanes_i16(whole))


@inlined
def load_logfmt(quarter: int, codes: int, rest: int, scale_addr: int) -> Any:
    """Return 32 numbers as fp32."""
    if load_i32(scale_addr, 2) == 0:
        return load_raw(quarter, codes, rest)
    return decode_log(
        load_lanes_i8(codes + QUARTER * quarter),
        load_lanes_i8(codes + 4 * QUARTER),
        broadcast_i32(8 - 2 * quarter),
        load_number(scale_addr, 0),
        load_number(scale_addr, 1),
        load_number(scale_addr, 2),
    )


@inlined
def sum_logfmt_rows(
    hidden: int,
    biases_addr: int,
    num_biases: int,
    terms_addr: int,
    factors_addr: int,
    num_terms: int,
    scales_addr: int,
    out_addr: int,
    past_caches: int,
) -> None:
    """out = bias 0 + bias 1 + factor 0 * term 0 + ..., in this order."""
    codes_begin, rest_begin = codes_offset(hidden), rest_offset(hidden)
    read_headers(groups_of(hidden), terms_addr, num_terms, scales_addr)
    for group in range(groups_of(hidden)):
        codes_of_group, rest_of_group = codes_begin + group * CODE_BYTES, rest_begin + group * REST_BYTES
        for quarter in range(4):
            channel = group * CHANNELS + quarter * QUARTER
            count = min(QUARTER, hidden - channel)
            if count <= 0:
                break
            total = broadcast(NOTHING)
            for bias in range(num_biases):
                row = load_i64(biases_addr, bias) + 2 * channel
                total = add(total, load(BF16, row) if count == QUARTER else load_part(BF16, row, count))
            for term in range(num_terms):
                row = load_i64(terms_addr, term)
                prefetch(row + codes_of_group + QUARTER * quarter + _AHEAD)
                scale = scales_addr + _SCALE_BYTES * (group * num_terms + term)
                numbers = load_logfmt(quarter, row + codes_of_group, row + rest_of_group, scale)
                total = add(total, multiply(numbers, load_number(factors_addr, term)))
            if count == QUARTER:
                store(BF16, out_addr + 2 * channel, total, past_caches)
            else:
                store_part(BF16, out_addr + 2 * channel, total, count)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def reduce_logfmt(
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
    row_bytes, out_bytes = row_bytes_of(hidden), 2 * hidden
    past_caches = int((out_addr | out_bytes) % LINE == 0)
    terms = allocate((24 + _SCALE_BYTES * groups_of(hidden)) * width + 16)
    ranks, biases = terms + 8 * width, terms + 16 * width
    factors = biases + 16
    scales = factors + 8 * width
    for term in range(width):
        store_i32(factors, term, _ONE_BITS)  # and so they stay where there are no weights: a product with 1 is exact
    for token in range(first_token, last_token):
        num_biases = collect_biases(bias0_addr, bias1_addr, token * out_bytes, biases)
        num_terms = collect_terms(
            *(token * width, width, by_rank, entry_rank_addr, entry_row_addr, peer_addr, row_bytes, weights_addr),
            *(terms, factors, ranks),
        )
        out = out_addr + token * out_bytes
        if num_biases + num_terms == 0:
            fill_bytes(out, out_bytes, 0)
        else:
            sum_logfmt_rows(hidden, biases, num_biases, terms, factors, num_terms, scales, out, past_caches)
    release(terms)
