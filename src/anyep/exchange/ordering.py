"""The order of a token's top-k columns, for sums that follow it. Importing compiles: setup.py does.

A rank that owns experts of several columns stands where the last of them stands: its *master column*. Legend:
T tokens, K top-k, R ranks, W entries a token, G groups of consecutive ranks.
"""

from __future__ import annotations

from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import fill_bytes, load_i32, load_i64, store_i32

_MINUS_ONE = 0xFF


@inlined
def _owner(idx_addr: int, idx_bytes: int, flat: int, expert_rank_addr: int) -> int:
    expert = load_i64(idx_addr, flat) if idx_bytes == 8 else load_i32(idx_addr, flat)
    return load_i32(expert_rank_addr, expert) if expert >= 0 else -1


@inlined
def _find(base: int, first: int, wanted: int) -> int:
    """Return where ``wanted`` stands from ``first`` on; it does."""
    at = first
    while load_i32(base, at) != wanted:
        at += 1
    return at


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def sort_by_column(
    idx_addr: int,
    idx_bytes: int,
    num_tokens: int,
    num_topk: int,
    expert_rank_addr: int,
    width: int,
    entry_rank_addr: int,
    entry_slot_addr: int,
) -> None:
    """Sort each token's compact entries, int32 [T, W], by their master columns, in place.

    >>> # experts of ranks [0, 1, 1], topk_idx=[[1, 2, 0]], entry_rank=[[0, 1]], entry_slot=[[5, 7]]:
    >>> # entry_rank=[[1, 0]]  entry_slot=[[7, 5]]
    """
    for token in range(num_tokens):
        first = token * width
        rest = first
        while rest < first + width and load_i32(entry_rank_addr, rest) >= 0:
            rest += 1
        for k in range(num_topk):  # from the last column on: the first that names a rank is its master
            rank = _owner(idx_addr, idx_bytes, (token + 1) * num_topk - 1 - k, expert_rank_addr)
            entry = first
            while entry < rest and load_i32(entry_rank_addr, entry) != rank:
                entry += 1
            if entry < rest:
                rest -= 1
                slot = load_i32(entry_slot_addr, entry)
                store_i32(entry_rank_addr, entry, load_i32(entry_rank_addr, rest))
                store_i32(entry_slot_addr, entry, load_i32(entry_slot_addr, rest))
                store_i32(entry_rank_addr, rest, rank)
                store_i32(entry_slot_addr, rest, slot)


@compiled(
    "void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)"
)
def order_by_column(
    idx_addr: int,
    idx_bytes: int,
    num_tokens: int,
    num_topk: int,
    expert_rank_addr: int,
    width: int,
    entry_rank_addr: int,
    entry_slot_addr: int,
    ranks_per_group: int,
    num_groups: int,
    group_width: int,
    out_rank_addr: int,
    out_slot_addr: int,
    order_width: int,
    order_addr: int,
) -> None:
    """Write the compact entries of each (token, group) in ascending order of their master columns.

    ``topk_idx`` [T, K]; ``entry_rank`` and ``entry_slot`` int32 [T, W], the compact layout's; ``out_rank`` and
    ``out_slot`` int32 [T, G, group_width], -1 behind the last; ``order`` int32 [T, order_width]: each token's groups
    in the order of *their* last columns, -1 behind the last.

    >>> # K=3, experts of ranks [0, 1, 1], topk_idx=[[1, 0, 2]], entry_rank=[[0, 1]], entry_slot=[[5, 7]], one group:
    >>> # out_rank=[[[0, 1]]]  out_slot=[[[5, 7]]]; with topk_idx=[[1, 2, 0]]: [[[1, 0]]] and [[[7, 5]]]
    """
    fill_bytes(out_rank_addr, 4 * num_tokens * num_groups * group_width, _MINUS_ONE)
    fill_bytes(out_slot_addr, 4 * num_tokens * num_groups * group_width, _MINUS_ONE)
    fill_bytes(order_addr, 4 * num_tokens * order_width, _MINUS_ONE)
    for token in range(num_tokens):
        last = (token + 1) * num_topk
        for flat in range(token * num_topk, last):
            rank = _owner(idx_addr, idx_bytes, flat, expert_rank_addr)
            if rank < 0:
                continue
            group = rank // ranks_per_group
            ends_rank, ends_group = True, True
            for later in range(flat + 1, last):
                other = _owner(idx_addr, idx_bytes, later, expert_rank_addr)
                if other == rank:
                    ends_rank = False
                if other >= 0 and other // ranks_per_group == group:
                    ends_group = False
            if ends_rank:
                free = _find(out_rank_addr, (token * num_groups + group) * group_width, -1)
                entry = _find(entry_rank_addr, token * width, rank)
                store_i32(out_rank_addr, free, rank)
                store_i32(out_slot_addr, free, load_i32(entry_slot_addr, entry))
            if ends_group:
                store_i32(order_addr, _find(order_addr, token * order_width, -1), group)
