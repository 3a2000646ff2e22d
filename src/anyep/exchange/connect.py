"""Where rows lie at their peers: from the places that ranks announce to the peer tables that kernels read.

Reads the ledger (``exchange/ledger.py``). Importing compiles: exchange/setup.py does.
"""

from __future__ import annotations

from typing import Any

from anyep.exchange.ledger import (
    CAPACITY,
    COMES_STRAIGHT,
    D_BY_EXPERT,
    D_EXPERTS,
    D_RANK,
    D_RANKS,
    DATA_OFFSET,
    DATA_SEGMENT,
    EAGER_ROWS,
    F_DENSE_START,
    F_EXPERT_ROWS,
    F_RANK_ENTRIES,
    F_SEND_START,
    F_SOURCE_ENTRIES,
    GOES_STRAIGHT,
    NEAR,
    NUM_FROM,
    NUM_ROWS,
    NUM_TO,
    PARTS,
    ROUTING_OFFSET,
    ROUTING_SEGMENT,
    STRAIGHT,
    WAY,
)
from anyep.exchange.settle import add, field
from anyep.layout.regions import ALIGNMENT_BYTES
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import fill_bytes, load_i32, store_i32


@inlined
def _aligned(num_bytes: int) -> int:
    return (num_bytes + ALIGNMENT_BYTES - 1) // ALIGNMENT_BYTES * ALIGNMENT_BYTES


@compiled(
    "int64(int64[:, :], int64, int64[:, :], int64, int64[:, ::1], int64[::1], int64, int64, int64, int64, int64[::1],"
    " int64, int64[::1], int64[:, ::1], int64[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1])"
)
def connect(
    opened_RW: Any,
    body: int,
    offered_RW: Any,
    offer: int,
    bases_RS: Any,
    part_bytes: Any,
    rank: int,
    limit_rows: int,
    entries_addr: int,
    batch_rows_addr: int,
    recv_slots_R: Any,
    source_rows_addr: int,
    part_offsets: Any,
    direct_PR: Any,
    arrived_PR: Any,
    to_R: Any,
    from_R: Any,
    far_tokens_R: Any,
    tally: Any,
) -> int:
    """Turn places into the peer tables of rows that go straight to their final place, and of rows that came along.

    ``offered`` holds the places from word ``offer`` + 1 on (the announcement itself, or a later offer); ``bases``
    [R, segments]: where each rank's segments lie here, 0 where that is not known yet: then returns
    ``rank << 32 | segment``, and is to be called again. -1 otherwise.
    ``entries`` int32 [R]: rows for each rank, ``limit_rows`` as in :func:`announce`; ``batch_rows`` int32 [R].
    ``to`` and ``from`` become the other ranks that this one writes to, and that write here, without eager rows;
    ``tally[EAGER_ROWS]`` the rows that came along (``source_rows`` int32 [R]: rows from each source),
    ``tally[NUM_ROWS]`` those of the batch. Ranks of other hosts (``far_tokens`` as in :func:`announce`) are not written
    to; those that send rows are in ``from``: somebody here writes them, and says so in their name. Rows of those that
    send STRAIGHT come along too; where they lie the caller puts into ``arrived`` himself.
    """
    num_to, num_from, came_rows = 0, 0, 0
    ranks = opened_RW.shape[0]
    for i in range(ranks):
        d = rank + i if rank + i < ranks else rank + i - ranks
        rows = load_i32(entries_addr, d)
        for part in range(PARTS):
            direct_PR[part, d] = 0
        near = far_tokens_R[d] == NEAR
        if near and rows > limit_rows:
            data_segment, routing_segment = offered_RW[d, offer + DATA_SEGMENT], offered_RW[d, offer + ROUTING_SEGMENT]
            for segment in (data_segment, routing_segment):
                if segment >= bases_RS.shape[1] or bases_RS[d, segment] == 0:
                    return (d << 32) | segment
            data = bases_RS[d, data_segment] + offered_RW[d, offer + DATA_OFFSET]
            routing = bases_RS[d, routing_segment] + offered_RW[d, offer + ROUTING_OFFSET]
            batch = load_i32(batch_rows_addr, d)
            weights = _aligned(part_bytes[2] * batch)
            direct_PR[0, d] = data
            direct_PR[1, d] = data + _aligned(part_bytes[0] * batch)
            direct_PR[2, d] = routing
            direct_PR[3, d] = routing + weights
            direct_PR[4, d] = routing + _aligned(weights + part_bytes[3] * batch)
            if d != rank:
                to_R[num_to] = d
                num_to += 1
        sent = load_i32(source_rows_addr, d)
        straight = not near and opened_RW[d, body + WAY] <= STRAIGHT
        came = opened_RW[d, body + WAY] if near else sent == 0 or straight
        if not came and d != rank:
            from_R[num_from] = d
            num_from += 1
        came_with = sent if (near and came) or straight else 0
        came_rows += came_with
        for part in range(PARTS):
            arrived_PR[part, d] = recv_slots_R[d] + part_offsets[part] if came_with > 0 else 0
    tally[NUM_TO], tally[NUM_FROM], tally[EAGER_ROWS] = num_to, num_from, came_rows
    tally[NUM_ROWS] = load_i32(batch_rows_addr, rank)
    return -1


