"""The bookkeeping of one half of an operation in one compiled call. Importing compiles: exchange/setup.py does.

Each reads where things lie from a frame (``exchange/frame.py``) and calls what ``exchange/settle.py`` and
``exchange/connect.py`` have for the parts, which are called one by one where something unusual lies between them.
"""

from __future__ import annotations

from typing import Any

import numba

from anyep.exchange.connect import connect, connect_back
from anyep.exchange.frame import (
    A_ARRIVED,
    A_CAPACITY,
    A_COUNTED,
    A_DIMS,
    A_EAGER,
    A_EXPERT_LOCAL,
    A_EXPERT_RANK,
    A_FAR,
    A_FROM,
    A_NUM_WORDS,
    A_OFFSETS,
    A_PART_BYTES,
    A_PART_OFFSETS,
    A_PARTS,
    A_PLACES,
    A_RECV_SLOTS,
    A_ROWS,
    A_ROWS_BY_EXPERT,
    A_ROWS_BY_SOURCE,
    A_SEND_SLOTS,
    A_STARTS,
    A_TALLY,
    A_TO,
    A_WEIGHTS_OFFSET,
    A_WORDS,
)
from anyep.exchange.ledger import (
    CAPACITY,
    D_EXPERTS,
    D_LOCAL,
    D_RANK,
    D_RANKS,
    DIRECT_ROWS,
    DISAGREE,
    EAGER_ROWS,
    F_BATCH_ROWS,
    F_GAPS,
    F_RANK_ROWS,
    F_SOURCE_ROWS,
    LANDING_TOO_SMALL,
    LIMIT_ROWS,
    NUM_FIELDS,
    NUM_GAPS,
    NUM_TALLY,
    PARTS,
    SETTLED,
    UNKNOWN_PLACE,
)
from anyep.exchange.settle import agree, announce, settle
from anyep.machine.compiler import compiled, inlined
from anyep.machine.intrinsics import load_i32, load_i64, words_at


@inlined
def _words(frame: int, word: int, count: int) -> Any:
    return numba.carray(words_at(load_i64(frame, word)), count)


@inlined
def _table(frame: int, word: int, rows: int, columns: int) -> Any:
    return numba.carray(words_at(load_i64(frame, word)), (rows, columns))


@inlined
def _ranks(frame: int) -> int:
    ranks: int = load_i64(load_i64(frame, A_DIMS), D_RANKS)
    return ranks


@compiled("void(int64, int64[::1], int64[::1], int64, int64, int64[::1])")
def begin(frame: int, header: Any, places: Any, ledger: int, limit_rows: int, far_tokens_R: Any) -> None:
    """Write the messages of an operation, and decide which pairs' rows come along: those of up to ``limit_rows``.

    Where pairs lie on both sides of the limit and all rows of a rank are to go one way, the limit moves out of the way
    (exchange/eager.py: EagerRule). The tally says how many rows go which way, and the limit.
    """
    ranks, parts = _ranks(frame), load_i64(frame, A_PARTS)
    dims, offsets = _words(frame, A_DIMS, 8), _words(frame, A_OFFSETS, NUM_FIELDS)
    messages_RW = _table(frame, A_WORDS, ranks, load_i64(frame, A_NUM_WORDS))
    num_counts = ranks + dims[D_EXPERTS] + 1 if load_i64(frame, A_COUNTED) else 0
    rows_addr = ledger + offsets[load_i64(frame, A_ROWS)]
    slots_R, part_offsets = _words(frame, A_SEND_SLOTS, ranks), _words(frame, A_PART_OFFSETS, parts)
    tables_PR, tally = _table(frame, A_EAGER, parts, ranks), _words(frame, A_TALLY, NUM_TALLY)
    capacity = load_i64(frame, A_CAPACITY)
    for _ in range(2):
        announce(
            messages_RW,
            header,
            places,
            ledger + offsets[F_RANK_ROWS],
            num_counts,
            rows_addr,
            limit_rows,
            slots_R,
            part_offsets,
            tables_PR,
            far_tokens_R,
            tally,
        )
        tally[LIMIT_ROWS] = limit_rows
        if capacity < 0 or tally[EAGER_ROWS] == 0 or tally[DIRECT_ROWS] == 0:
            return
        limit_rows = capacity if tally[EAGER_ROWS] > tally[DIRECT_ROWS] else 0


