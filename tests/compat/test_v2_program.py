"""A program that knows DeepEP alone runs unchanged, with the path that ``anyep compat-path`` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.job import run_job, run_torchrun


@pytest.mark.parametrize("per_host", ["2", "1"])
def test_a_training_step_runs_unchanged_in_two_processes(per_host):
    ended = run_job(Path(__file__).with_name("v2_program.py"), 2, ANYEP_RANKS_PER_HOST=per_host)
    assert [one.code for one in ended] == [0, 0], "\n".join(one.output for one in ended)
    assert "trained a step" in ended[0].output


@pytest.mark.parametrize(("ranks", "hosts"), [(3, {}), (4, {"ANYEP_RANKS_PER_HOST": "2"})])
def test_prefill_and_decode_run_unchanged_under_torchrun(ranks, hosts):
    ended = run_torchrun(Path(__file__).with_name("program_elastic.py"), ranks, **hosts)
    assert ended.code == 0, ended.output
    for rank in range(ranks):
        assert f"elastic {rank} of {ranks} on {1 + bool(hosts)} hosts: fine" in ended.output, ended.output
