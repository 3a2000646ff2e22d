"""A device a rank: memory that others have mapped, played by host memory, and its heap."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import anyep
from anyep.errors import CapacityError, Unavailable
from anyep.testing.lazy_device import LazyDevice
from anyep.testing.pretend_device import PretendDevice, pretended
from anyep.testing.processes import RankProcesses, run_processes
from anyep.transport import cuda_symmetric
from anyep.transport.cuda_symmetric import SymmetricHeap, open_heap
from anyep.transport.rendezvous import TorchRendezvous
from tests.exchange.rounds import check, open_buffer, play
from tests.gpu.exchanged import WAYS, draw
from tests.gpu.mapped import fall_silent, play_mapped

SIZES = {"hidden": 8, "num_experts": 2, "num_topk": 1, "max_tokens_per_rank": 2}


def mapped_heap(rendezvous, num_bytes, device):
    """Stand for torch's symmetric memory: every rank's piece of one process's memory, filled with 0xFF."""
    memory = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
    told = [int(item) for item in rendezvous.allgather(str(memory.data_ptr()).encode())]
    return SymmetricHeap(memory, told, rendezvous.rank)


def run(case, **options):
    def rank_main(member):
        with open_buffer(case, member, device="cuda", transport="cuda_symmetric", **options) as ep:
            return [play(case, ep) for _ in range(2)], ep.stats().copied_in_bytes

    outcomes, copied = zip(*anyep.local_group(case.num_ranks).run(rank_main), strict=True)
    for again in zip(*outcomes, strict=True):
        check(case, list(again))
    return copied


@pytest.fixture(autouse=True)
def mapped(monkeypatch):
    monkeypatch.setattr(cuda_symmetric, "open_heap", mapped_heap)


@pytest.mark.parametrize("seed", range(len(WAYS)))
def test_exchanges_between_devices_have_the_same_bits(seed):
    with pretended(LazyDevice(seed)):
        run(replace(draw(seed), num_tokens=(6, 0, 5)), arena_bytes=8 << 20)


@pytest.mark.parametrize(("seed", "copies"), [(24, False), (25, True)])
def test_outputs_are_copied_in_unless_they_lie_within_reach(seed, copies):
    """Even seeds take empty_output."""
    case = replace(draw(seed), num_tokens=(6, 5), with_weights=False, num_experts=4)
    with pretended(LazyDevice(0)):
        assert all((copied > 0) == copies for copied in run(case, arena_bytes=8 << 20))


def test_too_small_a_heap_is_an_error_on_all_ranks_with_the_account():
    case = replace(draw(0), num_tokens=(6, 6), num_topk=2, hidden=4096, spare_rows=None)

    def rank_main(member):
        with open_buffer(case, member, device="cuda", transport="cuda_symmetric", arena_bytes=0) as ep:
            batch, kept = case.batches[ep.rank], []

            def fill():
                for _ in range(100):
                    kept.append(ep.dispatch(batch.x, batch.topk_idx))

            with pytest.raises(CapacityError, match="could not allocate"):
                fill()
            kept.clear()
            return play(case, ep)

    with pretended(LazyDevice(0)):
        check(case, anyep.local_group(2).run(rank_main))


def test_a_device_without_room_for_the_heap_is_an_error_on_all_ranks_before_anything_is_mapped(monkeypatch):
    monkeypatch.setattr(cuda_symmetric, "open_heap", None)

    def rank_main(member):
        with pytest.raises(
            CapacityError, match=r"0\.031 GiB free, too little for a heap of 0\.06\d GiB .*\(arena_bytes"
        ):
            anyep.Buffer(member, **SIZES, device="cuda", transport="cuda_symmetric", arena_bytes=64 << 20)

    with pretended(PretendDevice(free_bytes=32 << 20)):
        anyep.local_group(2).run(rank_main)


