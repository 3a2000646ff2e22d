"""Who gets what. Every token's entries at once, then a program for each bin that numbers the bin's entries in order.

A slot is a count of what comes before, so that no atomic and no order of programs decides it. Each program looks at all
keys: (R + E) T K comparisons, spread over the device, cost less than the second pass over memory that sharing would.

Legend: T tokens, K top-k, W entries a token, E experts, R ranks; COLUMNS, PLACES: K, W up to the next power of two.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels import spec_device as spec
from anyep.kernels.gpu.boards import COUNTS_FROM, tell
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import base_of, i32_at, i64_at, load_indices, store_indices

BAD, NO_FAULT = tl.constexpr(spec.BAD), tl.constexpr(spec.NO_FAULT)


@triton.jit
def ranks_of(experts, num_experts, expert_rank_addr):
    """Return int32 ranks of int64 experts; -1 where there is none, or where it is none of ours to look up."""
    return tl.load(i32_at(expert_rank_addr) + experts, mask=(experts >= 0) & (experts < num_experts), other=-1)


@kernel
def find_entries(
    topk_idx_addr: tl.int64,
    num_tokens: tl.int64,
    num_topk: tl.int64,
    num_experts: tl.int64,
    width: tl.int64,
    expert_rank_addr: tl.int64,
    weights_addr: tl.int64,
    kept_idx_addr: tl.int64,
    kept_weights_addr: tl.int64,
    entry_rank_addr: tl.int64,
    entry_slot_addr: tl.int64,
    compact_rank_addr: tl.int64,
    compact_slot_addr: tl.int64,
    IDX_BYTES: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    COMPACT: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid (T / TOKENS): ranks, -1 in the slots beside -1, and copies of what the caller may change.

    COMPACT entries are ``width`` a token.
    """
    first = tl.program_id(0).to(tl.int64) * TOKENS
    last = tl.minimum(first + TOKENS, num_tokens)
    flat = first * num_topk + tl.arange(0, TOKENS * COLUMNS)
    inside = flat < last * num_topk
    experts = load_indices(topk_idx_addr, flat, inside, IDX_BYTES)
    kept_experts = tl.where((experts < -1) | (experts >= num_experts), BAD, experts)
    store_indices(kept_idx_addr, flat, kept_experts, inside, IDX_BYTES)
    kept = flat < tl.where(kept_weights_addr != 0, last * num_topk, 0)
    tl.store(i32_at(kept_weights_addr) + flat, tl.load(i32_at(weights_addr) + flat, mask=kept), mask=kept)
    if BY_EXPERT:
        ranks = ranks_of(experts, num_experts, expert_rank_addr)
        tl.store(i32_at(entry_rank_addr) + flat, ranks, mask=inside)
        tl.store(i32_at(entry_slot_addr) + flat, ranks, mask=inside & (ranks < 0))
    if COMPACT:
        tokens, columns = first + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
        by_row = tokens[:, None, None] * num_topk + columns[None, :, None]
        by_column = tokens[:, None, None] * num_topk + columns[None, None, :]
        valid = tokens[:, None, None] < num_tokens
        inside_row = valid & (columns[None, :, None] < num_topk)
        inside_column = valid & (columns[None, None, :] < num_topk)
        here = ranks_of(load_indices(topk_idx_addr, by_row, inside_row, IDX_BYTES), num_experts, expert_rank_addr)
        other = ranks_of(
            load_indices(topk_idx_addr, by_column, inside_column, IDX_BYTES), num_experts, expert_rank_addr
        )
        same = here == other
        earlier = columns[None, None, :] < columns[None, :, None]
        later = columns[None, None, :] > columns[None, :, None]
        repeats_row = tl.max(tl.where(same & earlier, 1, 0), axis=2)
        repeats_column = tl.max(tl.where(same & later, 1, 0), axis=1)
        counts = (repeats_column[:, None, :] == 0) & (other >= 0)
        place = tl.sum(tl.where(counts & (other < here), 1, 0), axis=2)
        rank = tl.max(here, axis=2)
        entry = tokens[:, None] * width
        tl.store(i32_at(compact_rank_addr) + entry + place, rank, mask=(rank >= 0) & (repeats_row == 0))
        num_named = tl.sum(tl.where((repeats_row == 0) & (rank >= 0), 1, 0), axis=1)
        empty = (columns[None, :] >= num_named[:, None]) & (columns[None, :] < width) & (tokens[:, None] < num_tokens)
        none = tl.full([TOKENS, COLUMNS], -1, tl.int32)
        tl.store(i32_at(compact_rank_addr) + entry + columns[None, :], none, mask=empty)
        tl.store(i32_at(compact_slot_addr) + entry + columns[None, :], none, mask=empty)


