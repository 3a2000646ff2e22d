"""For whom a rank waits, where several of its threads do."""

from __future__ import annotations

import threading
import time

from anyep.transport.inprocess import InProcessTransport, local_group
from tests.transport.ranks import LANES


class Asked:
    """The other hosts, of which one asks all the time. Keeps the last answer."""

    def __init__(self):
        self.answered = None

    def ask(self, since_ns):
        pass

    def answer(self, missing, outsider):
        self.answered = list(missing)

    def answers(self, since_ns):
        return {}


def test_a_rank_waits_for_whom_any_of_its_threads_waits():
    """A thread of rank 0 waits for ranks 1 and 2; another for 2 and 3, then for 3, then for nobody."""
    said, far = [], Asked()

    def rank_main(member):
        transport = InProcessTransport(member, lanes=LANES, ring=2, heap_bytes=1 << 20, timeout_s=20.0)
        member.allgather(b"")
        if member.rank == 0:
            transport.inquiry.others = far
            began_ns = time.monotonic_ns()
            transport.say_waiting([1, 2], began_ns)
            thread = threading.Thread(target=say_in_turn, args=(transport, began_ns))
            thread.start()
            thread.join()
        member.allgather(b"")
        transport.close()

    def say_in_turn(transport, began_ns):
        board = transport._opened().boards[0]
        for say in (
            lambda: transport.say_waiting([2, 3], began_ns),
            lambda: transport.say_waiting([3], began_ns),
            transport.say_waited,
        ):
            say()
            said.append((board.waits_for(began_ns), far.answered))

    local_group(4).run(rank_main)
    assert said == [((1, 2, 3), [1, 2, 3]), ((1, 2, 3), [1, 2, 3]), ((1, 2), [1, 2])]
