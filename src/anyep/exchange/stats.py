"""Counters of one rank: what moved, how often, which way, and for whom it waited."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from anyep.transport.base import Words

if TYPE_CHECKING:
    from anyep.exchange.outgoing import Outgoing


@dataclass(frozen=True, kw_only=True, eq=False)
class Stats:
    """A snapshot; all numbers count from the buffer's construction, on this rank alone."""

    dispatches: int
    cached_dispatches: int
    combines: int
    barriers: int
    rows_sent: int
    """one for each token and destination rank; in the expert and padded layouts one for each (token, column)"""
    rows_received: int
    """of batches as they are: padding rows count, and all rows of padded blocks; rows_by_source has those that came"""
    bytes_sent: int
    """rows_sent with their scales and routing, this rank's own included"""
    bytes_combined: int
    """rows that this rank read back"""
    copied_in_bytes: int
    """expert outputs that lay outside the arena and were copied in first"""
    refused: int
    """operations that every rank refused together"""
    eager_rows: int
    """rows that came along with an announcement, to or back from a rank"""
    direct_rows: int
    """rows that were written to, or read from, their final place"""
    far_rows: int
    """rows to or from ranks of other hosts, which cross once a token and host"""
    straight_rows: int
    """those of them that go to, or back from, their ranks straight, and are not forwarded"""
    network_bytes: int
    """bytes that this rank handed to the network between hosts, messages included"""
    second_offers: int
    """dispatches in which a rank's first offer of memory was too small"""
    message_rounds: int
    """messages of all ranks, or of some, that were awaited: 1 for each hop of an operation"""
    waiting_s: float
    """the sum over all sources of what each was waited for"""
    waiting_s_by_source: torch.Tensor
    """float64 [R]: how long after this rank had begun to wait each rank's messages were sent"""
    rows_by_source: torch.Tensor
    """int64 [R]: rows received from each rank, without padding"""
    rows_by_expert: torch.Tensor
    """int64 [L]: rows received for each local expert"""


_Ended = tuple[int, tuple[int, int, int], int, int, int, int]
"""Kind, rows each way, rounds of messages, rows received or bytes read back, rows and bytes sent."""
_DISPATCH, _CACHED, _COMBINE = range(3)
_MOST_NOTES = 1024
"""Notes that are kept before they are added up, where nobody has asked for a snapshot meanwhile."""


class Counters:
    """Counts, from the caller's thread and the background: dispatches and combines are noted, and added up later."""

    def __init__(self, num_ranks: int, num_local: int) -> None:
        self._adding = threading.Lock()
        self._ended: deque[_Ended] = deque()
        self.dispatches = 0
        self.cached_dispatches = 0
        self.combines = 0
        self.barriers = 0
        self.rows_sent = 0
        self.rows_received = 0
        self.bytes_sent = 0
        self.bytes_combined = 0
        self.copied_in_bytes = 0
        self.refused = 0
        self.eager_rows = 0
        self.direct_rows = 0
        self.far_rows = 0
        self.straight_rows = 0
        self.second_offers = 0
        self.message_rounds = 0
        self.rows_by_source: Words = np.zeros(num_ranks, np.int64)
        """of dispatches that are not cached: compiled bookkeeping adds to it (exchange/settle.py), in any thread"""
        self.rows_by_expert: Words = np.zeros(num_local, np.int64)
        self._cached_by_source: Words = np.zeros(num_ranks, np.int64)
        """of cached ones: apart, as numpy's sums would lose what compiled code adds to the same numbers meanwhile"""
        self._cached_by_expert: Words = np.zeros(num_local, np.int64)

    def add(
        self,
        *,
        barriers: int = 0,
        copied_in_bytes: int = 0,
        refused: int = 0,
        second_offers: int = 0,
        rounds: int = 0,
        straight_rows: int = 0,
    ) -> None:
        """Count what may happen in two threads at once; ``rounds``: of messages."""
        with self._adding:
            self.barriers += barriers
            self.copied_in_bytes += copied_in_bytes
            self.refused += refused
            self.second_offers += second_offers
            self.message_rounds += rounds
            self.straight_rows += straight_rows

    def dispatched(self, out: Outgoing, sent_rows: tuple[int, int, int], received: int, rounds: int) -> None:
        """Note one dispatch; ``sent_rows``: eager, direct and far, which count each token once a rank."""
        plan = out.plan
        rows = int(plan.numbers("rank_entries").sum()) if out.geometry.by_expert else sum(sent_rows)
        if out.cached is not None:
            with self._adding:
                self._cached_by_source += plan.numbers("source_entries")
                self._cached_by_expert += plan.numbers("counts")
        kind = _DISPATCH if out.cached is None else _CACHED
        self._note((kind, sent_rows, rounds, received, rows, rows * out.geometry.sent_bytes))

    def combined(self, bytes_read: int, sent_rows: tuple[int, int, int] = (0, 0, 0), rounds: int = 1) -> None:
        """Note one combine: bytes that this rank read back, rows that it let others have."""
        self._note((_COMBINE, sent_rows, rounds, bytes_read, 0, 0))

    def _note(self, ended: _Ended) -> None:
        """Keep it for later: adding up would cost every operation more than the note."""
        self._ended.append(ended)
        if len(self._ended) >= _MOST_NOTES:
            with self._adding:
                self._add_up()

    def _add_up(self) -> None:
        while self._ended:
            kind, (eager_rows, direct_rows, far_rows), rounds, came, rows, num_bytes = self._ended.popleft()
            self.dispatches += kind == _DISPATCH
            self.cached_dispatches += kind == _CACHED
            self.combines += kind == _COMBINE
            self.eager_rows += eager_rows
            self.direct_rows += direct_rows
            self.far_rows += far_rows
            self.message_rounds += rounds
            self.rows_sent += rows
            self.bytes_sent += num_bytes
            if kind == _COMBINE:
                self.bytes_combined += came
            else:
                self.rows_received += came

    def dispatched_on_device(self, *, cached: bool, rows: int) -> None:
        """Count one dispatch; ``rows`` that were received, 0 where the host does not know."""
        with self._adding:
            self.cached_dispatches += cached
            self.dispatches += not cached
            self.rows_received += rows
            self.message_rounds += 1

    def snapshot(self, waited_ns_R: Words, network_bytes: int = 0) -> Stats:
        """Return a copy of all counters; ``waited_ns_R`` [R]: nanoseconds that each rank was waited for."""
        with self._adding:
            self._add_up()
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        by_source = torch.from_numpy(waited_ns_R.astype(np.float64) / 1e9)
        return Stats(
            **counts,
            network_bytes=network_bytes,
            waiting_s=float(by_source.sum()),
            waiting_s_by_source=by_source,
            rows_by_source=torch.from_numpy(self.rows_by_source + self._cached_by_source),
            rows_by_expert=torch.from_numpy(self.rows_by_expert + self._cached_by_expert),
        )
