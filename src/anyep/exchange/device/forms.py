"""What calls of one form have in common, worked out at the first of them: places in a plan, headers, recorded launches.

A call of a form that is known hands bases to the device (kernels/tapes.py), and works out nothing again: most of the
microseconds that a call took the host went there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

_MOST_FORMS = 256
"""More shapes than a program that cares for microseconds has."""

Form = TypeVar("Form")


class Forms:
    """The forms that one endpoint has met; the oldest goes when there are too many."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}
        self._making = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Form]) -> Form:
        """Return the form of that key, made if it is not known."""
        found: Form | None = self._known.get(key)
        if found is not None:
            return found
        with self._making:
            while len(self._known) >= _MOST_FORMS:
                del self._known[next(iter(self._known))]
            found = self._known[key] = make()
        return found
