"""How ranks find each other: one verb, taken from whatever started them."""

from __future__ import annotations

from typing import Protocol


class Rendezvous(Protocol):
    """Only the constructor of a buffer talks through this; nothing afterwards does."""

    rank: int
    size: int

    def allgather(self, item: bytes) -> list[bytes]:
        """Return every rank's item, in rank order. Collective, bounded by the group's own timeout."""
        ...
