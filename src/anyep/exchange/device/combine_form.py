"""What combines of one form launch: recorded once, from bases (kernels/tapes.py), and played in every call.

::

    first    rows in LogFMT-10, where that is asked for; then where this rank's rows lie, to every rank's board
    sums     this rank's peer tables, and the sums of its tokens
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch

from anyep.exchange.device.devices import Tape
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.plan import PLAN, DevicePlan, PlanMap, address_if_any
from anyep.exchange.device.reach import NOWHERE
from anyep.exchange.returning import Returning
from anyep.exchange.wire import ELEMENTS
from anyep.kernels.spec_device import SUMMARY_WORDS, DeviceKernels
from anyep.kernels.tapes import counted_from

_Y, _FACTORS, _BIAS0, _BIAS1, _OUT, _WEIGHTS_OUT, _WORDS, _ENCODED, _ROWS = range(PLAN + 1, PLAN + 10)
_MESSAGES, _BOARD, _PLACE0, _PLACE1 = range(_ROWS + 1, _ROWS + 5)
"""Bases, after the plan: the caller's tensors; memory of this combine; this rank's messages, and the board; where rows
and weights lie, as peers are told."""


class CombineKey(NamedTuple):
    """All that what a combine launches depends on, besides addresses."""

    plan: PlanMap
    dtype: torch.dtype
    reduce: str
    wire: str
    has_factors: bool
    num_biases: int
    has_weights: bool


class Scratch(NamedTuple):
    """Memory of one combine on the device."""

    words: torch.Tensor
    """int64: what connect says, and peer tables"""
    encoded: torch.Tensor | None
    """rows in LogFMT-10, one behind the other"""
    rows: torch.Tensor | None
    """int32 [T, W]: where each entry's row lies among them"""


class CombineForm:
    """Recordings of one form."""

    def __init__(self, end: DeviceEndpoint, key: CombineKey) -> None:
        self._end = end
        self._key = key
        self.first: Tape = end.device.tape(self._first_half)
        self.sums: Tape = end.device.tape(self._second_half)

    def bases(
        self, back: Returning, plan: DevicePlan, epoch: int, scratch: Scratch, places: tuple[int, int]
    ) -> array[int]:
        """Return the values of all bases for one combine."""
        boards, bias = self._end.boards, back.bias
        return array(
            "q",
            (
                plan.device_memory.data_ptr(),
                back.y.data_ptr(),
                address_if_any(back.factors),
                bias[0].data_ptr() if bias else 0,
                bias[1].data_ptr() if len(bias) > 1 else 0,
                back.out.data_ptr(),
                address_if_any(back.weights_out),
                scratch.words.data_ptr(),
                address_if_any(scratch.encoded),
                address_if_any(scratch.rows),
                boards.messages_addr(epoch),
                boards.board_addr(epoch),
                *places,
            ),
        )

    def _first_half(self, kernels: DeviceKernels) -> None:
        end, plan = self._end, self._key.plan
        if self._key.wire != "none":
            kernels.logfmt_encode(
                *(counted_from(_Y), end.hidden, plan.geometry.shape.num_local),
                *(plan.field("counts"), plan.field("block_start"), counted_from(_ENCODED)),
            )
        places = (counted_from(_PLACE0), counted_from(_PLACE1), NOWHERE, NOWHERE, NOWHERE)
        kernels.announce(end.num_ranks, counted_from(_MESSAGES), 0, *places, 0, 0, 0)

    def _second_half(self, kernels: DeviceKernels) -> None:
        end, plan, key = self._end, self._key.plan, self._key
        summary_addr = counted_from(_WORDS)
        tables_addr = summary_addr + 8 * SUMMARY_WORDS
        kernels.connect(
            *(counted_from(_BOARD), end.boards.message_bytes, end.num_ranks, end.base_addr, 0),
            *(tables_addr, summary_addr, end.faults.addr, plan.entry_rank_addr, plan.num_tokens * plan.width),
        )
        rows_addr = plan.entry_row_addr
        if key.wire != "none":
            rows_addr = counted_from(_ROWS)
            kernels.place(
                *(plan.entry_rank_addr, plan.entry_slot_addr, plan.num_tokens, plan.width, plan.idx_addr),
                *(plan.idx_bytes, int(plan.geometry.by_expert), plan.field("dense_start"), rows_addr),
            )
        self._sum(kernels, rows_addr, tables_addr)

    def _sum(self, kernels: DeviceKernels, rows_addr: int, tables_addr: int) -> None:
        end, plan, key = self._end, self._key.plan, self._key
        entries = (plan.width, int(key.reduce == "rank"), plan.entry_rank_addr, rows_addr)
        factors = counted_from(_FACTORS) if key.has_factors else 0
        bias0, bias1 = (counted_from(base) if key.num_biases > n else 0 for n, base in enumerate((_BIAS0, _BIAS1)))
        rest = (0, plan.num_tokens, *entries, tables_addr, factors, bias0, bias1, counted_from(_OUT))
        if key.wire == "none":
            kernels.reduce(int(ELEMENTS[key.dtype]), end.hidden, *rest)
        else:
            kernels.reduce_logfmt(end.hidden, *rest)
        if key.has_weights:
            weights_table = tables_addr + 8 * end.num_ranks
            where = (weights_table, counted_from(_WEIGHTS_OUT))
            kernels.reduce_weights(end.num_topk, 0, plan.num_tokens, *entries, *where)


def combine_form_of(end: DeviceEndpoint, back: Returning, plan: DevicePlan) -> CombineForm:
    """Return the form of a combine, made once."""
    key = CombineKey(
        plan=plan.map,
        dtype=back.y.dtype,
        reduce=back.way.reduce,
        wire=back.way.wire,
        has_factors=back.factors is not None,
        num_biases=len(back.bias),
        has_weights=back.topk_weights is not None,
    )
    return end.forms.get(key, lambda: CombineForm(end, key))
