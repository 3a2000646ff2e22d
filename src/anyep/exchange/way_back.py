"""What a kind of combine comes to: the caller's choices, checked, and what follows from them, once a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from anyep.exchange.arguments import check_choice, check_integer
from anyep.exchange.opening import (
    COMBINE_WIRE_CODES,
    LAYOUT_CODES,
    REDUCE_CODES,
    Kind,
    make_header,
)
from anyep.exchange.wire import ELEMENTS
from anyep.transport.base import Words

if TYPE_CHECKING:
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.handle import Handle

_REDUCES = ("rank", "expert", "column")
_WIRES = ("logfmt10",)
"""Those that can be asked for."""


class WayBack(NamedTuple):
    """How rows of one dtype go back to where a dispatch of one kind has them from."""

    reduce: str
    """in which order a token's rows are added: one of REDUCE_CODES"""
    wire: str
    """how they travel, "none" for as they are: one of COMBINE_WIRE_CODES"""
    group: int
    """partial sums of so many consecutive ranks are rounded to y's dtype before they are added; 0: none are"""
    row_bytes: int
    """of a row of y"""
    header: Words
    """without the handle's number"""


def way_back(
    end: Endpoint, handle: Handle, dtype: torch.dtype, *, weighted: bool, reduce: object, wire: object, group: object
) -> WayBack:
    """Return the way for rows of ``dtype``; ``weighted``: with weights beside them. Raises TypeError and ValueError."""
    plan = handle.send
    key = (plan.geometry, plan.by_column, dtype, weighted, reduce, wire, group, type(group))
    try:
        known = end.ways.get(key)
    except TypeError:  # what cannot be a key is no valid choice either
        known = None
    if known is None:
        known = _work_out(end, handle, dtype, weighted=weighted, reduce=reduce, wire=wire, group=group)
        end.ways[key] = known
    return known


def _work_out(
    end: Endpoint, handle: Handle, dtype: torch.dtype, *, weighted: bool, reduce: object, wire: object, group: object
) -> WayBack:
    how, how_sent = _check_reduce(handle, reduce), _check_wire(wire, handle, dtype)
    rounded_group = _check_group(end, handle, how, group)
    row_bytes = dtype.itemsize * end.hidden
    header = make_header(
        kind=Kind.COMBINE,
        layout=LAYOUT_CODES[handle.layout],
        has_weights=weighted,
        element=ELEMENTS[dtype],
        reduce=REDUCE_CODES[how],
        combine_wire=COMBINE_WIRE_CODES[how_sent],
        row_bytes=row_bytes,
        num_topk=end.num_topk,
    )
    return WayBack(how, how_sent, rounded_group, row_bytes, header)


def _check_reduce(handle: Handle, reduce: object) -> str:
    how = (
        ("expert" if handle.send.geometry.padded else "rank")
        if reduce is None
        else check_choice("reduce", reduce, _REDUCES)
    )
    if how == "expert" and not handle.send.geometry.by_expert:
        raise ValueError(
            f"reduce='expert' sums one row for each (token, expert), but this handle's layout is {handle.layout!r}: "
            "dispatch with layout='expert', or use reduce='rank'"
        )
    if how == "column" and not handle.send.by_column:
        raise ValueError(
            "reduce='column' takes a handle of the compact layout of a buffer with a raw wire; use reduce='rank'"
        )
    return how


def _check_group(end: Endpoint, handle: Handle, how: str, group: object) -> int:
    rounded_group = check_integer("group", group, at_least=0)
    if rounded_group and (how == "expert" or handle.layout != "compact"):
        raise ValueError(f"group sums hosts' ranks of layout='compact', and this handle's layout is {handle.layout!r}")
    if rounded_group and end.across is not None and not end.across.has_groups_of(rounded_group):
        raise ValueError(f"group={rounded_group} must be the ranks of a host, in order, where ranks live on several")
    if how == "column" and rounded_group and end.across is None:
        raise ValueError("reduce='column' sums groups of one host's ranks with a handle of by_group; leave group out")
    return rounded_group


def _check_wire(wire: object, handle: Handle, dtype: torch.dtype) -> str:
    if wire is None:
        return "none"
    name = check_choice("wire", wire, _WIRES)
    if not handle.send.geometry.padded or dtype != torch.bfloat16:
        raise ValueError(
            f"wire='logfmt10' takes bfloat16 outputs of layout='padded', got {str(dtype).removeprefix('torch.')} of "
            f"layout={handle.layout!r}; leave wire out"
        )
    return name
