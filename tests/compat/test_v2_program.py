"""A program that knows DeepEP alone runs unchanged, with the path that ``anyep compat-path`` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.job import run_job


@pytest.mark.parametrize("per_host", ["2", "1"])
def test_a_training_step_runs_unchanged_in_two_processes(per_host):
    ended = run_job(Path(__file__).with_name("v2_program.py"), 2, ANYEP_RANKS_PER_HOST=per_host)
    assert [one.code for one in ended] == [0, 0], "\n".join(one.output for one in ended)
    assert "trained a step" in ended[0].output