@compiled("int64(int64, int64[:, :], int64[::1], int64[:, ::1], int64, int64)")
def size_up(frame: int, opened_RW: Any, header: Any, bases_RS: Any, ledger: int, limit_rows: int) -> int:
    """Work out from all announcements every place of a dispatch, and fill the peer tables of this rank's rows.

    Return SETTLED, or why not: DISAGREE where a header is another, what :func:`settle` found, or UNKNOWN_PLACE where
    all is settled, and a segment of a peer has to be looked up before ``connect`` can be called.
    """
    if not agree(opened_RW, header):
        return DISAGREE
    dims, offsets = _words(frame, A_DIMS, 8), _words(frame, A_OFFSETS, NUM_FIELDS)
    ranks, body = dims[D_RANKS], header.size
    tally = _words(frame, A_TALLY, NUM_TALLY)
    if load_i64(frame, A_COUNTED):
        found: int = settle(
            opened_RW,
            body,
            dims,
            offsets,
            load_i64(frame, A_EXPERT_RANK),
            load_i64(frame, A_EXPERT_LOCAL),
            ledger,
            _words(frame, A_ROWS_BY_SOURCE, ranks),
            _words(frame, A_ROWS_BY_EXPERT, dims[D_LOCAL]),
        )
        tally[NUM_GAPS] = load_i32(ledger + offsets[F_GAPS], 0)
        if found != SETTLED:
            return found
    else:
        tally[NUM_GAPS] = load_i32(ledger + offsets[F_GAPS], 0)
        for rank in range(ranks):
            if opened_RW[rank, body + CAPACITY] < load_i32(ledger + offsets[F_BATCH_ROWS], rank):
                return LANDING_TOO_SMALL
    unknown = connect(
        opened_RW,
        body,
        opened_RW,
        body,
        bases_RS,
        _words(frame, A_PART_BYTES, PARTS),
        dims[D_RANK],
        limit_rows,
        ledger + offsets[F_RANK_ROWS],
        ledger + offsets[F_BATCH_ROWS],
        _words(frame, A_RECV_SLOTS, ranks),
        ledger + offsets[F_SOURCE_ROWS],
        _words(frame, A_PART_OFFSETS, PARTS),
        _table(frame, A_PLACES, PARTS, ranks),
        _table(frame, A_ARRIVED, PARTS, ranks),
        _words(frame, A_TO, ranks),
        _words(frame, A_FROM, ranks),
        _words(frame, A_FAR, ranks),
        tally,
    )
    return SETTLED if unknown < 0 else UNKNOWN_PLACE


@compiled("int64(int64, int64[:, :], int64[::1], int64[:, ::1], int64, int64, int64[::1])")
def find_rows(
    frame: int, opened_RW: Any, header: Any, bases_RS: Any, ledger: int, limit_rows: int, far_tokens_R: Any
) -> int:
    """Find this rank's rows of a combine at their owners, where all ranks agree. Return as ``connect_back``.

    DISAGREE where a header is another.
    """
    if not agree(opened_RW, header):
        return DISAGREE
    ranks = _ranks(frame)
    unknown: int = connect_back(
        opened_RW,
        header.size,
        bases_RS,
        _words(frame, A_DIMS, 8),
        _words(frame, A_OFFSETS, NUM_FIELDS),
        ledger,
        load_i64(frame, A_EXPERT_RANK),
        limit_rows,
        _words(frame, A_RECV_SLOTS, ranks),
        load_i64(frame, A_WEIGHTS_OFFSET),
        _table(frame, A_PLACES, 2, ranks),
        load_i64(frame, A_STARTS),
        _words(frame, A_TO, ranks),
        _words(frame, A_FROM, ranks),
        far_tokens_R,
        _words(frame, A_TALLY, NUM_TALLY),
    )
    return unknown
