"""Two micro-batches: both schedules give the same bits, and what is said of them is right."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = [
    "--tokens",
    "9",
    "--hidden",
    "64",
    "--width",
    "8",
    "--experts",
    "8",
    "--topk",
    "3",
    "--layers",
    "2",
    "--rounds",
    "2",
]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("two_batch_overlap")


@pytest.mark.parametrize("layout", ["expert", "padded"])
def test_schedules_give_the_same_bits_on_rank_processes(example, layout):
    from two_batch import Sizes

    sizes = Sizes(tokens=9, hidden=64, width=8, num_experts=8, num_topk=3, num_layers=2, rounds=2, layout=layout)
    reports = example.run_processes(2, example.rank_main, sizes)
    for report in reports:
        assert report.same_bits
        for name in example.SCHEDULES:
            assert len(report.spans[name]) == 2
            for spans in report.spans[name]:
                assert sum(span.kind == "attention" for span in spans) == 4
                assert sum(span.in_flight for span in spans) == 8
                assert all(span.begin <= span.end for span in spans)
            assert len(report.waited_s[name]) == 2


def test_other_bits_are_an_error(example, monkeypatch):
    report = example.Report(spans={}, waited_s={}, same_bits=False)
    monkeypatch.setattr(example, "run_processes", lambda *_: [report])
    result = CliRunner().invoke(example.main, SMALL)
    assert result.exit_code == 1
    assert "different bits" in result.output


@pytest.mark.parametrize("options", [["--ranks", "3"], ["--topk", "9"]])
def test_sizes_that_do_not_go_together(example, options):
    result = CliRunner().invoke(example.main, [*SMALL, *options])
    assert result.exit_code == 2
    assert "--experts 8 must be" in result.output


def test_what_is_hidden(example):
    from timeline import Span

    def spans(total, attention):
        computed = Span(kind="attention", batch=0, begin=0, end=attention)
        travelled = Span(kind="dispatch", batch=0, begin=0, end=total, in_flight=True)
        return [computed, travelled]

    report = example.Report(
        spans={"sequential": [spans(10, 6)], "overlapped": [spans(7, 6)]}, waited_s={}, same_bits=True
    )
    assert example.hidden_share([report, report]) == pytest.approx(3 / 4)


def test_a_picture_without_its_package_names_the_extra(example, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(example.main, [*SMALL, "--picture", str(tmp_path / "a.png")])
    assert result.exit_code == 1
    assert "anyep[pictures]" in result.output


@pytest.mark.slow
def test_as_a_program_with_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "timeline.png"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "two_batch_overlap.py"), *SMALL, "--picture", str(picture)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "same bits on both schedules" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
