"""Gradients and DeepEP's interface between rank processes that play hosts, over real engines: random rounds of each."""

from __future__ import annotations

import pytest

from tests.hosts.on_top import draw_rounds, play_rounds
from tests.hosts.shapes import SHAPES


@pytest.mark.parametrize("shape", ["2x2", "3x2+1"])
def test_layers_and_deep_ep_over_an_engine_are_right(engine, shape):
    """2 x 14 rounds an engine, the same ones every time."""
    homes = SHAPES[shape]
    play_rounds(len(homes[0]), engine, draw_rounds(homes, 2), timeout_s=240)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_and_deep_ep_over_an_engine_are_right_at_length(engine, shape, seed):
    homes = SHAPES[shape]
    play_rounds(len(homes[0]), engine, draw_rounds(homes, 25, seed=seed), timeout_s=3500)
