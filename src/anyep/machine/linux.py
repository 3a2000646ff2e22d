"""The calls only Linux has, each with a portable fallback or a clear refusal."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
from pathlib import Path

from anyep.errors import CapacityError, Unavailable

HAS_MEMFD = hasattr(os, "memfd_create")
HAS_PIDFD = hasattr(os, "pidfd_open")
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; the mmap module does not name them
_PAGE = mmap.PAGESIZE
_UNLIMITED = 1 << 60


def shared_memory_file(num_bytes: int) -> int:
    """Return a descriptor of fresh memory without a name: only this user can open it, and it goes with its last user.

    Raises CapacityError when the machine cannot back it, Unavailable where there is no memfd.
    """
    if not HAS_MEMFD:
        raise Unavailable("shared memory between processes needs Linux (memfd_create); use transport='inprocess'")
    descriptor = os.memfd_create("anyep", os.MFD_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        os.posix_fallocate(descriptor, 0, num_bytes)  # an error now, not a SIGBUS at the first write
    except OSError as error:
        os.close(descriptor)
        raise CapacityError(
            f"the machine cannot back {num_bytes / 2**20:.1f} MiB of shared memory ({error.strerror}); "
            f"{available_bytes() / 2**20:.0f} MiB are available"
        ) from error
    return descriptor


def open_peer_memory(pid: int, descriptor: int) -> int:
    """Open the shared memory that another process holds as ``descriptor``."""
    try:
        return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise Unavailable(
            f"process {pid} does not let this one open its memory ({error.strerror}); ranks of one host must run as the "
            "same user and see each other in /proc"
        ) from error


def populate(memory: mmap.mmap, *, write: bool) -> None:
    """Fault all pages in now: a page fault inside the first collective costs more. ``write`` False: page tables only."""
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    try:
        memory.madvise(advice)
    except (OSError, ValueError, AttributeError):
        if write:
            for offset in range(0, len(memory), _PAGE):
                memory[offset] = 0


def watch_process(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends; None where there is no pidfd."""
    if not HAS_PIDFD:
        return None
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return None


def ended(descriptors: dict[int, int]) -> list[int]:
    """Return the keys of ``descriptors`` (key -> pidfd) whose process has ended."""
    poll = select.poll()
    for descriptor in descriptors.values():
        poll.register(descriptor, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(0)}
    return [key for key, descriptor in descriptors.items() if descriptor in ready]


def available_bytes() -> int:
    """Return the memory that can still be committed: the machine's, and the control group's where it has a limit."""
    return min(_meminfo_available(), _cgroup_available())


def _meminfo_available() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _UNLIMITED


def _cgroup_available() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text().strip().rsplit("::", 1)[1].lstrip("/")
        folder = Path("/sys/fs/cgroup") / group
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            return max(0, int(limit) - int((folder / "memory.current").read_text()))
    return _UNLIMITED
