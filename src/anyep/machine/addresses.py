"""Where arrays lie, for compiled code that takes addresses."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def address_of(array: NDArray[Any]) -> int:
    """Return where an array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address
