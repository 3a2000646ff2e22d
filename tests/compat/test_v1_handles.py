"""Handles are tuples in every respect, though their members are made when they are looked at."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.compat.v1_oracle import E, make_inputs, on_ranks, same_bits, send

MODE = {"low_latency_mode": True}


def both(buffer, given):
    """A handle of each kind that nobody has looked at."""
    low = buffer.low_latency_dispatch(given.x, given.topk_idx, 32, E)[2]
    return [(send(buffer, given)[4], 6), (low, 5)]


def handles(check, per_host=8):
    """Let ``check(handle, length)`` see a fresh handle of each kind on two ranks."""
    given = make_inputs([9, 31])

    def rank_main(buffer):
        for handle, length in both(buffer, given[buffer.rank]):
            check(handle, length)

    on_ranks(2, rank_main, **MODE)


def test_members_are_the_same_however_they_are_reached():
    def check(handle, length):
        members = list(handle)
        assert isinstance(handle, tuple)
        assert len(handle) == len(members) == length
        first, *middle, last = handle
        by_index = [handle[i] for i in range(length)]
        backwards = [handle[-i - 1] for i in range(length)][::-1]
        for same in (tuple(handle), [first, *middle, last], by_index, backwards, [*handle], list(handle[:])):
            assert all(one is other for one, other in zip(same, members, strict=True))
        assert [one is other for one, other in zip(reversed(handle), members[::-1], strict=True)] == [True] * length
        assert type(handle[1:3]) is tuple
        with pytest.raises(IndexError):
            handle[length]

    handles(check)


@pytest.mark.parametrize("how", [len, lambda handle: handle[-1], tuple, lambda handle: handle[:2], repr, hash])
def test_any_first_look_makes_them(how):
    def check(handle, length):
        how(handle)
        assert None not in [type(one) for one in handle]
        assert None not in [one for one in handle if not isinstance(one, torch.Tensor)]

    handles(check)


def test_a_handle_equals_itself_and_a_tuple_of_its_members():
    def check(handle, length):
        plain = tuple(handle)
        assert handle == handle
        assert handle == plain
        assert plain == handle
        assert (handle != plain) is False
        assert handle != plain[:-1]
        assert handle != 3
        assert hash(handle) == hash(plain)
        assert plain[0] in handle
        assert handle.index(plain[0]) == 0
        assert len(handle + (1,)) == len((1,) + handle) == length + 1  # noqa: RUF005
        assert ((1,) + handle)[1] is plain[0]  # noqa: RUF005
        assert (handle * 2)[length] is plain[0]

    handles(check)


def test_copies_are_plain_tuples_of_the_same_tensors_and_pickles_of_their_numbers():
    def check(handle, length):
        shallow = copy.copy(handle)
        assert type(shallow) is tuple
        assert all(one is other for one, other in zip(shallow, handle, strict=True))
        for other in (pickle.loads(pickle.dumps(handle)), copy.deepcopy(handle)):
            assert type(other) is tuple
            for one, same in zip(other, handle, strict=True):
                assert torch.equal(one, same) if isinstance(one, torch.Tensor) else one == same

    handles(check)


def test_members_put_together_again_stand_for_the_handle_as_long_as_one_lives():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, *_, handle, _ = send(buffer, mine)
        (low_x, *_), low = send(buffer, mine), buffer.low_latency_dispatch(mine.x, mine.topk_idx, 32, E)
        members, low_members = tuple(handle), [*low[2]]
        del handle
        y = torch.ones(low[0][0].shape, dtype=torch.bfloat16)
        expected = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, low[2])[0]
        del low
        again = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, low_members)[0]
        assert same_bits(again, expected)
        assert same_bits(buffer.dispatch(mine.x, handle=members)[0], x)
        assert same_bits(low_x, x)

    on_ranks(2, rank_main, **MODE)


def test_handles_of_another_kind_are_refused():
    given = make_inputs([9])[0]

    def rank_main(buffer):
        (normal, _), (low, _) = both(buffer, given)
        y = torch.zeros(E, 32, given.x.shape[1], dtype=torch.bfloat16)
        for handle in (low, (normal[0],) * 5, (1,) * 6):
            with pytest.raises(RuntimeError, match="handle"):
                buffer.combine(given.x, handle)
        for handle in (normal, (normal[0],) * 5):
            with pytest.raises(RuntimeError, match="handle"):
                buffer.low_latency_combine(y, given.topk_idx, given.topk_weights, handle)
        with pytest.raises(RuntimeError, match="copies of a handle"):
            buffer.get_next_low_latency_combine_buffer(copy.deepcopy(low))

    on_ranks(1, rank_main, **MODE)


REMAKES = {
    "clones": lambda handle: tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in handle),
    "pickles": lambda handle: pickle.loads(pickle.dumps(handle)),
    "deep copies": copy.deepcopy,
}


def check_copies_serve(tokens, how, members, *, worst=0):
    """Let copies of a handle take its place once it is gone, and hold what they bring against what it brought."""
    given = make_inputs(tokens)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, weights, _, handle, _ = send(buffer, mine, num_worst_tokens=worst)
        assert len(handle) == members
        expected = [one.clone() for one in buffer.combine(x, handle, weights)[:2]]
        again = REMAKES[how](handle)
        del handle
        for _ in range(2):  # the second time it is known
            found = buffer.combine(x, again, weights)[:2]
            assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
            assert same_bits(buffer.combine(x, again)[0], expected[0])
            assert same_bits(buffer.dispatch(mine.x, handle=again)[0], x)

    on_ranks(len(tokens), rank_main)


@pytest.mark.parametrize("worst", [0, 64])
@pytest.mark.parametrize("how", REMAKES)
@pytest.mark.parametrize(("per_host", "members"), [(8, 6), (2, 10)])
def test_copies_of_a_handle_serve_when_the_first_one_is_gone(monkeypatch, how, per_host, members, worst):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    check_copies_serve([9, 31, 0, 5], how, members, worst=worst)


def check_that_members_belong_together():
    """Write to a member of a copy, which is then refused, while the handle itself serves."""
    given = make_inputs([9])[0]

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given)
        again = copy.deepcopy(handle)
        again[0].add_(1)
        with pytest.raises(RuntimeError, match="belong together"):
            buffer.combine(x, again)
        buffer.combine(x, handle)

    on_ranks(1, rank_main)


def test_members_that_do_not_belong_together_are_refused():
    check_that_members_belong_together()


@pytest.mark.parametrize("how", REMAKES)
def test_copies_of_a_low_latency_handle_serve(how):
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        (x, _), _, handle, *_ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 32, E)
        y = x.bfloat16()
        expected = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle)[0]
        again = REMAKES[how](handle)
        assert same_bits(buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, again)[0], expected)

    on_ranks(2, rank_main, **MODE)


def test_copies_of_a_low_latency_handle_of_another_batch_are_refused():
    given = make_inputs([9])[0]

    def rank_main(buffer):
        (x, _), _, handle, *_ = buffer.low_latency_dispatch(given.x, given.topk_idx, 32, E)
        again = copy.deepcopy(handle)
        turned = (given.topk_idx + 1) % E
        with pytest.raises(RuntimeError, match="those of one dispatch"):
            buffer.low_latency_combine(x.bfloat16(), turned, given.topk_weights, again)
        buffer.low_latency_combine(x.bfloat16(), given.topk_idx, given.topk_weights, again)

    on_ranks(1, rank_main, **MODE)


def check_another_buffer():
    """Combine by a handle on another buffer than that of its dispatch."""
    given, kept = make_inputs([9, 31]), {}

    def first(buffer):
        x, *_, handle, _ = send(buffer, given[buffer.rank])
        kept[buffer.rank] = x.clone(), handle, buffer.combine(x, handle)[0].clone()

    def second(buffer):
        x, handle, expected = kept[buffer.rank]
        assert same_bits(buffer.combine(x, handle)[0], expected)

    on_ranks(2, first)
    on_ranks(2, second)


def test_a_handle_serves_on_another_buffer_of_the_same_ranks():
    check_another_buffer()


def test_members_say_what_was_sent_whatever_became_of_the_callers_tensors():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(mine.topk_idx, E)
        idx = mine.topk_idx.clone()
        options = {"topk_idx": idx, "topk_weights": mine.topk_weights}
        looked, untouched = (
            buffer.dispatch(mine.x, None, per_rank, None, inside, per_expert, **options)[4] for _ in "ab"
        )
        members = [one.clone() for one in looked]
        idx.zero_()
        inside.zero_()
        for number in (0, 1, 2, 3, 5):
            assert same_bits(untouched[number], members[number])

    on_ranks(2, rank_main)


@pytest.mark.parametrize("when", ["before", "after"])
def test_ranges_are_filled_whether_looked_at_before_or_after_the_hook(when):
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        now = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 32, E)[2][1].clone()
        _, _, handle, _, hook = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 32, E, return_recv_hook=True)
        early = handle[1] if when == "before" else None
        hook()
        assert early is None or early is handle[1]
        assert same_bits(handle[1], now)

    on_ranks(2, rank_main, **MODE)


def test_a_kind_of_call_that_was_checked_is_still_refused_where_its_tensors_are_bad():
    given = make_inputs([9])[0]

    def rank_main(buffer):
        per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(given.topk_idx, E)
        good = {"num_tokens_per_rank": per_rank, "is_token_in_rank": inside, "num_tokens_per_expert": per_expert}
        good |= {"x": given.x, "topk_idx": given.topk_idx, "topk_weights": given.topk_weights}
        handle = buffer.dispatch(**good)[4]
        buffer.combine(given.x[:8], handle)
        buffer.dispatch(given.x, handle=handle)
        strided = given.x.repeat_interleave(2, 1)[:, ::2]
        turned = given.topk_idx.T.contiguous().T
        wide = per_expert.repeat_interleave(2)[::2]
        cases = [{"x": strided}, {"topk_idx": turned}, {"num_tokens_per_expert": wide}]
        cases += [{"topk_weights": given.topk_weights[1:]}, {"topk_weights": given.topk_weights.double()}]
        for bad in cases:
            with pytest.raises(RuntimeError, match="must be"):
                buffer.dispatch(**good | bad)
        with pytest.raises(RuntimeError, match="contiguous"):
            buffer.dispatch(strided, handle=handle)
        with pytest.raises(RuntimeError, match="contiguous"):
            buffer.combine(strided[:8], handle)
        buffer.dispatch(**good)

    on_ranks(1, rank_main)
