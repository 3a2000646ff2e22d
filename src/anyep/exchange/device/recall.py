"""A handle from numbers, on a device: the launches of a dispatch that find places, on a board made of those numbers.

Nothing is exchanged. It waits for the device once, for the number under which the handle goes and for what fits it.
Legend: T tokens, K top-k, R ranks, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.errors import Unavailable
from anyep.exchange.arguments import check_choice, check_tensor
from anyep.exchange.device.announced import board_of, counts_on
from anyep.exchange.device.dispatch_form import DispatchForm, FormKey
from anyep.exchange.device.endpoint import DeviceEndpoint
from anyep.exchange.device.plan import DevicePlan, make_plan
from anyep.exchange.device.staged import StagedEndpoint, StagedPlan
from anyep.exchange.handle import Handle
from anyep.exchange.recall import (
    LAYOUTS,
    Counts,
    Handles,
    adopted,
    check_counts,
    check_own_counts,
    geometry_for,
    handle_from_counts,
)


class DeviceHandles(Handles):
    """What can be done with handles where ranks reach one another's devices. ``recall`` and ``adopt``, on one host."""

    _end: DeviceEndpoint

    def recall(
        self, topk_idx: torch.Tensor, announced: torch.Tensor, *, layout: str = "compact", expert_alignment: int = 1
    ) -> Handle:
        """Return the handle that a dispatch of ``topk_idx`` [T, K] left, as on the host; both on the device.

        It goes under another number than the dispatch's own, so that all ranks must use it, or none.
        """
        end = self._end
        self._check_open()
        if end.device.capturing():
            raise Unavailable("a graph is being captured, and recall waits for the device: call it outside of graphs")
        check_choice("layout", layout, LAYOUTS)
        dtypes, shape = (torch.int64, torch.int32), (None, end.num_topk)
        idx = check_tensor("topk_idx", topk_idx, dtypes=dtypes, shape=shape, legend="[T, num_topk]", device=end.where)
        counts = check_counts(end, announced)
        counts_RC: Counts = counts.cpu().numpy()
        geometry = geometry_for(end, layout, idx.itemsize, expert_alignment)
        _check_rows(counts_RC[:, : end.num_ranks].sum(0), geometry.shape.static_rows)
        plan = make_plan(end, idx, geometry, None)
        assert isinstance(plan, DevicePlan), "plans of a device are made on its endpoint"
        told = _launch(end, plan, counts)
        check_own_counts(plan, told.cpu().numpy(), counts_RC[end.rank])
        static = geometry.shape.static_rows
        num_rows = int(plan.numbers("filled_rows")[end.rank]) if static < 0 else static
        return handle_from_counts(self._identity, layout, plan, num_rows, counts_RC)

    def adopt(self, handle: Handle) -> Handle:
        """Return a handle of another buffer with the same experts, on the same device, as one of this."""
        self._check_open()
        return handle if handle.buffer is self._identity else replace(handle, buffer=self._identity)


class StagedHandles(Handles):
    """The same between hosts, where handles are those of the host's dispatch: all ranks ask each other there."""

    _end: StagedEndpoint

    def ask(self, topk_idx: torch.Tensor, *, layout: str = "compact", expert_alignment: int = 1) -> Handle:
        """Return a handle for rows that go the way of ``topk_idx`` [T, K] on the device. Collective."""
        self._check_open()
        end = self._end
        handle = self._ask(end.host, topk_idx.cpu(), layout=layout, expert_alignment=expert_alignment)
        return replace(handle, send=StagedPlan(handle.send, end.where))

    def adopt(self, handle: Handle) -> Handle:
        """Return a compact handle of another buffer with the same experts, hosts and device as one of this."""
        self._check_open()
        return handle if handle.buffer is self._identity else adopted(self._end.host, handle, self._identity)


def _check_rows(rows_R: NDArray[np.int64], static_rows: int) -> None:
    """Raise ValueError where rows are more than fit, before anything is launched."""
    if static_rows >= 0 and (rows_R > static_rows).any():
        raise ValueError(f"a rank received {rows_R.max()} rows by these counts, more than static_rows={static_rows}")


def _launch(end: DeviceEndpoint, plan: DevicePlan, counts: torch.Tensor) -> torch.Tensor:
    """Route, and work out every place on the caller's stream; return int32 [R + E], what this rank would announce."""
    ranks, experts = end.num_ranks, end.placement.num_experts
    key = FormKey(plan.geometry, plan.map, None, has_scales=False, is_cached=False, is_routed=plan.routes is None)
    form = end.forms.get(("recall", key), lambda: DispatchForm(end, key, waits=True))
    own, board = board_of(counts[:1], ranks), board_of(counts, ranks)
    messages = torch.full((ranks,), own.data_ptr(), dtype=torch.int64, device=end.where)
    bases = form.bases_of_places(plan, messages.data_ptr(), board.data_ptr())
    end.device.play(form.first, bases, plan.home)
    end.device.play(form.places, bases, plan.home)
    plan.routes = None
    return counts_on(own, 1, ranks, experts)[0]
