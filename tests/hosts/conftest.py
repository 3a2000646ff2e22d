"""Exchanges here run on poisoned memory, and over every engine that is installed."""

from __future__ import annotations

import pytest

from tests.engines import skip_without
from tests.exchange.conftest import poisoned

__all__ = ["poisoned"]


@pytest.fixture(scope="module")
def played():
    """Return a function that sets how many ranks a host has."""
    with pytest.MonkeyPatch.context() as patch:
        yield lambda number: patch.setenv("ANYEP_RANKS_PER_HOST", str(number))


@pytest.fixture(params=["gloo", "nixl"])
def engine(request):
    """Name a network engine; skip with the reason where it is not installed."""
    return skip_without(request.param)
