"""How many bytes each part of a buffer takes, known before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import NamedTuple

ALIGNMENT_BYTES = 128
"""Every array in an arena begins at a multiple of this: two cache lines, the pair that prefetchers fetch."""

_BELOW_ALIGNMENT = ALIGNMENT_BYTES - 1


def aligned(num_bytes: int) -> int:
    """Round up to the arena's alignment."""
    return (num_bytes + _BELOW_ALIGNMENT) & -ALIGNMENT_BYTES


@dataclass(frozen=True, kw_only=True)
class RowBytes:
    """Bytes of one received row, part by part, and of the row that combine reads."""

    x: int
    scales: int
    topk_idx: int
    topk_weights: int
    token: int
    """the source's token number"""
    y: int

    @property
    def sent(self) -> int:
        """Bytes that travel in a dispatch."""
        return self.x + self.scales + self.topk_idx + self.topk_weights + self.token

    def parts(self) -> list[int]:
        """Return the five parts that travel, in the order in which they lie."""
        return [self.x, self.scales, self.topk_idx, self.topk_weights, self.token]


class RowRegion(NamedTuple):
    """The arrays of a received batch: rows with their scales in one block, their routing in another.

    Two blocks, so that keeping the weights of a batch (autograd does) does not keep its rows.
    """

    scales_offset: int
    data_bytes: int
    weights_offset: int
    token_offset: int
    routing_bytes: int


def row_region(row: RowBytes, num_rows: int) -> RowRegion:
    """Lay out ``num_rows`` received rows. ``exchange/connect.py`` does so for every other rank's batch.

    >>> row_region(RowBytes(x=100, scales=4, topk_idx=16, topk_weights=8, token=0, y=200), 3)
    RowRegion(scales_offset=384, data_bytes=396, weights_offset=128, token_offset=256, routing_bytes=256)
    """
    up, mask = _BELOW_ALIGNMENT, -ALIGNMENT_BYTES  # aligned(), without a call: every dispatch comes here twice
    scales_offset = (row.x * num_rows + up) & mask
    weights_offset = (row.topk_idx * num_rows + up) & mask
    token_offset = (weights_offset + row.topk_weights * num_rows + up) & mask
    data_bytes, routing_bytes = scales_offset + row.scales * num_rows, token_offset + row.token * num_rows
    return RowRegion(scales_offset, data_bytes, weights_offset, token_offset, routing_bytes)


def hit_probability(num_experts: int, local_experts: int, num_topk: int) -> float:
    """Return the probability that a token with K distinct uniform experts visits a rank that owns ``local_experts``.

    1 - C(E - L, K) / C(E, K).

    >>> round(8 * hit_probability(256, 32, 8), 2)
    5.29
    """
    if num_topk > num_experts - local_experts:
        return 1.0
    return 1.0 - prod((num_experts - local_experts - k) / (num_experts - k) for k in range(num_topk))


@dataclass(frozen=True, kw_only=True)
class StepAccount:
    """What one step needs on one rank: a received batch, and an expert output of as many rows.

    *Balanced*: every expert equally likely. *Worst*: every token of every rank comes here (compact layout).
    """

    balanced_rows: int
    balanced_bytes: int
    worst_rows: int
    worst_bytes: int
    padded_rows: int
    """of the padded layout: max_tokens rows for each source and local expert, filled or not"""
    padded_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryAccount:
    """What one rank's buffer commits when it is made, in bytes, and what its steps need of it."""

    step: StepAccount
    control_bytes: int
    eager_bytes: int
    """for small batches that arrive with their announcement"""
    heap_bytes: int
    """the eager slots and what is for tensors; more is added when a step needs it"""
    committed_bytes: int
    """control words and heap, in whole segments"""
    crossing_bytes: int = 0
    """what is on its way between hosts takes at most in one operation, beside what was committed; 0 on one host"""
    pinned_bytes: int = 0
    """host memory through which a device's rows pass between hosts, beside what was committed; 0 elsewhere"""

    def __str__(self) -> str:
        crossing = f"; up to {self.crossing_bytes / 2**20:.1f} MiB on their way between hosts" * bool(
            self.crossing_bytes
        )
        pinned = f"; {self.pinned_bytes / 2**20:.1f} MiB pinned" * bool(self.pinned_bytes)
        return (
            f"{_spell(self.committed_bytes)} committed ({self.control_bytes / 2**10:.0f} KiB of control words, "
            f"{self.eager_bytes / 2**20:.1f} MiB of eager slots); "
            f"a balanced step {self.step.balanced_rows} rows, {_spell(self.step.balanced_bytes)}; "
            f"the worst step {self.step.worst_rows} rows, {_spell(self.step.worst_bytes)}; "
            f"a padded step (low latency) {self.step.padded_rows} rows, {_spell(self.step.padded_bytes)}"
            f"{crossing}{pinned}"
        )


def _spell(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def account_step(
    row: RowBytes, *, num_ranks: int, max_tokens: int, num_topk: int, num_experts: int, local_experts: int
) -> StepAccount:
    """Add up one step of one rank that owns ``local_experts``."""
    reach = hit_probability(num_experts, local_experts, num_topk)
    balanced_rows = ceil(reach * max_tokens * num_ranks)
    worst_rows = max_tokens * num_ranks
    padded_rows = worst_rows * local_experts
    return StepAccount(
        balanced_rows=balanced_rows,
        balanced_bytes=_step_bytes(replace(row, token=0), balanced_rows),
        worst_rows=worst_rows,
        worst_bytes=_step_bytes(replace(row, token=0), worst_rows),
        padded_rows=padded_rows,
        padded_bytes=_step_bytes(replace(row, topk_idx=0, topk_weights=0), padded_rows),
    )


def _step_bytes(row: RowBytes, num_rows: int) -> int:
    region = row_region(row, num_rows)
    weights = row.topk_weights * num_rows
    return sum(aligned(part) for part in (region.data_bytes, region.routing_bytes, row.y * num_rows, weights))
