"""V2 on devices of several hosts, which are played: tensors pass through the host's memory, bits are the host's."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext

import pytest
import torch

from anyep.compat.deep_ep.ep_handle import FIELDS
from tests.compat.test_v2_buffer import exchange
from tests.compat.test_v2_handle import dispatch, pickled, rebuilt, use
from tests.compat.v2_world import World, same_bits

WORLDS = [
    (World(), 2),
    (World(), 1),
    (World(num_tokens=(6, 2, 0, 9, 4, 1), num_experts=12, num_topk=7), 3),
    (World(num_tokens=(0, 0, 0, 0)), 2),
]
PLAYED = pytest.mark.parametrize(("world", "per_host"), WORLDS)
SYNC = pytest.mark.parametrize("sync", [True, False])


pytestmark = pytest.mark.usefixtures("device")


def assert_same(ours, theirs):
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one is None) == (other is None), place
        assert one is None or same_bits(one, other), place


@pytest.fixture
def assert_as_on_the_host(twice, monkeypatch):
    """Compares bits of a device's calls and the host's."""

    def compare(world, per_host, rank_main, **options):
        monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
        for ours, theirs in twice(lambda: world.run(rank_main, **options)):
            assert_same(ours, theirs)

    return compare


def kept(*found):
    return [one if one is None else one.clone() for one in found]


def telling(x, rank):
    """Return rows whose sums tell in which order they were made, and where they were rounded."""
    return torch.full_like(x, (2.0**30, 1.0, -(2.0**30), 3.0)[rank % 4])


@pytest.mark.parametrize(
    ("waits", "options"),
    [(True, {}), (False, {}), (True, {"deterministic": True}), (True, {"allow_hybrid_mode": False})],
)
@SYNC
@PLAYED
def test_calls_have_the_bits_of_the_host(world, per_host, sync, waits, options, assert_as_on_the_host):
    def rank_main(buffer, given):
        event = {"async_with_compute_stream": not waits}
        stats = torch.ones(world.num_local, dtype=torch.int32)
        x, idx, weights, handle, first = buffer.dispatch(
            given.x,
            given.idx,
            given.weights,
            num_experts=world.num_experts,
            do_cpu_sync=sync,
            cumulative_local_expert_recv_stats=stats,
            **event,
        )
        assert (first.event is None) == waits
        if not waits:
            first.current_stream_wait()
        more, again_idx, none, same, second = buffer.dispatch(given.x * 3, handle=handle, **event)
        assert same is handle
        assert none is None
        y = (x.float() * (1 + buffer.rank_idx)).bfloat16()
        out, sent, third = buffer.combine(y, handle, topk_weights=weights, bias=given.bias, **event)
        plain, nothing, fourth = buffer.combine(y, handle, bias=given.bias[0], **event)
        assert nothing is None
        ordered, _, fifth = buffer.combine(telling(x, buffer.rank_idx), handle, **event)
        for event in (second, third, fourth, fifth):
            assert (event.event is None) == waits
            if not waits:
                event.current_stream_wait()
        assert handle.num_recv_tokens == len(x)
        lists = torch.tensor(handle.num_recv_tokens_per_expert_list)
        return kept(x, idx, weights, more, again_idx, out, sent, plain, ordered, stats, lists)

    assert_as_on_the_host(world, per_host, rank_main, **options)


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("alignment", [1, 4])
@SYNC
@PLAYED
def test_expanded_batches_and_their_sums_have_the_bits_of_the_host(
    world, per_host, sync, alignment, several, assert_as_on_the_host
):
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
        ordered = buffer.combine(telling(x, buffer.rank_idx), handle)[0]
        sent = buffer.combine(y, handle, topk_weights=weights)[1] if several else None
        fields = [handle.psum_num_recv_tokens_per_expert, handle.num_unaligned_recv_tokens_per_expert]
        lists = torch.tensor([handle.num_expanded_tokens, *handle.num_recv_tokens_per_expert_list])
        return kept(x, weights, more, out, again, ordered, sent, *fields, lists)

    assert_as_on_the_host(world, per_host, rank_main, allow_multiple_reduction=several)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
@SYNC
def test_rows_in_fp8_have_their_scales(sync, tma, expand, with_weights, assert_as_on_the_host):
    world, per_host = WORLDS[2]

    def rank_main(buffer, given):
        scales = torch.arange(len(given.x) * 3, dtype=torch.float32).view(3, -1).t()
        (x, got), _, weights, handle, _ = buffer.dispatch(
            (given.x.to(torch.float8_e4m3fn), scales),
            given.idx.int(),
            given.weights if with_weights else None,
            num_experts=world.num_experts,
            do_cpu_sync=sync,
            do_expand=expand,
            do_zero_padding=expand,
            expert_alignment=3,
            use_tma_aligned_col_major_sf=tma,
        )
        assert got.stride() == ((1, -(-len(x) // 4) * 4) if tma else (3, 1)) or got.numel() == 0
        again = buffer.dispatch((given.x.to(torch.float8_e4m3fn), scales * 2), handle=handle, do_expand=expand)[0]
        return kept(x, got, weights, *again)

    assert_as_on_the_host(world, per_host, rank_main)


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"allow_hybrid_mode": False}])
@pytest.mark.parametrize("expand", [False, True])
@SYNC
@pytest.mark.parametrize(("world", "per_host"), WORLDS[::2])
def test_fields_of_a_handle_are_those_of_the_host(world, per_host, sync, expand, options, twice, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))

    def rank_main(buffer, given):
        handle = buffer.dispatch(
            given.x, given.idx, num_experts=world.num_experts, do_expand=expand, do_cpu_sync=sync, expert_alignment=4
        )[3]
        return {name: copy.copy(getattr(handle, name)) for name in FIELDS}

    for ours, theirs in twice(lambda: world.run(rank_main, **options)):
        for name in FIELDS:
            one, other = ours[name], theirs[name]
            assert same_bits(one, other) if isinstance(one, torch.Tensor) else one == other, name


ALL = pytest.mark.parametrize(("expand", "several"), [(False, True), (True, True), (True, False)])


@ALL
@SYNC
@pytest.mark.parametrize(
    ("remake", "deterministic"), [(rebuilt, False), (pickled, False), (copy.copy, True), ("bare", False)]
)
def test_a_handle_made_again_serves_when_the_first_one_is_gone(
    remake, deterministic, sync, expand, several, monkeypatch
):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")

    def rank_main(buffer, given):
        x, _, weights, handle, _ = dispatch(buffer, given, do_expand=expand, expert_alignment=3, do_cpu_sync=sync)
        expected = kept(*use(buffer, x, weights, handle, given, expand=expand))
        counts = handle.announced_counts
        again = rebuilt(handle, without=("announced_counts",)) if remake == "bare" else remake(handle)
        del handle
        gc.collect()
        for _ in range(2):  # the second time it is known
            assert_same(use(buffer, x, weights, again, given, expand=expand), expected)
        assert same_bits(again.announced_counts, counts)

    World().run(rank_main, allow_multiple_reduction=several, deterministic=deterministic)


@ALL
def test_fields_that_a_caller_sets_are_what_combine_reads(expand, several, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")

    def rank_main(buffer, given):
        first = dispatch(buffer, given, do_expand=expand)[3]
        turned = given.idx.flip(0).contiguous()
        x, _, weights, second, _ = buffer.dispatch(given.x, turned, given.weights, num_experts=8, do_expand=expand)
        expected = kept(*use(buffer, x, weights, second, given, expand=expand))
        for name, value in vars(second).items():
            setattr(first, name, value)
        assert_same(use(buffer, x, weights, first, given, expand=expand), expected)

    World().run(rank_main, allow_multiple_reduction=several)


def test_metadata_that_points_outside_its_batch_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "1")

    def rank_main(buffer, given):
        x, _, weights, handle, _ = dispatch(buffer, given, do_expand=True)
        expected = kept(*use(buffer, x, weights, handle, given, expand=True))
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


def test_copies_on_some_ranks_only_are_refused_on_all(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")

    def rank_main(buffer, given):
        x, _, _, handle, _ = dispatch(buffer, given)
        mixed = copy.copy(handle) if buffer.rank_idx else handle
        if buffer.rank_idx:
            mixed.topk_idx = mixed.topk_idx.clone()
        with pytest.raises(ValueError, match="ranks disagree"):
            buffer.combine(x, mixed)
        return buffer.combine(x, handle)[0]

    World().run(rank_main)


@pytest.mark.parametrize("hybrid", [True, False])
def test_a_handle_serves_on_another_buffer(hybrid, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")

    def rank_main(buffer, given):
        options = {"num_cpu_timeout_secs": 30, "allow_hybrid_mode": hybrid, "num_max_tokens_per_rank": 9}
        other = type(buffer)(buffer.group, num_bytes=buffer.num_bytes, **options)
        x, _, _, handle, _ = dispatch(buffer, given)
        whole = torch.arange(x.numel()).view(x.shape).remainder(5).bfloat16()  # sums are exact in any order
        expected = kept(buffer.combine(whole, handle)[0])
        for one in (handle, copy.copy(handle)):
            assert_same([other.combine(whole, one)[0]], expected)
            assert_same([other.dispatch(given.x, handle=one)[0]], [x])

    World().run(rank_main)


@pytest.mark.parametrize("per_host", ["4", "2"])
@pytest.mark.parametrize("state", ["dtype", "device", "deterministic", "inference", "grad"])
def test_torchs_global_state_changes_no_result(state, per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", per_host)
    world = World()
    plain = world.run(exchange)

    def rank_main(buffer, given):
        inside = {"inference": torch.inference_mode, "device": lambda: torch.device("meta"), "grad": torch.enable_grad}
        with inside.get(state, nullcontext)():
            return exchange(buffer, given)

    with monkeypatch.context() as patch:
        if state == "dtype":
            torch.set_default_dtype(torch.float64)
        if state == "deterministic":
            torch.use_deterministic_algorithms(True)
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        try:
            changed = world.run(rank_main)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(changed, plain, strict=True):
        assert_same(ours, theirs)


def test_an_expert_named_twice_has_two_rows_and_a_lone_minus_zero_stays(assert_as_on_the_host):
    world = World(num_tokens=(2, 1), num_experts=4, num_topk=3)

    def rank_main(buffer, given):
        idx = torch.tensor([[1, 1, 0], [3, -1, -1]])[: len(given.x)]
        x, _, _, handle, _ = buffer.dispatch(given.x, idx, num_experts=4, do_expand=True)
        out = buffer.combine(torch.full_like(x, -0.0), handle)[0]
        assert out.view(torch.int16).ne(0).all()
        return kept(x, out, handle.recv_src_metadata)

    assert_as_on_the_host(world, 1, rank_main)
