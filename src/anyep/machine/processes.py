"""Processes of one machine: what they are known by, where they lie, whether they live. Elsewhere than on Linux less."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anyep.machine.linux import IS_LINUX, Descriptor, libc

_PR_SET_PDEATHSIG = 1
_ADDR_NO_RANDOMIZE, _ASK = 0x0040000, 0xFFFFFFFF
"""Of personality(2)."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def host_identity() -> str:
    """Return a name that ranks share when they run on one host: hostname, boot and network namespace.

    Not "can I see the memory": emulated hosts on one machine see each other's.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [socket.gethostname(), boot.read_text().strip() if boot.exists() else "", _namespace("net")]
    return "/".join(part for part in parts if part)


def process_namespace() -> str:
    """Return the namespace that process numbers belong to: a peer's number means nothing in another one."""
    return _namespace("pid")


def _namespace(kind: str) -> str:
    try:
        return f"{kind}:{os.stat(f'/proc/self/ns/{kind}').st_ino}"
    except OSError:
        return ""


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however it ends. Does nothing elsewhere."""
    if IS_LINUX:
        libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def lay_out_alike() -> None:
    """Let programs that this process goes on to run, and their children, all lie at the same addresses.

    Ranks that take turns on a core then find its branch predictor and its caches of decoded instructions filled by
    each other; at random addresses each turn begins with neither, and Python runs at half its speed. Does nothing where
    the system refuses.
    """
    if IS_LINUX:
        known = libc().personality(_ASK)
        if known >= 0:
            libc().personality(known | _ADDR_NO_RANDOMIZE)


def lie_alike() -> bool:
    """Whether this process lies where :func:`lay_out_alike` has put it."""
    return IS_LINUX and bool(max(0, libc().personality(_ASK)) & _ADDR_NO_RANDOMIZE)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait until the block is over: what Python's handlers raise in it would be lost.

    For starting processes: whatever is raised in the hooks of a fork is printed and forgotten, and what is raised
    before the new process is noted somewhere leaves it behind. Only for the main thread; ignored signals stay so.
    """
    came: list[int] = []
    before = {number: handler for number in _ENDING if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for held in came:
            signal.raise_signal(held)


class ProcessWatch:
    """Says which of some processes have died. Made while they are known to be alive, so that no number is mistaken.

    By pidfd; where the kernel has none (before 5.3, or a sandbox that forbids it), by number and start time. Its
    descriptors go with this object.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._poll = select.poll()
        self._turn = threading.Lock()  # one poll object serves one thread at a time
        self._pidfds: dict[int, tuple[int, Descriptor]] = {}
        self._started: dict[int, str] = {}
        try:
            for pid in dict.fromkeys(pids):
                self._add(pid)
        except BaseException:
            self.close()
            raise

    def _add(self, pid: int) -> None:
        try:
            descriptor = Descriptor(os.pidfd_open(pid))
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            self._started[pid] = start_time(pid)
            return
        self._pidfds[descriptor.fd] = pid, descriptor
        self._poll.register(descriptor.fd, select.POLLIN)

    def dead(self) -> set[int]:
        """Return the processes that have ended; zombies count."""
        with self._turn:
            dead = {self._pidfds[fd][0] for fd, _ in self._poll.poll(0)}
        return dead | {pid for pid, started in list(self._started.items()) if start_time(pid) != started}

    def close(self) -> None:
        """Idempotent; nobody is dead afterwards."""
        with self._turn:
            self._started.clear()
            while self._pidfds:
                fd, (_, descriptor) = self._pidfds.popitem()
                self._poll.unregister(fd)
                descriptor.close()


def is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP) or a debugger holds the process; False where nothing tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def start_time(pid: int) -> str:
    """Return when the process started, in clock ticks since boot; '' when it has ended, or where nothing tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
