"""The GPU benchmark where there is no GPU: what it says, and that what it checks and counts is right."""

from __future__ import annotations

import pytest
import torch

from anyep.testing.pretend_device import PretendDevice, pretended
from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import measure
from benchmarks.gpu.stopwatch import HostStopwatch
from benchmarks.gpu.work import Work
from tests.gpu.programs import needs_triton

SMALL = {"hidden": 256, "experts": 8, "topk": 3, "ranks": 2, "tokens": 5}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written_and_the_reason_is_said(tmp_path, capsys):
    assert bench.main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert "nothing was measured and nothing is written: kernels='gpu' need" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _measure(layout):
    with pretended(PretendDevice()):
        return bench.measure(
            HostStopwatch(), [Work(name="small", layout=layout, **SMALL)], rounds=2, copy_bytes=1 << 10
        )


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_works_are_checked_against_torch_and_timed_beside_it(layout):
    rows = _measure(layout)
    named = {row.what: row for row in rows if row.work == "small 2 x 5"}
    assert {
        "dispatch, graph",
        "dispatch, torch",
        "combine, graph",
        "combine, torch",
    } <= named.keys()
    assert ("dispatch, host waits for counts" in named) == (layout == "compact")
    assert named["dispatch, graph"].bytes == named["dispatch, torch"].bytes > 2 * 5 * 2 * 256
    assert all(row.rounds == 2 for row in rows)
    assert "small 2 x 5" in bench.table(rows)


def test_a_wrong_row_ends_the_run(monkeypatch):
    def flipped(x):
        q, scales = right(x)
        q[0, 0] ^= 1
        return q, scales

    right = measure.torch_ops.quantise
    monkeypatch.setattr(measure.torch_ops, "quantise", flipped)
    with pytest.raises(AssertionError, match="rows from 0"):
        _measure("compact")


@needs_triton
def test_facts_name_the_versions():
    assert {"torch", "triton", "numba", "python"} <= HostStopwatch().facts().keys()
