"""The first message of every operation: what this rank is about to do, so that ranks that disagree find out.

A message is a *header*, equal on all ranks when they agree, a *status*, and a body for each destination.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from anyep.errors import CapacityError
from anyep.transport.base import Words


class Kind(IntEnum):
    """Operations, as they stand in headers and messages."""

    BARRIER = 1
    DISPATCH = 2
    CACHED_DISPATCH = 3
    COMBINE = 4

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


class RefusedError(Exception):
    """Every rank refuses this operation at the same point: the buffer stays usable. Carries the public error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


_LAYOUTS = {0: "none", 1: "compact", 2: "expert", 3: "padded"}
_REDUCES = {0: "none", 1: "rank", 2: "expert", 3: "column"}
LAYOUT_CODES = {name: code for code, name in _LAYOUTS.items()}
REDUCE_CODES = {name: code for code, name in _REDUCES.items()}
_COMBINE_WIRES = {0: "none", 1: "logfmt10"}
COMBINE_WIRE_CODES = {name: code for code, name in _COMBINE_WIRES.items()}
_ELEMENTS = {-1: "none", 0: "bfloat16", 1: "float16", 2: "float32"}


_DEFAULTS = {
    "kind": 0,
    "layout": 0,
    "idx_bytes": 0,
    "has_weights": 0,
    "handle_epoch": -1,
    "element": -1,
    "reduce": 0,
    "combine_wire": 0,
    "row_bytes": 0,
    "scale_bytes": 0,
    "num_topk": 0,
    "block_rows": 0,
    "static_rows": -1,
}
"""Fields of a header, in order: all must be the same on all ranks."""
_FIELDS = list(_DEFAULTS)
_HANDLE_EPOCH = _FIELDS.index("handle_epoch")
STATUS = len(_FIELDS)
"""Column of the status: 0, or the bytes that a rank could not allocate."""
BODY = STATUS + 1
"""First column of the body."""


def make_header(**fields: int) -> Words:
    """Return header and status, int64 [BODY]; what is not given is "none"."""
    assert fields.keys() <= _DEFAULTS.keys(), "a header has no other fields"
    return np.array([*(_DEFAULTS | fields).values(), 0], np.int64)


def naming_handle(header: Words, epoch: int) -> Words:
    """Return a header for an operation that goes by the handle of dispatch ``epoch``."""
    named: Words = header.copy()
    named[_HANDLE_EPOCH] = epoch
    return named


_TEXT: dict[str, Callable[[int], str]] = {
    "kind": lambda value: Kind(value).label,
    "layout": lambda value: repr(_LAYOUTS[value]),
    "idx_bytes": lambda value: f"int{8 * value}",
    "has_weights": lambda value: "given" if value else "not given",
    "handle_epoch": lambda value: f"of dispatch {value}" if value >= 0 else "none",
    "element": lambda value: _ELEMENTS[value],
    "reduce": lambda value: repr(_REDUCES[value]),
    "combine_wire": lambda value: repr(_COMBINE_WIRES[value]),
    "row_bytes": str,
    "scale_bytes": str,
    "num_topk": str,
    "block_rows": str,
    "static_rows": lambda value: str(value) if value >= 0 else "not fixed",
}
_NAMES = {
    "kind": "the operation",
    "layout": "layout",
    "idx_bytes": "topk_idx.dtype",
    "has_weights": "topk_weights",
    "handle_epoch": "the handle",
    "element": "the dtype of y",
    "reduce": "reduce",
    "combine_wire": "the wire of combine",
    "row_bytes": "the number of bytes a row",
    "scale_bytes": "the number of bytes of scales a row",
    "num_topk": "num_topk",
    "block_rows": "the number of rows for each expert, R * max_tokens_per_rank,",
    "static_rows": "static_rows",
}


def check_agreement(header: Words, received_RW: Words, step: str, own: Exception | None = None) -> None:
    """Raise RefusedError on every rank where headers differ, or where a rank had no memory (``own``: this one's)."""
    if not (received_RW[:, :STATUS] == header[:STATUS]).all():
        raise RefusedError(ValueError(_disagreement(received_RW, step)))
    check_memory(received_RW[:, STATUS], step, own)


def check_memory(status_R: Words, step: str, own: Exception | None = None) -> None:
    """Raise RefusedError where a rank reports bytes that it could not allocate; on that rank caused by ``own``."""
    if not status_R.any():
        return
    short = {int(rank): int(status_R[rank]) for rank in np.flatnonzero(status_R)}
    text = ", ".join(f"rank {rank} could not allocate {needed / 2**20:.1f} MiB" for rank, needed in short.items())
    error = CapacityError(
        f"{step}: {text}; release received tensors, send fewer tokens, or free memory on that machine"
    )
    error.__cause__ = own
    raise RefusedError(error)


def _disagreement(received_RW: Words, step: str) -> str:
    for column, name in enumerate(_FIELDS):
        values = received_RW[:, column]
        if (values != values[0]).any():
            groups = [(int(value), np.flatnonzero(values == value).tolist()) for value in np.unique(values)]
            said = " and ".join(f"{_TEXT[name](value)} on {_ranks(ranks)}" for value, ranks in groups)
            return (
                f"{step}: ranks disagree: {_NAMES[name]} is {said}; "
                "every rank must make the same calls in the same order with the same options"
            )
    raise AssertionError("called without a disagreement")


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
