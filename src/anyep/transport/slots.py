"""The ring slots of each lane, worked out once: a post or a wait only picks one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anyep.machine.linux import Memory
from anyep.transport.base import Words
from anyep.transport.control import WORDS_OFFSET, ControlLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """One ring slot of a lane: where source 0's mailbox lies, how far the next, where this rank's is, all messages."""

    first: int
    stride: int
    own_offset: int
    view: Words


def lay_out(layout: ControlLayout, rank: int, own: Memory) -> list[list[Slot]]:
    """Return the slots of every lane, as ``rank`` reads them in its ``own`` memory and fills them in its peers'."""

    def slot_at(lane: int, slot: int) -> Slot:
        first, stride = layout.mailbox_offset(lane, slot, 0), layout.mailbox_bytes(lane)
        shape, strides = (layout.num_ranks, layout.lane_words[lane]), (stride, 8)
        return Slot(
            first=own.address + first,
            stride=stride,
            own_offset=layout.mailbox_offset(lane, slot, rank),
            view=np.ndarray(shape, np.int64, buffer=own.bytes, offset=first + WORDS_OFFSET, strides=strides),
        )

    return [[slot_at(lane, slot) for slot in range(layout.ring)] for lane in range(len(layout.lane_words))]
