"""Up to which size a pair's rows should come along with the announcement, measured when a buffer is made.

Rows that come along spare a second round of messages; they cost a copy from the slot to their final place. Both are
measured with all ranks at work at once, as they share cores and memory: a round of messages, and how much longer it
takes when every rank copies before it. A rank that receives B bytes gains by eager rows while B / rate < round, so each
of its R pairs may bring ``round * rate / R`` bytes if a copy from slots is as fast as the one that is timed. It takes
about twice as long: rows are few, of five parts, from R slots, and their tables are cold (docs/log.md). All ranks take
the median of what they measured.
"""

from __future__ import annotations

import time

import numpy as np

from anyep.exchange.desk import Lanes
from anyep.exchange.eager import EagerRule
from anyep.kernels.spec import KernelSet
from anyep.transport.base import Block, Transport, Words

_ROUNDS, _TURNS = 4, 3
"""Rounds that are timed together, as the last rank to come finds a single one short; and how often."""
_COPY_BYTES = 1 << 19
_SLOWER = 2
"""How much longer rows take from slots than the copy that is timed."""
_COPIES = 4
"""Pieces that a rank copies before a round: together they take longer than the round."""
NUM_EPOCHS = 2 * _ROUNDS * _TURNS + 1
"""How many epochs the measurement takes."""


def given_rule(eager_bytes: int) -> EagerRule:
    """Return the rule that the caller asked for."""
    return EagerRule(pair_bytes=eager_bytes, reason="eager_bytes was given")


def measured_rule(transport: Transport, lanes: Lanes, kernels: KernelSet, area: Block, epoch: int) -> EagerRule:
    """Measure with all ranks. Collective; takes the epochs from ``epoch`` on."""
    if transport.size == 1:
        return EagerRule(pair_bytes=0, reason="a single rank writes to itself")
    num_bytes = min(area.num_bytes // (2 * _COPIES), _COPY_BYTES)
    rounds_s: list[float] = []
    copies_s: list[float] = []
    for turn in range(_TURNS):
        for times_s, copies in ((rounds_s, False), (copies_s, True)):
            begin = time.perf_counter()
            for number in range(_ROUNDS):
                if copies:
                    _copy_pieces(kernels, area.address, num_bytes, back=(turn + number) % 2 == 1)
                _round(transport, lanes, epoch, 0, 0)
                epoch += 1
            times_s.append((time.perf_counter() - begin) / _ROUNDS)
    round_s = min(rounds_s)  # what else the machine does only makes it slower
    extra_s = max(round_s / 4, min(copies_s) - round_s)
    told_R2 = _round(transport, lanes, epoch, int(1e9 * round_s), int(_COPIES * num_bytes / extra_s))
    round_s, rate = float(np.median(told_R2[:, 0])) / 1e9, float(np.median(told_R2[:, 1]))
    reason = (
        f"a round of messages takes {round_s * 1e6:.0f} us, a copy {rate / 1e9:.1f} GB/s a rank with all at it, "
        f"for {transport.size} ranks; all rows of a rank go the way of most"
    )
    return EagerRule(pair_bytes=int(round_s * rate / (_SLOWER * transport.size)), reason=reason, one_way=True)


def _copy_pieces(kernels: KernelSet, address: int, num_bytes: int, *, back: bool) -> None:
    """Copy every other piece to its neighbour, or back: what it reads was written past the caches, as are slots."""
    for piece in range(_COPIES):
        first = address + 2 * piece * num_bytes
        second = first + num_bytes
        kernels.copy(second if back else first, first if back else second, num_bytes)
    kernels.fence()


def _round(transport: Transport, lanes: Lanes, epoch: int, first: int, second: int) -> Words:
    words_RW = np.tile(np.array([first, second], np.int64), (transport.size, 1))
    transport.post(lanes.open, epoch, words_RW)
    told_R2: Words = transport.wait(lanes.open, epoch, "opening: calibration")[:, :2].copy()
    return told_R2
