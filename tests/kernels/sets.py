"""Kernel sets by name, for tests that go through all of them."""

from __future__ import annotations

import os

import pytest

from anyep.errors import Unavailable
from anyep.kernels.registry import load


def load_or_skip(name):
    """The set; the GPU's interpreted in a process that was started for that, skipped where there is none."""
    if name == "gpu" and os.environ.get("TRITON_INTERPRET") == "1":
        from anyep.testing.interpreter import interpreted_kernels

        return interpreted_kernels()
    try:
        return load(name)
    except Unavailable as reason:
        pytest.skip(str(reason))


def device_of(name):
    """Where the tensors lie whose addresses a set takes."""
    return "cuda" if name == "gpu" and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
