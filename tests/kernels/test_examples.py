"""The worked examples of the spec's docstrings, number by number, for every set."""

from __future__ import annotations

import pytest
import torch

from anyep.kernels.registry import NAMES
from anyep.kernels.spec import Element, ScaleFormat
from anyep.numerics.logfmt import logfmt_row_bytes
from tests.kernels.memory import i32, poisoned, table
from tests.kernels.sets import device_of, load_or_skip

TOPK_IDX = [[0, 3], [1, 0], [-1, 2]]
EXPERT_RANK = [0, 0, 1, 1]


@pytest.fixture(params=NAMES)
def kernels(request):
    kernels = load_or_skip(request.param)
    with torch.device(device_of(request.param)):
        yield kernels


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("by_expert", "ranks", "slots", "rank_rows"),
    [
        (0, [[0, 1], [0, -1], [1, -1]], [[0, 0], [1, -1], [1, -1]], [2, 2]),
        (1, [[0, 1], [0, 0], [-1, 1]], [[0, 0], [0, 1], [-1, 0]], [3, 2]),
    ],
)
def test_route(kernels, idx_dtype, by_expert, ranks, slots, rank_rows):
    idx, expert_rank = torch.tensor(TOPK_IDX, dtype=idx_dtype), i32(EXPERT_RANK)
    outputs = [poisoned(*shape, dtype=torch.int32) for shape in ((3, 2), (3, 2), (2,), (4,))]
    scratch = poisoned(6, dtype=torch.int32)
    head = (idx.data_ptr(), idx.itemsize, 3, 2, 4, 2, expert_rank.data_ptr(), by_expert)
    assert kernels.route(*head, *(one.data_ptr() for one in outputs), scratch.data_ptr()) == -1
    assert [one.tolist() for one in outputs] == [ranks, slots, rank_rows, [2, 1, 1, 1]]


@pytest.mark.parametrize("bad", [-2, 4, 2**40])
def test_route_names_the_first_expert_outside(kernels, bad):
    idx, expert_rank = torch.tensor(TOPK_IDX), i32(EXPERT_RANK)
    idx[1, 1] = bad
    idx[2, 0] = -5
    outputs = [poisoned(*shape, dtype=torch.int32) for shape in ((3, 2), (3, 2), (2,), (4,), (6,))]
    head = (idx.data_ptr(), 8, 3, 2, 4, 2, expert_rank.data_ptr(), 0)
    assert kernels.route(*head, *(one.data_ptr() for one in outputs)) == 3


def test_place(kernels):
    ranks, slots, start = i32([[0, 1], [0, -1], [1, -1]]), i32([[0, 0], [1, -1], [1, -1]]), i32([10, 20])
    rows = poisoned(3, 2, dtype=torch.int32)
    kernels.place(ranks.data_ptr(), slots.data_ptr(), 3, 2, 0, 8, 0, start.data_ptr(), rows.data_ptr())
    assert rows.tolist() == [[10, 20], [11, -1], [21, -1]]
    assert slots.tolist() == [[0, 0], [1, -1], [1, -1]]


def test_scatter(kernels):
    x = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    rank0, rank1 = poisoned(1, 3, dtype=torch.uint8), poisoned(2, 3, dtype=torch.uint8)
    ranks, rows, peers = i32([[0, 1], [1, -1]]), i32([[0, 1], [0, -1]]), table(rank0, rank1)
    kernels.scatter(x.data_ptr(), 3, 0, 2, 2, ranks.data_ptr(), rows.data_ptr(), peers.data_ptr())
    kernels.fence()
    assert rank0.tolist() == [[1, 2, 3]]
    assert rank1.tolist() == [[4, 5, 6], [1, 2, 3]]


def test_scatter_skips_a_rank_without_an_address(kernels):
    x = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    rank1 = poisoned(2, 3, dtype=torch.uint8)
    ranks, rows, peers = i32([[0, 1], [1, -1]]), i32([[0, 1], [0, -1]]), torch.tensor([0, rank1.data_ptr()])
    kernels.scatter(x.data_ptr(), 3, 0, 2, 2, ranks.data_ptr(), rows.data_ptr(), peers.data_ptr())
    kernels.fence()
    assert rank1.tolist() == [[4, 5, 6], [1, 2, 3]]


