"""After an operation that all ranks refuse: messages that had been sent ahead of the announcements' answer.

Nobody will ask for them, and their tags come round again. So every rank tells every rank of other hosts how many it has
sent there, of each kind, and takes delivery of what it is told of, whatever its size.

So a refusal lasts until every rank has come to its second half. That lies in the seam: an engine has no memory for what
nobody has asked for, and a large message leaves when its receiver asks for it, there. Counts in the announcement would
save the word, not the wait; to call a message back would take an answer too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from anyep.exchange.courier import DATA, RETRACTED, ROUTING, STRAIGHT, Part, carry
from anyep.transport.engine import Bytes, Transfer
from anyep.transport.hierarchical import HierarchicalTransport, tag_of

_KINDS = (ROUTING, DATA, STRAIGHT)


class Sender(Part, Protocol):
    """A part that sends."""

    def sent_to(self) -> Mapping[int, tuple[int, int, int]]:
        """Return how many messages of each kind (routing, rows, straight) it has sent to each rank."""
        ...


def retract(transport: HierarchicalTransport, epoch: int, senders: Sequence[Sender]) -> None:
    """Collective. Raises PeerLost and PeerTimeout as an operation does."""
    far = transport.hosts.far_ranks(transport.rank)
    counts_RK = np.zeros((transport.size, len(_KINDS)), np.int64)
    for sender in senders:
        for rank, counts in sender.sent_to().items():
            counts_RK[rank] += counts
    tag = tag_of(RETRACTED, epoch)
    told = [transport.engine.send(rank, tag, counts_RK[rank].view(np.uint8)) for rank in far]
    ahead = [transfer for sender in senders for transfer in sender.pending()]
    carry(
        [_Leaving(transport, [*told, *ahead]), *(_Delivery(transport, rank, epoch) for rank in far)],
        transport,
        epoch,
        f"refusal of {epoch}",
    )


class _Leaving:
    """Sends under way: a rank that ended before they have left would take them with it."""

    def __init__(self, transport: HierarchicalTransport, sent: Sequence[Transfer]) -> None:
        self._transport = transport
        self._sent = sent

    def advance(self) -> bool:
        return False

    def pending(self) -> list[Transfer]:
        return [transfer for transfer in self._sent if not self._transport.is_done(transfer)]


class _Delivery:
    """What one rank has sent, taken delivery of and dropped."""

    def __init__(self, transport: HierarchicalTransport, rank: int, epoch: int) -> None:
        self._transport = transport
        self._rank = rank
        self._epoch = epoch
        self._counts = np.zeros(len(_KINDS), np.int64)
        memory: Bytes = self._counts.view(np.uint8)
        self._word: Transfer | None = transport.engine.receive(rank, tag_of(RETRACTED, epoch), memory)
        self._dropped: list[Transfer] = []

    def advance(self) -> bool:
        if self._word is None or not self._transport.is_done(self._word):
            return False
        self._word, nothing = None, np.empty(0, np.uint8)
        for kind, count in zip(_KINDS, self._counts.tolist(), strict=True):
            for number in range(count):
                tag = tag_of(kind, self._epoch, number)
                self._dropped.append(_Dropped(self._transport.engine.receive(self._rank, tag, nothing)))
        return True

    def pending(self) -> list[Transfer]:
        if self._word is not None:
            return [self._word]
        return [transfer for transfer in self._dropped if not self._transport.is_done(transfer)]


class _Dropped:
    """A message of any size, of which nothing is wanted."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self.rank = transfer.rank

    def done(self) -> bool:
        try:
            return self._transfer.done()
        except ValueError:  # it has another size than none, and is gone now
            return True
