"""Every collective in these tests runs on poisoned memory: what nobody wrote is seen."""

from __future__ import annotations

from functools import partial

import pytest

from anyep.collectives import station
from anyep.transport.registry import open_transport


@pytest.fixture(scope="package", autouse=True)
def poisoned():
    original = station.open_transport
    station.open_transport = partial(open_transport, poison=True)
    yield
    station.open_transport = original
