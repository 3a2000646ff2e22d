"""Every operation of the compact layout against what the oracle has passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from anyep.cli.bench.ours import Ours, poison
from anyep.cli.bench.verify import check_combined, check_received, check_same, check_same_batch
from anyep.exchange.handle import Received
from anyep.testing.oracle import Exchange


class CompactChecks:
    """The first result of each kind is judged by the oracle, byte by byte; all others must be the same bits.

    Memory is poisoned before it is written, so that what an operation forgets to write is seen.
    """

    def __init__(self, ours: Ours, exchange: Exchange, wire: str) -> None:
        self._ours = ours
        self._exchange = exchange
        self._wire = wire
        self._batch: Received | None = None
        self._sum = torch.empty(0)

    def first(self) -> dict[str, str]:
        """Judge by the oracle and return the mismatches by operation."""
        judged = self.judge()
        return {**self.again(), **judged}

    def judge(self) -> dict[str, str]:
        """Judge a dispatch and a combine by the oracle, and nothing else."""
        ours, rank = self._ours, self._ours.ep.rank
        poison(ours.dispatch())
        self._batch = _outside(ours.dispatch())
        received = check_received(self._batch, self._exchange, rank, ours.tape, self._wire)
        ours.poison_out()
        self._sum = ours.combine(ours.in_arena).clone()
        combined = check_combined(self._sum, self._exchange, rank, ours.tape, hosts=ours.hosts)
        return {name: text for name, text in (("dispatch", received), ("combine", combined)) if text}

    def beside(self, ours: Ours) -> CompactChecks:
        """Return checks of another buffer that moves the same batch: its results must be the bits judged here."""
        other = CompactChecks(ours, self._exchange, self._wire)
        other._batch, other._sum = self._batch, self._sum
        return other

    def again(self) -> dict[str, str]:
        """Compare every operation's result with what :meth:`first` has judged; return the mismatches."""
        ours = self._ours
        found = {
            "dispatch": self._batch_of(ours.dispatch),
            "dispatch_cached": self._batch_of(ours.dispatch_cached),
            "combine": self._sum_of(lambda: ours.combine(ours.in_arena)),
            "combine_copied_in": self._sum_of(lambda: ours.combine(ours.outside)),
            "dispatch_combine": self.both_of(lambda: ours.both(ours.in_arena)),
            "dispatch_combine_copied_in": self.both_of(lambda: ours.both(ours.outside)),
        }
        return {name: text for name, text in found.items() if text}

    def both_of(self, both: Callable[[], Received]) -> str | None:
        """Judge a dispatch and a combine behind it; the latter writes to ``out``."""
        self._ours.poison_out()
        return self._batch_of(both) or check_same("combined", self._ours.out, self._sum)

    def _batch_of(self, dispatch: Callable[[], Received]) -> str | None:
        poison(self._ours.dispatch())
        assert self._batch is not None
        return check_same_batch(dispatch(), self._batch)

    def _sum_of(self, combine: Callable[[], torch.Tensor]) -> str | None:
        self._ours.poison_out()
        return check_same("combined", combine(), self._sum)


def _outside(received: Received) -> Received:
    """Copy a batch out of the arena."""

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone()

    return replace(
        received,
        x=received.x.clone(),
        scales=copy(received.scales),
        topk_idx=copy(received.topk_idx),
        topk_weights=copy(received.topk_weights),
    )
