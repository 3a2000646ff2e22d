"""Whether forwarding pays on the links between hosts, measured when a buffer is made.

Two questions. Announcements: is a round of messages faster when each crosses once a host and is passed on there, or
when it goes straight to every rank? Rows: straight ones spare their ranks the wait for a forwarder, and take longer to
cross if more ranks than one of a host want them. They pay while ``more bytes / rate < what forwarding takes``. All
ranks take the median of what they measured, as both answers concern all of them.
"""

from __future__ import annotations

import time

import numpy as np

from anyep.exchange.courier import Part, carry
from anyep.exchange.desk import Lanes
from anyep.exchange.straight import StraightIn, StraightOut
from anyep.exchange.straight_rule import StraightRule, most_bytes_for
from anyep.transport.base import Words
from anyep.transport.hierarchical import HierarchicalTransport

_ROUNDS, _TURNS = 3, 4
"""Rounds that are timed together, and how often."""
_CLEARLY = 0.8
"""Straight announcements are more messages: they have to be faster by more than what comes and goes."""
_RATE_BYTES, _LEAST_BYTES = 1 << 20, 64 << 10
"""Cross from each rank when the rate is measured, once: more than links and their queues let pass at first; and to each
host at least."""
_FORWARDING_S = 300e-6
"""What a forwarder does for a small batch of one source: route it, find its places, write it, say done. It is the same
code whatever the link. Measured, hosts of 1, 2 and 4 ranks: 100 us for a token, 230 to 480 for 8 and 32."""
_BEFORE = -1
"""Stands for an operation in the tags of these messages."""
NUM_EPOCHS = 2 * _ROUNDS * _TURNS + 1
"""How many epochs the measurement takes."""


def given_links(transport: HierarchicalTransport, straight_bytes: int) -> StraightRule:
    """Do as the caller asked: announcements go as rows do."""
    transport.announce_straight(straight_bytes > 0)
    return StraightRule(most_bytes=straight_bytes, spare_bytes=None, reason="straight_bytes was given")


def measured_links(transport: HierarchicalTransport, lanes: Lanes, epoch: int) -> StraightRule:
    """Measure with all ranks, and choose how announcements go. Collective; takes the epochs from ``epoch`` on."""
    rounds_s: dict[bool, list[float]] = {False: [], True: []}
    for _turn in range(_TURNS):
        for straight in (False, True):
            transport.announce_straight(straight)
            begin = time.perf_counter()
            for _ in range(_ROUNDS):
                _round(transport, lanes, epoch, [0, 0, 0])
                epoch += 1
            rounds_s[straight].append((time.perf_counter() - begin) / _ROUNDS)
    seen = [int(1e9 * min(rounds_s[False])), int(1e9 * min(rounds_s[True])), int(_measure_rate(transport))]
    told_R3 = _round(transport, lanes, epoch, seen)
    forwarded_s, straight_s = (float(np.median(told_R3[:, column])) / 1e9 for column in range(2))
    rate = float(np.median(told_R3[:, 2]))
    is_straight = straight_s < _CLEARLY * forwarded_s
    transport.announce_straight(is_straight)
    way = "straight to every rank" if is_straight else "once a host, and are passed on there"
    reason = (
        f"a round of announcements takes {straight_s * 1e6:.0f} us straight and {forwarded_s * 1e6:.0f} us forwarded, "
        f"so that they go {way}; {rate / 1e6:.0f} MB/s a rank with all at it, in the {_FORWARDING_S * 1e6:.0f} us that "
        "forwarding takes"
    )
    return StraightRule(most_bytes=most_bytes_for(transport.size), spare_bytes=int(_FORWARDING_S * rate), reason=reason)


def _measure_rate(transport: HierarchicalTransport) -> float:
    """Return the bytes a second at which this rank's messages cross while all others send theirs."""
    hosts, rank = transport.hosts, transport.rank
    to = [hosts.forwarder(rank, host) for host in hosts.far_hosts(rank)]
    num_bytes = max(_LEAST_BYTES, _RATE_BYTES // len(to))
    begin = time.perf_counter()
    sent = StraightOut(transport, dict.fromkeys(to, num_bytes), _BEFORE)
    came = StraightIn(transport, {s: np.empty(num_bytes, np.uint8) for s in hosts.sources_of(rank)}, _BEFORE)
    sent.send()
    parts: list[Part] = [sent, came]
    carry(parts, transport, _BEFORE, "opening: links")
    return len(to) * num_bytes / (time.perf_counter() - begin)


def _round(transport: HierarchicalTransport, lanes: Lanes, epoch: int, words: list[int]) -> Words:
    words_RW = np.tile(np.array(words, np.int64), (transport.size, 1))
    transport.post(lanes.open, epoch, words_RW)
    told_R3: Words = transport.wait(lanes.open, epoch, "opening: links")[:, : len(words)].copy()
    return told_R3
