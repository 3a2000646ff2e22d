"""The oracle against other ways to say the same: whole tensors, float64, sorted pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anyep.kernels.reference import ReferenceKernels
from anyep.kernels.spec import Element
from tests.kernels.memory import i32, poisoned, table

T, K, E, R = 50, 6, 24, 5
KERNELS = ReferenceKernels()


def _routed(by_expert):
    idx = torch.from_numpy(np.random.default_rng(3).integers(-1, E, (T, K)))
    expert_rank = i32((np.arange(E) * 7 % R).tolist())
    W = K if by_expert else min(K, R)
    outputs = [poisoned(*shape, dtype=torch.int32) for shape in ((T, W), (T, W), (R,), (E,), (R + E,))]
    head = (idx.data_ptr(), 8, T, K, E, R, expert_rank.data_ptr(), by_expert)
    assert KERNELS.route(*head, *(one.data_ptr() for one in outputs)) == -1
    return idx.numpy(), expert_rank.numpy(), *(one.numpy() for one in outputs[:4])


def test_compact_routes_are_a_cumulative_sum_over_a_membership_table():
    idx, expert_rank, entry_rank, entry_slot, rank_rows, expert_rows = _routed(0)
    member_TR = np.zeros((T, R), dtype=int)
    for k in range(K):
        named = idx[:, k] >= 0
        member_TR[named, expert_rank[idx[named, k]]] = 1
    slot_TR = np.cumsum(member_TR, axis=0) - 1
    for t in range(T):
        ranks = np.flatnonzero(member_TR[t])
        assert entry_rank[t].tolist() == ranks.tolist() + [-1] * (entry_rank.shape[1] - len(ranks))
        assert entry_slot[t, : len(ranks)].tolist() == slot_TR[t, ranks].tolist()
    assert rank_rows.tolist() == member_TR.sum(axis=0).tolist()
    assert expert_rows.tolist() == np.bincount(idx[idx >= 0], minlength=E).tolist()


def test_expert_routes_are_a_stable_sort():
    idx, expert_rank, entry_rank, entry_slot, rank_rows, expert_rows = _routed(1)
    flat = idx.ravel()
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] >= 0]
    starts = np.concatenate([[0], np.cumsum(expert_rows)[:-1]])
    slots = np.full(T * K, -1)
    slots[order] = np.arange(len(order)) - starts[flat[order]]
    assert entry_slot.ravel().tolist() == slots.tolist()
    assert entry_rank.tolist() == np.where(idx < 0, -1, expert_rank[idx]).tolist()
    assert rank_rows.tolist() == np.bincount(entry_rank[entry_rank >= 0], minlength=R).tolist()


@pytest.mark.parametrize("element", list(Element))
@pytest.mark.parametrize("by_rank", [0, 1])
def test_reduce_is_near_the_exact_sum_and_follows_its_order(element, by_rank):
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randn((6, 33), generator=generator).to(element.dtype) for _ in range(3)]
    bias = torch.randn((2, 33), generator=generator).to(element.dtype)
    ranks, places = i32([[2, 0, 2, 1], [1, -1, -1, 0]]), i32([[5, 1, 0, 3], [4, -1, -1, 2]])
    out, peers = poisoned(2, 33, dtype=element.dtype), table(*rows)
    KERNELS.reduce(
        *(int(element), 33, 0, 2, 4, by_rank, ranks.data_ptr(), places.data_ptr(), peers.data_ptr()),
        *(0, bias.data_ptr(), 0, out.data_ptr()),
    )
    named = [[rows[2][5], rows[0][1], rows[2][0], rows[1][3]], [rows[1][4], rows[0][2]]]
    if by_rank:
        named = [[rows[0][1], rows[1][3], rows[2][5], rows[2][0]], [rows[0][2], rows[1][4]]]
    for t in range(2):
        exact = sum((row.double() for row in named[t]), bias[t].double())
        eps = torch.finfo(element.dtype).eps
        assert (out[t].double() - exact).abs().max() <= eps * (exact.abs().max() + 1)
        ordered = bias[t].float()
        for row in named[t]:
            ordered = ordered + row.float()
        assert torch.equal(out[t], ordered.to(element.dtype))


def test_a_token_without_rows_is_zero_or_its_biases():
    none, out = i32([[-1, -1]]), poisoned(1, 4, dtype=torch.float32)
    bias0, bias1 = torch.full((1, 4), 1.5), torch.full((1, 4), 0.25)
    peers = torch.zeros(2, dtype=torch.int64)
    for biases, expected in (((0, 0), 0.0), ((bias0.data_ptr(), 0), 1.5), ((bias0.data_ptr(), bias1.data_ptr()), 1.75)):
        KERNELS.reduce(
            *(int(Element.FP32), 4, 0, 1, 2, 1, none.data_ptr(), none.data_ptr(), peers.data_ptr()),
            *(0, *biases, out.data_ptr()),
        )
        assert out.tolist() == [[expected] * 4]


def test_a_lone_row_keeps_the_sign_of_its_zeros():
    row, out = torch.tensor([[-0.0]], dtype=torch.bfloat16), poisoned(1, 1, dtype=torch.bfloat16)
    one, peers = i32([[0]]), table(row)
    KERNELS.reduce(
        *(int(Element.BF16), 1, 0, 1, 1, 1, one.data_ptr(), one.data_ptr(), peers.data_ptr(), 0, 0, 0, out.data_ptr())
    )
    assert torch.signbit(out).item()
