"""The layer in five lines runs as it is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import anyep

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_has_gradients(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("moe_layer")
    for shape, x_norm, expert_norm in anyep.local_group(example.RANKS).run(example.rank_main):
        assert tuple(shape) == (example.TOKENS, example.HIDDEN)
        assert x_norm > 0
        assert expert_norm > 0


def test_as_a_program():
    done = subprocess.run([sys.executable, str(EXAMPLES / "moe_layer.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out [64, 128]") == 2