def test_scatter_routing(kernels):
    idx, weights = torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.25]])
    expert_rank, expert_local = i32(EXPERT_RANK), i32([0, 1, 0, 1])
    ranks, rows = i32([[0, 1]]), i32([[0, 0]])
    there_idx = [poisoned(1, 2, dtype=torch.int64) for _ in range(2)]
    there_weights = [poisoned(1, 2, dtype=torch.float32) for _ in range(2)]
    there_token = [poisoned(1, dtype=torch.int32) for _ in range(2)]
    tables = [table(*there) for there in (there_idx, there_weights, there_token)]
    head = (idx.data_ptr(), 8, weights.data_ptr(), 0, 1, 2, 2, 0, expert_rank.data_ptr(), expert_local.data_ptr())
    kernels.scatter_routing(*head, ranks.data_ptr(), rows.data_ptr(), *(one.data_ptr() for one in tables))
    assert [one.tolist() for one in there_idx] == [[[0, -1]], [[-1, 1]]]
    assert [one.tolist() for one in there_weights] == [[[0.5, 0.0]], [[0.0, 0.25]]]
    assert [one.tolist() for one in there_token] == [[0], [0]]


@pytest.mark.parametrize(
    ("scale_format", "expected"), [(ScaleFormat.FP32, 2.0), (ScaleFormat.POWER_OF_TWO, 2.0), (ScaleFormat.UE8M0, 0x80)]
)
@pytest.mark.parametrize("element", list(Element))
def test_quantise_scatter(kernels, element, scale_format, expected):
    x = torch.tensor([[1.0, -2.0, 896.0]]).to(element.dtype)
    q, scales = poisoned(1, 3, dtype=torch.uint8), poisoned(1, 1, dtype=scale_format.dtype)
    ranks, rows, q_table, scales_table = i32([[0]]), i32([[0]]), table(q), table(scales)
    head = (x.data_ptr(), int(element), 3, int(scale_format), 0, 1, 1)
    kernels.quantise_scatter(*head, ranks.data_ptr(), rows.data_ptr(), q_table.data_ptr(), scales_table.data_ptr())
    kernels.fence()
    assert q.tolist() == [[0x30, 0xB8, 0x7E]]
    assert scales.tolist() == [[expected]]


@pytest.mark.parametrize("element", list(Element))
def test_dequantise(kernels, element):
    q, scales = torch.tensor([[0x38, 0xC0, 0x7E]], dtype=torch.uint8), torch.tensor([[0.5]])
    out = poisoned(1, 3, dtype=element.dtype)
    kernels.dequantise(q.data_ptr(), scales.data_ptr(), 0, 1, 3, out.data_ptr(), int(element))
    kernels.fence()
    assert out.tolist() == [[0.5, -1.0, 224.0]]


@pytest.mark.parametrize(("weights", "expected"), [(None, [11.5, 2.0]), ([[0.5, 4.0]], [12.5, 1.015625])])
def test_reduce(kernels, weights, expected):
    rank0 = torch.tensor([[9, 9], [1, 2]], dtype=torch.bfloat16)
    rank1 = torch.tensor([[0.5, 2**-8]], dtype=torch.bfloat16)
    bias = torch.tensor([[10, 0]], dtype=torch.bfloat16)
    out = poisoned(1, 2, dtype=torch.bfloat16)
    ranks, rows, peers = i32([[0, 1]]), i32([[1, 0]]), table(rank0, rank1)
    head = (int(Element.BF16), 2, 0, 1, 2, 1, ranks.data_ptr(), rows.data_ptr(), peers.data_ptr())
    factors = torch.tensor(weights or [])
    kernels.reduce(*head, factors.data_ptr() if weights else 0, bias.data_ptr(), 0, out.data_ptr())
    kernels.fence()
    assert out.tolist() == [expected]


def test_reduce_weights(kernels):
    rank0, rank1 = torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, 0.25]])
    out = poisoned(1, 2, dtype=torch.float32)
    ranks, rows, peers = i32([[0, 1]]), i32([[0, 0]]), table(rank0, rank1)
    kernels.reduce_weights(2, 0, 1, 2, 1, ranks.data_ptr(), rows.data_ptr(), peers.data_ptr(), out.data_ptr())
    kernels.fence()
    assert out.tolist() == [[0.5, 0.25]]


def test_copy(kernels):
    source, target = torch.arange(200, dtype=torch.uint8), poisoned(202, dtype=torch.uint8)
    kernels.copy(source.data_ptr(), target.data_ptr() + 1, 200)
    kernels.fence()
    assert target.tolist() == [255, *range(200), 255]


def test_fill_rows(kernels):
    rows, begin, end = torch.full((4, 2), 7, dtype=torch.uint8), i32([1]), i32([3])
    kernels.fill_rows(rows.data_ptr(), 2, 1, begin.data_ptr(), end.data_ptr(), 0xFF)
    assert rows.tolist() == [[7, 7], [255, 255], [255, 255], [7, 7]]


def test_unpack(kernels):
    sources = [torch.tensor(rows, dtype=torch.uint8) for rows in ([[1, 2]], [[3, 4], [5, 6]])]
    base, rows, start, packed = poisoned(4, 2, dtype=torch.uint8), i32([1, 2]), i32([3, 0]), table(*sources)
    kernels.unpack(2, 2, rows.data_ptr(), start.data_ptr(), packed.data_ptr(), base.data_ptr())
    kernels.fence()
    assert base.tolist() == [[3, 4], [5, 6], [255, 255], [1, 2]]


