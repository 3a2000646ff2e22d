"""Sizes that fit: what a workload takes of this machine's memory, and fewer tokens where that is too much."""

from __future__ import annotations

from dataclasses import replace

from anyep.cli.bench.copy_speed import COPY_BYTES
from anyep.cli.bench.ours import DTYPES, account, arena_bytes
from anyep.cli.bench.padded import padded_bytes
from anyep.cli.bench.plan import Plan, Workload
from anyep.cli.bench.sweep import NUM_WAYS
from anyep.errors import CapacityError
from anyep.exchange.eager import AREA_BYTES
from anyep.layout.regions import hit_probability

_PROCESS_BYTES = 260 << 20
"""An interpreter with torch and kernels, and one piece of the oracle's work, as measured."""
_USABLE = 0.93
"""Of the available memory: the rest stays with the machine's other work."""
_SKEW = 1.02
"""Rows of all ranks above what uniform routing gives; real routing visits fewer ranks."""
_PEER_BUFFERS = 2
_BF16_BYTES = 2


def fit(plan: Plan, available_bytes: int | None) -> tuple[Plan, list[str]]:
    """Return the plan with as many tokens as fit, and a sentence for each workload that became smaller.

    CapacityError where not even one token a rank fits. ``available_bytes`` None: unknown, so nothing is made smaller.
    """
    if available_bytes is None:
        return plan, []
    room = int(available_bytes * _USABLE)
    fitted, notes = [], []
    for workload in plan.workloads:
        tokens = workload.tokens
        while required_bytes(plan, workload.with_tokens(tokens)) > room:
            tokens //= 2
            if not tokens:
                raise CapacityError(_too_large(plan, workload, available_bytes))
        if tokens < workload.tokens:
            notes.append(
                f"{workload.name} {workload.wire}: {tokens} tokens a rank instead of {workload.tokens}, "
                f"which would need {required_bytes(plan, workload) / 2**30:.1f} GiB "
                f"of the {available_bytes / 2**30:.1f} GiB available"
            )
        chosen = workload.with_tokens(tokens)
        if chosen.padded and padded_required_bytes(plan, chosen) > room:
            notes.append(
                f"{workload.name} {workload.wire}: no padded layout, which would need "
                f"{padded_required_bytes(plan, chosen) / 2**30:.1f} GiB "
                f"of the {available_bytes / 2**30:.1f} GiB available"
            )
            chosen = replace(chosen, padded=False)
        fitted.append(chosen)
    for workload in plan.latency:
        if max(required_bytes(plan, workload), padded_required_bytes(plan, workload)) > room:
            raise CapacityError(_too_large(plan, workload, available_bytes))
    sweep = []
    for workload in plan.sweep:
        needed = sweep_required_bytes(plan, workload)
        if needed <= room:
            sweep.append(workload)
            continue
        notes.append(
            f"sweep: {workload.name} {workload.wire} is left out: it would need {needed / 2**30:.1f} GiB "
            f"of the {available_bytes / 2**30:.1f} GiB available"
        )
    return replace(plan, workloads=tuple(fitted), sweep=tuple(sweep)), notes


def required_bytes(plan: Plan, workload: Workload) -> int:
    """Return what all ranks take at the busiest moment: while results are judged, or while they meet a peer."""
    rows = _expected_rows(plan, workload)
    pairs = workload.tokens * workload.topk
    output = workload.hidden * DTYPES[workload.wire].itemsize
    slots = account(workload, plan.ranks).eager_bytes
    ours = arena_bytes(workload, rows) + slots + rows * output + 2 * workload.tokens * output
    row = workload.hidden * _BF16_BYTES
    peers = {"gloo": _PEER_BUFFERS * pairs * row, "mpich": _PEER_BUFFERS * rows * row}
    judged = arena_bytes(workload, rows) - 2 * rows * output + workload.tokens * output
    peer = max([judged, *(peers[name] for name in plan.peers)])
    return plan.ranks * (ours + peer + 2 * COPY_BYTES + _PROCESS_BYTES)


def padded_required_bytes(plan: Plan, workload: Workload) -> int:
    """Return what all ranks take while they measure the padded layout, in a buffer that is then the only one."""
    pairs = int(_SKEW * workload.tokens * workload.topk) + 1
    output = workload.hidden * DTYPES[workload.wire].itemsize
    slots = account(workload, plan.ranks).eager_bytes
    ours = padded_bytes(workload, plan.ranks, 0, pairs) + slots + 2 * workload.tokens * output
    peer = _PEER_BUFFERS * pairs * workload.hidden * _BF16_BYTES if plan.peers else 0
    judged = pairs * output + 2 * workload.tokens * output
    return plan.ranks * (ours + max(judged, peer) + 2 * COPY_BYTES + _PROCESS_BYTES)


def sweep_required_bytes(plan: Plan, workload: Workload) -> int:
    """Return what all ranks take while the ways that rows can go meet: a buffer for each, and what was judged."""
    rows = _expected_rows(plan, workload)
    output = workload.hidden * DTYPES[workload.wire].itemsize
    one = arena_bytes(workload, rows, num_outputs=1) + AREA_BYTES + 2 * workload.tokens * output
    judged = arena_bytes(workload, rows, num_outputs=0) + workload.tokens * output
    return plan.ranks * (NUM_WAYS * one + judged + _PROCESS_BYTES)


def _expected_rows(plan: Plan, workload: Workload) -> int:
    """Return how many rows a rank receives of the compact layout."""
    hit = hit_probability(workload.experts, -(-workload.experts // plan.ranks), workload.topk)
    return int(_SKEW * hit * workload.tokens * plan.ranks)


def _too_large(plan: Plan, workload: Workload, available_bytes: int) -> str:
    needed = required_bytes(plan, workload.with_tokens(1))
    return (
        f"{plan.ranks} ranks with one token each need about {needed / 2**30:.1f} GiB and "
        f"{available_bytes / 2**30:.1f} GiB are available; use fewer --ranks or a smaller --hidden"
    )
