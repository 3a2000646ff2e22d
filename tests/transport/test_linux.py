"""Memory without a name, watched processes, and what is done where the system lacks a call."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anyep.errors import Unavailable
from anyep.machine import linux, processes, room

MIB = 1 << 20


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def test_private_memory_is_zero_and_writable():
    memory = linux.private_memory(2 * MIB)
    view = np.frombuffer(memory.bytes, np.uint8)
    assert view.ctypes.data == memory.address
    assert (view.size, int(view.max())) == (2 * MIB, 0)
    view[:] = 1


def test_shared_memory_has_no_name_and_belongs_to_this_user():
    memory = linux.shared_memory(2 * MIB)
    found = os.fstat(memory.fd)
    assert found.st_mode & 0o777 == 0o600
    assert found.st_nlink == 0
    assert found.st_blocks * 512 == 2 * MIB, "committed, not promised"
    assert not [name for name in os.listdir("/dev/shm") if "anyep" in name]
    memory.close_fd()


def test_peer_memory_is_the_same_memory():
    memory = linux.shared_memory(2 * MIB)
    other = linux.map_peer_memory(os.getpid(), memory.fd, memory.inode, memory.size)
    np.frombuffer(memory.bytes, np.uint8)[12345] = 99
    assert other.address != memory.address
    assert np.frombuffer(other.bytes, np.uint8)[12345] == 99
    memory.close_fd()


def pmd_mapped_bytes(memory):
    """Bytes of the mapping that begins at ``memory`` which huge pages serve, as the kernel tells."""
    maps = Path("/proc/self/smaps").read_text().partition(f"{memory.address:08x}-")[2]
    return 1024 * int(maps.partition("ShmemPmdMapped:")[2].split()[0])


def test_shared_memory_is_of_huge_pages_where_it_says_so_also_for_peers():
    memory = linux.shared_memory(4 * MIB)
    other = linux.map_peer_memory(os.getpid(), memory.fd, memory.inode, memory.size)
    assert memory.address % linux.HUGE_PAGE_BYTES == other.address % linux.HUGE_PAGE_BYTES == 0
    for mapped in (memory, other):
        assert pmd_mapped_bytes(mapped) == (memory.size if memory.huge_pages else 0)
    memory.close_fd()


def test_memory_that_cannot_be_collapsed_is_committed_all_the_same(monkeypatch):
    advise = linux._advise

    def no_collapse(memory, advice, *where):
        return errno.EINVAL if advice == linux._MADV_COLLAPSE else advise(memory, advice, *where)

    monkeypatch.setattr(linux, "_advise", no_collapse)
    memory = linux.shared_memory(4 * MIB)
    assert not memory.huge_pages
    assert os.fstat(memory.fd).st_blocks * 512 == 4 * MIB
    assert int(np.frombuffer(memory.bytes, np.uint8).max()) == 0
    memory.close_fd()


def test_bytes_stay_mapped_while_anybody_looks_at_them_and_no_longer():
    memory = linux.shared_memory(4 * MIB)
    mapping, view = f"{memory.address:08x}-", np.frombuffer(memory.bytes, np.uint8)[5:9]
    memory.close_fd()
    del memory
    assert mapping in Path("/proc/self/maps").read_text()
    view[:] = 1
    del view
    assert mapping not in Path("/proc/self/maps").read_text()


def test_mapping_does_not_wipe_what_the_owner_wrote(monkeypatch):
    memory = linux.shared_memory(2 * MIB)
    np.frombuffer(memory.bytes, np.uint8)[:] = 7
    for code in (0, errno.EINVAL):  # as advised, and by touching where the kernel cannot
        if code:
            monkeypatch.setattr(linux, "_advise", lambda memory, advice, *where: errno.EINVAL)
        other = linux.map_peer_memory(os.getpid(), memory.fd, memory.inode, memory.size)
        assert int(np.frombuffer(other.bytes, np.uint8).min()) == 7
    memory.close_fd()


def test_closed_memory_cannot_be_mapped_even_if_its_number_is_used_again(tmp_path):
    memory = linux.shared_memory(2 * MIB)
    memory.close_fd()
    with pytest.raises(ProcessLookupError, match="has closed its memory"):
        linux.map_peer_memory(os.getpid(), memory.fd, memory.inode, memory.size)
    stranger = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    os.ftruncate(stranger, memory.size)
    os.dup2(stranger, memory.fd)  # most likely it has that number already
    try:
        with pytest.raises(ProcessLookupError, match="has closed its memory"):
            linux.map_peer_memory(os.getpid(), memory.fd, memory.inode, memory.size)
    finally:
        for fd in {stranger, memory.fd}:
            os.close(fd)


def test_memory_of_a_process_that_is_gone(sleeper):
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(ProcessLookupError, match=str(sleeper.pid)):
        linux.map_peer_memory(sleeper.pid, 3, 1, MIB)


def test_failed_allocation_leaves_no_descriptor(monkeypatch):
    def refuse(fd, offset, size):
        raise OSError(errno.ENOSPC, "no space")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="no space"):
        linux.shared_memory(2 * MIB)
    assert os.listdir("/proc/self/fd") == before


def test_a_refused_commitment_is_an_error(monkeypatch):
    monkeypatch.setattr(linux, "_advise", lambda memory, advice: errno.ENOMEM)
    with pytest.raises(OSError, match="could not commit 2097152 bytes"):
        linux.private_memory(2 * MIB)


def test_without_memfd_the_error_says_what_is_possible(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(Unavailable, match="local_group"):
        linux.shared_memory(2 * MIB)


def test_memory_is_touched_where_the_kernel_cannot_populate(monkeypatch):
    monkeypatch.setattr(linux, "_advise", lambda memory, advice: errno.EINVAL)
    memory = linux.private_memory(MIB)
    assert len(memory.bytes) == MIB
    resident = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(resident) if _covers(line, memory.address))
    rss = next(line for line in resident[start:] if line.startswith("Rss:"))
    assert int(rss.split()[1]) * 1024 >= MIB


def _covers(line: str, address: int) -> bool:
    span = line.split()[0].split("-") if line else []
    return len(span) == 2 and int(span[0], 16) <= address < int(span[1], 16)


def test_available_memory_is_plausible():
    available = room.available_bytes()
    assert available is not None
    assert 0 < available < 1 << 50


def test_control_group_limits_bind_all_the_way_up(tmp_path):
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for directory, limit, used, cache in ((tmp_path / "job", "1000", "600", "150"), (inner, "max", "500", "0")):
        (directory / "memory.max").write_text(limit + "\n")
        (directory / "memory.current").write_text(used + "\n")
        (directory / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 5\n")
    assert list(room._rooms(tmp_path, "/job/step", "memory.max", "memory.current")) == [550]
    assert list(room._rooms(tmp_path, "/", "memory.max", "memory.current")) == []


def test_host_identity_names_boot_and_network():
    identity = processes.host_identity()
    assert identity == processes.host_identity()
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() in identity
    assert str(os.stat("/proc/self/ns/net").st_ino) in identity
    assert processes.process_namespace() == f"pid:{os.stat('/proc/self/ns/pid').st_ino}"


def _no_pidfd(pid):
    raise OSError(errno.ENOSYS, "no pidfd here")


@pytest.mark.parametrize("pidfd", [True, False], ids=["pidfd", "by start time"])
def test_a_watched_process_is_seen_to_end(sleeper, monkeypatch, pidfd):
    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", _no_pidfd)
    watch = processes.ProcessWatch([sleeper.pid, os.getpid(), sleeper.pid])
    assert watch.dead() == set()
    sleeper.send_signal(signal.SIGSTOP)
    assert watch.dead() == set(), "stopped is not dead"
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert watch.dead() == {sleeper.pid}, "a zombie is dead"
    watch.close()
    watch.close()
    assert watch.dead() == set()


def test_a_watch_that_cannot_be_made_leaves_no_descriptor(sleeper):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="No such process"):
        processes.ProcessWatch([os.getpid(), 2**22 + 5])
    assert os.listdir("/proc/self/fd") == before


def test_prefault_serves_pages_of_any_size():
    memory = linux.private_memory(5 * mmap.PAGESIZE)
    linux.prefault(memory, fresh=False)
    assert int(np.frombuffer(memory.bytes, np.uint8).max()) == 0


def laid_out(prepare):
    """Where two programs, started one after another, find a function of the interpreter, and what they say of it."""
    told = (
        "import ctypes; from anyep.machine.processes import lie_alike; "
        "print(ctypes.cast(ctypes.pythonapi.Py_IncRef, ctypes.c_void_p).value, lie_alike())"
    )
    run = [sys.executable, "-c", told]
    return [subprocess.run(run, preexec_fn=prepare, capture_output=True, text=True, check=True).stdout for _ in "ab"]


@pytest.mark.skipif(not linux.IS_LINUX, reason="personality(2) is Linux's")
def test_programs_that_are_laid_out_alike_lie_at_the_same_addresses():
    first, second = laid_out(processes.lay_out_alike)
    assert first == second
    assert first.split()[1] == "True"


def test_a_system_that_refuses_leaves_addresses_as_they_are(monkeypatch):
    class Refuses:
        def personality(self, _):
            return -1

    monkeypatch.setattr(processes, "libc", Refuses)
    processes.lay_out_alike()
    assert not processes.lie_alike()
