"""Where DeepEP's calls exchange tensors: on the host, or on a device that host memory plays."""

from __future__ import annotations

import pytest

from anyep.compat.deep_ep import native
from anyep.testing.pretend_device import PretendDevice, pretended


@pytest.fixture
def device(monkeypatch):
    """Rows are taken for a GPU's. The device that stands for it."""
    monkeypatch.setattr(native, "device_of", lambda rows: "cuda")
    with pretended(PretendDevice()) as device:
        yield device


@pytest.fixture(params=["host", "device"])
def where(request):
    """On the host, and once more on a device."""
    if request.param == "device":
        request.getfixturevalue("device")


@pytest.fixture
def twice(device, monkeypatch):
    """Does the same on a device, and then on the host; returns pairs of what ranks return."""

    def run(act):
        on_device = act()
        monkeypatch.setattr(native, "device_of", lambda rows: None)
        return zip(on_device, act(), strict=True)

    return run
