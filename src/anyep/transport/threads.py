"""The in-process transport: every rank's memory is everybody's, at the same address."""

from __future__ import annotations

from collections.abc import Sequence

from anyep.transport.arena import Arena, Segment, private_segment
from anyep.transport.base import Lane, Place
from anyep.transport.control import ControlLayout
from anyep.transport.inprocess import LocalMember
from anyep.transport.memory import MemoryTransport


class InProcessTransport(MemoryTransport):
    """Ranks are threads. A thread that ends without closing its buffer is noticed by the timeout only."""

    name = "inprocess"

    def __init__(
        self,
        member: LocalMember,
        *,
        lanes: Sequence[Lane],
        ring: int,
        heap_bytes: int,
        timeout_s: float,
        poison: bool = False,
    ) -> None:
        layout = ControlLayout.of(lanes, ring, member.size)
        super().__init__(member.rank, lanes, layout, private_segment(layout.num_bytes), timeout_s)
        self._arena = Arena(private_segment, poison=poison)
        failure = _grow(self._arena, heap_bytes)
        answers: list[InProcessTransport | Exception] = member.allgather(self if failure is None else failure)
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if isinstance(answer, Exception):
                raise type(answer)(f"rank {rank}: {answer}") from answer
        self._peers = [peer for peer in answers if isinstance(peer, InProcessTransport)]
        self.connect([peer._control.address for peer in self._peers])
        member.allgather(None)  # nobody posts before everybody is connected

    def address(self, rank: int, place: Place) -> int:
        return self._peers[rank]._arena.segments[place.segment].address + place.offset

    def _arena_of(self) -> Arena:
        return self._arena

    def _control_memory(self, rank: int) -> Segment:
        return self._peers[rank]._control

    def _dead(self, ranks: Sequence[int]) -> dict[int, str]:
        return {}

    def _hint(self, ranks: Sequence[int]) -> str:
        return "look at the threads' stacks (faulthandler, py-spy dump)"


def _grow(arena: Arena, heap_bytes: int) -> Exception | None:
    try:
        arena.grow(max(heap_bytes, 1))
    except Exception as error:
        return error
    return None
