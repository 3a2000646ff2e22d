"""What was chosen and why, as data that prints well."""

from __future__ import annotations

from dataclasses import dataclass

from anyep.exchange.endpoint import Endpoint
from anyep.exchange.straight_rule import StraightRule
from anyep.layout.regions import MemoryAccount


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One decision: the topic, what was chosen, and the reason."""

    topic: str
    chosen: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All decisions of one rank's buffer, and its memory account."""

    choices: tuple[Choice, ...]
    memory: MemoryAccount

    def __str__(self) -> str:
        width = max(len(choice.topic) for choice in self.choices)
        lines = [f"{choice.topic:<{width}}  {choice.chosen}  ({choice.reason})" for choice in self.choices]
        return "\n".join([*lines, f"{'memory':<{width}}  {self.memory}"])


def _mode(end: Endpoint) -> str:
    limit, slot = end.rule.pair_bytes, end.slots.slot_bytes
    if min(limit, slot) <= 0:
        return "every row straight to its final place"
    return (
        f"pairs of ranks with up to {min(limit, slot) / 1024:.1f} KiB send rows along with the announcement "
        f"(a slot holds {slot / 1024:.1f} KiB), larger ones straight to their final place"
    )


def explain(end: Endpoint, memory: MemoryAccount, transport_reason: str, threads_by_default: bool) -> Explanation:
    """Describe an endpoint that has just been opened."""
    scales = "no scales" if end.wire.scale_format is None else f"scales {end.wire.scale_format.name} per 128 channels"
    threads = "cores divided by ranks" if threads_by_default else "num_threads was given"
    facts = end.transport.describe()
    choices = [
        Choice(topic="mode", chosen=_mode(end), reason=end.rule.reason),
        Choice(
            topic="in flight",
            chosen=f"up to {end.max_in_flight} operations",
            reason="max_in_flight; rows that are left to be sent go in one background thread, in low latency never",
        ),
        Choice(topic="transport", chosen=end.transport.name, reason=transport_reason),
        Choice(topic="wire", chosen=end.wire.name, reason=f"{end.wire.row_bytes} bytes a row, {scales}"),
        Choice(topic="kernels", chosen=end.kernels.name, reason=f"{end.workers.num_threads} threads a rank: {threads}"),
        *(Choice(topic=topic, chosen=fact, reason="so the transport says") for topic, fact in facts.items()),
    ]
    return Explanation(choices=(*choices, *_between_hosts(end, memory)), memory=memory)


def _between_hosts(end: Endpoint, memory: MemoryAccount) -> list[Choice]:
    if end.across is None:
        return []
    chunk_kib, window, pairs = end.across.chunk_bytes / 1024, end.across.window, end.across.num_streams
    pieces = Choice(
        topic="pieces",
        chosen=f"rows cross in pieces of {chunk_kib:g} KiB, {window} of a stream on their way",
        reason=f"{pairs} streams an operation: up to {memory.crossing_bytes / 2**20:.1f} MiB",
    )
    return [pieces, Choice(topic="straight", chosen=_straight(end.across.straight), reason=end.across.straight.reason)]


def _straight(rule: StraightRule) -> str:
    if rule.most_bytes == 0:
        return "rows for other hosts are all forwarded there"
    more = (
        "" if rule.spare_bytes is None else f" that need not take {rule.spare_bytes / 1024:.1f} KiB more than forwarded"
    )
    return (
        f"up to {rule.most_bytes / 1024:.1f} KiB to another host{more} go straight to its ranks, the rest is forwarded"
    )
