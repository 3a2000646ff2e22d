"""Exchanges here run on poisoned memory, and over every engine that is installed."""

from __future__ import annotations

import pytest

from anyep.errors import Unavailable
from anyep.transport.nixl_agent import load_nixl
from tests.exchange.conftest import poisoned

__all__ = ["poisoned"]


@pytest.fixture(params=["gloo", "nixl"])
def engine(request):
    """Name a network engine; skip with the reason where it is not installed."""
    if request.param == "nixl":
        try:
            load_nixl()
        except Unavailable as error:
            pytest.skip(str(error))
    return request.param
