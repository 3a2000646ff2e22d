"""When rows between hosts go straight to their ranks instead of being forwarded: the rule, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

MOST_BYTES = 1 << 20
"""What a rank sends straight to a host at most, each way."""
_ALL_BYTES = 64 << 20
"""What all ranks of a group together may send straight to one."""


def most_bytes_for(num_ranks: int) -> int:
    """Return what a rank may send straight to a host, so that what arrives at one rank stays bounded.

    >>> most_bytes_for(8) >> 10, most_bytes_for(256) >> 10
    (1024, 256)
    """
    return min(MOST_BYTES, _ALL_BYTES // num_ranks)


@dataclass(frozen=True, kw_only=True)
class StraightRule:
    """Up to how many bytes rows go straight to another host's ranks, and why."""

    most_bytes: int
    """there or back, whichever is more"""
    spare_bytes: int | None
    """how many more bytes may cross than if they were forwarded, there and back; None: any number"""
    reason: str

    def pays(self, there: tuple[int, int], back: tuple[int, int]) -> bool:
        """Whether straight is better: bytes (straight, forwarded) of a dispatch, and of its combine."""
        more = there[0] - there[1] + back[0] - back[1]
        return max(there[0], back[0]) <= self.most_bytes and (self.spare_bytes is None or more <= self.spare_bytes)
