"""Every exchange in these tests runs on poisoned memory: what nobody wrote would show in sums and gradients."""

from __future__ import annotations

import pytest

from anyep.exchange import receive, setup
from tests.exchange.rounds import poison_arenas


@pytest.fixture(scope="package", autouse=True)
def poisoned():
    original = setup.open_transport, receive.fresh
    poison_arenas()
    yield
    setup.open_transport, receive.fresh = original
