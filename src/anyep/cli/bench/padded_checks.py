"""Every operation of the padded layout against what the oracle has passed.

The rows of a padded batch that are defined, one block behind the other, are the rows of the expert layout: that is how
they are kept and judged. What is said of their sources is judged beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch

from anyep.cli.bench.ours import POISON
from anyep.cli.bench.padded import LOGFMT, Padded
from anyep.cli.bench.verify import check_combined, check_rows, check_same
from anyep.exchange.handle import Received
from anyep.testing.oracle import Arrivals, Exchange


@dataclass(frozen=True, kw_only=True, eq=False)
class DefinedRows:
    """A padded batch without its undefined rows, outside the arena. L local experts, R ranks, M defined rows."""

    x: torch.Tensor
    """[M, H]"""
    scales: torch.Tensor | None
    """[M, G]"""
    source_token: torch.Tensor
    """[M] int32"""
    source_begin: torch.Tensor
    """[L, R] int32"""
    source_count: torch.Tensor
    """[L, R] int32"""

    @classmethod
    def of(cls, received: Received) -> DefinedRows:
        assert received.source_token is not None
        assert received.source_begin is not None
        assert received.source_count is not None
        return cls(
            x=_defined(received.x, received.counts),
            scales=None if received.scales is None else _defined(received.scales, received.counts),
            source_token=_defined(received.source_token, received.counts),
            source_begin=received.source_begin,
            source_count=received.source_count,
        )


def check_defined(batch: DefinedRows, exchange: Exchange, rank: int, padded: Padded, wire: str) -> str | None:
    """Compare with the oracle: sources, rows and scales. ``exchange`` is of the expert layout."""
    arrivals = exchange.arrivals[rank]
    count = _source_counts(arrivals, len(exchange.local_experts(rank)), exchange.num_ranks)
    parts = (batch.x,) if batch.scales is None else (batch.x, batch.scales)
    return (
        check_same("source_count", batch.source_count, count)
        or check_same("source_begin", batch.source_begin, (count.cumsum(1) - count).int())
        or check_same("source_token", batch.source_token[:, None], arrivals.token.int()[:, None])
        or check_rows(parts, arrivals, rank, padded.tape, wire)
    )


class PaddedChecks:
    """The first result of each kind is judged by the oracle, byte by byte; all others must be the same bits."""

    def __init__(self, padded: Padded, exchange: Exchange, wire: str) -> None:
        self._padded = padded
        self._exchange = replace(exchange, layout="expert")
        self._wire = wire
        self._batch: DefinedRows | None = None
        self._sums: dict[str | None, torch.Tensor] = {}

    def first(self) -> dict[str, str]:
        """Judge by the oracle and return the mismatches by operation."""
        padded, rank = self._padded, self._padded.ep.rank
        poison_defined(padded.dispatch())
        self._batch = DefinedRows.of(padded.dispatch())
        judged = {"dispatch_padded": check_defined(self._batch, self._exchange, rank, padded, self._wire)}
        for wire in self._wires():
            padded.poison_out()
            self._sums[wire] = padded.combine(wire=wire).clone()
            judged[_name("combine_padded", wire)] = check_combined(
                self._sums[wire], self._exchange, rank, padded.tape, weighs=True, logfmt=wire == LOGFMT
            )
        return {**self.again(), **{name: text for name, text in judged.items() if text}}

    def again(self) -> dict[str, str]:
        """Compare every operation's result with what :meth:`first` has judged; return the mismatches."""
        found = {"dispatch_padded": self._batch_of(self._padded.dispatch)}
        for wire in self._wires():
            found[_name("combine_padded", wire)] = self._sum_of(wire)
            found[_name("dispatch_combine_padded", wire)] = self._both_of(wire)
        return {name: text for name, text in found.items() if text}

    def both_of(self, both: Callable[[], Received], wire: str | None = None) -> str | None:
        """Judge a dispatch and a combine behind it; the latter writes to ``out``."""
        self._padded.poison_out()
        return self._batch_of(both) or check_same("combined", self._padded.out, self._sums[wire])

    def _both_of(self, wire: str | None) -> str | None:
        return self.both_of(lambda: self._padded.both(wire), wire)

    def _wires(self) -> list[str | None]:
        return [None, LOGFMT] if self._padded.has_logfmt else [None]

    def _batch_of(self, dispatch: Callable[[], Received]) -> str | None:
        poison_defined(self._padded.dispatch())
        got, verified = DefinedRows.of(dispatch()), self._batch
        return next(
            (
                text
                for field in fields(DefinedRows)
                if (text := check_same(field.name, _rows_of(got, field.name), _rows_of(verified, field.name)))
            ),
            None,
        )

    def _sum_of(self, wire: str | None) -> str | None:
        self._padded.poison_out()
        return check_same("combined", self._padded.combine(wire=wire), self._sums[wire])


def poison_defined(received: Received) -> None:
    """Overwrite a batch's defined rows before their memory is used again."""
    for tensor in (received.x, received.source_token):
        assert tensor is not None
        for block, count in zip(tensor, received.counts, strict=True):
            block[:count].view(torch.uint8).fill_(POISON)


def _defined(blocks: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Copy the first ``counts[l]`` of each block of [L, P, ...]: [M, ...]."""
    rows = torch.empty(sum(counts), *blocks.shape[2:], dtype=blocks.dtype)
    for block, count, end in zip(blocks, counts, accumulate(counts), strict=True):
        rows[end - count : end] = block[:count]
    return rows


def _source_counts(arrivals: Arrivals, num_local: int, num_ranks: int) -> torch.Tensor:
    """Return how many rows each local expert gets from each source: int32 [L, R]."""
    expert = arrivals.topk_idx.amax(dim=1).long()
    counts = torch.bincount(expert * num_ranks + arrivals.source, minlength=num_local * num_ranks)
    return counts.view(num_local, num_ranks).int()


def _rows_of(batch: DefinedRows | None, name: str) -> torch.Tensor | None:
    tensor: torch.Tensor | None = getattr(batch, name)
    return tensor[:, None] if tensor is not None and tensor.dim() == 1 else tensor


def _name(op: str, wire: str | None) -> str:
    return op if wire is None else f"{op}_{wire}"
