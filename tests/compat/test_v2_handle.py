"""EPHandle: every field row by row, and that combine reads nothing besides the fields."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle

import pytest
import torch

from anyep.compat.deep_ep import EPHandle, notebook
from anyep.compat.deep_ep.ep_handle import FIELDS
from tests.compat.v2_world import World, poisoned, same_bits  # noqa: F401

WORLD = World()
ALL = pytest.mark.parametrize(
    ("expand", "multi", "per_host"), [(e, m, h) for e in (False, True) for m in (True, False) for h in (4, 2)]
)


def dispatch(buffer, inputs, **options):
    return buffer.dispatch(inputs.x, inputs.idx, inputs.weights, num_experts=8, **options)


def test_fields_of_a_compact_batch():
    for rank, handle in enumerate(WORLD.run(lambda b, i: dispatch(b, i, expert_alignment=4, num_sms=8)[3])):
        arrivals, counts = WORLD.arrivals(rank), WORLD.counts(rank)
        aligned = [-(-count // 4) * 4 for count in counts]
        assert (handle.do_expand, handle.num_experts, handle.expert_alignment) == (False, 8, 4)
        assert (handle.num_max_tokens_per_rank, handle.num_sms) == (WORLD.max_tokens, 8)
        assert handle.num_recv_tokens == len(arrivals)
        assert handle.num_expanded_tokens == sum(aligned)
        assert handle.num_recv_tokens_per_expert_list == aligned
        sums = torch.tensor(aligned).cumsum(0).tolist()
        assert handle.psum_num_recv_tokens_per_expert.tolist() == sums
        assert handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
        ends = [sum(source <= last for source, _ in arrivals) for last in range(WORLD.num_ranks)]
        assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == ends
        assert torch.equal(handle.topk_idx, WORLD.inputs[rank].idx)
        for name in ("token_metadata_at_forward", "channel_linked_list", "cached_recv_src_metadata_before_sort"):
            assert getattr(handle, name) is None
        for name, value in vars(handle).items():
            assert not isinstance(value, torch.Tensor) or name == "topk_idx" or value.dtype == torch.int32, name


@pytest.mark.parametrize("world", [WORLD, World(num_topk=8), World(num_experts=24, num_topk=17)])
def test_metadata_tells_each_rows_token_and_master_column(world):
    K = world.num_topk
    handles = world.run(lambda b, i: b.dispatch(i.x, i.idx, num_experts=world.num_experts)[3])
    for rank, handle in enumerate(handles):
        assert len(handle.recv_src_metadata) == len(world.arrivals(rank))
        for row, (source, token) in enumerate(world.arrivals(rank)):
            number, slot, *served = handle.recv_src_metadata[row].tolist()
            assert number == source * world.max_tokens + token
            assert slot == source * K + world.masters(source, token)[rank]
            local = world.local_idx(rank, source, token)
            assert served == [row if expert >= 0 else -1 for expert in local]


def test_metadata_holds_whatever_is_written_to_the_batch_and_dispatched_later(monkeypatch):
    monkeypatch.setattr(notebook, "_BLOCK_BYTES", 40)  # several dispatches a block, and several blocks

    def rank_main(buffer, given):
        handles = []
        for columns in (4, 1, 3, 4, 2, 4):
            _, idx, _, handle, _ = buffer.dispatch(given.x, given.idx[:, :columns].contiguous(), num_experts=8)
            expected = torch.where(idx >= 0, torch.arange(len(idx)).unsqueeze(1), -1)
            handles.append((handle, expected))
            idx.fill_(0)
        for handle, expected in handles:
            assert handle.recv_src_metadata[:, 2:].tolist() == expected.tolist()

    WORLD.run(rank_main)


def test_destination_slots_stand_in_the_master_column_of_each_rank():
    for rank, handle in enumerate(WORLD.run(lambda b, i: dispatch(b, i)[3])):
        sent = [0] * WORLD.num_ranks
        for token in range(WORLD.num_tokens[rank]):
            expected = [-1] * WORLD.num_topk
            for owner, column in WORLD.masters(rank, token).items():
                expected[column] = rank * WORLD.max_tokens + sent[owner]
                sent[owner] += 1
            assert handle.dst_buffer_slot_idx[token].tolist() == expected


def test_announced_counts_are_the_same_on_all_ranks():
    handles = WORLD.run(lambda b, i: dispatch(b, i)[3])
    for handle in handles:
        assert torch.equal(handle.announced_counts, handles[0].announced_counts)
    for rank in range(WORLD.num_ranks):
        assert int(handles[0].announced_counts[:, rank].sum()) == len(WORLD.arrivals(rank))


@pytest.mark.parametrize("copies", [True, False])
def test_indices_are_copied_unless_the_caller_says_otherwise(copies):
    def rank_main(buffer, i):
        return dispatch(buffer, i, do_handle_copy=copies)[3].topk_idx.data_ptr() == i.idx.data_ptr()

    shared = WORLD.run(rank_main)
    assert [same for same, tokens in zip(shared, WORLD.num_tokens, strict=True) if tokens] == [not copies] * 3


def rebuilt(handle: EPHandle, without: tuple[str, ...] = ()) -> EPHandle:
    """Return a handle made from copies of the constructor's arguments."""
    names = [name for name in inspect.signature(EPHandle).parameters if name not in without]
    fields = {name: copy.deepcopy(getattr(handle, name)) for name in names}
    return EPHandle(**fields)


