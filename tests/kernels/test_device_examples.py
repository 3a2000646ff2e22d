"""The worked examples of what a device works out by itself, number by number, for every set that does."""

from __future__ import annotations

import os

import pytest
import torch

from anyep.kernels.reference_device import ReferenceDeviceKernels
from anyep.kernels.spec_device import BAD, BAD_EXPERT, HEAD_WORDS, LANDING_TOO_SMALL, NO_FAULT, SETTLED, message_bytes
from anyep.testing.kernel_exam_device import check_device_kernels
from tests.kernels.memory import i32, poisoned
from tests.kernels.sets import device_of, load_or_skip

POISON = int(poisoned(1, dtype=torch.int32))


@pytest.fixture(params=["reference", "gpu"])
def kernels(request):
    kernels = ReferenceDeviceKernels() if request.param == "reference" else load_or_skip("gpu")
    with torch.device(device_of(request.param)):
        yield kernels


def board(*messages):
    """Messages of (head words, counts), as ranks announce them."""
    ranks, experts = len(messages), len(messages[0][1]) - len(messages)
    told = torch.zeros(ranks, message_bytes(ranks, experts) // 8, dtype=torch.int64)
    for message, (head, counts) in zip(told, messages, strict=True):
        message[:HEAD_WORDS] = torch.tensor(head)
        message[HEAD_WORDS:].view(torch.int32)[: len(counts)] = i32(counts)
    return told


def test_announce(kernels):
    messages = [torch.zeros(HEAD_WORDS + 1, dtype=torch.int64) for _ in range(2)]
    peers = torch.tensor([messages[0].data_ptr(), 0])
    counts = i32([3, 5])
    kernels.announce(2, peers.data_ptr(), 8, 64, -1, -1, -1, -1, 0, counts.data_ptr(), 2)
    assert messages[0].tolist() == [8, 64, -1, -1, -1, -1, NO_FAULT, 3 + (5 << 32)]
    assert messages[1].tolist() == [0] * (HEAD_WORDS + 1)


def test_begin_route_and_announce_counts(kernels):
    idx, expert_rank = torch.tensor([[0, 3], [4, 0]]), i32([0, 0, 1, 1])
    kept = torch.zeros(2, 2, dtype=torch.int64)
    entry_rank, entry_slot, rank_rows, expert_rows = (
        poisoned(*shape, dtype=torch.int32) for shape in ((2, 2), (2, 2), (2,), (4,))
    )
    entries = (entry_rank.data_ptr(), entry_slot.data_ptr())
    kernels.begin_route(idx.data_ptr(), 8, 2, 2, 4, 2, expert_rank.data_ptr(), 0, 0, kept.data_ptr(), 0, *entries, 0, 0)
    assert kept.tolist() == [[0, 3], [BAD, 0]]
    assert entry_rank.tolist() == [[0, 1], [0, -1]]
    assert entry_slot.tolist() == [[POISON, POISON], [POISON, -1]]
    verdict, message = torch.zeros(1, dtype=torch.int64), torch.zeros(HEAD_WORDS + 3, dtype=torch.int64)
    peers = torch.tensor([message.data_ptr(), 0])
    kernels.announce_counts(
        *(kept.data_ptr(), 8, 2, 2, 4, 2, 0, *entries, 0, 0, rank_rows.data_ptr(), expert_rows.data_ptr()),
        *(verdict.data_ptr(), peers.data_ptr(), 8, 64, -1, -1, -1, -1),
    )
    assert verdict.tolist() == [2]
    assert entry_slot.tolist() == [[0, 0], [1, -1]]
    assert rank_rows.tolist() == [2, 1]
    assert expert_rows.tolist() == [2, 0, 0, 1]
    assert message[:HEAD_WORDS].tolist() == [8, 64, -1, -1, -1, -1, 2]
    assert message[HEAD_WORDS:].view(torch.int32).tolist() == [2, 1, 2, 0, 0, 1]


def test_entries_of_both_layouts_at_once(kernels):
    idx, expert_rank = torch.tensor([[0, 3], [1, 0]]), i32([0, 0, 1, 1])
    kept, verdict = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    entries = [poisoned(2, 2, dtype=torch.int32) for _ in range(4)]
    rank_rows, expert_rows = poisoned(2, dtype=torch.int32), poisoned(4, dtype=torch.int32)
    addresses = [one.data_ptr() for one in entries]
    kernels.begin_route(idx.data_ptr(), 8, 2, 2, 4, 2, expert_rank.data_ptr(), 1, 0, kept.data_ptr(), 0, *addresses)
    kernels.announce_counts(
        *(kept.data_ptr(), 8, 2, 2, 4, 2, 1, *addresses, rank_rows.data_ptr(), expert_rows.data_ptr()),
        *(verdict.data_ptr(), 0, 8, -1, -1, -1, -1, -1),
    )
    by_expert, compact = [one.tolist() for one in entries[:2]], [one.tolist() for one in entries[2:]]
    assert by_expert == [[[0, 1], [0, 0]], [[0, 0], [0, 1]]]
    assert compact == [[[0, 1], [0, -1]], [[0, 0], [1, -1]]]
    assert rank_rows.tolist() == [2, 1]
    assert expert_rows.tolist() == [2, 1, 0, 1]


@pytest.mark.parametrize(
    ("capacity", "verdict", "code"),
    [(8, NO_FAULT, SETTLED), (2, NO_FAULT, LANDING_TOO_SMALL), (8, 7, BAD_EXPERT)],
)
def test_settle(kernels, capacity, verdict, code):
    heads = [capacity, 64, -1, -1, -1, -1, NO_FAULT], [8, 0, -1, -1, -1, -1, verdict]
    told = board((heads[0], [2, 1, 2, 1]), (heads[1], [1, 0, 1, 0]))
    owner, local, base = i32([0, 1]), i32([0, 0]), torch.tensor([1000, 2000])
    idx, ranks, slots = torch.tensor([[0], [1], [0]]), i32([0, 1, 0]), i32([0, 0, 1])
    names = {"send_start": 2, "dense_start": 2, "recv_rows": 2, "recv_start": 2, "counts": 1, "block_start": 1}
    names |= {"filled_rows": 2, "gap_begin": 2, "gap_end": 2}
    source_rows = poisoned(2, dtype=torch.int32)
    found = {name: poisoned(size, dtype=torch.int32) for name, size in names.items()}
    rows = poisoned(3, dtype=torch.int32)
    tables, summary, fault = (torch.full(shape, 5) for shape in ((5, 2), (4,), (4,)))
    kernels.settle(
        *(told.data_ptr(), message_bytes(2, 2), 0, 2, 2, 1, owner.data_ptr(), local.data_ptr(), 1, 4, 0, -1, 1),
        *(one.data_ptr() for one in (base, tables, summary, fault, *found.values())),
        *(0, 0, source_rows.data_ptr(), 3, 1, idx.data_ptr(), 8, ranks.data_ptr(), slots.data_ptr(), rows.data_ptr()),
    )
    good = code == SETTLED
    assert {name: one.tolist() for name, one in found.items()} == {
        "send_start": [0, 0],
        "dense_start": [POISON, POISON],
        "recv_rows": [2, 1],
        "recv_start": [0, 2],
        "counts": [3 if good else 0],
        "block_start": [0],
        "filled_rows": [4, 4],
        "gap_begin": [3 if good else 0, POISON],
        "gap_end": [4 if good else 0, POISON],
    }
    assert tables.tolist() == [[1064, 2000] if good else [0, 0], *[[0, 0]] * 4]
    assert summary.tolist() == [code, 4, 1 if verdict == 7 else 2, verdict]
    assert fault.tolist() == ([5] * 4 if good else summary.tolist())
    assert source_rows.tolist() == ([2, 1] if good else [0, 0])
    assert rows.tolist() == [0, 0, 1]
    assert ranks.tolist() == ([0, 1, 0] if good else [-1] * 3)


@pytest.mark.parametrize("verdict", [NO_FAULT, 7])
def test_connect(kernels, verdict):
    told = board(([8, 64, -1, -1, -1, -1, NO_FAULT], [0, 0, 0]), ([8, 0, -1, -1, -1, -1, verdict], [0, 0, 0]))
    base = torch.tensor([1000, 2000])
    tables, summary, fault = (torch.full(shape, 5) for shape in ((5, 2), (4,), (4,)))
    entries = i32([0, 1])
    addresses = (one.data_ptr() for one in (tables, summary, fault, entries))
    kernels.connect(told.data_ptr(), message_bytes(2, 1), 2, base.data_ptr(), 3, *addresses, 2)
    good = verdict == NO_FAULT
    assert tables.tolist() == [[1064, 2000] if good else [0, 0], *[[0, 0]] * 4]
    assert entries.tolist() == ([0, 1] if good else [-1, -1])
    assert summary.tolist() == ([SETTLED, 3, 2, NO_FAULT] if good else [BAD_EXPERT, 3, 1, 7])
    assert fault.tolist() == ([5] * 4 if good else summary.tolist())


def test_fill_gaps(kernels):
    begin, end = i32([1]), i32([2])
    parts = [torch.full((3, 4), 7, dtype=torch.uint8) for _ in range(4)]
    where = [number for one in parts for number in (one.data_ptr(), 4)]
    kernels.fill_gaps(1, begin.data_ptr(), end.data_ptr(), *where, 0, 4)
    for part, tensor in enumerate(parts):
        assert tensor[:, 0].tolist() == [7, 255 if part == 2 else 0, 7]
        assert (tensor == tensor[:, :1]).all()


def test_the_reference_passes_its_own_exam():
    check_device_kernels(ReferenceDeviceKernels(), rounds=20)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the exam runs in tests/gpu there")
def test_a_gpu_passes_the_exam():
    from anyep.testing.kernel_memory import DeviceMemory

    check_device_kernels(load_or_skip("gpu"), memory=DeviceMemory("cuda"))
