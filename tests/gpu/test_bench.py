"""The GPU benchmark where there is no GPU: what it says, and that what it checks and counts is right."""

from __future__ import annotations

import json

import pytest
import torch

from anyep.kernels.reference_device import ReferenceDeviceKernels
from anyep.testing.pretend_device import PretendDevice, pretended
from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import torch_ops
from benchmarks.gpu.contest import Contest, add_copy
from benchmarks.gpu.correct import examine
from benchmarks.gpu.stopwatch import HostStopwatch
from benchmarks.gpu.verdicts import Verdict
from benchmarks.gpu.work import Work
from tests.gpu.programs import needs_triton

SMALL = {"hidden": 256, "experts": 8, "topk": 3, "ranks": 2, "tokens": 5}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written_and_the_reason_is_said(tmp_path, capsys):
    assert bench.main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert "nothing was measured and nothing is written: device='cuda' needs a GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _measure(layout, wrong=()):
    contest = Contest(HostStopwatch(), 2)
    with pretended(PretendDevice()) as device:
        works = [Work(name="small", layout=layout, **SMALL)]
        rows = bench.measure(contest, works, device.kernels, copy_bytes=1 << 10)
    assert [problem for problem in contest.problems if not problem.startswith(tuple(wrong))] == []
    assert len(contest.problems) == len(wrong)
    return {row.what: row for row in rows if row.work == "small 2 x 5"}, rows, contest


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_works_are_checked_against_torch_and_timed_beside_it(layout):
    named, rows, _ = _measure(layout)
    assert {
        *("dispatch, launched", "dispatch, graph", "dispatch, torch", "dispatch, host by call"),
        *("combine, launched", "combine, graph", "combine, torch", "combine, host by call"),
    } <= named.keys()
    assert ("dispatch, host waits for counts" in named) == (layout == "compact")
    assert named["dispatch, graph"].bytes == named["dispatch, torch"].bytes > 2 * 5 * 2 * 256
    assert ({"all sends, graph", "all receives, graph"} <= named.keys()) == (layout == "padded")
    assert named["combine, graph"].launches == 6
    assert named["combine, graph"].launch_us > 0
    assert all(row.rounds == 2 for row in rows)
    assert "small 2 x 5" in bench.table(rows)


WANTED = {
    "of the copy": ["prefill 2 x 5, dispatch", "prefill 2 x 5, combine"],
    "of floor + launches": [f"decode 2 x 5, {what}, graph" for what in ("all sends", "all receives", "combine")],
    "times as fast": [
        f"{work} 2 x 5, {part} against torch" for work in ("prefill", "decode") for part in ("dispatch", "combine")
    ],
    "us": [f"{work} 2 x 5, {part}, host by call" for work in ("prefill", "decode") for part in ("dispatch", "combine")],
}


def test_one_run_says_of_every_row_that_is_wanted_what_came(tmp_path):
    works = [Work(name="prefill", layout="compact", **SMALL), Work(name="decode", layout="padded", **SMALL)]
    contest = Contest(HostStopwatch(), 2)
    with pretended(PretendDevice()) as device:
        rows = bench.measure(contest, works, device.kernels, copy_bytes=1 << 10)
    bench.write(tmp_path / "gpu.json", contest, rows, bench.verdicts(rows, *works))
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["problems"] == []
    found = {unit: [one["what"] for one in told["verdicts"] if one["unit"] == unit] for unit in WANTED}
    assert found == WANTED
    assert sum(map(len, WANTED.values())) == len(told["verdicts"])
    assert all(one["got"] > 0 and one["reached"] is not None for one in told["verdicts"])


def test_what_was_not_measured_is_not_reached():
    works = [Work(name="prefill", layout="compact", **SMALL), Work(name="decode", layout="padded", **SMALL)]
    told = bench.verdicts([], *works)
    assert {(one.got, one.reached) for one in told} == {(None, None)}
    assert bench.lines(told).count("not measured") == len(told) == 13


@pytest.mark.parametrize(("at_least", "got", "reached"), [(True, 0.8, True), (True, 0.79, False), (False, 2.1, False)])
def test_a_verdict_is_by_its_own_direction(at_least, got, reached):
    wanted = 0.8 if at_least else 2.0
    assert Verdict(what="", unit="", wanted=wanted, at_least=at_least, got=got).reached is reached


def test_a_wrong_row_is_named_and_not_timed(monkeypatch):
    def flipped(x):
        q, scales = right(x)
        q[0, 0] ^= 1
        return q, scales

    right = torch_ops.quantise
    monkeypatch.setattr(torch_ops, "quantise", flipped)
    wrong = [f"small 2 x 5, {how}: AssertionError: small: rows from 0" for how in ("launched", "host waits for counts")]
    named, rows, _ = _measure("compact", wrong)
    assert named == {}
    assert [row.work for row in rows] == ["copy", "launch"]


def test_a_wrong_graph_is_named_and_the_rest_is_timed(monkeypatch, tmp_path):
    def negated(self, act):
        result = act()
        return (lambda: None), None if result is None else [-one for one in result]

    monkeypatch.setattr(HostStopwatch, "graph", negated)
    named, rows, contest = _measure("padded", ["small 2 x 5, graph: TypeError"])
    assert {"dispatch, launched", "combine, launched"} <= named.keys()
    assert named.keys().isdisjoint({"dispatch, graph", "combine, graph"})
    bench.write(tmp_path / "results" / "gpu.json", contest, rows, [])
    told = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert told["problems"] == contest.problems
    assert len(told["rows"]) == len(rows)


def test_an_act_that_fails_while_it_is_timed_has_no_row():
    contest, calls = Contest(HostStopwatch(), 2), []

    def fails_once_timed():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle")

    add_copy(contest, 1 << 10)
    contest.add("work", "what", fails_once_timed)
    assert [row.work for row in contest.run()] == ["copy"]
    assert contest.problems == ["work, what, round 1: RuntimeError: in the middle"]
    assert len(calls) == 2


def test_each_kernel_that_differs_is_named():
    class Wrong(ReferenceDeviceKernels):
        def tick(self, clock_addr, epoch_addr):
            pass

        def copy(self, source_addr, destination_addr, num_bytes):
            pass

    contest = Contest(HostStopwatch(), 1)
    examine(contest, Wrong(), 2)
    assert [problem.split(":")[0] for problem in contest.problems] == ["kernel copy", "kernel tick"]


@needs_triton
def test_facts_name_the_versions():
    assert {"torch", "triton", "numba", "python"} <= HostStopwatch().facts().keys()