def pickled(handle: EPHandle) -> EPHandle:
    stream = io.BytesIO()
    torch.save(vars(handle), stream)
    stream.seek(0)
    fresh = EPHandle.__new__(EPHandle)
    vars(fresh).update(torch.load(stream, weights_only=True))
    return pickle.loads(pickle.dumps(fresh))


def use(buffer, x, weights, handle, inputs, *, expand):
    """Return what a combine and a cached dispatch bring."""
    given = weights if buffer.allow_multiple_reduction or not expand else None
    combined, back, _ = buffer.combine(x, handle, given)
    again = buffer.dispatch(inputs.x, topk_weights=inputs.weights, handle=handle, do_expand=expand)
    return [t for t in (combined, back, again[0], again[2]) if t is not None]


@ALL
@pytest.mark.parametrize("remake", [rebuilt, pickled, copy.copy])
def test_a_handle_made_again_from_its_fields_serves_when_the_first_one_is_gone(
    monkeypatch, remake, expand, multi, per_host
):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))

    def rank_main(buffer, i):
        x, _, weights, handle, _ = dispatch(buffer, i, do_expand=expand, expert_alignment=3)
        expected = use(buffer, x, weights, handle, i, expand=expand)
        again = remake(handle)
        del handle
        gc.collect()
        found = use(buffer, x, weights, again, i, expand=expand)
        return all(same_bits(a, b) for a, b in zip(found, expected, strict=True))

    assert all(WORLD.run(rank_main, allow_multiple_reduction=multi))


def test_ranks_may_mix_first_handles_and_those_made_again():
    def rank_main(buffer, i):
        x, _, weights, handle, _ = dispatch(buffer, i)
        expected = use(buffer, x, weights, handle, i, expand=False)
        mixed = rebuilt(handle) if buffer.rank_idx % 2 else handle
        found = use(buffer, x, weights, mixed, i, expand=False)
        return all(same_bits(a, b) for a, b in zip(found, expected, strict=True))

    assert all(WORLD.run(rank_main))


@ALL
def test_a_handle_of_upstreams_fields_alone_asks_the_other_ranks(monkeypatch, expand, multi, per_host):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))

    def rank_main(buffer, i):
        x, _, weights, handle, _ = dispatch(buffer, i, do_expand=expand, expert_alignment=3)
        expected = use(buffer, x, weights, handle, i, expand=expand)
        bare = rebuilt(handle, without=("announced_counts",))
        found = use(buffer, x, weights, bare, i, expand=expand)
        assert torch.equal(bare.announced_counts, handle.announced_counts)
        return all(same_bits(a, b) for a, b in zip(found, expected, strict=True))

    assert all(WORLD.run(rank_main, allow_multiple_reduction=multi))


def test_a_bare_handle_on_some_ranks_only_is_refused_on_all():
    def rank_main(buffer, i):
        x, _, _, handle, _ = dispatch(buffer, i)
        mixed = rebuilt(handle, without=("announced_counts",)) if buffer.rank_idx == 1 else handle
        with pytest.raises(ValueError, match="ranks disagree"):
            buffer.combine(x, mixed)
        return same_bits(buffer.combine(x, handle)[0], buffer.combine(x, handle)[0])

    assert all(WORLD.run(rank_main))


def test_a_handle_serves_on_another_buffer():
    def rank_main(buffer, i):
        other = type(buffer)(buffer.group, num_bytes=buffer.num_bytes, num_cpu_timeout_secs=30)
        x, _, _, handle, _ = dispatch(buffer, i)
        return same_bits(other.combine(x, handle)[0], buffer.combine(x, handle)[0])

    assert all(WORLD.run(rank_main))


def test_fields_that_a_caller_sets_are_what_combine_reads():
    def rank_main(buffer, i):
        _, _, _, first, _ = dispatch(buffer, i)
        turned = i.idx.flip(0).contiguous()
        x, _, _, second, _ = buffer.dispatch(i.x, turned, num_experts=8)
        expected = buffer.combine(x, second)[0]
        for name, value in vars(second).items():
            setattr(first, name, value)
        return same_bits(buffer.combine(x, first)[0], expected)

    assert all(WORLD.run(rank_main))


def test_what_a_caller_does_to_received_indices_changes_no_field():
    def rank_main(buffer, i):
        expected = dispatch(buffer, i)[3].recv_src_metadata
        _, idx, _, handle, _ = dispatch(buffer, i)
        idx.fill_(7)
        return same_bits(handle.recv_src_metadata, expected)

    assert all(WORLD.run(rank_main))


def test_a_handle_has_the_attributes_of_upstreams_and_no_others():
    def rank_main(buffer, i):
        handle = dispatch(buffer, i)[3]
        with pytest.raises(AttributeError, match="no attribute 'num_rows_per_expert'"):
            getattr(handle, "num_rows_per_expert")  # noqa: B009
        handle.note = "mine"
        copied = copy.copy(handle)
        return vars(copied).keys() - {"note"} == set(FIELDS) and copied.note == "mine"

    assert all(WORLD.run(rank_main))
