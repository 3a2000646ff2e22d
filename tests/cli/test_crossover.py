"""What is made of a sweep's spans and counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from anyep.cli.bench.crossover import overflow_notes, sweep_row
from anyep.cli.bench.plan import Workload
from anyep.cli.bench.stage import RankResult, Ways

WORKLOAD = Workload(name="w", tokens=8, hidden=256, topk=2, experts=4, wire="fp8", routing="balanced")
NAMES = ["automatic", "rendezvous", "eager"]


def ways(dispatch_eager, dispatch_direct):
    return Ways(
        dispatch_eager=dispatch_eager, dispatch_direct=dispatch_direct, combine_eager=6, combine_direct=2, rule="so"
    )


def ranks(us=((110, 100, 300), (440, 400, 300)), mismatches=()):
    """Two ranks that see the same spans; rank 1 sends twice the rows."""
    spans = np.array([[[0, 1000 * one] for one in turn] for turn in us])
    counted = [dict(zip(NAMES, (ways(3 * n, n), ways(0, 4 * n), ways(4 * n, 0)), strict=True)) for n in (1, 2)]
    return tuple(
        RankResult(
            workload=WORKLOAD, contest="sweep", names=NAMES, spans=spans, rows=4, ways=one, mismatches=dict(mismatches)
        )
        for one in counted
    )


def test_shares_are_of_the_rows_of_all_ranks():
    row = sweep_row(ranks())
    assert [row.ways[name].dispatch_eager_share for name in NAMES] == [0.75, 0, 1]
    assert row.ways["automatic"].combine_eager_share == 0.75


def test_the_ratio_is_taken_inside_a_round_against_the_way_with_the_smaller_median():
    row = sweep_row(ranks())
    assert row.better == "rendezvous"
    assert row.ratio == pytest.approx(1.1)
    other = sweep_row(ranks(us=((110, 200, 100), (120, 200, 100))))
    assert other.better == "eager"
    assert other.ratio == pytest.approx(1.15)


def test_what_did_not_fit_the_slots_is_said():
    row = sweep_row(ranks())
    (note,) = overflow_notes([row])
    assert "with 8 tokens" in note
    assert "100 % came along in dispatch, 75 % in combine" in note
    assert overflow_notes([replace(row, workload=replace(WORKLOAD, tokens=0))]) == []


def test_a_wrong_byte_marks_its_way_only():
    row = sweep_row(ranks(mismatches={"eager": "row 1"}.items()))
    assert [row.ways[name].verified for name in NAMES] == [True, True, False]
