"""A symmetric heap between rank processes without GPUs: files in memory that every process maps, for tests."""

from __future__ import annotations

import mmap
import os

import numpy as np
import torch

from anyep.exchange.device import devices
from anyep.testing.lazy_device import LazyDevice
from anyep.transport import cuda_symmetric
from anyep.transport.cuda_symmetric import SymmetricHeap
from tests.exchange.rounds import open_buffer, play


def map_heap(rendezvous, num_bytes, device):
    """Stand for :func:`cuda_symmetric.open_heap`: a rank's heap lies at another address in every process."""
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    file = os.memfd_create("anyep-test")
    os.ftruncate(file, size)
    names = rendezvous.allgather(f"/proc/{os.getpid()}/fd/{file}".encode())
    maps = [_map(name.decode(), size) for name in names]
    rendezvous.allgather(b"mapped")
    os.close(file)
    heaps = [torch.from_numpy(np.frombuffer(one, np.uint8)) for one in maps]
    heaps[rendezvous.rank].fill_(0xFF)
    heap = SymmetricHeap(heaps[rendezvous.rank], [one.data_ptr() for one in heaps], rendezvous.rank)
    heap.others = heaps
    return heap


def _map(name, size):
    file = os.open(name, os.O_RDWR)
    try:
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def play_mapped(group, rank, cases, seed):
    """Play cases one after the other, on a device of this process alone."""
    cuda_symmetric.open_heap = map_heap
    device = LazyDevice(seed + rank)
    devices.find_device = lambda name, num_sms=None, at_once=1, sizes=(8, 8, 8): device
    outcomes = []
    for case in cases:
        with open_buffer(case, group, device="cuda", arena_bytes=8 << 20) as ep:
            outcomes.append(play(case, ep))
    return outcomes


def fall_silent(group, rank, case):
    """Rank 1 ends in the middle; the others say what they got."""
    cuda_symmetric.open_heap = map_heap
    device = LazyDevice(rank)
    devices.find_device = lambda name, num_sms=None, at_once=1, sizes=(8, 8, 8): device
    with open_buffer(case, group, device="cuda", arena_bytes=8 << 20) as ep:
        if rank == 1:
            os._exit(3)
        ep.dispatch(case.batches[rank].x, case.batches[rank].topk_idx)
