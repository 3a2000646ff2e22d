"""Rank processes in the place of rank threads: a test that runs a function on all ranks' threads, and judges what they
return, is run whole by every process; the function runs on its own rank, and what the ranks return is gathered."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import anyep
from anyep.transport.inprocess import LocalGroup, local_group


class ThisRank:
    """What ``anyep.local_group(R)`` returns in a rank process."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def run(self, function: Callable[[Any], Any]) -> list[Any]:
        """Call ``function(group)`` here; return what all ranks' calls returned, which must pickle. Collective."""
        mine = pickle.dumps(function(self.group))
        return [pickle.loads(one) for one in self.group.allgather(mine)]


def stand_in(group: Any) -> None:
    """From now on ``anyep.local_group(R)`` of this process is ``group``; groups of one rank stay threads."""

    def chosen(num_ranks: int, **options: Any) -> ThisRank | LocalGroup:
        if num_ranks == 1:
            return local_group(1, **options)
        assert num_ranks == group.size, f"a test of {num_ranks} ranks runs on {group.size} processes"
        return ThisRank(group)

    anyep.local_group = chosen
