"""This rank's rows for its own host, a few tokens at a time, where rows cross to other hosts meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from anyep.exchange.scatter import Route, send_some_rows
from anyep.layout.pieces import rows_a_piece
from anyep.transport.engine import Transfer

if TYPE_CHECKING:
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.outgoing import Outgoing

_SLICE_BYTES = 1 << 20
"""Written at a time: about 1 ms, in which the network can do without this rank."""


class RowsNear:
    """A part (exchange/courier.py) that awaits nothing; ``then`` is called behind the last row."""

    def __init__(
        self, end: Endpoint, out: Outgoing, route: Route, table_addr: Sequence[int], then: Callable[[], None]
    ) -> None:
        self._end = end
        self._out = out
        self._route = route
        self._table_addr = table_addr
        self._then = then
        self._next = 0
        self._slice_tokens = rows_a_piece(out.geometry.row.sent * route.width, _SLICE_BYTES)

    def advance(self) -> bool:
        if self._next == self._out.plan.num_tokens:
            return False
        last = min(self._next + self._slice_tokens, self._out.plan.num_tokens)
        send_some_rows(self._end, self._out, self._route, self._table_addr, self._out.geometry.row, self._next, last)
        self._next = last
        os.sched_yield()  # ranks that share this core may not have asked yet for what crosses to them
        if last == self._out.plan.num_tokens:
            self._then()
        return True

    def pending(self) -> list[Transfer]:
        return []
