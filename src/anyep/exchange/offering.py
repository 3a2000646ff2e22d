"""Where the memory that a rank offered for a batch is too small: all ranks offer once more, or refuse together."""

from __future__ import annotations

from anyep.errors import CapacityError
from anyep.exchange.desk import Desk
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.geometry import Geometry
from anyep.exchange.opening import check_memory
from anyep.exchange.receive import Landing, cut_landing
from anyep.layout.regions import row_region
from anyep.transport.base import Words


def offer_again(
    end: Endpoint, geometry: Geometry, desk: Desk, landing: Landing | None, needed: int, epoch: int, step: str
) -> tuple[Landing, Words]:
    """Return memory for ``needed`` rows, ``landing`` or new, and what all ranks offer, int64 [R, OFFER_WORDS].

    Raises RefusedError on all ranks where one has no memory, PeerLost and PeerTimeout.
    """
    desk.offers_RW[:, 0] = 0
    no_memory: CapacityError | None = None
    if landing is None:
        try:
            landing = cut_landing(end, geometry, needed)
        except CapacityError as error:
            no_memory = error
            desk.offers_RW[:, 0] = max(1, row_region(geometry.row, needed).data_bytes)
    if landing is not None:
        desk.offers_RW[:, 1:] = landing.places
    end.transport.post(end.lanes.offer, epoch, desk.offers_RW)
    offers_RW: Words = end.wait(end.lanes.offer, epoch, step).copy()
    offers_RW[end.crowd.absent] = 0
    check_memory(offers_RW[:, 0], step, no_memory)
    assert landing is not None, "a rank without memory says so in its offer, and all refuse"
    end.counters.add(second_offers=1, rounds=1)
    return landing, offers_RW
