"""The way of rows behind a handle: known from its dispatch, or worked out again from its fields.

Legend: T tokens, K top-k, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from anyep.buffer import Buffer
from anyep.compat.deep_ep.elastic_side import Side
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.exchange.handle import Handle
from anyep.exchange.wire import carrying_wire

ROUTING = ("topk_idx", "announced_counts")
"""Fields that say where rows go."""


class Route:
    """A native handle, and the fields it stands for with how often they had been written to."""

    __slots__ = ("adopted", "native", "num_experts", "owner", "versions")

    def __init__(self, owner: object, native: Handle, num_experts: int, *, adopted: bool) -> None:
        """``owner``: whose buffers know it; ``adopted``: whether it has the number that recalled ones have."""
        self.owner = owner
        self.native = native
        self.num_experts = num_experts
        self.adopted = adopted
        self.versions: dict[str, tuple[torch.Tensor, int]] = {}

    def note(self, name: str, value: torch.Tensor) -> None:
        """Remember a field's tensor, unless torch does not count what is written to it, as in inference mode."""
        if not value.is_inference():
            self.versions[name] = value, value._version

    def fits(self, fields: dict[str, Any]) -> bool:
        """Whether the fields are as they were; those that nobody has looked at are."""
        if fields["num_experts"] != self.num_experts:
            return False
        for name in ROUTING:
            value = fields.get(name, fields)
            if value is not fields and not self._as_it_was(name, value):
                return False
        return True

    def _as_it_was(self, name: str, value: torch.Tensor | None) -> bool:
        noted = self.versions.get(name)
        return noted is not None and value is noted[0] and value._version == noted[1]

    def native_for(self, side: Side, ep: Buffer) -> Handle:
        """Return the handle as ``ep`` takes it, under a number that is the same where it was recalled."""
        if self.owner is not side.natives:
            return ep.adopt(self.native)
        if not self.adopted:
            self.native, self.adopted = ep.adopt(self.native), True
        return self.native


def static_rows_of(side: Side, handle: EPHandle) -> int | None:
    """Return the rows of a batch of fixed size, which the exchange keeps; None where it knows those that arrived."""
    if handle.do_expand or not side.keeps_order or handle.is_exact:
        return None
    return handle.num_recv_tokens  # type: ignore[no-any-return]


def native_handle(side: Side, handle: EPHandle, ep: Buffer) -> Handle:
    """Return the handle of the dispatch, as ``ep`` takes it. Exchanges something in one case alone:

    ``announced_counts`` is None. All ranks tell theirs then, by a dispatch whose rows nobody reads.
    """
    route: Route | None = handle.route
    if route is not None and route.fits(handle.fields):
        return route.native_for(side, ep)
    topk_idx = handle.topk_idx
    if handle.announced_counts is None:
        handle.announced_counts = _ask_for_counts(side, handle.num_experts, topk_idx)
    recalled = ep.recall(topk_idx, handle.announced_counts)
    handle.route = Route(side.natives, recalled, handle.num_experts, adopted=True)
    for name in ROUTING:
        handle.route.note(name, getattr(handle, name))
    return recalled


def _ask_for_counts(side: Side, num_experts: int, topk_idx: torch.Tensor) -> torch.Tensor:
    nothing = carrying_wire(torch.uint8, 1, 0, torch.float32, by_column=True)
    ep = side.natives.variant(num_experts, nothing, topk_idx.shape[1])
    x = torch.zeros((topk_idx.shape[0], 1), dtype=torch.uint8, device="cpu")
    announced = ep.dispatch(x, topk_idx).handle.announced
    assert announced is not None, "wires with sums by column keep what was announced"
    return torch.from_numpy(announced)
