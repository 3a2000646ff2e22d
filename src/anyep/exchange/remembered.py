"""What a dispatch by a handle takes from it, on the host and on a device alike."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from anyep.exchange.opening import naming_handle

if TYPE_CHECKING:
    import torch

    from anyep.exchange.handle import Handle
    from anyep.exchange.outgoing import Outgoing
    from anyep.transport.base import Words


def header_of(out: Outgoing) -> Words:
    """Return the header of a dispatch, which names the handle that it goes by."""
    if out.cached is None:
        return out.geometry.header
    return naming_handle(out.geometry.cached_header, out.cached.epoch)


def weights_for_combine(out: Outgoing) -> torch.Tensor | None:
    """Return a copy of what combine will multiply rows with, [T, K]; None where it multiplies with nothing."""
    return out.topk_weights.clone() if out.geometry.padded and out.topk_weights is not None else None


def handle_again(out: Outgoing) -> Handle | None:
    """Return the handle that a dispatch goes by, with its own weights where combine will want them; None without."""
    weights = weights_for_combine(out)
    return out.cached if out.cached is None or weights is None else replace(out.cached, topk_weights=weights)
