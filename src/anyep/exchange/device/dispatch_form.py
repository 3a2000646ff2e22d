"""What dispatches of one form launch: recorded once, from bases (kernels/tapes.py), and played in every call.

::

    first    route; counts and places to every rank's board; and a padded batch's rows to slots at every rank
    again    counts and places once more, where memory was too small
    places   every place, and from it this rank's peer tables; by a handle, the tables alone
    rows     rows to their final places; or blocks made of those that have come to slots. Then padding
    turn     scales turned to column-major, when all ranks' rows are here
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from anyep.exchange.device.devices import Tape
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.landing import Landing, LandingShapes, part_shapes
from anyep.exchange.device.plan import IDX, PLAN, WEIGHTS, DevicePlan, PlanMap, address_if_any, route_on
from anyep.exchange.device.reach import NOWHERE
from anyep.exchange.device.slots import SlotKind
from anyep.exchange.geometry import Geometry
from anyep.exchange.ledger import D_ALIGNMENT
from anyep.exchange.outgoing import Outgoing
from anyep.exchange.scatter import Route
from anyep.kernels.spec_device import NUM_PLACES, DeviceKernels
from anyep.kernels.tapes import counted_from
from anyep.layout.regions import RowBytes
from anyep.numerics.formats import Element

_X, _SCALES, _MESSAGES, _BOARD, _SLOTS, _HERE, _CAPACITY, _ROWS, _TURNED, _PART = range(3, 13)
_PLACE = _PART + NUM_PLACES
"""Bases, after those of :mod:`anyep.exchange.device.plan`: rows and their scales; this rank's messages, and the board;
tables of slots at others, and where slots begin here; rows that fit, and rows of a handle's batch; turned scales; the
parts of the landing, and what peers are told of them."""


class FormKey(NamedTuple):
    """All that what a dispatch launches depends on, besides addresses and numbers of rows."""

    geometry: Geometry
    plan: PlanMap
    element: Element | None
    has_scales: bool
    is_cached: bool
    is_routed: bool
    """whether entries were found before"""


class DispatchForm:
    """Recordings of one form, and what else its dispatches have in common."""

    def __init__(self, end: DeviceEndpoint, key: FormKey, *, waits: bool) -> None:
        self._end = end
        self._key = key
        self._map = key.plan
        self.geometry = geometry = key.geometry
        self.slots: SlotKind | None = end.slots_of(geometry, self._map.geometry.shape.block_rows // end.num_ranks)
        self.landing = LandingShapes(part_shapes(end, geometry))
        self.turned_shape = None
        if geometry.padded and geometry.row.scales:
            self.turned_shape = (geometry.shape.num_local, end.wire.scale_columns, geometry.shape.block_rows)
        self.waits = waits
        self._in_flight = [self._where(epoch) for epoch in range(end.boards.ring)]
        tape = end.device.tape
        self.first: Tape = tape(self._first_half)
        self.again: Tape | None = tape(self._announce) if waits else None
        self.places: Tape | None = tape(self._find_places) if waits else None
        self.rows: Tape = tape(self._move if waits else self._find_places_and_move)
        self.turn: Tape | None = tape(self._turn) if self.turned_shape is not None and self.slots is None else None

    def bases(
        self,
        out: Outgoing,
        plan: DevicePlan,
        epoch: int,
        landing: Landing | None,
        turned: torch.Tensor | None,
    ) -> array[int]:
        """Return the values of all bases for one dispatch; without a landing others are told that nothing fits."""
        rows, in_flight = out.rows, self._in_flight
        capacity, parts, places = (-1, _NO_PARTS, _NO_PLACES) if landing is None else landing.addresses(self._end.reach)
        return array(
            "q",
            (
                plan.device_memory.data_ptr(),
                address_if_any(plan.routes),
                address_if_any(out.topk_weights),
                rows.x.data_ptr(),
                address_if_any(rows.scales),
                *in_flight[epoch % len(in_flight)],
                capacity,
                0 if out.cached is None else out.cached.num_rows,
                address_if_any(turned),
                *parts,
                *places,
            ),
        )

    def bases_of_places(self, plan: DevicePlan, messages_addr: int, board_addr: int) -> array[int]:
        """Return the same for what works out places alone: on a board that was made, with this rank's own message."""
        bases = array("q", (0,) * (_PLACE + NUM_PLACES))
        bases[PLAN], bases[IDX] = plan.device_memory.data_ptr(), address_if_any(plan.routes)
        bases[_MESSAGES], bases[_BOARD] = messages_addr, board_addr
        return bases

    def _where(self, epoch: int) -> tuple[int, int, int, int]:
        """Return the bases _MESSAGES to _HERE: of operations that are in flight together each has its own."""
        boards, slots = self._end.boards, self.slots
        places = (0, 0) if slots is None else (slots.first_table_addr(epoch), slots.receiving_addr(epoch))
        return boards.messages_addr(epoch), boards.board_addr(epoch), *places

    def _first_half(self, kernels: DeviceKernels) -> None:
        end, plan, key = self._end, self._map, self._key
        if not key.is_cached and not key.is_routed:
            route_on(kernels, end, plan)
        self._announce(kernels)
        if self.slots is not None:  # each token once a receiver: nobody's counts are needed for that
            route = Route(plan.compact_width, plan.compact_rank_addr, plan.compact_slot_addr, by_expert=0)
            tables = [counted_from(_SLOTS) + 8 * end.num_ranks * part for part in range(NUM_PLACES)]
            self._send(kernels, route, tables, key.geometry.eager_row)

    def _announce(self, kernels: DeviceKernels) -> None:
        """Write this rank's message to all boards, with its counts if they are not known."""
        end, plan, key = self._end, self._map, self._key
        messages, capacity = counted_from(_MESSAGES), counted_from(_CAPACITY)
        if key.is_cached:
            kernels.announce(*(end.num_ranks, messages, capacity, *self._places(), 0, 0, 0))
        else:
            kernels.announce_counts(
                *(plan.idx_addr, plan.idx_bytes, plan.num_tokens, end.num_topk, end.placement.num_experts),
                *(end.num_ranks, int(key.geometry.by_expert), plan.entry_rank_addr, plan.entry_slot_addr),
                *plan.compact_entries(end),
                *(plan.field("rank_rows"), plan.field("expert_rows"), plan.verdict_addr),
                *(messages, capacity, *self._places()),
            )

    def _places(self) -> Sequence[int]:
        """Return what this rank announces: where the others write, or where parts of its rows stand in slots."""
        if self.slots is not None:
            return self.slots.places
        return [NOWHERE if part is None else counted_from(_PLACE + n) for n, part in enumerate(self.landing.parts)]

    def _send(self, kernels: DeviceKernels, route: Route, tables: Sequence[int], row: RowBytes) -> None:
        """Write rows of ``row``'s parts along ``route``; ``tables``: a peer table for each part."""
        end, plan, element = self._end, self._map, self._key.element
        weights = counted_from(WEIGHTS) if row.topk_weights else 0
        x, scales, idx, weights_table, token = tables
        if self._key.has_scales:
            first, last = 0, plan.num_tokens
            ways = (first, last, route.width, route.entry_rank_addr, route.entry_row_addr)
            kernels.scatter(counted_from(_X), row.x, *ways, x)
            kernels.scatter(counted_from(_SCALES), row.scales, *ways, scales)
            kernels.scatter_routing(
                *(plan.idx_addr, plan.idx_bytes, weights, first, last, end.num_topk, route.width, route.by_expert),
                *(end.tables.rank_addr, end.tables.local_addr, route.entry_rank_addr, route.entry_row_addr),
                *(idx if row.topk_idx else 0, weights_table, token if row.token else 0),
            )
            return
        kernels.send(
            counted_from(_X),
            *((0, row.x, -1) if element is None else (int(element), end.hidden, end.scale_code)),
            *(plan.num_tokens, route.width, route.entry_rank_addr, route.entry_row_addr, x, scales),
            *(plan.idx_addr, plan.idx_bytes, weights, end.num_topk),
            *(route.by_expert, end.tables.rank_addr, end.tables.local_addr),
            *(idx if row.topk_idx else 0, weights_table, token if row.token else 0),
        )

    def _find_places_and_move(self, kernels: DeviceKernels) -> None:
        self._find_places(kernels)
        self._move(kernels)

    def _find_places(self, kernels: DeviceKernels) -> None:
        """Work out every place; by a handle, only look up where peers' memory lies."""
        end, plan, shape = self._end, self._map, self._key.geometry.shape
        board = (counted_from(_BOARD), end.boards.message_bytes)
        base_addr = end.base_addr if self.slots is None else counted_from(_HERE)
        if self._key.is_cached:
            rows = counted_from(_ROWS)
            kernels.connect(
                *(*board, end.num_ranks, base_addr, rows, plan.tables_addr, plan.summary_addr, end.faults.addr, 0, 0)
            )
            return
        field = plan.field
        kernels.settle(
            *(*board, end.rank, end.num_ranks, end.placement.num_experts, shape.num_local),
            *(end.tables.rank_addr, end.tables.local_addr),
            *(int(shape.by_expert), self._alignment, shape.block_rows, shape.static_rows, int(not self.waits)),
            *(base_addr, plan.tables_addr, plan.summary_addr, 0 if self.waits else end.faults.addr),
            *(field("send_start"), field("dense_start"), field("recv_rows"), field("recv_start"), field("counts")),
            *(field("block_start"), field("filled_rows"), *self._gaps()),
            *((*plan.source_addr, field("source_rows")) if self._key.geometry.padded else (0, 0, 0)),
            *(plan.num_tokens, plan.width, plan.idx_addr, plan.idx_bytes),
            *(plan.entry_rank_addr, plan.entry_slot_addr, plan.entry_row_addr),
        )
        if plan.board_addr:
            kernels.copy(counted_from(_BOARD), plan.board_addr, end.num_ranks * end.boards.message_bytes)

    @property
    def _alignment(self) -> int:
        return int(self._key.geometry.shape.dims[D_ALIGNMENT])

    def _gaps(self) -> tuple[int, int]:
        """Return where gaps begin and end: one behind each expert's rows, and after those one behind the batch."""
        begins = self._map.field("gaps") + 4
        return begins, begins + 4 * (self._key.geometry.shape.num_local + 1)

    def _move(self, kernels: DeviceKernels) -> None:
        plan, geometry = self._map, self._key.geometry
        if self.slots is not None:
            self._expand(kernels)
        else:
            by_expert = int(geometry.shape.by_expert)
            route = Route(plan.width, plan.entry_rank_addr, plan.entry_row_addr, by_expert=by_expert)
            self._send(kernels, route, plan.table_addr, geometry.row)
        self._fill_gaps(kernels)
        if self.slots is not None and self.turned_shape is not None:
            self._turn(kernels)

    def _expand(self, kernels: DeviceKernels) -> None:
        """Make the rows of this rank's blocks from those that have come to its slots."""
        end, plan, rows = self._end, self._map, self._key.geometry.eager_row
        x_table, scales_table, idx_table, _, token_table = plan.table_addr
        x, scales, _, _, token = self._part_addrs()
        kernels.expand(
            *(rows.x, rows.scales, end.num_topk, plan.idx_bytes, end.num_ranks, self._key.geometry.shape.num_local),
            *(plan.field("source_rows"), plan.field("recv_start"), plan.field("scratch")),
            *(x_table, scales_table if rows.scales else 0, idx_table, 0, token_table),
            *(x, scales, 0, 0, token),
        )

    def _part_addrs(self) -> list[int]:
        return [0 if part is None else counted_from(_PART + n) for n, part in enumerate(self.landing.parts)]

    def _fill_gaps(self, kernels: DeviceKernels) -> None:
        """Define the rows of this rank's batch that nobody sends."""
        shape, (begins, ends) = self._key.geometry.shape, self._gaps()
        behind_blocks = shape.num_local if shape.by_expert and not shape.block_rows and self._alignment > 1 else 0
        first = 4 * (0 if behind_blocks else shape.num_local)
        num_gaps = behind_blocks + (shape.static_rows >= 0)
        if num_gaps:
            parts = zip(self._part_addrs(), self._key.geometry.row.parts(), strict=True)
            where = [number for part in parts for number in part]
            kernels.fill_gaps(num_gaps, begins + first, ends + first, *where)

    def _turn(self, kernels: DeviceKernels) -> None:
        assert self.turned_shape is not None
        num_local, columns, block_rows = self.turned_shape
        counts_addr, scales_addr = self._map.field("counts"), counted_from(_PART + 1)
        kernels.transpose_scales(num_local, block_rows, columns, counts_addr, scales_addr, counted_from(_TURNED))


_NO_PARTS = (0,) * NUM_PLACES
_NO_PLACES = (NOWHERE,) * NUM_PLACES


def form_of(end: DeviceEndpoint, out: Outgoing, plan: DevicePlan) -> DispatchForm:
    """Return the form of a dispatch, made once."""
    rows, is_cached = out.rows, out.cached is not None
    key = FormKey(
        out.geometry, plan.map, rows.quantise_from, rows.scales is not None, is_cached, is_routed=plan.routes is None
    )
    return end.forms.get(key, lambda: DispatchForm(end, key, waits=waits_for_counts(end, out)))


def waits_for_counts(end: DeviceEndpoint, out: Outgoing) -> bool:
    """Return whether the number of rows is known only when all ranks have counted."""
    return out.cached is None and end.static_rows is None and not out.geometry.padded
