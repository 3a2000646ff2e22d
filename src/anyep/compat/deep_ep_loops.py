"""Loops over tokens that only DeepEP's interface needs, compiled; importing compiles, so that callers import it late.

Legend: T tokens, K top-k, E experts, R ranks, H hosts, C channels, N rows. Addresses as in kernels/spec.py.
"""

from __future__ import annotations

from typing import Any

from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import fill_bytes, load_i8, load_i32, load_i64, store_i8, store_i32


@inlined
def _load_index(base: int, index_bytes: int, index: int) -> int:
    value: int = load_i64(base, index) if index_bytes == 8 else load_i32(base, index)
    return value


@inlined
def _increment(base: int, index: int) -> None:
    store_i32(base, index, load_i32(base, index) + 1)


@compiled("boolean(int64, int64, int64)")
def same_bytes(left_addr: int, right_addr: int, num_bytes: int) -> bool:
    """Return whether so many bytes are the same in both places.

    >>> # int32 [1, 2, 3] and int32 [1, 2, 4]: True for 8 bytes, False for 12
    """
    words = num_bytes // 8
    for word in range(words):
        if load_i64(left_addr, word) != load_i64(right_addr, word):
            return False
    for byte in range(8 * words, num_bytes):  # noqa: SIM110  # Numba compiles no generator in all()
        if load_i8(left_addr, byte) != load_i8(right_addr, byte):
            return False
    return True


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def count_layout(
    idx_addr: int,
    idx_bytes: int,
    num_tokens: int,
    num_topk: int,
    num_experts: int,
    num_ranks: int,
    ranks_per_host: int,
    rank_addr: int,
    host_addr: int,
    expert_addr: int,
    inside_addr: int,
) -> int:
    """Count tokens for each rank (once), host (once; address 0: not wanted) and expert (each column).

    Writes int32 [R], int32 [H], int32 [E] and bool [T, R]. Returns -1, or the flat index of the first expert that does
    not exist.

    >>> # topk_idx=[[0, 1], [3, -1]], E=4, R=2: ranks [1, 1], experts [1, 1, 0, 1], inside [[1, 0], [0, 1]]
    """
    local = num_experts // num_ranks
    num_hosts = (num_ranks + ranks_per_host - 1) // ranks_per_host
    fill_bytes(rank_addr, 4 * num_ranks, 0)
    fill_bytes(expert_addr, 4 * num_experts, 0)
    fill_bytes(inside_addr, num_tokens * num_ranks, 0)
    if host_addr:
        fill_bytes(host_addr, 4 * num_hosts, 0)
    for token in range(num_tokens):
        for column in range(num_topk):
            entry = token * num_topk + column
            expert = _load_index(idx_addr, idx_bytes, entry)
            if expert < -1 or expert >= num_experts:
                return entry
            if expert >= 0:
                _increment(expert_addr, expert)
                store_i8(inside_addr, token * num_ranks + expert // local, 1)
        host = -1
        for rank in range(num_ranks):
            if load_i8(inside_addr, token * num_ranks + rank):
                _increment(rank_addr, rank)
                if host_addr and rank // ranks_per_host != host:
                    host = rank // ranks_per_host
                    _increment(host_addr, host)
    return -1


@compiled("void(int64, int64, int64, int64, int64, int64, int64)")
def number_in_channels(
    inside_addr: int,
    num_tokens: int,
    num_ranks: int,
    group: int,
    num_channels: int,
    prefix_addr: int,
    head_addr: int,
) -> None:
    """Number this rank's tokens in every (channel, destination) queue; a destination is ``group`` consecutive ranks.

    Channel c has tokens [c n, (c + 1) n), n = ceil(T / C). ``inside`` bool [T, R]. Writes ``prefix`` int32 [D, C]
    (inclusive sums over channels) and ``head`` int32 [T, D]: a token's number in its queue, or -1.

    >>> # T=3, R=1, C=2, inside=[[1], [0], [1]]: prefix=[[1, 2]], head=[[0], [-1], [0]]
    """
    destinations = (num_ranks + group - 1) // group
    length = max(1, (num_tokens + num_channels - 1) // num_channels)
    for destination in range(destinations):
        total = 0
        token = 0
        last_rank = min(num_ranks, (destination + 1) * group)
        for channel in range(num_channels):
            number = 0
            while token < min(num_tokens, (channel + 1) * length):
                goes = 0
                for rank in range(destination * group, last_rank):
                    goes |= load_i8(inside_addr, token * num_ranks + rank)
                store_i32(head_addr, token * destinations + destination, number if goes else -1)
                number += 1 if goes else 0
                token += 1
            total += number
            store_i32(prefix_addr, destination * num_channels + channel, total)


@compiled("void(int64, int32[::1], int32[::1], int64, int32[:, ::1])")
def channel_starts(token_addr: int, rows_R: Any, tokens_R: Any, num_channels: int, starts_RC: Any) -> None:
    """Write where each channel begins in each source's rows: how many of its rows belong to earlier channels.

    ``token`` int32 [N], rows in the order of their sources, ``rows`` a source, ``tokens`` the source's T.

    >>> # token=[0, 2, 1], rows=[2, 1], tokens=[3, 2], C=2: starts=[[0, 1], [0, 0]]
    """
    first = 0
    for source in range(rows_R.size):
        length = max(1, (tokens_R[source] + num_channels - 1) // num_channels)
        row = 0
        for channel in range(num_channels):
            while row < rows_R[source] and load_i32(token_addr, first + row) < channel * length:
                row += 1
            starts_RC[source, channel] = row
        first += rows_R[source]
