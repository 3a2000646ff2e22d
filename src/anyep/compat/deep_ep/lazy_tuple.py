"""A tuple whose members are made when one of them is first looked at: most programs hand a handle on and never look."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, SupportsIndex, TypeVar

_Kind = TypeVar("_Kind", bound="LazyTuple")
_BEHIND = [(None,) * (length - 1) for length in range(11)]
item = tuple.__getitem__
"""Reads what a tuple holds itself: ``item(handle, 0)`` is its origin."""
_MAKING = threading.RLock()
"""Two threads that look at once must see the same members; making them waits for nothing."""


class LazyTuple(tuple[Any, ...]):
    """A tuple of known length: indexing, slicing, unpacking, iterating and comparing make the members, once.

    What Python code does with a tuple works; pickles and copies are plain tuples. Only extensions in C that read a
    tuple's memory past these methods would see its origin and None.
    """

    @property
    def origin(self) -> Any:
        """What the members are made from: the one thing that the tuple itself holds."""
        return item(self, 0)

    @abstractmethod
    def _make(self) -> tuple[Any, ...]:
        """Return the members."""

    def members(self) -> tuple[Any, ...]:
        """Return them as a plain tuple, the same one each time."""
        made: tuple[Any, ...] | None = self.__dict__.get("_members")
        if made is None:
            with _MAKING:
                made = self.__dict__.get("_members")
                if made is None:
                    made = self.__dict__["_members"] = self._make()
        return made

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        return self.members()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.members())

    def __contains__(self, value: object) -> bool:
        return value in self.members()

    def __eq__(self, other: object) -> bool:
        return self is other or self.members() == _plain(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.members())

    def __add__(self, other: Any) -> tuple[Any, ...]:
        joined: tuple[Any, ...] = self.members() + _plain(other)
        return joined

    def __radd__(self, other: Any) -> tuple[Any, ...]:
        joined: tuple[Any, ...] = other + self.members()
        return joined

    def __mul__(self, times: SupportsIndex) -> tuple[Any, ...]:
        return self.members() * times

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return repr(self.members())

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self.members(),)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return self.__reduce__()

    def count(self, value: object) -> int:
        return self.members().count(value)

    def index(self, value: object, *limits: SupportsIndex) -> int:
        return self.members().index(value, *limits)


def lazy(kind: type[_Kind], length: int, origin: object) -> _Kind:
    """Return a tuple of ``length`` members; a class's own ``__new__`` runs twice as long from cold caches."""
    return tuple.__new__(kind, (origin, *_BEHIND[length]))


def _plain(other: Any) -> Any:
    return other.members() if isinstance(other, LazyTuple) else other
