"""A handle from topk_idx alone: all ranks tell each other, by a dispatch whose rows nobody reads.

Between hosts a handle is more than counts: a forwarder has to know which tokens of which ranks it stands in for.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch

from anyep.exchange.dispatch import Dispatch
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.flights import Flights
from anyep.exchange.handle import Handle
from anyep.exchange.outgoing import prepare
from anyep.exchange.straight_rule import StraightRule
from anyep.exchange.wire import carrying_wire

_NOTHING = carrying_wire(torch.uint8, 1, 0, torch.float32, by_column=True)
_FORWARDED = StraightRule(most_bytes=0, spare_bytes=0, reason="rows of any size may follow where these have one byte")


def ask_all(
    flights: Flights, identity: object, end: Endpoint, topk_idx: torch.Tensor, *, layout: str, expert_alignment: int
) -> Handle:
    """Return a handle for rows that go the way of ``topk_idx`` [T, K]. Collective; errors as of a dispatch.

    Rows that take this way later are forwarded, however small: the asking rows have one byte, and how wide those are
    that follow nobody knows yet. So the handle goes under a number of its own where ranks live on several hosts: it is
    refused together with that of the dispatch itself, whose rows may go straight.
    """
    asking = _endpoint(end, layout, expert_alignment)
    x = torch.zeros((topk_idx.shape[0], 1), dtype=torch.uint8, device="cpu")
    outgoing = prepare(asking, x, topk_idx, None, layout=layout)
    handle = flights.run(Dispatch(asking, outgoing, buffer=identity)).handle
    if end.across is None or handle.announced is None:
        return handle
    return replace(handle, epoch=zlib.crc32(b"asked", handle.epoch) & 0x7FFFFFFF)


def _endpoint(end: Endpoint, layout: str, expert_alignment: int) -> Endpoint:
    asking = end.variant(
        wire=_NOTHING,
        num_topk=end.num_topk,
        max_tokens=end.max_tokens,
        static_rows=end.static_rows if layout == "compact" else None,
        source_tokens=end.source_tokens,
    )
    across = None if end.across is None else replace(end.across, straight=_FORWARDED)
    return replace(asking, across=across, expert_alignment=expert_alignment)
