"""Network engines that tests need, and this machine may lack."""

from __future__ import annotations

import pytest

from anyep.errors import Unavailable
from anyep.transport.nixl_agent import load_nixl


def skip_without(engine: str) -> str:
    """Return the name of an engine or transport; skip the test, with the reason, where it is not installed."""
    if engine == "nixl":
        try:
            load_nixl()
        except Unavailable as error:
            pytest.skip(str(error))
    return engine