@inlined
def _came_along(opened_RW: Any, body: int, owner: int, far_tokens_R: Any, limit_rows: int) -> bool:
    if far_tokens_R[owner] == NEAR:
        return limit_rows >= 0 and opened_RW[owner, body + WAY] != 0
    return limit_rows >= 0 and far_tokens_R[owner] & COMES_STRAIGHT != 0


@compiled(
    "int64(int64[:, :], int64, int64[:, ::1], int64[::1], int64[::1], int64, int64, int64, int64[::1], int64,"
    " int64[:, ::1], int64, int64[::1], int64[::1], int64[::1], int64[::1])"
)
def connect_back(
    opened_RW: Any,
    body: int,
    bases_RS: Any,
    dims: Any,
    offsets: Any,
    ledger_addr: int,
    expert_rank_addr: int,
    limit_rows: int,
    recv_slots_R: Any,
    weights_offset: int,
    tables_2R: Any,
    starts_addr: int,
    to_R: Any,
    from_R: Any,
    far_tokens_R: Any,
    tally: Any,
) -> int:
    """Find this rank's rows at their owners: in the slot where they came along, or where the owner says they lie.

    Fills the peer tables of rows and weights, ``starts`` int32 [B] (what ``place`` adds to slots; there must be room
    for E + R), ``to`` (owners whose rows are read where they lie) and ``from`` (ranks that read here).
    ``tally[EAGER_ROWS]`` becomes the number of owners whose rows do not lie as the dispatch placed them,
    ``tally[NUM_ROWS]`` this rank's rows. Returns as :func:`connect`. Owners on other hosts are left out, unless
    ``far_tokens`` has COMES_STRAIGHT for them: their rows came along, the caller puts into ``tables`` where; with
    GOES_STRAIGHT they read nothing here. Whoever reads for a rank of another host passes that rank's ledger, and
    ``limit_rows`` -1: nothing came along for it.
    """
    rank, ranks = dims[D_RANK], dims[D_RANKS]
    entries = field(ledger_addr, offsets, F_RANK_ENTRIES)
    readers = field(ledger_addr, offsets, F_SOURCE_ENTRIES)
    packed = starts_addr + 4 * dims[D_EXPERTS]
    send_start = field(ledger_addr, offsets, F_SEND_START)
    num_to, num_from, moved, num_rows = 0, 0, 0, 0
    for i in range(ranks):
        d = rank + i if rank + i < ranks else rank + i - ranks
        tables_2R[0, d], tables_2R[1, d] = 0, 0
        near = far_tokens_R[d] == NEAR
        goes_straight = not near and far_tokens_R[d] & GOES_STRAIGHT != 0
        if load_i32(readers, d) > (limit_rows if near else 0) and d != rank and not goes_straight:
            from_R[num_from] = d
            num_from += 1
        if load_i32(entries, d) == 0 or not (near or far_tokens_R[d] & COMES_STRAIGHT):
            continue
        num_rows += load_i32(entries, d)
        if _came_along(opened_RW, body, d, far_tokens_R, limit_rows):
            tables_2R[0, d] = recv_slots_R[d]
            tables_2R[1, d] = recv_slots_R[d] + weights_offset
            moved += 1
            continue
        moved += opened_RW[d, body + CAPACITY]
        for table in range(2):
            segment = opened_RW[d, body + DATA_SEGMENT + 2 * table]
            if segment >= 0:
                if segment >= bases_RS.shape[1] or bases_RS[d, segment] == 0:
                    return (d << 32) | segment
                tables_2R[table, d] = bases_RS[d, segment] + opened_RW[d, body + DATA_OFFSET + 2 * table]
        if d != rank:
            to_R[num_to] = d
            num_to += 1
    if moved > 0 and not dims[D_BY_EXPERT]:
        for d in range(ranks):
            came = _came_along(opened_RW, body, d, far_tokens_R, limit_rows)
            store_i32(starts_addr, d, 0 if came else load_i32(send_start, d))
    elif moved > 0:
        fill_bytes(packed, 4 * ranks, 0)
        for expert in range(dims[D_EXPERTS]):
            owner = load_i32(expert_rank_addr, expert)
            start = load_i32(send_start, expert)
            if _came_along(opened_RW, body, owner, far_tokens_R, limit_rows):
                start = load_i32(packed, owner)
                add(packed, owner, load_i32(field(ledger_addr, offsets, F_EXPERT_ROWS), expert))
            elif far_tokens_R[owner] == NEAR and opened_RW[owner, body + CAPACITY]:
                start = load_i32(field(ledger_addr, offsets, F_DENSE_START), expert)
            store_i32(starts_addr, expert, start)
    tally[NUM_TO], tally[NUM_FROM], tally[EAGER_ROWS], tally[NUM_ROWS] = num_to, num_from, moved, num_rows
    return -1
