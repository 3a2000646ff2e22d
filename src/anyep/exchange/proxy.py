"""A rank of another host, as its forwarder stands in for it: its tokens that crossed, and where their rows go here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.crossing import address_of
from anyep.exchange.handle import SendPlan
from anyep.exchange.opening import BODY
from anyep.exchange.routing import order_entries, plan_of
from anyep.exchange.scatter import place
from anyep.layout.regions import RowBytes, row_region
from anyep.transport.base import Words
from anyep.transport.engine import Bytes

if TYPE_CHECKING:
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.geometry import Geometry


class Proxy:
    """What one forwarder keeps of one source of one dispatch, for cached dispatches and combines.

    ``plan`` is the source's plan, for those of its tokens that came to this host: the same rows at the same places as
    if the source shared memory here.
    """

    def __init__(self, source: int, plan: SendPlan, tokens: NDArray[np.int32] | None) -> None:
        self.source = source
        self.plan = plan
        self.tokens = tokens
        """[n]: their numbers at the source, where the layout reports them"""

    @property
    def num_tokens(self) -> int:
        return self.plan.num_tokens


def routing_row(geometry: Geometry, *, cached: bool) -> RowBytes:
    """Return the bytes of a token's routing as it crosses: what a forwarder of a cached dispatch knows stays behind."""
    return RowBytes(
        x=0,
        scales=0,
        topk_idx=0 if cached else geometry.eager_row.topk_idx,
        topk_weights=geometry.row.topk_weights,
        token=0 if cached else geometry.row.token,
        y=0,
    )


def make_proxy(
    end: Endpoint, geometry: Geometry, source: int, num_tokens: int, routing: Bytes | None, opened_RW: Words
) -> Proxy:
    """Work out where the rows of ``num_tokens`` tokens go, from their routing and from what all ranks announced."""
    row = routing_row(geometry, cached=False)
    region = row_region(row, num_tokens)
    first = 0 if routing is None else address_of(routing)
    plan = plan_of(end, geometry, first, num_tokens)
    nothing = np.zeros(max(end.num_ranks, geometry.shape.num_local, 1), np.int64)
    end.books.settle(
        opened_RW,
        BODY,
        geometry.shape.dims,
        geometry.shape.offsets,
        end.tables.rank_addr,
        end.tables.local_addr,
        plan.first_addr,
        nothing,
        nothing.copy(),
    )
    order_entries(end, plan)
    place(end, plan)
    tokens = None
    if row.token and routing is not None:
        tokens = routing[region.token_offset :].view(np.int32)[:num_tokens].copy()
    return Proxy(source, plan, tokens)
