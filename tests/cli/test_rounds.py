"""Contests and what is made of their spans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from anyep.cli.bench.copy_speed import COPY_BYTES
from anyep.cli.bench.launch import run_threads
from anyep.cli.bench.plan import Plan, Workload
from anyep.cli.bench.rank import num_steps
from anyep.cli.bench.rounds import Operation, contest, durations_us
from anyep.cli.bench.stage import RankResult
from anyep.cli.bench.summary import summarise, to_json

WORKLOAD = Workload(name="prefill", tokens=10, hidden=256, topk=2, experts=4, wire="fp8", routing="balanced")
PLAN = Plan(ranks=2, workloads=(WORKLOAD,), peers=("gloo",), transport="shm", rounds=2, timeout_s=30)


def test_every_operation_runs_once_a_round_behind_a_barrier():
    calls = []
    operations = [Operation(name=name, run=lambda name=name: calls.append(name)) for name in "ab"]
    spans = contest(
        operations,
        rounds=2,
        warm_up=1,
        barrier=lambda: calls.append("|"),
        after_round=lambda: calls.append("."),
    )
    rounds = "".join(calls).split(".")[:-1]
    assert len(rounds) == 3
    assert set(rounds) == {"|a|b", "|b|a"}
    assert spans.shape == (2, 2, 2)
    assert (spans[..., 1] >= spans[..., 0]).all()


def test_calls_in_a_row_follow_each_other_behind_one_barrier():
    calls = []
    operations = [Operation(name=name, run=lambda name=name: calls.append(name)) for name in "ab"]
    contest(
        operations,
        rounds=4,
        warm_up=0,
        barrier=lambda: calls.append("|"),
        after_round=lambda: calls.append("."),
        in_a_row=3,
    )
    assert set("".join(calls).split(".")[:-1]) == {"|aaa|bbb", "|bbb|aaa"}


def test_the_progress_bar_reaches_its_end():
    small = replace(WORKLOAD, tokens=3, wire="fp32", padded=True)
    plan = replace(PLAN, transport="inprocess", peers=(), workloads=(small,), latency=(small,), sweep=(small,))
    steps = []
    run_threads(plan, steps.append)
    assert len(steps) == num_steps(plan)


def test_a_round_lasts_from_the_first_begin_to_the_last_end():
    first = np.array([[[1_000, 5_000]], [[0, 10_000]]])
    second = np.array([[[2_000, 9_000]], [[3_000, 4_000]]])
    assert durations_us([first, second]).tolist() == [[8.0], [10.0]]
    assert durations_us([first, second], in_a_row=4).tolist() == [[2.0], [2.5]]


def result(contest_name, names, us, rows, mismatches=()):
    """Spans of two rounds, the second twice as long."""
    spans = np.array([[[0, factor * 1000 * one] for one in us] for factor in (1, 2)])
    return RankResult(
        workload=WORKLOAD, contest=contest_name, names=names, spans=spans, rows=rows, mismatches=dict(mismatches)
    )


def results(mismatch=()):
    own = ["copy", "dispatch", "combine", "dispatch_combine"]
    return [
        [
            result("anyep", own, [1000, 100, 200, 300], rows, mismatch if rows == 12 else ()),
            result("gloo", ["dispatch_combine", "dispatch_combine_copied_in", "gloo"], [300, 400, 1200], rows),
        ]
        for rows in (12, 18)
    ]


def test_rows_count_bytes_and_shares():
    summary = summarise(PLAN, {}, [], results())
    assert [row.op for row in summary.rows] == ["dispatch", "combine", "dispatch_combine"]
    dispatch, combine, both = summary.rows
    assert (dispatch.rows, combine.rows, both.rows) == (30, 30, 60)
    assert dispatch.moved_bytes == 30 * (256 + 2 * 4 + 2 * 12)  # fp8 row, two scales, index and weight for each column
    assert combine.moved_bytes == 30 * 512
    assert both.moved_bytes == dispatch.moved_bytes + combine.moved_bytes
    assert dispatch.logical_bytes == 2 * 10 * 2 * 256
    assert combine.us.tolist() == [200.0, 400.0]
    assert combine.gb_s == pytest.approx(30 * 512 / 300e-6 / 1e9)
    copies = [2 * COPY_BYTES / us / 1e3 for us in (1000, 2000)]
    assert summary.copy_gb_s == pytest.approx(sum(copies) / 2)
    assert combine.copy_fraction == pytest.approx(combine.gb_s / summary.copy_gb_s)


def test_pairs_are_ratios_of_the_same_round():
    inside, copied = summarise(PLAN, {}, [], results()).pairs
    assert (inside.peer, inside.op) == ("gloo", "dispatch_combine")
    assert inside.ratios.tolist() == [4.0, 4.0]
    assert copied.ratios.tolist() == [3.0, 3.0]


def test_small_workloads_are_paired_once_more_in_a_row():
    small = replace(WORKLOAD, tokens=128)
    names = ["dispatch_combine", "mpich"]
    turns = result("mpich", names, [800, 4000], 16).spans
    one = replace(result("mpich", names, [300, 1200], 16), workload=small, in_a_row=8, row_spans=turns)
    alone, in_a_row = summarise(PLAN, {}, [], [[one], [one]]).pairs
    assert (alone.in_a_row, alone.ratios.tolist()) == (1, [4.0, 4.0])
    assert (in_a_row.in_a_row, in_a_row.ratios.tolist(), in_a_row.ours_us.tolist()) == (8, [5.0, 5.0], [100.0, 200.0])


def test_one_wrong_byte_on_one_rank_marks_the_row():
    summary = summarise(PLAN, {}, [], results({"dispatch": "row 3, byte 4"}.items()))
    assert [row.verified for row in summary.rows] == [False, True, True]
    assert summary.mismatches == ["prefill fp8, dispatch: row 3, byte 4"]


def padded_and_latency():
    """Two ranks, two rounds: 100 and 200 us for the first operation, 300 and 600 for the second."""
    names = ["dispatch_padded", "combine_padded_logfmt10"]
    return [
        [
            replace(result("padded", ["copy", *names], [1000, 100, 300], 16), hops={names[0]: rank, names[1]: 2}),
            replace(
                result("latency", names, [100, 300], 16),
                hops={names[0]: 1, names[1]: 1 + rank},
                in_a_row=4,
                row_spans=result("latency", names, [200, 400], 16).spans,
            ),
        ]
        for rank in (1, 2)
    ]


def test_padded_rows_carry_a_token_number_and_no_routing():
    there, back = summarise(PLAN, {}, [], padded_and_latency()).rows
    assert there.moved_bytes == 32 * (256 + 2 * 4 + 4)
    assert back.moved_bytes == 32 * (64 + 2 * 160)  # a cache line of headers, two groups of 128 ten-bit codes
    assert back.logical_bytes == 2 * 10 * 2 * 512
    assert (there.hops, back.hops) == (2, 2)


def test_latency_rows_name_their_ranks_and_their_tail():
    first, second = summarise(PLAN, {}, [], results(), padded_and_latency()).latency
    assert (first.ranks, first.op, first.hops, second.hops) == (2, "dispatch_padded", 1, 3)
    assert first.us_median == 150
    assert first.us_p99 == pytest.approx(199)
    assert (first.in_a_row, first.row_us.tolist()) == (4, [50, 100])
    assert second.verified


def test_what_is_hidden_behind_computation():
    names = ["compute", "communicate", "overlapped"]
    ranks = [[result("overlap padded", names, [100, 80, 120], 16)] for _ in range(2)]
    (row,) = summarise(PLAN, {}, [], ranks).overlaps
    assert (row.layout, row.verified) == ("padded", True)
    assert row.hidden_share == pytest.approx(1 - 20 / 80)


def test_json_has_the_documented_keys():
    data = to_json(summarise(PLAN, {"cpu": "some"}, ["a note"], results()))
    assert set(data) >= {"machine", "copy_gb_s", "rows", "paired"}
    row_keys = "workload op ranks tokens hidden topk experts wire us_median us_min us_max gb_s copy_fraction verified"
    for row in data["rows"]:
        assert set(row) >= set(row_keys.split())
    for pair in data["paired"]:
        assert set(pair) >= {"peer", "workload", "ratio_median", "ratio_min", "ratio_max"}
    assert data["rows"][1]["us_median"] == 300.0
    assert (data["rows"][1]["us_min"], data["rows"][1]["us_max"]) == (200.0, 400.0)
