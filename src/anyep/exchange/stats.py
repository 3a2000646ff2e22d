"""Counters of one rank: what moved, how often, and how long it waited."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A snapshot; all numbers count from the buffer's construction, on this rank alone."""

    dispatches: int
    cached_dispatches: int
    combines: int
    barriers: int
    rows_sent: int
    rows_received: int
    bytes_sent: int
    """rows with scales and routing that this rank wrote, its own included"""
    bytes_combined: int
    """rows that this rank read back"""
    copied_in_bytes: int
    """expert outputs that lay outside the arena and were copied in first"""
    refused: int
    """operations that every rank refused together"""
    waiting_s: float


class Counters:
    """Counts in place; operations of one buffer run one after another, so no lock is needed."""

    def __init__(self) -> None:
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
        self.waiting_s = 0.0

    def sent(self, row_bytes: int, rows_sent: int, rows_received: int) -> None:
        """Count one dispatch's rows."""
        self.rows_sent += rows_sent
        self.rows_received += rows_received
        self.bytes_sent += rows_sent * row_bytes

    def returned(self, row_bytes: int, rows: int) -> None:
        """Count one combine's rows."""
        self.combines += 1
        self.bytes_combined += rows * row_bytes

    def snapshot(self) -> Stats:
        return Stats(**vars(self))
