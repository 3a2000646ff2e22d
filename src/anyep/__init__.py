"""Expert-parallel communication for Mixture-of-Experts models.

The layers, lowest first; imports go down only::

    errors config machine         words everybody shares, and the machine below
    layout numerics               who goes where; what the bytes are
    kernels | transport           loops over rows; how bytes move (neither sees the other)
    exchange collectives          dispatch and combine, the protocol; rows by number, rings, all-gathers
    buffer                        the public class
    testing cli                   on top
"""

from anyep.buffer import Buffer
from anyep.errors import (
    AnyEPError,
    CapacityError,
    ClosedError,
    PeerError,
    PeerLost,
    PeerTimeout,
    Unavailable,
)
from anyep.exchange.event import Pending
from anyep.exchange.explain import Explanation
from anyep.exchange.handle import Combined, Handle, Received
from anyep.exchange.options import memory_account
from anyep.exchange.stats import Stats
from anyep.transport.generations import Generations
from anyep.transport.inprocess import local_group
from anyep.version import __version__

__all__ = [
    "AnyEPError",
    "Buffer",
    "CapacityError",
    "ClosedError",
    "Combined",
    "Explanation",
    "Generations",
    "Handle",
    "PeerError",
    "PeerLost",
    "PeerTimeout",
    "Pending",
    "Received",
    "Stats",
    "Unavailable",
    "__version__",
    "local_group",
    "memory_account",
]
