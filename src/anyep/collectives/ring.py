"""A ring of ranks that send tensors to their two neighbours: stages of a pipeline, halos, rotating blocks.

Legend: R ranks, S slots. Each rank keeps S slots for each neighbour in its own memory. Message n from one neighbour:

1. The sender waits until message n - S was taken (*free* n - S), writes the tensor into slot n of the receiver, and
   tells shape and dtype (*sent* n).
2. The receiver waits for *sent* n, copies the tensor out, and tells *free* n.

So a mailbox, like a slot, is written again only after its message was taken, whatever the other ranks do: *sent* n
falls on *sent* n - S, which the receiver has read before it told *free* n - S; *free* n falls on *free* n - S, which
the sender has awaited before it sent n. *Free* 0, told when the ring is made, says where the slots lie.
"""

from __future__ import annotations

import numpy as np
import torch

from anyep.collectives.station import Station, Wiring, place_words
from anyep.collectives.tensors import DESCRIPTION_WORDS, bytes_of, check_out, dense, describe, read_description
from anyep.exchange.arguments import check_integer
from anyep.layout.regions import aligned
from anyep.transport.base import Lane, Ranks

_SENT = Lane(index=0, name="sent", words=DESCRIPTION_WORDS)
_FREE = Lane(index=1, name="free", words=2)
_MOST_BYTES = 1 << 40
_MOST_SLOTS = 1 << 16


class Ring(Station):
    """First in, first out, between neighbours: rank r and ranks (r - 1) % R and (r + 1) % R.

    ``max_bytes``: of the largest tensor. ``slots`` S: how many tensors may be on their way from one rank to another
    before the sender waits. A rank commits 2 S ``max_bytes`` of memory. With two ranks both neighbours are the same,
    and so is the queue; a rank alone is its own neighbour.

    One thread may send while another receives. Messages that arrived before their sender closed can still be received.

    >>> from anyep import local_group
    >>> def rank_main(member):
    ...     with Ring(member, max_bytes=64) as ring:
    ...         ring.send(torch.full((2,), ring.rank), to=ring.next)
    ...         return ring.recv(ring.previous).tolist()
    >>> local_group(3).run(rank_main)
    [[2, 2], [0, 0], [1, 1]]
    """

    label = "ring"

    def __init__(
        self,
        group: object,
        *,
        max_bytes: int,
        slots: int = 4,
        timeout_s: float = 30.0,
        transport: str = "auto",
        kernels: str = "cpu",
    ) -> None:
        def plan(num_ranks: int) -> Wiring:
            check_integer("max_bytes", max_bytes, at_least=0, at_most=_MOST_BYTES)
            check_integer("slots", slots, at_least=1, at_most=_MOST_SLOTS)
            num_neighbours = min(num_ranks, 3) - 1 or 1
            equal = {"max_bytes": max_bytes, "slots": slots}
            heap_bytes = num_neighbours * slots * aligned(max_bytes)
            return Wiring(lanes=(_SENT, _FREE), ring=slots, heap_bytes=heap_bytes, equal=equal)

        super().__init__(group, plan, timeout_s=timeout_s, transport=transport, kernels=kernels)
        self._max_bytes = max_bytes
        self._slots = slots
        self._slot_bytes = aligned(max_bytes)
        self._neighbours = sorted({self.previous, self.next})
        self._sent = dict.fromkeys(self._neighbours, 0)
        self._taken = dict.fromkeys(self._neighbours, 0)
        with self._opening():
            self._inboxes = {rank: self._transport.allocate(slots * self._slot_bytes) for rank in self._neighbours}
            self._outboxes = self._meet()

    @property
    def next(self) -> int:
        """The rank after this one; after the last comes 0."""
        return (self.rank + 1) % self.num_ranks

    @property
    def previous(self) -> int:
        """The rank before this one; before 0 comes the last."""
        return (self.rank - 1) % self.num_ranks

    def send(self, x: torch.Tensor, to: int) -> None:
        """Send a tensor of any shape and dtype to a neighbour; ``x`` may be changed at once.

        Waits while S tensors are on their way there. Raises ValueError for a rank that is no neighbour and a tensor
        of more than ``max_bytes``, TypeError for what is no tensor (nothing was sent: the ring goes on); PeerLost and
        PeerTimeout when the neighbour is gone or takes nothing, which end the ring; ClosedError.
        """
        self._check_open()
        self._check_neighbour("to", to)
        plain = dense("x", x)
        if plain.nbytes > self._max_bytes:
            raise ValueError(
                f"x has {plain.nbytes} bytes, and this ring was made with max_bytes={self._max_bytes}: send parts of it"
            )
        number = self._sent[to] + 1
        if self.num_ranks == 1 and number > self._taken[to] + self._slots:
            raise ValueError(f"all {self._slots} slots of this ring of one rank are full: recv before this send")
        with self._unbroken():
            if number > self._slots:
                self._transport.wait(_FREE, number - self._slots, f"send {number} to rank {to}", _only(to))
            self._kernels.copy(plain.data_ptr(), self._outboxes[to] + self._slot(number), plain.nbytes)
            words_RN = np.tile(describe(plain.shape, plain.dtype), (self.num_ranks, 1))
            self._transport.post(_SENT, number, words_RN, _only(to))
            self._sent[to] = number

    def recv(self, source: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the next tensor from a neighbour, as it was sent; in ``out`` if that is given.

        Waits for it. Raises ValueError for a rank that is no neighbour; TypeError and ValueError where ``out`` is
        not of the sender's dtype and shape (the tensor stays the next one); other errors as :meth:`send`.
        """
        self._check_open()
        self._check_neighbour("source", source)
        number = self._taken[source] + 1
        if self.num_ranks == 1 and number > self._sent[source]:
            raise ValueError("this ring of one rank is empty: send before this recv")
        with self._unbroken():
            words_RN = self._transport.wait(_SENT, number, f"recv {number} from rank {source}", _only(source))
        shape, dtype = read_description(words_RN[source])
        into = torch.empty(shape, dtype=dtype, device="cpu") if out is None else check_out(out, shape, dtype)
        with self._unbroken():
            slot = self._inboxes[source].address + self._slot(number)
            self._kernels.copy(slot, into.data_ptr(), bytes_of(shape, dtype))
            self._transport.post(_FREE, number, np.zeros((self.num_ranks, 1), np.int64), _only(source))
            self._taken[source] = number
        return into if out is None else out

    def _slot(self, number: int) -> int:
        return number % self._slots * self._slot_bytes

    def _meet(self) -> dict[int, int]:
        """Tell each neighbour where its slots lie here; return where this rank's lie at each."""
        words_RN = np.zeros((self.num_ranks, 2), np.int64)
        for rank in self._neighbours:
            words_RN[rank] = place_words(self._inboxes[rank])
        ranks = np.array(self._neighbours, np.int64)
        self._transport.post(_FREE, 0, words_RN, ranks)
        told_RN = self._transport.wait(_FREE, 0, "opening: slots", ranks)
        return {rank: self._address(rank, *told_RN[rank].tolist()) for rank in self._neighbours}

    def _check_neighbour(self, name: str, rank: object) -> None:
        check_integer(name, rank, at_least=0, at_most=self.num_ranks - 1)
        if rank not in self._neighbours:
            raise ValueError(
                f"{name} must be a neighbour of rank {self.rank} in a ring of {self.num_ranks}: "
                f"{' or '.join(map(str, self._neighbours))}, got {rank}"
            )


def _only(rank: int) -> Ranks:
    return np.array([rank], np.int64)