@triton.jit
def number_bin(
    keys_addr, KEY_BYTES: tl.constexpr, num_keys, bin_, slots_addr, WRITES: tl.constexpr, BLOCK: tl.constexpr
):
    """Give the keys that equal ``bin_`` their numbers in order, and return how many there are."""
    total = tl.cast(bin_ * 0, tl.int32)
    num_keys = tl.cast(num_keys, tl.int32)
    for begin in range(0, num_keys, BLOCK):
        position = tl.cast(begin, tl.int32) + tl.arange(0, BLOCK)
        ours = tl.where(load_indices(keys_addr, position, position < num_keys, KEY_BYTES) == bin_, 1, 0)
        if WRITES:
            tl.store(i32_at(slots_addr) + position, total + tl.cumsum(ours) - 1, mask=ours != 0)
        total += tl.sum(ours)
    return total


@triton.jit
def first_bad(kept_idx_addr, num_pairs, IDX_BYTES: tl.constexpr, BLOCK: tl.constexpr):
    """Return the flat index of the first BAD, or NO_FAULT."""
    num_pairs = tl.cast(num_pairs, tl.int32)
    first = num_pairs
    for begin in range(0, num_pairs, BLOCK):
        position = tl.cast(begin, tl.int32) + tl.arange(0, BLOCK)
        experts = load_indices(kept_idx_addr, position, position < num_pairs, IDX_BYTES)
        first = tl.minimum(first, tl.min(tl.where(experts == BAD, position, num_pairs)))
    return tl.where(first < num_pairs, first.to(tl.int64), NO_FAULT)


@triton.jit
def messages_of(peer_message_addr, num_ranks, RANKS: tl.constexpr):
    """Return where this rank's message to each rank lies, [RANKS]; 0 for none."""
    peers = tl.arange(0, RANKS)
    some = tl.where(peer_message_addr != 0, num_ranks, 0)
    return tl.load(i64_at(peer_message_addr) + peers, mask=peers < some, other=0)


@triton.jit
def tell_count(peer_message_addr, num_ranks, number, rows, RANKS: tl.constexpr):
    """Write count ``number`` to every rank's message. Looked up only now: kept through a count, it would be spilled."""
    messages = messages_of(peer_message_addr, num_ranks, RANKS)
    there = i32_at(messages + (COUNTS_FROM + 4 * number))
    tl.store(there, tl.zeros([RANKS], tl.int32) + rows, mask=messages != 0)


