"""How much memory can still be had: on this machine, and in the control groups that this process is in."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def available_bytes() -> int | None:
    """Return how much memory can still be committed: the machine's and the control group's; None where unknown."""
    limits = [_memory_available(), *_cgroup_rooms()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _memory_available() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup_rooms() -> Iterable[int]:
    """Yield the room under each memory limit on the way from this process's control group to the root."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from _rooms(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                yield from _rooms(Path("/sys/fs/cgroup/memory"), path, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _rooms(root: Path, path: str, limit_name: str, used_name: str) -> Iterable[int]:
    group = root / path.lstrip("/")
    for directory in (group, *group.parents):
        with suppress(OSError, ValueError):
            limit = int((directory / limit_name).read_text())  # "max" is no number: no limit here
            yield limit - int((directory / used_name).read_text()) + _reclaimable(directory)
        if directory == root:
            return


def _reclaimable(directory: Path) -> int:
    """Page cache counts as used and can be dropped."""
    for line in (directory / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
