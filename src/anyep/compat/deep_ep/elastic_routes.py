"""The way of rows behind a handle: known from its dispatch, or worked out again from its fields.

Legend: T tokens, K top-k, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from anyep.compat.deep_ep.elastic_context import ElasticContext
from anyep.compat.deep_ep.ep_handle import EPHandle, HandleKind
from anyep.compat.deep_ep.native import ask_everybody
from anyep.exchange.calls import Calls
from anyep.exchange.device.announced import announced_on
from anyep.exchange.device.plan import DevicePlan
from anyep.exchange.handle import Handle
from anyep.exchange.ledger import D_EXPERTS
from anyep.exchange.wire import carrying_wire

ROUTING = ("topk_idx", "announced_counts")
"""Fields that say where rows go."""


class Route:
    """A native handle, and the fields it stands for with how often they had been written to."""

    __slots__ = ("by_expert", "native", "versions")

    def __init__(self, native: Handle) -> None:
        self.native = native
        self.by_expert: tuple[int, Handle] | None = None
        """an alignment, and the same dispatch with a row for each (token, column), once a combine has wanted it"""
        self.versions: dict[str, tuple[Any, int]] = {}

    def note(self, name: str, value: torch.Tensor) -> None:
        """Remember a field's tensor; -1 where torch does not count what is written to it, as in inference mode."""
        self.versions[name] = value, -1 if value.is_inference() else value._version

    def fits(self, handle: EPHandle) -> bool:
        """Whether the fields are as they were."""
        if handle.num_experts != self.native.send.geometry.shape.dims[D_EXPERTS]:
            return False
        for name in ROUTING:
            noted = self.versions.get(name)
            if noted is None or handle.fields.get(name) is not noted[0]:
                return False
        return self.unwritten()

    def unwritten(self) -> bool:
        """Whether nobody has written to the fields that were looked at."""
        return all(version >= 0 and value._version == version for value, version in self.versions.values())


def route_of(handle: EPHandle, native: Handle) -> Route:
    """Return what is noted of a handle's fields."""
    if handle.route is None:
        handle.route = Route(native)
    route: Route = handle.route
    return route


def static_rows_of(context: ElasticContext, kind: HandleKind) -> int | None:
    """Return the rows of a batch of fixed size, which the exchange keeps; None where it knows those that arrived."""
    compact = not kind.do_expand or context.natives.device is not None  # a device's slabs are made from such a batch
    return kind.static_rows if kind.static_rows >= 0 and context.keeps_order and compact else None


def native_handle(context: ElasticContext, handle: EPHandle, ep: Calls) -> Handle:
    """Return the handle of the dispatch, as ``ep`` takes it: the dispatch's own, or from the handle's fields."""
    source: Any = handle.source
    if handle.untouched and handle.route is None:  # nobody has looked at a field
        native: Handle = source.native
        return native if source.context.natives is context.natives else ep.handles.adopt(native)
    return _from_fields(context, handle, ep)


def _from_fields(context: ElasticContext, handle: EPHandle, ep: Calls) -> Handle:
    """Return the same from what was noted of fields, or from the fields. Exchanges something in two cases:

    ``announced_counts`` is None, and between hosts, where ranks forward for each other and handles do not say for whom.
    All ranks tell each other then, by a dispatch whose rows nobody reads.
    """
    route: Route | None = handle.route
    if route is not None and (route.unwritten() if handle.untouched else route.fits(handle)):
        return ep.handles.adopt(route.native)
    topk_idx = handle.topk_idx
    if ep.num_hosts > 1:
        return _asked_again(context, handle)
    if handle.announced_counts is None:
        handle.announced_counts = _ask_for_counts(context, handle.num_experts, topk_idx)
    recalled = ep.handles.recall(topk_idx, handle.announced_counts)
    handle.route = route = Route(recalled)
    for name in ROUTING:
        route.note(name, getattr(handle, name))
    return recalled


def rows_by_expert(context: ElasticContext, handle: EPHandle, ep: Calls) -> Handle:
    """Return the handle of the same dispatch with a row for each (token, column), from which each row goes back."""
    native = native_handle(context, handle, ep)  # asks the others where the handle does not have their counts
    if ep.num_hosts == 1:
        counts, alignment = handle.announced_counts, handle.expert_alignment
        assert counts is not None, "asked for just now"
        route = route_of(handle, native)
        if route.by_expert is None or route.by_expert[0] != alignment:
            known = ep.handles.recall(handle.topk_idx, counts, layout="expert", expert_alignment=alignment)
            route.by_expert = alignment, known
        return ep.handles.adopt(route.by_expert[1])
    return ask(context, handle.num_experts, handle.topk_idx, None, layout="expert")


def _asked_again(context: ElasticContext, handle: EPHandle) -> Handle:
    rows = static_rows_of(context, handle.kind)
    native = ask(context, handle.num_experts, handle.topk_idx, rows)
    handle.announced_counts = counts_announced(native, handle.topk_idx.device)
    handle.route = route = Route(native)
    for name in ROUTING:
        route.note(name, getattr(handle, name))
    return native


def ask(
    context: ElasticContext, num_experts: int, topk_idx: torch.Tensor, static_rows: int | None, layout: str = "compact"
) -> Handle:
    """Return the handle that all ranks agree on by a dispatch whose rows nobody reads."""
    nothing = carrying_wire(torch.uint8, 1, 0, torch.float32, by_column=True)
    ep = context.natives.variant(num_experts, nothing, topk_idx.shape[1], static_rows=static_rows)
    return ask_everybody(ep, topk_idx, layout)


def _ask_for_counts(context: ElasticContext, num_experts: int, topk_idx: torch.Tensor) -> torch.Tensor:
    return counts_announced(ask(context, num_experts, topk_idx, None), topk_idx.device)


def counts_announced(native: Handle, where: torch.device) -> torch.Tensor:
    """Return what all ranks announced, int32 [R, R + num_experts], where their tensors lie."""
    if isinstance(native.send, DevicePlan):
        return announced_on(native.send).clone()
    assert native.announced is not None, "wires with sums by column keep what was announced"
    return torch.from_numpy(native.announced.copy()).to(where)
