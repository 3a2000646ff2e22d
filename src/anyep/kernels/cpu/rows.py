"""Rows as bytes: copied past the caches to every place that wants them, or filled."""

from __future__ import annotations

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
    store_fence,
    store_i64,
    stream_line,
)

_STREAM_FROM = 1024
"""Bytes from which a copy bypasses the caches: shorter rows share their lines with their neighbours."""
_PAGE = 4096
"""Bytes that one sequential copy reads, and then writes: 5 % faster than line by line."""
PIECE = 2 * LINE
"""Bytes that go to all of a token's places before the next ones: 14 % faster than row by row."""
_AHEAD = 4096
"""Bytes between a piece and the prefetch of what will follow it."""


@inlined
def stream_lines(destination: int, source: int, num_bytes: int) -> None:
    """Copy whole lines past the caches where the destination is aligned; anything else through them."""
    num_lines = num_bytes // LINE if destination % LINE == 0 else 0
    for line in range(num_lines):
        stream_line(destination, source, line)
    done = num_lines * LINE
    if done < num_bytes:
        copy_bytes(destination + done, source + done, num_bytes - done)


@inlined
def stream(destination: int, source: int, num_bytes: int) -> None:
    """Copy past the caches, whatever the alignment; short copies go through them."""
    if num_bytes < _STREAM_FROM:
        copy_bytes(destination, source, num_bytes)
        return
    head = -destination % LINE
    copy_bytes(destination, source, head)
    for begin in range(head, num_bytes, _PAGE):
        end = min(begin + _PAGE, num_bytes)
        for ahead in range(begin, end, LINE):
            prefetch(source + ahead + _PAGE // 4)
        stream_lines(destination + begin, source + begin, end - begin)


@inlined
def place_of(peer_addr: int, entry_rank_addr: int, entry_row_addr: int, entry: int, row_bytes: int) -> int:
    """Return the address of the row that flat entry ``entry`` names; 0 where it names none, or a skipped rank's."""
    rank = load_i32(entry_rank_addr, entry)
    base = load_i64(peer_addr, rank) if rank >= 0 else 0
    return base + load_i32(entry_row_addr, entry) * row_bytes if base != 0 else 0


@inlined
def collect(
    first_entry: int,
    width: int,
    entry_rank_addr: int,
    entry_row_addr: int,
    peer_addr: int,
    row_bytes: int,
    places_addr: int,
) -> int:
    """Write the addresses of a token's rows to ``places`` int64 [width], in column order; return how many there are."""
    num_places = 0
    for entry in range(first_entry, first_entry + width):
        place = place_of(peer_addr, entry_rank_addr, entry_row_addr, entry, row_bytes)
        if place != 0:
            store_i64(places_addr, num_places, place)
            num_places += 1
    return num_places


@inlined
def all_aligned(places_addr: int, num_places: int) -> bool:
    bits = 0
    for i in range(num_places):
        bits |= load_i64(places_addr, i)
    return bits % LINE == 0


@inlined
def stream_piece(places_addr: int, num_places: int, offset: int, source: int) -> None:
    """Copy one piece past the caches to ``offset`` in every place; places and offset are multiples of 64."""
    for i in range(num_places):
        place = load_i64(places_addr, i) + offset
        stream_line(place, source, 0)
        stream_line(place, source, 1)


@inlined
def spread(source: int, num_bytes: int, places_addr: int, num_places: int) -> None:
    """Copy one row to all places: piece by piece where whole lines can bypass the caches, else place by place."""
    if num_bytes < _STREAM_FROM or not all_aligned(places_addr, num_places):
        for i in range(num_places):
            stream(load_i64(places_addr, i), source, num_bytes)
        return
    whole = num_bytes // PIECE * PIECE
    for begin in range(0, whole, PIECE):
        prefetch(source + begin + _AHEAD)
        prefetch(source + begin + _AHEAD + LINE)
        stream_piece(places_addr, num_places, begin, source + begin)
    for i in range(num_places):
        stream_lines(load_i64(places_addr, i) + whole, source + whole, num_bytes - whole)


@compiled("void(int64, int64, int64)")
def copy(source_addr: int, destination_addr: int, num_bytes: int) -> None:
    stream(destination_addr, source_addr, num_bytes)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def scatter(
    x_addr: int,
    row_bytes: int,
    first_token: int,
    last_token: int,
    width: int,
    entry_rank_addr: int,
    entry_row_addr: int,
    peer_addr: int,
) -> None:
    places = allocate(8 * width)
    for token in range(first_token, last_token):
        num_places = collect(token * width, width, entry_rank_addr, entry_row_addr, peer_addr, row_bytes, places)
        if num_places > 0:
            spread(x_addr + token * row_bytes, row_bytes, places, num_places)
    release(places)


@compiled("void(int64, int64, int64, int64, int64, int64)")
def fill_rows(base_addr: int, row_bytes: int, num_gaps: int, gap_begin_addr: int, gap_end_addr: int, byte: int) -> None:
    for gap in range(num_gaps):
        begin = load_i32(gap_begin_addr, gap)
        num_rows = load_i32(gap_end_addr, gap) - begin
        if num_rows > 0:
            fill_bytes(base_addr + begin * row_bytes, num_rows * row_bytes, byte)


@compiled("void()")
def fence() -> None:
    store_fence()
