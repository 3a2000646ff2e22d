"""Where an operation's bookkeeping lies, as one array of addresses and sizes: a *frame*, made once for a kind and desk.

A compiled call pays for every array that it is passed, most where its code is cold (docs/log.md); one that reads a
frame pays for one number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anyep.exchange.ledger import FIELDS, PARTS
from anyep.machine.addresses import address_of

if TYPE_CHECKING:
    from anyep.exchange.desk import Desk
    from anyep.exchange.endpoint import Endpoint, ReturnSlots
    from anyep.exchange.geometry import Geometry
    from anyep.transport.base import Words

(
    A_WORDS,
    A_NUM_WORDS,
    A_COUNTED,
    A_ROWS,
    A_SEND_SLOTS,
    A_PARTS,
    A_PART_OFFSETS,
    A_EAGER,
    A_CAPACITY,
    A_TALLY,
    A_DIMS,
    A_OFFSETS,
    A_RECV_SLOTS,
    A_TO,
    A_FROM,
    A_PLACES,
    A_ARRIVED,
    A_EXPERT_RANK,
    A_EXPERT_LOCAL,
    A_ROWS_BY_SOURCE,
    A_ROWS_BY_EXPERT,
    A_PART_BYTES,
    A_STARTS,
    A_WEIGHTS_OFFSET,
    A_FAR,
    NUM_FRAME_WORDS,
) = range(26)
"""Of both: the messages and how many words each has, whether it holds counts, which field of the ledger says how many
rows go to whom; slots that this rank fills, parts of a row and where each begins in a slot, their peer tables; the
capacity of a slot where all rows of a rank go one way, else -1; the tally; sizes and offsets of the ledger; slots that
this rank reads; whom it writes to or reads from, and who does so here; peer tables of rows at their places. Then of a
dispatch those of rows that came along, of both the experts' ranks, of a dispatch their numbers there, the counters, and
bytes of each part; of a combine room for starts, and where weights begin in a slot; of a dispatch the ranks of other
hosts, as the endpoint knows them."""


class Frame:
    """The array. What it points to lives as long as whoever uses it: the desk, the geometry, the buffer.

    ``kept``: what belongs to one variant of the buffer, where others use the frame too, also when that one has gone.
    """

    __slots__ = ("_kept", "_words", "addr")

    def __init__(self, words: dict[int, int], *, kept: object = None) -> None:
        self._kept = kept
        values: Words = np.zeros(NUM_FRAME_WORDS, np.int64)
        for word, value in words.items():
            values[word] = value
        self.addr = address_of(values)
        self._words = values


def frame_of_dispatch(end: Endpoint, geometry: Geometry, desk: Desk, *, cached: bool) -> int:
    """Return where the frame of dispatches of one kind lies. With a handle no counts are told, and none are settled."""
    known = geometry.frames.get((desk, cached))
    if known is None:
        known = geometry.frames[desk, cached] = _dispatch_frame(end, geometry, desk, cached=cached)
    return known.addr


def frame_of_combine(end: Endpoint, geometry: Geometry, desk: Desk, slots: ReturnSlots) -> int:
    """Return where the frame of combines lies whose rows go back in ``slots``."""
    key = (desk, slots.slot_rows, slots.weights_offset)
    known = geometry.frames.get(key)
    if known is None:
        known = geometry.frames[key] = _combine_frame(end, geometry, desk, slots)
    return known.addr


def _dispatch_frame(end: Endpoint, geometry: Geometry, desk: Desk, *, cached: bool) -> Frame:
    messages_RW = desk.places_RW if cached else desk.words_RW
    counters = end.counters
    return Frame(
        _of_both(end, geometry, desk, messages_RW)
        | {
            A_COUNTED: not cached,
            A_ROWS: FIELDS.index("rank_rows"),
            A_PARTS: PARTS,
            A_PART_OFFSETS: address_of(geometry.slot_offsets),
            A_EAGER: desk.eager.addr[0],
            A_CAPACITY: geometry.slot_rows if end.rule.one_way else -1,
            A_PLACES: desk.direct.addr[0],
            A_ARRIVED: desk.arrived.addr[0],
            A_EXPERT_RANK: end.tables.rank_addr,
            A_EXPERT_LOCAL: end.tables.local_addr,
            A_ROWS_BY_SOURCE: address_of(counters.rows_by_source),
            A_ROWS_BY_EXPERT: address_of(counters.rows_by_expert),
            A_PART_BYTES: address_of(geometry.part_bytes),
            A_FAR: address_of(end.far_R),
        }
    )


def _combine_frame(end: Endpoint, geometry: Geometry, desk: Desk, slots: ReturnSlots) -> Frame:
    return Frame(
        _of_both(end, geometry, desk, desk.places_RW)
        | {
            A_COUNTED: 0,
            A_ROWS: FIELDS.index("source_entries"),
            A_PARTS: 2,
            A_PART_OFFSETS: address_of(slots.offsets),
            A_EAGER: desk.back.addr[0],
            A_CAPACITY: slots.slot_rows if end.rule.one_way else -1,
            A_PLACES: desk.lent.addr[0],
            A_EXPERT_RANK: end.tables.rank_addr,
            A_STARTS: desk.starts_addr,
            A_WEIGHTS_OFFSET: slots.weights_offset,
        },
        kept=slots.offsets,
    )


def _of_both(end: Endpoint, geometry: Geometry, desk: Desk, messages_RW: Words) -> dict[int, int]:
    return {
        A_WORDS: address_of(messages_RW),
        A_NUM_WORDS: messages_RW.shape[1],
        A_SEND_SLOTS: address_of(desk.send_slots_R),
        A_TALLY: address_of(desk.tally),
        A_DIMS: address_of(geometry.shape.dims),
        A_OFFSETS: address_of(geometry.shape.offsets),
        A_RECV_SLOTS: address_of(desk.recv_slots_R),
        A_TO: address_of(desk.to_R),
        A_FROM: address_of(desk.from_R),
    }
