"""Memory as only Linux gives it: without a name, shared by descriptor, page tables filled ahead, in huge pages.

What the in-process transport needs has a portable fallback here; the rest raises Unavailable elsewhere.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from anyep.errors import Unavailable

IS_LINUX = sys.platform == "linux"
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 14, 23, 25
HUGE_PAGE_BYTES = 2 << 20
"""Of x86-64, and of aarch64 with pages of 4 KiB; elsewhere a call that asks for such pages is refused, which is all."""
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


class Descriptor:
    """Owns an open file's number: closes it when told, or when nobody has this object any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.close = weakref.finalize(self, os.close, fd)
        self.close.atexit = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """Bytes mapped into this process. They stay mapped while anything refers to ``bytes`` or to a view of it.

    ``fd`` and ``inode`` name shared memory for :func:`map_peer_memory`; both are -1 where nobody else can map it. The
    descriptor goes with this object: views of the bytes do not keep it.
    """

    bytes: memoryview
    address: int
    size: int
    inode: int = -1
    descriptor: Descriptor | None = None
    huge_pages: bool = False

    @property
    def fd(self) -> int:
        return -1 if self.descriptor is None else self.descriptor.fd

    def close_fd(self) -> None:
        """Let nobody map it any more. Idempotent."""
        if self.descriptor is not None:
            self.descriptor.close()


def _mapped(bytes_: memoryview, *, inode: int = -1, descriptor: Descriptor | None = None) -> Memory:
    address = np.frombuffer(bytes_, np.uint8).ctypes.data
    return Memory(bytes=bytes_, address=address, size=bytes_.nbytes, inode=inode, descriptor=descriptor)


def _map_file(fd: int, num_bytes: int) -> memoryview:
    """Map a file where huge pages can be: at an address that is a multiple of their size.

    The kernel chooses such addresses for files in memory only where all of them are to have huge pages. So addresses
    are reserved first, a huge page more than needed, and the file is mapped over a part of them; they are given back
    together.
    """
    if not IS_LINUX:
        return memoryview(mmap.mmap(fd, num_bytes))
    reserved = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON | _MAP_NORESERVE)
    first = np.frombuffer(reserved, np.uint8).ctypes.data
    begin = -first % HUGE_PAGE_BYTES
    call = libc().mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if call(first + begin, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != first + begin:
        code = ctypes.get_errno()
        raise OSError(code, f"could not map {num_bytes} bytes: {os.strerror(code)}")
    return memoryview(reserved)[begin : begin + num_bytes]


def private_memory(num_bytes: int) -> Memory:
    """Return zeroed memory of this process, in huge pages where the machine gives them. Works everywhere.

    Raises OSError (ENOMEM) when the machine has none left.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return _mapped(memoryview(mmap.mmap(-1, num_bytes)))
    memory = _mapped(memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)))
    prefault(memory, fresh=True)
    return memory


def shared_memory(num_bytes: int) -> Memory:
    """Return zeroed memory that this user's other processes can map by (pid, fd), and that has no name anywhere.

    All pages are there when this returns: a machine without memory is an OSError here (ENOMEM, ENOSPC), not
    a SIGBUS later. The caller closes ``fd``; the memory is gone with its last mapping.
    """
    if not hasattr(os, "memfd_create"):
        raise Unavailable(
            "shared memory between processes needs memfd_create (Linux 3.17); here ranks can be threads "
            "of one process: anyep.local_group"
        )
    descriptor = Descriptor(os.memfd_create("anyep", os.MFD_CLOEXEC))
    fd = descriptor.fd
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, num_bytes)
        memory = _mapped(_map_file(fd, num_bytes), inode=os.fstat(fd).st_ino, descriptor=descriptor)
        collapsed = _collapse(memory)
        os.posix_fallocate(fd, 0, num_bytes)
        prefault(memory, fresh=True)
    except BaseException:
        descriptor.close()  # an error holds this frame
        raise
    return replace(memory, huge_pages=collapsed)


def map_peer_memory(pid: int, fd: int, inode: int, num_bytes: int) -> Memory:
    """Map what :func:`shared_memory` made in another process, page tables filled.

    Raises ProcessLookupError when the process is gone or has closed it (its number may name another file by now),
    PermissionError when it belongs to another user, OSError otherwise.
    """
    try:
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} is gone or has closed its memory") from error
    try:
        found = os.fstat(own)
        if found.st_ino != inode or found.st_size != num_bytes:
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has closed its memory")
        memory = _mapped(_map_file(own, num_bytes))
    finally:
        os.close(own)
    prefault(memory, fresh=False)
    return memory


def prefault(memory: Memory, *, fresh: bool) -> None:
    """Fill the page tables now: faults inside the first collective cost more. ``fresh``: nobody has written yet."""
    if IS_LINUX:
        if fresh:
            _advise(memory, _MADV_HUGEPAGE)
        code = _advise(memory, _MADV_POPULATE_WRITE)
        if code == 0:
            return
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, f"could not commit {memory.size} bytes: {os.strerror(code)}")
    pages = np.frombuffer(memory.bytes, np.uint8)[:: mmap.PAGESIZE]
    if fresh:
        pages[:] = 0
    else:
        pages.max()


def _collapse(memory: Memory) -> bool:
    """Make fresh shared memory of huge pages, whatever the machine's setting for files in memory; True if it is.

    Rows that are scattered over hundreds of MiB need a page's address each, and in a virtual machine finding one takes
    up to two dozen loads. Linux 6.1 and later collapse pages on demand, but only where one is there already.
    """
    for first in range(0, memory.size, HUGE_PAGE_BYTES):
        if _advise(memory, _MADV_POPULATE_WRITE, first, mmap.PAGESIZE):
            return False
    return _advise(memory, _MADV_COLLAPSE) == 0


def _advise(memory: Memory, advice: int, first: int = 0, num_bytes: int | None = None) -> int:
    """madvise through libc, which unlike ``mmap.madvise`` does not hold the GIL; return 0 or the errno."""
    size = memory.size if num_bytes is None else num_bytes
    if libc().madvise(ctypes.c_void_p(memory.address + first), ctypes.c_size_t(size), advice) == 0:
        return 0
    return ctypes.get_errno()


@lru_cache(maxsize=1)
def libc() -> ctypes.CDLL:
    """Return the C library, with errno kept."""
    return ctypes.CDLL(None, use_errno=True)
