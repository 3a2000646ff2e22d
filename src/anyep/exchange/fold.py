"""Entries of tokens whose rows come from other hosts. Importing compiles: exchange/setup.py does."""

from __future__ import annotations

from typing import Any

from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import load_i32, store_i32


@inlined
def _insert(
    first: int, at: int, key: int, rank: int, row: int, keys_addr: int, ranks_addr: int, rows_addr: int
) -> None:
    """Put a term behind all of this token's terms (from ``first`` on) whose key is not larger."""
    while at > first and load_i32(keys_addr, at - 1) > key:
        store_i32(keys_addr, at, load_i32(keys_addr, at - 1))
        store_i32(ranks_addr, at, load_i32(ranks_addr, at - 1))
        store_i32(rows_addr, at, load_i32(rows_addr, at - 1))
        at -= 1
    store_i32(keys_addr, at, key)
    store_i32(ranks_addr, at, rank)
    store_i32(rows_addr, at, row)


@inlined
def _to_the_end(known: int, end: int, ranks_addr: int, rows_addr: int) -> None:
    """Let a term stand behind all of this token's terms."""
    rank, row = load_i32(ranks_addr, known), load_i32(rows_addr, known)
    for at in range(known, end - 1):
        store_i32(ranks_addr, at, load_i32(ranks_addr, at + 1))
        store_i32(rows_addr, at, load_i32(rows_addr, at + 1))
    store_i32(ranks_addr, end - 1, rank)
    store_i32(rows_addr, end - 1, row)


@compiled(
    "void(int64, int64, int64, int64, int32[::1], int32[::1], int32[::1], int64, int64, int32[::1], int64, int64,"
    " int64)"
)
def fold(
    num_tokens: int,
    width: int,
    entry_rank_addr: int,
    entry_row_addr: int,
    host_R: Any,
    first_M: Any,
    here_M: Any,
    each: int,
    by_order: int,
    next_M: Any,
    keys_addr: int,
    ranks_addr: int,
    rows_addr: int,
) -> None:
    """Turn entries (rank, row) [T, W] into terms [T, W] of what lies here: neighbours' rows, and rows that crossed.

    ``here`` int32 [M]: 1 for hosts whose ranks' rows can be read here. What crossed from host h counts as rank R + h,
    its rows in the order in which they come. ``each`` 1: a row an entry, and every term stays in its entry's place.
    ``each`` 0: a row a token, the host's sum; terms ascend by rank, a host's sum where its first rank (``first`` int32
    [M]) would stand, whichever of its ranks have rows. ``by_order`` 1, where every host's sum counts as one that
    crossed: a host stands where the last of its entries does. ``next`` int32 [M] must be 0; ``keys`` int32 [T, W] holds
    anything. Missing terms are rank -1.

    Example: ranks 0 and 1 are host 0 (here), 2 and 3 host 1; a token's entries are (0, 5), (2, 1), (3, 7). Summed by
    hosts its terms are (0, 5), (4 + 1, 0), none; each by itself (0, 5), (5, 0), (5, 1).
    """
    ranks = host_R.size
    for token in range(num_tokens):
        first, at = token * width, token * width
        for entry in range(first, first + width):
            rank = load_i32(entry_rank_addr, entry)
            host = host_R[rank] if rank >= 0 else -1
            crossed = rank >= 0 and not here_M[host]
            if each:
                store_i32(ranks_addr, entry, ranks + host if crossed else rank)
                store_i32(rows_addr, entry, next_M[host] if crossed else load_i32(entry_row_addr, entry))
                at = entry + 1
            elif crossed:
                known = -1
                for other in range(first, at):
                    if load_i32(ranks_addr, other) == ranks + host:
                        known = other
                if known >= 0:
                    if by_order:
                        _to_the_end(known, at, ranks_addr, rows_addr)
                    continue
                key = 0 if by_order else first_M[host]
                _insert(first, at, key, ranks + host, next_M[host], keys_addr, ranks_addr, rows_addr)
                at += 1
            elif rank >= 0:
                _insert(first, at, rank, rank, load_i32(entry_row_addr, entry), keys_addr, ranks_addr, rows_addr)
                at += 1
            if crossed:
                next_M[host] += 1
        for empty in range(at, first + width):
            store_i32(ranks_addr, empty, -1)
