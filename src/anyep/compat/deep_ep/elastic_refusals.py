"""How the collective calls of ``ElasticBuffer`` refuse what upstream's host code refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anyep.errors import CapacityError

VECTOR_BYTES = 32
"""What upstream's bulk copies move at a time."""


class RefusedCall(AssertionError, RuntimeError):
    """What upstream's host code refuses: a RuntimeError there, described as an assertion; callers catch either."""


def require(condition: bool, text: str) -> None:
    if not condition:
        raise RefusedCall(f"Assertion exception: {text}")


@contextmanager
def refused_as_upstream() -> Iterator[None]:
    """What our own objects refuse for its arguments becomes what upstream's host code raises."""
    try:
        yield
    except (CapacityError, ValueError) as error:
        raise RefusedCall(f"Assertion exception: {error}") from error
