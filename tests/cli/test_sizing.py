"""Sizes follow the memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anyep.cli.bench.plan import Plan, Workload, name_of
from anyep.cli.bench.sizing import fit, padded_required_bytes, required_bytes, sweep_required_bytes
from anyep.errors import CapacityError

GIB = 1 << 30


def plan(tokens=4096, peers=(), ranks=8):
    workload = Workload(
        name=name_of(tokens), tokens=tokens, hidden=7168, topk=8, experts=256, wire="fp8", routing="balanced"
    )
    return Plan(ranks=ranks, workloads=(workload,), peers=peers, transport="shm", rounds=None, timeout_s=30)


def test_what_fits_stays_as_it_is():
    assert fit(plan(), 1000 * GIB) == (plan(), [])


def test_what_does_not_fit_is_halved_and_said():
    fitted, notes = fit(plan(peers=("gloo",)), 12 * GIB)
    tokens = fitted.workloads[0].tokens
    assert tokens in (2048, 1024, 512)
    assert required_bytes(fitted, fitted.workloads[0]) <= 12 * GIB
    assert fitted.workloads[0].name == "prefill"
    (note,) = notes
    assert f"{tokens} tokens a rank instead of 4096" in note
    assert "12.0 GiB available" in note


def test_a_comparison_needs_more():
    alone, beside_gloo = (required_bytes(plan(peers=peers), plan().workloads[0]) for peers in ((), ("gloo",)))
    pairs_of_all_ranks = 8 * 4096 * 8 * 7168 * 2
    assert beside_gloo - alone > pairs_of_all_ranks
    assert beside_gloo > 2 * pairs_of_all_ranks + 5.2 * 4096 * 8 * 7168 * 5


def test_the_estimate_covers_the_batches_themselves():
    rows_and_outputs = 5.2 * 4096 * 8 * 7168 * (1 + 2 + 2)
    assert required_bytes(plan(), plan().workloads[0]) > rows_and_outputs


def small(padded=True, peers=()):
    decode = replace(plan(128).workloads[0], padded=padded)
    return replace(plan(128, peers), workloads=(decode,))


def test_the_padded_layout_is_left_out_where_it_does_not_fit():
    assert fit(small(), 20 * GIB) == (small(), [])
    fitted, notes = fit(small(), 8 * GIB)
    assert fitted == small(padded=False)
    assert "decode-size fp8: no padded layout, which would need" in notes[0]


def test_padded_blocks_are_counted_whole():
    rows = 32 * 8 * 128
    needed = padded_required_bytes(small(), small().workloads[0])
    assert needed > 8 * rows * 7168 * 3
    assert padded_required_bytes(small(peers=("gloo",)), small().workloads[0]) > needed


def test_latency_is_measured_as_it_is_or_not_at_all():
    alone = replace(plan(), workloads=(), latency=(plan(128).workloads[0],))
    assert fit(alone, 20 * GIB) == (alone, [])
    with pytest.raises(CapacityError):
        fit(alone, 4 * GIB)


def test_a_size_of_the_sweep_that_does_not_fit_is_left_out_and_said():
    sizes = tuple(plan(tokens).workloads[0] for tokens in (8, 4096))
    sweep = replace(plan(), workloads=(), sweep=sizes)
    fitted, notes = fit(sweep, 12 * GIB)
    assert fitted.sweep == sizes[:1]
    assert "sweep: prefill fp8 is left out" in notes[0]
    assert sweep_required_bytes(sweep, sizes[1]) > 3 * 5.2 * 4096 * 8 * 7168 * 3


def test_unknown_memory_makes_nothing_smaller():
    assert fit(plan(), None) == (plan(), [])


def test_nothing_fits():
    with pytest.raises(CapacityError, match=r"8 ranks with one token each need about .* fewer --ranks"):
        fit(plan(), GIB // 4)
