"""Functions that rank processes run; light to import."""

from __future__ import annotations

import os
import time
from typing import Any


def whoami(group: Any, rank: int, extra: int) -> tuple[int, int, int, list[bytes]]:
    return rank, group.size, extra, group.allgather(bytes([rank]))


def fail_on(group: Any, rank: int, culprit: int) -> int:
    if rank == culprit:
        raise ValueError(f"rank {rank} fails on purpose")
    return rank


def die_on(group: Any, rank: int, culprit: int) -> int:
    if rank == culprit:
        os._exit(7)
    return rank


def sleep_on(group: Any, rank: int, culprit: int, seconds: float) -> int:
    if rank == culprit:
        time.sleep(seconds)
    return rank
