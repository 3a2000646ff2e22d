"""Programs written for DeepEP run unchanged: only PYTHONPATH says where ``deep_ep`` is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.job import run_job


@pytest.mark.parametrize(
    ("program", "ranks", "hosts"),
    [("prefill", 2, {}), ("prefill", 4, {"ANYEP_RANKS_PER_HOST": "2"}), ("decode", 2, {})],
)
def test_a_program_for_deep_ep_runs_unchanged(program, ranks, hosts):
    ended = run_job(Path(__file__).with_name(f"program_{program}.py"), ranks, **hosts)
    for rank, one in enumerate(ended):
        assert f"{program} {rank} of {ranks}: fine" in one.output, "\n".join(other.output for other in ended)
