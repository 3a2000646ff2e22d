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
    A_WORDS,  # [R, A_NUM_WORDS] the messages
    A_NUM_WORDS,
    A_COUNTED,  # whether messages hold counts
    A_ROWS,  # number of the ledger's field that says how many rows go to whom
    A_SEND_SLOTS,  # [R] slots that this rank fills
    A_PARTS,  # parts of a row, P
    A_PART_OFFSETS,  # [P] where each begins in a slot
    A_EAGER,  # [P, R] peer tables of the slots that this rank fills
    A_CAPACITY,  # rows of a slot where all rows of a rank go one way, else -1
    A_TALLY,  # [NUM_TALLY]
    A_DIMS,  # sizes of the ledger
    A_OFFSETS,  # where its fields begin
    A_RECV_SLOTS,  # [R] slots that this rank reads
    A_TO,  # [R] whom this rank writes to; of a combine whose rows it reads
    A_FROM,  # [R] who writes, or reads, here
    A_PLACES,  # [P, R] peer tables of rows at their places
    A_ARRIVED,  # dispatch: [P, R] peer tables of rows that came along
    A_EXPERT_RANK,  # [E] each expert's rank
    A_EXPERT_LOCAL,  # dispatch: [E] its number there
    A_ROWS_BY_SOURCE,  # dispatch: [R] counter
    A_ROWS_BY_EXPERT,  # dispatch: [L] counter
    A_PART_BYTES,  # dispatch: [P] bytes of each part
    A_STARTS,  # combine: [R + E] room for starts
    A_WEIGHTS_OFFSET,  # combine: where weights begin in a slot
    A_FAR,  # dispatch: [R] which ranks live on other hosts, as the endpoint knows them
    NUM_FRAME_WORDS,
) = range(26)
"""Words of a frame, addresses where a shape is given. Of dispatches and combines, but where one of them is named."""


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
