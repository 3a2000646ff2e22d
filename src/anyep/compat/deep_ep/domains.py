"""Which ranks count as one host: DeepEP's scale-up domain, 8 ranks by default as there, or ``ANYEP_RANKS_PER_HOST``.

All of one machine's ranks share memory however many they are; domains decide which of the two forms of a handle a call
returns, and in how many stages combine rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyep.config import ranks_per_host

_RANKS_PER_HOST = 8


@dataclass(frozen=True, kw_only=True)
class Domain:
    """R ranks, so many a host; the last host may have fewer."""

    num_ranks: int
    per_host: int

    @property
    def num_hosts(self) -> int:
        return -(-self.num_ranks // self.per_host)

    @property
    def crosses_hosts(self) -> bool:
        return self.num_ranks > self.per_host


def domain_of(num_ranks: int) -> Domain:
    """Return the domain of ``num_ranks`` ranks. ValueError where ANYEP_RANKS_PER_HOST is no such number."""
    return Domain(num_ranks=num_ranks, per_host=ranks_per_host() or _RANKS_PER_HOST)
