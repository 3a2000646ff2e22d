"""Sizes that fit: what a workload takes of this machine's memory, and fewer tokens where that is too much."""

from __future__ import annotations

from dataclasses import replace

from anyep.cli.bench.copy_speed import COPY_BYTES
from anyep.cli.bench.ours import DTYPES
from anyep.cli.bench.plan import WIRE_BYTES, Plan, Workload
from anyep.errors import CapacityError
from anyep.layout.regions import hit_probability

_PROCESS_BYTES = 300 << 20
"""An interpreter with torch and kernels, and one piece of the oracle's work."""
_USABLE = 0.85
"""Of the available memory: the rest stays with the machine's other work."""
_SKEW = 1.05
"""Rows of all ranks above what uniform routing gives."""
_HEAD_ROOM = 1.25
"""Of an arena over a balanced step (layout/regions.py)."""
_PEER_BUFFERS = 2
_BF16_BYTES = 2


def fit(plan: Plan, available_bytes: int) -> tuple[Plan, list[str]]:
    """Return the plan with as many tokens as fit, and a sentence for each workload that became smaller.

    CapacityError where not even one token a rank fits.
    """
    room = int(available_bytes * _USABLE)
    fitted, notes = [], []
    for workload in plan.workloads:
        tokens = workload.tokens
        while required_bytes(plan, workload.with_tokens(tokens)) > room:
            tokens //= 2
            if tokens == 0:
                raise CapacityError(_too_large(plan, workload, available_bytes))
        if tokens < workload.tokens:
            notes.append(
                f"{workload.name} {workload.wire}: {tokens} tokens a rank instead of {workload.tokens}, "
                f"which would need {required_bytes(plan, workload) / 2**30:.1f} GiB "
                f"of the {available_bytes / 2**30:.1f} GiB available"
            )
        fitted.append(workload.with_tokens(tokens))
    return replace(plan, workloads=tuple(fitted)), notes


def required_bytes(plan: Plan, workload: Workload) -> int:
    """Return what all ranks together take at the busiest moment, while they meet the largest peer."""
    hit = hit_probability(workload.experts, -(-workload.experts // plan.ranks), workload.topk)
    rows = int(_SKEW * hit * workload.tokens * plan.ranks)
    pairs = int(_SKEW * workload.tokens * workload.topk)
    output = workload.hidden * DTYPES[workload.wire].itemsize
    wire = workload.hidden * WIRE_BYTES[workload.wire]
    # in the arena the judged batch, the next one and an output; outside of it another output, the input and the result
    arena = rows * max(2 * wire + output, int(_HEAD_ROOM * (wire + output)))
    ours = arena + rows * output + 2 * workload.tokens * output
    row = workload.hidden * _BF16_BYTES
    peers = {"gloo": _PEER_BUFFERS * pairs * row, "mpich": _PEER_BUFFERS * rows * row}
    peer = max((peers[name] for name in plan.peers), default=0)
    return plan.ranks * (ours + peer + 2 * COPY_BYTES + _PROCESS_BYTES)


def _too_large(plan: Plan, workload: Workload, available_bytes: int) -> str:
    needed = required_bytes(plan, workload.with_tokens(1))
    return (
        f"{plan.ranks} ranks with one token each need about {needed / 2**30:.1f} GiB and "
        f"{available_bytes / 2**30:.1f} GiB are available; use fewer --ranks or a smaller --hidden"
    )
