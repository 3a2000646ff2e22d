"""V2 dispatch with a row for each (token, local expert): slabs of experts, padding, and what the handle says."""

from __future__ import annotations

import pytest
import torch

from tests.compat.v2_world import World, poisoned, same_bits  # noqa: F401

WORLD = World()
ALIGNMENTS = [1, 4, 7]


def dispatch(buffer, inputs, **options):
    given = (inputs.x.to(torch.float8_e4m3fn), scales_of(inputs))
    return buffer.dispatch(given, inputs.idx, inputs.weights, num_experts=8, do_expand=True, **options)


def scales_of(inputs):
    return inputs.x[:, :3].float().contiguous()


def expected_rows(rank, alignment, of, shape):
    rows, _ = WORLD.expanded(rank, alignment)
    return torch.stack([torch.zeros(shape) if row is None else of(*row).float().reshape(shape) for row in rows])


@pytest.mark.parametrize("zero_padding", [False, True])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_each_local_expert_has_a_slab_whose_padding_is_zero(alignment, zero_padding):
    results = WORLD.run(lambda b, i: dispatch(b, i, expert_alignment=alignment, do_zero_padding=zero_padding))
    for rank, ((x, scales), idx, weights, _, _) in enumerate(results):
        assert idx is None
        expected_x = expected_rows(rank, alignment, lambda s, t, k: WORLD.inputs[s].x[t], (WORLD.hidden,))
        assert same_bits(x, expected_x.to(torch.float8_e4m3fn))
        assert same_bits(scales, expected_rows(rank, alignment, lambda s, t, k: scales_of(WORLD.inputs[s])[t], (3,)))
        assert same_bits(weights, expected_rows(rank, alignment, lambda s, t, k: WORLD.inputs[s].weights[t, k], ()))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_expert_ends_without_padding_lead_to_the_next_experts_begin(alignment):
    results = WORLD.run(lambda b, i: dispatch(b, i, expert_alignment=alignment)[3])
    for rank, handle in enumerate(results):
        counts, begin, ends = WORLD.counts(rank), 0, handle.psum_num_recv_tokens_per_expert.tolist()
        for count, end in zip(counts, ends, strict=True):
            assert end - begin == count
            begin = -(-end // alignment) * alignment
        assert handle.num_expanded_tokens == begin
        assert handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
        aligned = [-(-count // alignment) * alignment for count in counts]
        assert handle.num_recv_tokens_per_expert_list == aligned


def test_metadata_names_the_expanded_row_of_each_column():
    for rank, handle in enumerate(WORLD.run(lambda b, i: dispatch(b, i, expert_alignment=4)[3])):
        _, places = WORLD.expanded(rank, 4)
        expected = [[places.get((s, t, k), -1) for k in range(WORLD.num_topk)] for s, t in WORLD.arrivals(rank)]
        assert handle.recv_src_metadata[:, 2:].tolist() == expected
        assert handle.num_recv_tokens == len(expected)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_without_waiting_for_the_cpu_there_is_room_for_the_worst_case(alignment):
    def rank_main(buffer, i):
        return dispatch(buffer, i, expert_alignment=alignment, do_cpu_sync=False), dispatch(
            buffer, i, expert_alignment=alignment
        )

    most = WORLD.num_ranks * WORLD.max_tokens * min(WORLD.num_topk, WORLD.num_local)
    total = -(-(most + (alignment - 1) * WORLD.num_local) // alignment) * alignment
    for open_, exact in WORLD.run(rank_main):
        (x, scales), _, weights, handle, _ = open_
        rows = exact[0][0].shape[0]
        assert (len(x), len(scales), len(weights), handle.num_expanded_tokens) == (total,) * 4
        assert same_bits(x[:rows], exact[0][0])
        assert same_bits(weights[:rows], exact[2])
        assert (x[rows:].float() == 0).all()
        assert (scales[rows:] == 0).all()
        assert (weights[rows:] == 0).all()


def test_with_several_hosts_slabs_are_the_same(monkeypatch):
    direct = WORLD.run(lambda b, i: dispatch(b, i, expert_alignment=4)[0][0])
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    hybrid = WORLD.run(lambda b, i: dispatch(b, i, expert_alignment=4)[0][0])
    assert all(same_bits(a, b) for a, b in zip(direct, hybrid, strict=True))
