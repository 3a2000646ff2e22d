"""What every engine asks of its caller, and how it tells of a message that cannot come."""

from __future__ import annotations

import numpy as np

from anyep.errors import PeerLost
from anyep.transport.engine import NUM_TAGS, Bytes
from anyep.transport.liveness import Departure

_HOW = {"closed": "closed its engine", "died": "died, or cannot be reached any more", "failed": "ended with an error"}


def check_message(own_rank: int, size: int, rank: int, tag: int, memory: Bytes) -> None:
    """Raise TypeError or ValueError for what cannot be a message between ``own_rank`` and ``rank``."""
    if not 0 <= rank < size or rank == own_rank:
        raise ValueError(f"rank must be another one of 0 to {size - 1}, got {rank} on rank {own_rank}")
    if not 0 <= tag < NUM_TAGS:
        raise ValueError(f"tag must be from 0 to {NUM_TAGS - 1}, got {tag}")
    if not isinstance(memory, np.ndarray) or memory.dtype != np.uint8:
        found = memory.dtype if isinstance(memory, np.ndarray) else type(memory).__name__
        raise TypeError(f"memory must be a NumPy array of uint8, got {found}; use .view(numpy.uint8)")
    if memory.ndim != 1 or not memory.flags.c_contiguous:
        raise ValueError(f"memory must be one-dimensional and contiguous, got shape {memory.shape}")


def check_writable(memory: Bytes) -> None:
    """Raise ValueError for memory in which nothing can arrive."""
    if not memory.flags.writeable:
        raise ValueError("memory for a message to arrive in must be writable")


def wrong_size(rank: int, tag: int, expected: int, came: int) -> ValueError:
    return ValueError(
        f"the message from rank {rank} under tag {tag} should have {expected} bytes and has {came}: "
        "both sides have to agree on its size"
    )


def tag_taken(rank: int, tag: int, verb: str) -> ValueError:
    return ValueError(f"a message under tag {tag} is being {verb} rank {rank} already: a tag carries one at a time")


def peer_lost(rank: int, own_rank: int, tag: int, departure: Departure, verb: str, why: str = "") -> PeerLost:
    """Return the error for a message that ``own_rank`` ``verb`` ("awaits from", "sends to") a rank that has left.

    A rank that left because of others passes its blame on. ``why``: what the network said.
    """
    blame = departure.blame
    ranks = (rank,) if blame is None else blame.ranks
    told = f" ({why})" if why else ""
    text = (
        f"rank {rank} {_HOW[departure.how]}{told} before the message came through that rank {own_rank} {verb} it "
        f"under tag {tag}; look at the output of rank {', '.join(map(str, ranks))}"
    )
    return PeerLost(text, ranks=ranks, step=f"network: tag {tag}")