def test_pack(kernels):
    base = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]], dtype=torch.uint8)
    there = [poisoned(num_rows, 2, dtype=torch.uint8) for num_rows in (3, 1)]
    rows, start, packed = i32([[1, 2], [1, 0]]), i32([[3, 0], [2, 0]]), table(*there)
    kernels.pack(2, 2, 2, rows.data_ptr(), start.data_ptr(), base.data_ptr(), packed.data_ptr())
    kernels.fence()
    assert [one.tolist() for one in there] == [[[7, 8], [1, 2], [3, 4]], [[5, 6]]]


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
def test_gather(kernels, idx_dtype):
    ranks = [torch.tensor(rows, dtype=torch.uint8) for rows in ([[1, 2], [3, 4]], [[5, 6], [7, 8]])]
    peers = table(*ranks)
    index, out = torch.tensor([3, 0, 3], dtype=idx_dtype), poisoned(3, 2, dtype=torch.uint8)
    tail = (2, 2, peers.data_ptr(), out.data_ptr())
    assert kernels.gather(2, 3, index.data_ptr(), index.itemsize, *tail) == -1
    kernels.fence()
    assert out.tolist() == [[7, 8], [1, 2], [7, 8]]
    wrong = torch.tensor([0, 4, -1], dtype=idx_dtype)
    assert kernels.gather(2, 3, wrong.data_ptr(), wrong.itemsize, *tail) == 1
    assert out.tolist() == [[7, 8], [1, 2], [7, 8]]


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
def test_expand(kernels, idx_dtype):
    x, token = torch.tensor([[7], [8]], dtype=torch.uint8), i32([4, 6])
    idx, weights = torch.tensor([[0, 1], [-1, 0]], dtype=idx_dtype), torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    rows, start, scratch = i32([2]), i32([[0, 2]]), poisoned(2, dtype=torch.int32)
    tables = [table(one) for one in (x, idx, weights, token)]
    out = [poisoned(3, *one.shape[1:], dtype=one.dtype) for one in (x, idx, weights, token)]
    x_in, *sources = (one.data_ptr() for one in tables)
    x_out, *there = (one.data_ptr() for one in out)
    where = (rows.data_ptr(), start.data_ptr(), scratch.data_ptr())
    kernels.expand(1, 0, 2, idx.itemsize, 1, 2, *where, x_in, 0, *sources, x_out, 0, *there)
    kernels.fence()
    expected = (
        [[7], [8], [7]],
        [[0, -1], [-1, 0], [-1, 1]],
        [[0.5, 0.0], [0.0, 1.0], [0.0, 0.25]],
        [4, 6, 4],
    )
    assert tuple(one.tolist() for one in out) == expected


def test_transpose_scales(kernels):
    source, there, counts = i32([[[1, 2], [3, 4], [5, 6]]]), poisoned(1, 2, 3, dtype=torch.int32), i32([2])
    kernels.transpose_scales(1, 3, 2, counts.data_ptr(), source.data_ptr(), there.data_ptr())
    assert there.tolist() == [[[1, 3, -1], [2, 4, -1]]]


def _encoded(kernels):
    x, rows, start = torch.tensor([[9, 9], [0.5, -0.25]], dtype=torch.bfloat16), i32([1]), i32([1])
    wire = poisoned(logfmt_row_bytes(2), dtype=torch.uint8)
    kernels.logfmt_encode(x.data_ptr(), 2, 1, rows.data_ptr(), start.data_ptr(), wire.data_ptr())
    kernels.fence()
    return wire


def test_logfmt_encode(kernels):
    wire = _encoded(kernels)
    assert wire[:4].view(torch.int32).item() == 0x3E803F00
    assert wire[64:192].tolist() == [255, 1, *[0] * 126]
    assert wire[192:224].tolist() == [0b01, 0b10, *[0] * 30]
    assert wire[4:64].tolist() + wire[224:].tolist() == [255] * (60 + 96)


def test_reduce_logfmt(kernels):
    wire = _encoded(kernels)
    peers, ranks, rows, weights = table(wire), i32([[0]]), i32([[0]]), torch.tensor([[2.0]])
    bias, out = torch.ones((1, 2), dtype=torch.bfloat16), poisoned(1, 2, dtype=torch.bfloat16)
    head = (2, 0, 1, 1, 1, ranks.data_ptr(), rows.data_ptr(), peers.data_ptr(), weights.data_ptr())
    kernels.reduce_logfmt(*head, bias.data_ptr(), 0, out.data_ptr())
    kernels.fence()
    assert out.tolist() == [[2.0, 0.5]]
