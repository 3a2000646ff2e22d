"""V2 on a device: compact batches with scales and weights, cached calls, fixed sizes, and sums in column order."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from anyep.compat.deep_ep.ep_handle import FIELDS
from tests.compat.test_v2_handle import dispatch, pickled, rebuilt, use
from tests.compat.v2_world import World, same_bits

WORLDS = [World(), World(num_tokens=(6,), num_experts=5), World(num_tokens=(3, 9, 1), num_experts=6, num_topk=7)]


pytestmark = pytest.mark.usefixtures("device")


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or same_bits(one, other)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("world", WORLDS)
def test_calls_have_the_bits_of_the_host(world, waits, twice):
    def rank_main(buffer, given):
        event = {"async_with_compute_stream": not waits}
        x, idx, weights, handle, first = buffer.dispatch(
            given.x, given.idx, given.weights, num_experts=world.num_experts, **event
        )
        assert (first.event is None) == waits
        if not waits:
            first.current_stream_wait()
        more, again_idx, none, same, second = buffer.dispatch(given.x * 3, handle=handle, **event)
        assert same is handle
        assert none is None
        y = (x.float() * (1 + buffer.rank_idx)).bfloat16()
        out, sent, third = buffer.combine(y, handle, topk_weights=weights, bias=given.bias, **event)
        plain, nothing, fourth = buffer.combine(y, handle, **event)
        assert nothing is None
        large = (2.0**30, 1.0, -(2.0**30), 3.0)[buffer.rank_idx % 4]  # a sum of them tells in which order it was made
        ordered, _, fifth = buffer.combine(torch.full_like(x, large), handle, **event)
        for event in (second, third, fourth, fifth):
            if not waits:
                event.current_stream_wait()
        assert handle.num_recv_tokens == len(x)
        fields = [handle.topk_idx, handle.psum_num_recv_tokens_per_expert, handle.num_unaligned_recv_tokens_per_expert]
        lists = torch.tensor(handle.num_recv_tokens_per_expert_list)
        return [t.clone() for t in (x, idx, weights, more, again_idx, out, sent, plain, ordered, *fields, lists)]

    for ours, theirs in twice(lambda: world.run(rank_main)):
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
def test_scales_travel_with_and_without_weights(dtype, tma, with_weights, twice):
    world = WORLDS[0]

    def rank_main(buffer, given):
        q = given.x.to(torch.float8_e4m3fn)
        scales = torch.arange(len(q) * 3).view(3, -1).t().to(dtype)
        (x, got), _, weights, _, _ = buffer.dispatch(
            (q, scales),
            given.idx,
            given.weights if with_weights else None,
            num_experts=world.num_experts,
            use_tma_aligned_col_major_sf=tma,
        )
        assert got.stride() == ((1, -(-len(x) // 4) * 4) if tma else (3, 1)) or got.numel() == 0
        return [x.clone(), got.clone(), None if weights is None else weights.clone()]

    for ours, theirs in twice(lambda: world.run(rank_main)):
        assert_same(ours, theirs)


def test_a_batch_of_fixed_size_needs_no_count(twice):
    world = WORLDS[0]

    def rank_main(buffer, given):
        x, idx, weights, handle, _ = buffer.dispatch(
            given.x, given.idx, given.weights, num_experts=world.num_experts, do_cpu_sync=False
        )
        assert handle.num_recv_tokens_per_expert_list == []
        out, _, _ = buffer.combine(x, handle)
        return [t.clone() for t in (x, idx, weights, out, handle.num_unaligned_recv_tokens_per_expert)]

    for ours, theirs in twice(lambda: world.run(rank_main)):
        assert_same(ours, theirs)


def test_the_callers_own_indices_may_be_what_the_handle_has():
    world = WORLDS[0]

    def rank_main(buffer, given):
        x, _, _, handle, _ = buffer.dispatch(given.x, given.idx, num_experts=8, do_handle_copy=False)
        assert handle.topk_idx is given.idx
        return buffer.combine(x, handle)[0]

    world.run(rank_main)


def everything(twice, world, rank_main, **options):
    """Assert that ranks bring the bits of the host, None where the host does."""
    for ours, theirs in twice(lambda: world.run(rank_main, **options)):
        assert_same(ours, theirs)


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("world", WORLDS)
def test_expanded_batches_and_their_sums_have_the_bits_of_the_host(world, alignment, sync, several, twice):
    def rank_main(buffer, given):
        asked = {"do_expand": True, "expert_alignment": alignment}
        x, idx, weights, handle, _ = buffer.dispatch(
            given.x, given.idx, given.weights, num_experts=world.num_experts, do_cpu_sync=sync, **asked
        )
        assert idx is None
        more, none, _, same, event = buffer.dispatch(
            given.x * 3, handle=handle, async_with_compute_stream=True, **asked
        )
        event.current_stream_wait()
        assert none is None
        assert same is handle
        y = (torch.arange(x.numel()).view(x.shape) % 251 - 100).bfloat16() * (1 + buffer.rank_idx)
        out, none, _ = buffer.combine(y, handle, bias=given.bias)
        assert none is None
        again, _, event = buffer.combine(-y, handle, async_with_compute_stream=True)
        event.current_stream_wait()
        sent = buffer.combine(y, handle, topk_weights=weights)[1] if several else None
        fields = [handle.psum_num_recv_tokens_per_expert, handle.num_unaligned_recv_tokens_per_expert]
        lists = torch.tensor([handle.num_expanded_tokens, *handle.num_recv_tokens_per_expert_list])
        return [t if t is None else t.clone() for t in (x, weights, more, out, again, sent, *fields, lists)]

    everything(twice, world, rank_main, allow_multiple_reduction=several)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
def test_expanded_rows_have_their_scales(tma, with_weights, twice):
    world = WORLDS[2]

    def rank_main(buffer, given):
        q = given.x.to(torch.float8_e4m3fn)
        scales = torch.arange(len(q) * 3, dtype=torch.float32).view(3, -1).t()
        (x, got), _, weights, _, _ = buffer.dispatch(
            (q, scales),
            given.idx,
            given.weights if with_weights else None,
            num_experts=world.num_experts,
            do_expand=True,
            do_zero_padding=True,
            expert_alignment=3,
            use_tma_aligned_col_major_sf=tma,
        )
        assert got.stride() == ((1, -(-len(x) // 4) * 4) if tma else (3, 1)) or got.numel() == 0
        return [x.clone(), got.clone(), None if weights is None else weights.clone()]

    everything(twice, world, rank_main)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("world", WORLDS)
def test_fields_of_a_handle_are_those_of_the_host(world, sync, expand, twice):
    def rank_main(buffer, given):
        handle = buffer.dispatch(
            given.x, given.idx, num_experts=world.num_experts, do_expand=expand, do_cpu_sync=sync, expert_alignment=4
        )[3]
        return {name: copy.copy(getattr(handle, name)) for name in FIELDS}

    for ours, theirs in twice(lambda: world.run(rank_main)):
        rows = int(theirs["psum_num_recv_tokens_per_scaleup_rank"][-1])
        assert (ours["recv_src_metadata"][rows:] == -1).all()
        for fields in (ours, theirs):
            fields["recv_src_metadata"] = fields["recv_src_metadata"][:rows]
        for name in FIELDS:
            one, other = ours[name], theirs[name]
            assert same_bits(one, other) if isinstance(one, torch.Tensor) else one == other, name


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("world", WORLDS)
def test_a_compact_batch_says_how_many_rows_it_would_have_expanded(world, sync, alignment):
    def rank_main(buffer, given):
        asked = {"num_experts": world.num_experts, "do_cpu_sync": sync, "expert_alignment": alignment}
        compact = buffer.dispatch(given.x, given.idx, **asked)[3]
        x, *_ = buffer.dispatch(given.x, given.idx, do_expand=True, **asked)
        assert compact.num_expanded_tokens == len(x)
        return len(x)

    for rank, rows in enumerate(world.run(rank_main)):
        aligned = sum(-(-count // alignment) * alignment for count in world.counts(rank))
        assert rows == aligned if sync else rows >= aligned


ALL = pytest.mark.parametrize(("expand", "several"), [(False, True), (True, True), (True, False)])


@ALL
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("remake", [rebuilt, pickled, copy.copy, copy.deepcopy])
def test_a_handle_made_again_from_its_fields_serves_when_the_first_one_is_gone(remake, sync, expand, several):
    world = WORLDS[0]

    def rank_main(buffer, given):
        x, _, weights, handle, _ = dispatch(buffer, given, do_expand=expand, expert_alignment=3, do_cpu_sync=sync)
        expected = [one.clone() for one in use(buffer, x, weights, handle, given, expand=expand)]
        again = remake(handle)
        del handle
        gc.collect()
        for _ in range(2):  # the second time it is known
            found = use(buffer, x, weights, again, given, expand=expand)
            assert_same(found, expected)

    world.run(rank_main, allow_multiple_reduction=several)


@ALL
def test_a_handle_of_upstreams_fields_alone_asks_the_other_ranks(expand, several):
    def rank_main(buffer, given):
        x, _, weights, handle, _ = dispatch(buffer, given, do_expand=expand, expert_alignment=3)
        expected = [one.clone() for one in use(buffer, x, weights, handle, given, expand=expand)]
        bare = rebuilt(handle, without=("announced_counts",))
        assert_same(use(buffer, x, weights, bare, given, expand=expand), expected)
        assert torch.equal(bare.announced_counts, handle.announced_counts)

    WORLDS[0].run(rank_main, allow_multiple_reduction=several)


@ALL
def test_fields_that_a_caller_sets_are_what_combine_reads(expand, several):
    def rank_main(buffer, given):
        first = dispatch(buffer, given, do_expand=expand)[3]
        turned = given.idx.flip(0).contiguous()
        x, _, weights, second, _ = buffer.dispatch(given.x, turned, given.weights, num_experts=8, do_expand=expand)
        expected = [one.clone() for one in use(buffer, x, weights, second, given, expand=expand)]
        for name, value in vars(second).items():
            setattr(first, name, value)
        assert_same(use(buffer, x, weights, first, given, expand=expand), expected)

    WORLDS[0].run(rank_main, allow_multiple_reduction=several)


def test_what_is_written_to_looked_at_fields_is_what_combine_reads():
    def rank_main(buffer, given):
        x, _, weights, handle, _ = dispatch(buffer, given, do_expand=True)
        once = buffer.combine(x, handle, weights)[0].clone()
        handle.recv_src_metadata[:, 2:] = -1
        nothing, none, _ = buffer.combine(x, handle, weights)
        assert not nothing.any()
        assert not none.any()
        assert once.any() == bool(len(given.x))
        handle.topk_idx.fill_(-1)
        with pytest.raises(ValueError, match="does not belong to these counts"):
            buffer.combine(x, handle)

    World(num_tokens=(6, 5)).run(rank_main)


def test_metadata_that_points_outside_its_batch_is_refused_before_anything_is_written():
    def rank_main(buffer, given):
        x, _, weights, handle, _ = dispatch(buffer, given, do_expand=True)
        expected = [one.clone() for one in use(buffer, x, weights, handle, given, expand=True)]
        for bad in (
            torch.full_like(handle.recv_src_metadata, len(x)),
            handle.recv_src_metadata[1:],
            handle.recv_src_metadata.long(),
            None,
        ):
            broken = copy.copy(handle)
            broken.recv_src_metadata = bad
            with pytest.raises(RuntimeError, match="recv_src_metadata"):
                buffer.combine(x, broken)
            with pytest.raises(RuntimeError, match="recv_src_metadata"):
                buffer.dispatch(given.x, handle=broken, do_expand=True)
        assert_same(use(buffer, x, weights, handle, given, expand=True), expected)

    World(num_tokens=(6, 5)).run(rank_main)


def test_copies_on_some_ranks_only_are_refused_on_all():
    def rank_main(buffer, given):
        x, _, _, handle, _ = dispatch(buffer, given)
        mixed = copy.copy(handle) if buffer.rank_idx else handle
        if buffer.rank_idx:
            mixed.topk_idx = mixed.topk_idx.clone()
        with pytest.raises(ValueError, match="ranks disagree"):
            buffer.combine(x, mixed)
        return buffer.combine(x, handle)[0]

    WORLDS[0].run(rank_main)


def test_a_handle_serves_on_another_buffer():
    def rank_main(buffer, given):
        other = type(buffer)(buffer.group, num_bytes=buffer.num_bytes, num_cpu_timeout_secs=30)
        x, _, _, handle, _ = dispatch(buffer, given)
        assert_same([other.combine(x, handle)[0]], [buffer.combine(x, handle)[0]])

    WORLDS[0].run(rank_main)


def test_an_expert_named_twice_has_two_rows_and_a_lone_minus_zero_stays(twice):
    world = World(num_tokens=(2, 1), num_experts=4, num_topk=3)

    def rank_main(buffer, given):
        idx = torch.tensor([[1, 1, 0], [3, -1, -1]])[: len(given.x)]
        x, _, _, handle, _ = buffer.dispatch(given.x, idx, num_experts=4, do_expand=True)
        out = buffer.combine(torch.full_like(x, -0.0), handle)[0]
        assert out.view(torch.int16).ne(0).all()
        return [x.clone(), out.clone(), handle.recv_src_metadata.clone()]

    everything(twice, world, rank_main)
