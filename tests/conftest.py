"""What all tests share."""

from __future__ import annotations

from contextlib import ExitStack

import pytest


@pytest.fixture
def stack():
    """A class of context stacks: each rank opens its own."""
    return ExitStack