def test_memory_returns_to_the_heap_with_the_last_view():
    memory = torch.zeros(1 << 10, dtype=torch.uint8)
    heap = SymmetricHeap(memory, [memory.data_ptr()], 0)
    view = heap.take(1000).view(torch.int16)[100:]
    gc.collect()
    with pytest.raises(CapacityError, match=r"has no room for 0\.0 MiB; release received tensors"):
        heap.take(100)
    assert heap.offset(view.data_ptr(), view.nbytes) == 200
    assert heap.offset(torch.zeros(1).data_ptr(), 4) is None
    del view
    assert heap.take(1000).numel() == 1000


def test_a_heap_that_torch_cuts_out_of_a_block_is_found_on_every_rank(monkeypatch):
    """What peers are told begins at the block; each rank's tensor may lie elsewhere in its own."""
    import torch.distributed._symmetric_memory as symmetric

    blocks = [torch.zeros(1 << 10, dtype=torch.uint8) for _ in range(2)]
    inside = [64, 256]

    for rank in range(2):
        memory = blocks[rank][inside[rank] :][:512]
        handle = SimpleNamespace(buffer_ptrs=[one.data_ptr() for one in blocks])
        monkeypatch.setattr(symmetric, "empty", lambda *size, memory=memory, **options: memory)
        monkeypatch.setattr(symmetric, "rendezvous", lambda tensor, group, handle=handle: handle)
        told = [[_fine()] * 2, [str(one).encode() for one in inside]]
        heap = open_heap(Group(rank, told), 512, torch.device("cpu"))
        assert told == []
        assert heap.base_R == [one.data_ptr() + there for one, there in zip(blocks, inside, strict=True)]
        assert heap.offset(memory.data_ptr() + 8, 4) == 8
        assert heap.mapping is handle


class Group(TorchRendezvous):
    """One of two ranks; ``told``: what both tell, call by call."""

    def __init__(self, rank, told):
        self.rank, self.size, self.group, self.told = rank, 2, "group", told

    def allgather(self, item):
        both = self.told.pop(0)
        assert both[self.rank] in (item, None)
        return [item if one is None else one for one in both]


def _fine():
    return json.dumps({"told": None}).encode()


def test_a_rank_that_cannot_allocate_is_an_error_on_both_before_torch_maps(monkeypatch):
    """Torch's rendezvous would wait for the one that does not come."""
    import torch.distributed._symmetric_memory as symmetric

    def full(*size, **options):
        raise torch.OutOfMemoryError("CUDA driver error: out of memory")

    failed = json.dumps({"error": "Unavailable", "text": "no memory"}).encode()
    monkeypatch.setattr(symmetric, "rendezvous", None)
    monkeypatch.setattr(symmetric, "empty", full)
    with pytest.raises(Unavailable, match=r"torch could not allocate 0.5 KiB that other GPUs map: .* out of memory"):
        open_heap(Group(0, [[None, _fine()]]), 512, torch.device("cpu"))
    monkeypatch.setattr(symmetric, "empty", lambda *size, **options: torch.zeros(512))
    with pytest.raises(Unavailable, match="rank 0 could not allocate its heap: Unavailable: no memory"):
        open_heap(Group(1, [[failed, _fine()]]), 512, torch.device("cpu"))


def test_without_a_process_group_it_is_unavailable(monkeypatch):
    monkeypatch.undo()

    def rank_main(member):
        with pytest.raises(Unavailable, match=r"need a torch.distributed process group"):
            anyep.Buffer(member, **SIZES, device="cuda", transport="cuda_symmetric")

    with pretended(PretendDevice()):
        anyep.local_group(2).run(rank_main)


def test_processes_with_a_device_each_give_the_same_bits():
    played = [replace(draw(seed), num_tokens=(6, 0, 5)) for seed in (3, 10)]
    for case, *outcomes in zip(played, *run_processes(3, play_mapped, played, 7), strict=True):
        check(case, outcomes)


def test_a_process_that_dies_is_lost_and_nobody_hangs():
    case = replace(draw(0), num_tokens=(4, 4))
    with RankProcesses(2, fall_silent, case) as ranks:
        survivor, _ = ranks.outcomes(timeout_s=60)
    assert survivor.error == "PeerLost"
    assert "rank 1" in survivor.text
