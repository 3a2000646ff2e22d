"""Every exchange in these tests runs on poisoned memory: fresh memory is zeros, which padding has to be too."""

from __future__ import annotations

import pytest

from anyep.exchange import courier, receive, setup, sums_in
from tests.exchange.rounds import poison_arenas


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    original = setup.open_transport, receive.fresh, courier.piece_memory
    poison_arenas()
    yield
    setup.open_transport, receive.fresh, courier.piece_memory = original
    sums_in.piece_memory = courier.piece_memory
