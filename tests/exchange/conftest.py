"""Every exchange in these tests runs on poisoned memory: fresh memory is zeros, which padding has to be too."""

from __future__ import annotations

import pytest

from anyep.exchange import receive, setup
from tests.exchange.rounds import poison_arenas


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    original = setup.open_transport, receive.fresh
    poison_arenas()
    yield
    setup.open_transport, receive.fresh = original
