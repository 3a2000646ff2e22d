"""Up to which size a pair's rows should come along with the announcement, measured when a buffer is made.

Rows that come along spare their pair the second message of an operation; they cost the receiver a copy from the slot
to their final place. A rank that receives B bytes in all gains by it while B / copy rate < time of a message round, so
each of its R pairs may bring ``hop * rate / R`` bytes. All ranks take the median of what they measured.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from anyep.exchange.eager import EagerRule
from anyep.exchange.endpoint import Lanes
from anyep.kernels.spec import KernelSet
from anyep.transport.base import Block, Transport, Words

_HOPS, _COPIES = 8, 3
_COPY_BYTES = 1 << 18


def given_rule(eager_bytes: int) -> EagerRule:
    """Return the rule that the caller asked for."""
    return EagerRule(pair_bytes=eager_bytes, reason="eager_bytes was given")


def measured_rule(transport: Transport, lanes: Lanes, kernels: KernelSet, area: Block, epoch: int) -> EagerRule:
    """Measure message rounds and copies together with all ranks. Collective; uses epochs from ``epoch`` on."""
    if transport.size == 1:
        return EagerRule(pair_bytes=0, reason="a single rank writes to itself")
    hops, rates = [], []
    for number in range(_HOPS):
        begin = time.perf_counter()
        _round(transport, lanes, epoch + number, 0, 0)
        hops.append(time.perf_counter() - begin)
    num_bytes = min(area.num_bytes // 2, _COPY_BYTES)
    for _ in range(_COPIES):
        begin = time.perf_counter()
        kernels.copy(area.address, area.address + num_bytes, num_bytes)
        kernels.fence()
        rates.append(num_bytes / max(1e-9, time.perf_counter() - begin))
    told_R2 = _round(transport, lanes, epoch + _HOPS, int(1e9 * median(hops[2:])), int(max(rates)))
    hop_s, rate = float(np.median(told_R2[:, 0])) / 1e9, float(np.median(told_R2[:, 1]))
    pair_bytes = int(hop_s * rate / transport.size)
    reason = f"a round of messages takes {hop_s * 1e6:.0f} us, a copy {rate / 1e9:.1f} GB/s, for {transport.size} ranks"
    return EagerRule(pair_bytes=pair_bytes, reason=reason)


NUM_EPOCHS = _HOPS + 1


def _round(transport: Transport, lanes: Lanes, epoch: int, first: int, second: int) -> Words:
    words_RW = np.tile(np.array([first, second], np.int64), (transport.size, 1))
    transport.post(lanes.open, epoch, words_RW)
    told_R2: Words = transport.wait(lanes.open, epoch, "opening: calibration")[:, :2].copy()
    return told_R2
