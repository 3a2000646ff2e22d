"""Random exchanges and programs between rank processes that play hosts, over real engines: every bit is right."""

from __future__ import annotations

import pytest

from tests.hosts.shapes import SHAPES, draw_rounds, play_rounds


@pytest.mark.parametrize("shape", SHAPES)
def test_random_rounds_over_an_engine_are_exact(engine, shape, tmp_path):
    """4 x 8 rounds an engine, the same ones every time."""
    homes = SHAPES[shape]
    play_rounds(len(homes[0]), engine, tmp_path, draw_rounds(homes, 8), timeout_s=240)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_random_rounds_over_an_engine_are_exact_at_length(engine, shape, seed, tmp_path):
    homes = SHAPES[shape]
    play_rounds(len(homes[0]), engine, tmp_path, draw_rounds(homes, 150, seed=seed), timeout_s=3500)
