"""The ways that rows can go, side by side: chosen by each pair of ranks, always rendezvous, eager as far as it goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from anyep.cli.bench.compact_checks import CompactChecks
from anyep.cli.bench.ours import DTYPES, Ours
from anyep.cli.bench.rounds import Operation
from anyep.cli.bench.stage import SWEEP, RankResult, Stage, Ways
from anyep.cli.bench.tape import Tape
from anyep.exchange.eager import AREA_BYTES, SLOT_BYTES
from anyep.exchange.handle import Received
from anyep.exchange.options import BufferOptions

AUTOMATIC, RENDEZVOUS, EAGER = "automatic", "rendezvous", "eager"
NUM_WAYS = 3
_RING = 2 * BufferOptions.max_in_flight
"""Operations for which a buffer keeps eager slots, unless told otherwise."""


def largest_eager_bytes(num_ranks: int) -> int:
    """Return up to how many bytes a pair's rows can come along in slots of the size that buffers have by themselves.

    >>> largest_eager_bytes(2) >> 10, largest_eager_bytes(8) >> 10, largest_eager_bytes(64) >> 10
    (1024, 1024, 128)
    """
    return min(SLOT_BYTES, AREA_BYTES // (_RING * num_ranks))


def sweep(stage: Stage) -> RankResult:
    """Time dispatch and combine in three buffers that differ in nothing but the way of their rows."""
    tape = Tape(stage.workload.hidden, DTYPES[stage.workload.wire])
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(
                Ours(
                    stage.group,
                    stage.workload,
                    stage.exchange,
                    tape,
                    transport=stage.plan.transport,
                    timeout_s=stage.plan.timeout_s,
                    eager_bytes=eager_bytes,
                    num_outputs=1,
                )
            )
            for name, eager_bytes in (
                (AUTOMATIC, None),
                (RENDEZVOUS, 0),
                (EAGER, largest_eager_bytes(stage.plan.ranks)),
            )
        }
        return _contest(stage, sides)


def _contest(stage: Stage, sides: dict[str, Ours]) -> RankResult:
    stage.say("checking every byte of every way")
    first = sides[AUTOMATIC]
    checks = CompactChecks(first, stage.exchange, stage.workload.wire)
    mismatches = checks.judge()
    if mismatches:
        mismatches[AUTOMATIC] = next(iter(mismatches.values()))
    mismatches = {**_same_bits(checks, sides), **mismatches}
    operations = [Operation(name=name, run=_both(side)) for name, side in sides.items()]
    rounds = stage.plan.sweep_rounds_of(stage.workload)
    spans = stage.contest(first, operations, "timing every way", rounds=rounds)
    stage.say("checking every byte again")
    mismatches = {**_same_bits(checks, sides), **mismatches}
    ways = {name: count_ways(side) for name, side in sides.items()}
    return stage.result(first, SWEEP, operations, spans, mismatches=mismatches, ways=ways)


def _both(side: Ours) -> Callable[[], Received]:
    return lambda: side.both(side.in_arena)


def _same_bits(checks: CompactChecks, sides: dict[str, Ours]) -> dict[str, str]:
    found = {name: checks.beside(side).both_of(_both(side)) for name, side in sides.items()}
    return {name: text for name, text in found.items() if text}


def count_ways(side: Ours) -> Ways:
    """Dispatch and combine once more and return how this rank's rows went. Collective."""
    before = side.ep.stats()
    received = side.dispatch()
    between = side.ep.stats()
    side.combine(side.in_arena, received.handle)
    after = side.ep.stats()
    mode = next(choice for choice in side.ep.explain().choices if choice.topic == "mode")
    return Ways(
        dispatch_eager=between.eager_rows - before.eager_rows,
        dispatch_direct=between.direct_rows - before.direct_rows,
        combine_eager=after.eager_rows - between.eager_rows,
        combine_direct=after.direct_rows - between.direct_rows,
        rule=f"{mode.chosen} ({mode.reason})",
    )
