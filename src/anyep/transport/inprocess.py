"""Ranks as threads of one process: the public fake, with the real protocol, arenas and signals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from anyep.errors import PeerError, PeerLost, PeerTimeout

Result = TypeVar("Result")
_MEETING_TIMEOUT_S = 120.0


class LocalMember:
    """One rank of a local group; pass it to Buffer as its group, in a thread of its own."""

    def __init__(self, group: LocalGroup, rank: int) -> None:
        self.group = group
        self.rank = rank
        self._meetings = 0

    @property
    def size(self) -> int:
        return self.group.size

    def allgather(self, item: Any) -> list[Any]:
        """Return every member's item, in rank order; items are not copied."""
        self._meetings += 1
        return self.group.meet(self._meetings, self.rank, item)

    def __repr__(self) -> str:
        return f"<member {self.rank} of a local group of {self.size}>"


class LocalGroup:
    """R ranks of this process. Index or iterate for the members, or let :meth:`run` start a thread for each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.members = tuple(LocalMember(self, rank) for rank in range(size))
        self._changed = threading.Condition()
        self._items: dict[int, dict[int, Any]] = {}
        self._failed: dict[int, BaseException] = {}

    def __getitem__(self, rank: int) -> LocalMember:
        return self.members[rank]

    def __iter__(self) -> Iterator[LocalMember]:
        return iter(self.members)

    def __len__(self) -> int:
        return self.size

    def run(self, rank_main: Callable[[LocalMember], Result]) -> list[Result]:
        """Call ``rank_main(member)`` in a thread for each rank; return the results in rank order.

        If ranks fail, raises the error that came first of its own accord, not a PeerLost that followed from it.
        """
        results: dict[int, Result] = {}
        self._failed = {}

        def thread_main(member: LocalMember) -> None:
            try:
                results[member.rank] = rank_main(member)
            except BaseException as error:
                with self._changed:
                    self._failed[member.rank] = error
                    self._changed.notify_all()

        threads = [
            threading.Thread(target=thread_main, args=(member,), name=f"anyep-rank-{member.rank}", daemon=True)
            for member in self.members
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed:
            raise _root_cause(list(self._failed.values()))
        return [results[rank] for rank in range(self.size)]

    def meet(self, meeting: int, rank: int, item: Any) -> list[Any]:
        """Exchange items between all members; used by constructors."""
        with self._changed:
            items = self._items.setdefault(meeting, {})
            items[rank] = item
            self._changed.notify_all()
            complete = self._changed.wait_for(lambda: len(items) == self.size or self._failed, _MEETING_TIMEOUT_S)
            if len(items) < self.size:
                self._raise_absent(items, timed_out=not complete)
            self._items.pop(meeting, None)
        return [items[other] for other in range(self.size)]

    def _raise_absent(self, items: dict[int, Any], *, timed_out: bool) -> None:
        absent = [rank for rank in range(self.size) if rank not in items]
        if timed_out:
            raise PeerTimeout(
                f"making a buffer: ranks {absent} of the local group did not come within {_MEETING_TIMEOUT_S:g} s; "
                "every member must make its buffer, each in a thread of its own",
                ranks=absent,
                step="making a buffer",
            )
        culprits = sorted(self._failed)
        raise PeerLost(f"making a buffer: ranks {culprits} failed", ranks=culprits, step="making a buffer")


def _root_cause(errors: Sequence[BaseException]) -> BaseException:
    own = [error for error in errors if not isinstance(error, PeerError)]
    return (own or errors)[0]


def local_group(size: int) -> LocalGroup:
    """Return a group of ``size`` ranks in this process. ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"a group has at least 1 rank, got {size}")
    return LocalGroup(size)
