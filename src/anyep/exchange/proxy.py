"""A rank of another host, as its forwarder stands in for it: its tokens that crossed, and where their rows go here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anyep.exchange.handle import SendPlan
from anyep.exchange.opening import BODY
from anyep.exchange.routing import order_entries, plan_of
from anyep.exchange.scatter import place
from anyep.machine.addresses import address_of
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


def make_proxy(end: Endpoint, geometry: Geometry, source: int, num_tokens: int, idx: Bytes, opened_RW: Words) -> Proxy:
    """Work out where the rows of ``num_tokens`` tokens go, from their topk_idx and from what all ranks announced.

    Their token numbers come with the rows.
    """
    plan = plan_of(end, geometry, address_of(idx), num_tokens)
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
    return Proxy(source, plan, np.empty(num_tokens, np.int32) if geometry.row.token else None)