@kernel
def number_entries(
    kept_idx_addr: tl.int64,
    num_pairs: tl.int64,
    entry_rank_addr: tl.int64,
    num_entries: tl.int64,
    num_experts: tl.int64,
    num_ranks: tl.int64,
    entry_slot_addr: tl.int64,
    compact_slot_addr: tl.int64,
    rank_rows_addr: tl.int64,
    expert_rows_addr: tl.int64,
    verdict_addr: tl.int64,
    peer_message_addr: tl.int64,
    capacity: tl.int64,
    place0: tl.int64,
    place1: tl.int64,
    place2: tl.int64,
    place3: tl.int64,
    place4: tl.int64,
    IDX_BYTES: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    COMPACT: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (E + R + 1): the rows of every expert and of every rank, and the slots of those that are bins here.

    Ranks are counted in ``entry_rank`` [num_entries], COMPACT ones where those are wanted. Each number is announced by
    the program that has counted it, the head of the message by one more.
    """
    bin_ = tl.program_id(0).to(tl.int64)
    if bin_ < num_experts:
        rows = number_bin(kept_idx_addr, IDX_BYTES, num_pairs, bin_, entry_slot_addr, BY_EXPERT, BLOCK)
        tl.store(i32_at(expert_rows_addr) + bin_, rows)
        tell_count(peer_message_addr, num_ranks, num_ranks + bin_, rows, RANKS)
    elif bin_ < num_experts + num_ranks:
        rank = bin_ - num_experts
        rows = number_bin(entry_rank_addr, 4, num_entries, rank, compact_slot_addr, COMPACT, BLOCK)
        tl.store(i32_at(rank_rows_addr) + rank, rows)
        tell_count(peer_message_addr, num_ranks, rank, rows, RANKS)
    else:
        verdict = first_bad(kept_idx_addr, num_pairs, IDX_BYTES, BLOCK)
        tl.store(i64_at(verdict_addr), verdict)
        messages = messages_of(peer_message_addr, num_ranks, RANKS)
        tell(messages, capacity, place0, place1, place2, place3, place4, verdict)


@kernel
def place(
    entry_rank_addr: tl.int64,
    entry_slot_addr: tl.int64,
    num_entries: tl.int64,
    topk_idx_addr: tl.int64,
    start_addr: tl.int64,
    entry_row_addr: tl.int64,
    refusal_addr: tl.int64,
    IDX_BYTES: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (entries / BLOCK). Where int64 ``refusal`` is not 0, entries are taken back; 0 for no such word."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < num_entries
    rank = tl.load(i32_at(entry_rank_addr) + entry, mask=inside, other=-1)
    named = rank >= 0
    bin_ = rank.to(tl.int64)
    if BY_EXPERT:
        bin_ = load_indices(topk_idx_addr, entry, named, IDX_BYTES)
    slot = tl.load(i32_at(entry_slot_addr) + entry, mask=named, other=-1)
    start = tl.load(i32_at(start_addr) + bin_, mask=named, other=0)
    tl.store(i32_at(entry_row_addr) + entry, slot + start, mask=inside)
    if refusal_addr != 0:
        refused = tl.load(i64_at(refusal_addr)) != 0
        tl.store(i32_at(entry_rank_addr) + entry, rank * 0 - 1, mask=entry < tl.where(refused, num_entries, 0))


@triton.jit
def route_token(
    token,
    topk_idx_addr,
    topk_weights_addr,
    num_topk,
    width,
    by_expert,
    expert_rank_addr,
    expert_local_addr,
    entry_rank_addr,
    entry_row_addr,
    peer_idx_addr,
    peer_weights_addr,
    peer_token_addr,
    IDX_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Write a token's number and the columns that each row serves to all its entries, [PLACES, COLUMNS] at once."""
    places, columns = tl.arange(0, PLACES)[:, None], tl.arange(0, COLUMNS)[None, :]
    entry = token * width + places
    rank = tl.load(i32_at(entry_rank_addr) + entry, mask=places < width, other=-1)
    row = tl.load(i32_at(entry_row_addr) + entry, mask=rank >= 0, other=0).to(tl.int64)
    there = base_of(peer_token_addr, rank)
    tl.store(i32_at(there) + row, tl.zeros([PLACES, 1], tl.int32) + token.to(tl.int32), mask=there != 0)
    inside = columns < num_topk
    expert = load_indices(topk_idx_addr, token * num_topk + columns, inside, IDX_BYTES)
    known = expert >= 0
    owner = tl.load(i32_at(expert_rank_addr) + expert, mask=known, other=-2)
    serves = tl.where(by_expert != 0, tl.where(columns == places, 1, 0), tl.where(owner == rank, 1, 0)) != 0
    serves = serves & known
    there = base_of(peer_idx_addr, rank)
    local = tl.load(i32_at(expert_local_addr) + expert, mask=known, other=-1).to(tl.int64)
    position = row * num_topk + columns
    store_indices(there, position, tl.where(serves, local, -1), (there != 0) & inside, IDX_BYTES)
    if topk_weights_addr != 0:
        there = base_of(peer_weights_addr, rank)
        weight = tl.load(i32_at(topk_weights_addr) + token * num_topk + columns, mask=inside, other=0)
        tl.store(i32_at(there) + position, tl.where(serves, weight, 0), mask=(there != 0) & inside)


@kernel
def scatter_routing(
    topk_idx_addr: tl.int64,
    topk_weights_addr: tl.int64,
    first_token: tl.int64,
    last_token: tl.int64,
    step: tl.int64,
    num_topk: tl.int64,
    width: tl.int64,
    by_expert: tl.int64,
    expert_rank_addr: tl.int64,
    expert_local_addr: tl.int64,
    entry_rank_addr: tl.int64,
    entry_row_addr: tl.int64,
    peer_idx_addr: tl.int64,
    peer_weights_addr: tl.int64,
    peer_token_addr: tl.int64,
    IDX_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Grid (step): every ``step``-th token."""
    for number in tl.range(first_token + tl.program_id(0), last_token, step, disable_licm=True):
        route_token(
            *(tl.cast(number, tl.int64), topk_idx_addr, topk_weights_addr, num_topk, width, by_expert),
            *(expert_rank_addr, expert_local_addr, entry_rank_addr, entry_row_addr),
            *(peer_idx_addr, peer_weights_addr, peer_token_addr, IDX_BYTES, COLUMNS, PLACES),
        )
