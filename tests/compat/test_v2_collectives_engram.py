"""engram_write and engram_fetch: entries of all ranks by one number, with or without scale factors."""

from __future__ import annotations

import pytest
import torch

from tests.compat.elastic_host import on_ranks

HIDDEN = 96


def entries_of(rank, n, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 120, (n, HIDDEN * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)


def all_entries(num_ranks, n, dtype=torch.bfloat16):
    return torch.cat([entries_of(rank, n, dtype).view(torch.uint8) for rank in range(num_ranks)])


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "entries"), [(5, 3), (1, 1), (0, 2), (4, 0)])
def test_a_fetch_returns_a_call_that_returns_the_entries_side_by_side(num_ranks, tokens, entries):
    def program(buffer):
        buffer.engram_write(entries_of(buffer.rank_idx, 6))
        indices = torch.randint(0, 6 * num_ranks, (tokens, entries), dtype=torch.int32)
        data, sf = buffer.engram_fetch(indices)()
        assert sf is None
        assert data.dtype == torch.bfloat16
        assert data.shape == (tokens, HIDDEN * entries)
        expected = all_entries(num_ranks, 6)[indices.long()].flatten(1)
        assert torch.equal(data.view(torch.uint8), expected)

    on_ranks(num_ranks, program)


@pytest.mark.parametrize("sf_dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_fp8_entries_come_with_the_scale_factors_of_all_ranks(sf_dtype, aligned, tokens):
    sf = torch.arange(2 * 6 * 3, dtype=torch.int32).view(sf_dtype).view(12, 3)

    def program(buffer):
        buffer.engram_write(entries_of(buffer.rank_idx, 6, torch.float8_e4m3fn), sf)
        indices = torch.randint(0, 12, (tokens, 2), dtype=torch.int32)
        data, scales = buffer.engram_fetch(indices, use_tma_aligned_col_major_sf=aligned)()
        assert data.dtype == torch.float8_e4m3fn
        assert scales.dtype == sf_dtype
        expected = all_entries(2, 6, torch.float8_e4m3fn)[indices.long()].flatten(1)
        assert torch.equal(data.view(torch.uint8), expected)
        assert scales.shape == (tokens, 6)
        assert torch.equal(scales.contiguous().view(torch.int32), sf[indices.long()].view(tokens, 6).view(torch.int32))
        assert scales.stride() == ((1, (tokens + 3) // 4 * 4) if aligned else (6, 1))

    on_ranks(2, program)


def test_strided_scale_factors_are_stored_by_value():
    sf = torch.arange(12.0).view(3, 4).T

    def program(buffer):
        mine = sf.clone()
        buffer.engram_write(entries_of(buffer.rank_idx, 2, torch.float8_e4m3fn), mine)
        mine.zero_()
        return buffer.engram_fetch(torch.tensor([[3], [0]], dtype=torch.int32))()[1].tolist()

    assert on_ranks(2, program) == [[[3.0, 7.0, 11.0], [0.0, 4.0, 8.0]]] * 2


def test_a_later_write_takes_the_place_of_the_entries_and_their_kind():
    def program(buffer):
        buffer.engram_write(entries_of(buffer.rank_idx, 2, torch.float8_e4m3fn), torch.ones(4, 1))
        buffer.engram_write(torch.full((3, 8), 5.0, dtype=torch.bfloat16))
        data, sf = buffer.engram_fetch(torch.tensor([[5]], dtype=torch.int32))()
        return data.tolist(), sf

    assert on_ranks(2, program) == [([[5.0] * 8], None)] * 2


def test_the_call_may_come_late_and_twice_and_the_indices_may_change():
    def program(buffer):
        buffer.engram_write(torch.full((2, 8), float(buffer.rank_idx), dtype=torch.bfloat16))
        indices = torch.tensor([[2]], dtype=torch.int32)
        first = buffer.engram_fetch(indices)
        indices.zero_()
        second = buffer.engram_fetch(indices)
        results = second()[0], first()[0], first()[0]
        return [float(one[0, 0]) for one in results]

    assert on_ranks(2, program) == [[0.0, 1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda b: b.engram_write(torch.ones(4)), "contiguous \\[entries, hidden\\]"),
        (lambda b: b.engram_write(torch.ones(8, 4, dtype=torch.bfloat16).T), "contiguous"),
        (lambda b: b.engram_write(torch.ones(4, 4)), "must be torch.bfloat16 without sf"),
        (
            lambda b: b.engram_write(torch.ones(4, 4).bfloat16(), torch.ones(8, 1)),
            "must be torch.float8_e4m3fn with sf",
        ),
        (lambda b: b.engram_write(torch.ones(1 << 20, 2).bfloat16()), "num_cpu_bytes=2097152"),
        (
            lambda b: b.engram_write(torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 1)),
            "sf must be \\[8, packs\\]",
        ),
        (
            lambda b: b.engram_write(torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(8, 1).half()),
            "4-byte words",
        ),
        (lambda b: b.engram_fetch(torch.zeros(2, 1)), "int32"),
        (lambda b: b.engram_fetch(torch.zeros(2, dtype=torch.int32)), "\\[tokens, entries\\]"),
        (lambda b: b.engram_fetch(torch.zeros(2, 4, dtype=torch.int32).T), "contiguous"),
        (lambda b: b.engram_fetch(torch.zeros(1 << 20, 2, dtype=torch.int32)), "the buffer has 4194304"),
        (lambda b: b.engram_fetch(torch.tensor([[8]], dtype=torch.int32))(), "indices\\[0, 0\\] is 8"),
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_what_upstream_refuses_is_refused(call, text, kind):
    def program(buffer):
        buffer.engram_write(torch.ones(4, 4, dtype=torch.bfloat16))
        with pytest.raises(kind, match=text):
            call(buffer)

    on_ranks(2, program)


def test_nothing_can_be_fetched_before_a_write():
    def program(buffer):
        with pytest.raises(RuntimeError, match="engram_write"):
            buffer.engram_fetch(torch.zeros(1, 1, dtype=torch.int32))

    on_ranks(1, program)
