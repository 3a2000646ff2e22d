"""Normal dispatch: order, indices, weights, scales, tails, cached calls and the handle's members."""

from __future__ import annotations

import pytest
import torch

from anyep.compat import deep_ep
from tests.compat.v1_oracle import E, H, K, arrival, make_inputs, on_ranks, rows_of, same_bits, send, summed

BATCHES = [[23], [9, 31], [20, 0, 13], [5, 33, 12, 8]]


def check_received(buffer, given, experts=E):
    """Dispatch, hold all that comes against plain torch, and return the rows, their weights and the handle."""
    x, idx, weights, counts, handle, event = send(buffer, given[buffer.rank], experts=experts)
    there = arrival(given, buffer.rank, experts)
    assert same_bits(x, rows_of(given, buffer.rank, lambda one: one.x, experts))
    assert same_bits(idx, there.topk_idx)
    assert same_bits(weights, there.topk_weights)
    assert (weights[idx == -1] == 0).all()
    assert counts == there.counts
    assert event.event is None
    return x, weights, handle


@pytest.mark.parametrize("tokens", BATCHES)
def test_rows_come_by_source_rank_and_token_with_local_indices_and_masked_weights(tokens):
    given = make_inputs(tokens)

    def rank_main(buffer):
        *_, handle = check_received(buffer, given)
        assert handle[3].tolist() == arrival(given, buffer.rank).token

    on_ranks(len(tokens), rank_main)


@pytest.mark.parametrize("alignment", [1, 4, 128])
def test_counts_are_rounded_up_and_rows_are_not(alignment):
    given = make_inputs([9, 31])

    def rank_main(buffer):
        x, _, _, counts, _, _ = send(buffer, given[buffer.rank], expert_alignment=alignment)
        there = arrival(given, buffer.rank)
        assert counts == [-(-count // alignment) * alignment for count in there.counts]
        assert len(x) == len(there.token)

    on_ranks(2, rank_main)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_rows_of_any_dtype_and_odd_size_arrive_bit_by_bit(dtype):
    given = make_inputs([6, 11])
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 200, (n, 7), generator=generator).to(dtype) for n in (6, 11)]

    def rank_main(buffer):
        x = send(buffer, given[buffer.rank], rows[buffer.rank])[0]
        there = arrival(given, buffer.rank)
        expected = torch.stack([rows[s][t] for s, t in zip(there.source, there.token, strict=True)])
        assert same_bits(x, expected)

    on_ranks(2, rank_main)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("packs", [1, 5])
@pytest.mark.parametrize("layout", ["row-major", "column-major", "every other"])
def test_scales_of_any_strides_and_number_travel_with_their_rows(dtype, packs, layout):
    given = make_inputs([6, 11])

    def scales_of(tokens):
        plain = (torch.arange(tokens * packs).view(tokens, packs) * 1.0).to(dtype)
        if layout == "column-major":
            return plain.T.contiguous().T
        if layout == "every other":
            return plain.repeat_interleave(2, 1)[:, ::2]
        return plain

    def rank_main(buffer):
        mine = given[buffer.rank]
        q = mine.x.float().to(torch.float8_e4m3fn)
        (x, scales), *_ = send(buffer, mine, (q, scales_of(len(q))))
        there = arrival(given, buffer.rank)
        assert same_bits(x, rows_of(given, buffer.rank, lambda one: one.x.float().to(torch.float8_e4m3fn)))
        assert scales.is_contiguous()
        expected = [scales_of([6, 11][s])[t] for s, t in zip(there.source, there.token, strict=True)]
        assert same_bits(scales, torch.stack(expected))

    on_ranks(2, rank_main)


@pytest.mark.parametrize("per_host", [8, 1])
def test_a_fixed_number_of_rows_has_the_result_as_prefix_and_a_defined_tail(per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        q = mine.x.float().to(torch.float8_e4m3fn)
        (x, scales), idx, weights, counts, handle, _ = send(
            buffer, mine, (q, torch.ones(len(q), 3)), num_worst_tokens=100
        )
        there, rows = arrival(given, buffer.rank), len(arrival(given, buffer.rank).token)
        assert [len(one) for one in (x, scales, idx, weights)] == [100] * 4
        assert counts == []
        assert same_bits(idx[:rows], there.topk_idx)
        assert same_bits(weights[:rows], there.topk_weights)
        assert (idx[rows:] == -1).all()
        assert not weights[rows:].any()
        assert not x[rows:].view(torch.uint8).any()
        assert not scales[rows:].any()
        sources = handle[3 if per_host > 1 else -3]
        assert len(sources) == 100  # so that combine takes as many
        (again, other), *_ = buffer.dispatch((q, torch.full((len(q), 3), 2.0)), handle=handle)
        assert same_bits(again, x)
        assert same_bits(other, scales * 2)
        y = torch.randn(100, H, generator=torch.Generator().manual_seed(buffer.rank)).bfloat16()
        return y, buffer.combine(y, handle)[0]

    results = on_ranks(2, rank_main)
    outputs = [y[: len(arrival(given, rank).token)] for rank, (y, _) in enumerate(results)]
    for rank, (_, out) in enumerate(results):
        assert same_bits(out, summed(given, outputs, rank, [], per_host))


@pytest.mark.parametrize("tokens", [[23], [20, 0, 13]])
def test_a_cached_dispatch_sends_other_rows_the_same_way_and_returns_nothing_else(tokens):
    given = make_inputs(tokens)

    def rank_main(buffer):
        mine = given[buffer.rank]
        *_, handle, _ = send(buffer, mine)
        other = mine.x.float() * 3
        x, idx, weights, counts, again, event = buffer.dispatch(other, handle=handle)
        assert (idx, weights, counts, again) == (None, None, None, None)
        assert event.event is None
        assert same_bits(x, rows_of(given, buffer.rank, lambda one: one.x.float() * 3))

    on_ranks(len(tokens), rank_main)


def test_without_topk_ranks_are_those_of_is_token_in_rank_and_counts_the_callers():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, idx, weights, counts, handle, _ = send(buffer, mine, topk_idx=None, topk_weights=None)
        there = arrival(given, buffer.rank)
        assert idx is None
        assert weights is None
        assert counts == there.counts
        assert same_bits(x, rows_of(given, buffer.rank, lambda one: one.x))
        assert handle[3].tolist() == there.token
        out, back, _ = buffer.combine(x, handle, topk_weights=torch.ones(len(x), K))
        assert same_bits(back[:, 0], send_count(handle[4]))
        return x, out

    def send_count(inside):
        return inside.sum(1).float()

    results = on_ranks(2, rank_main)
    for rank, (_, out) in enumerate(results):
        assert same_bits(out, summed(given, [x for x, _ in results], rank, [], 8))


def test_a_handle_of_one_host_has_six_members():
    given = make_inputs([20, 0, 13])
    channels = 4

    def rank_main(buffer):
        mine = given[buffer.rank]
        *_, handle, _ = send(buffer, mine, config=deep_ep.Config(2 * channels))
        matrix, sent, received, token, inside, head = handle
        there = arrival(given, buffer.rank)
        per_pair = [[there_of.source.count(s) for there_of in (arrival(given, r) for r in range(3))] for s in range(3)]
        assert matrix.dtype == torch.int32
        assert torch.equal(matrix, torch.tensor(per_pair).cumsum(0))
        length = max(1, -(-len(mine.x) // channels))
        for rank in range(3):
            goes = inside[:, rank].tolist()
            assert sent[rank].tolist() == [sum(goes[: (c + 1) * length]) for c in range(channels)]
            for t, going in enumerate(goes):
                assert head[t, rank] == (sum(goes[t // length * length : t]) if going else -1)
        for source in range(3):
            tokens = [t for s, t in zip(there.source, there.token, strict=True) if s == source]
            theirs = max(1, -(-len(given[source].x) // channels))
            assert received[source].tolist() == [sum(t < c * theirs for t in tokens) for c in range(channels)]
        assert token.tolist() == there.token
        assert {one.dtype for one in (sent, received, token, head)} == {torch.int32}

    on_ranks(3, rank_main)


def test_the_handle_keeps_the_callers_is_token_in_rank():
    given = make_inputs([9])

    def rank_main(buffer):
        mine = given[0]
        per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(mine.topk_idx, E)
        handle = buffer.dispatch(mine.x, None, per_rank, None, inside, per_expert)[4]
        assert handle[4] is inside

    on_ranks(1, rank_main)


def test_a_handle_between_hosts_has_ten_members(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    given = make_inputs([5, 33, 12, 8])
    channels = 3

    def rank_main(buffer):
        *_, handle, _ = send(buffer, given[buffer.rank], config=deep_ep.Config(2 * channels))
        there, tokens = arrival(given, buffer.rank), len(given[buffer.rank].x)
        rows = len(there.token)
        inside, host_sent, sent, host_received, host_ends, starts, ends, meta, host_head, nvl_head = handle
        by_source = torch.tensor([there.source.count(s) for s in range(4)])
        assert ends.tolist() == by_source.cumsum(0).tolist()
        assert handle[-4] is ends
        assert starts[:, 0].tolist() == (by_source.cumsum(0) - by_source).tolist()
        assert host_ends.tolist() == by_source.view(2, 2).sum(1).cumsum(0).tolist()
        assert sent[:, -1].tolist() == inside.sum(0).tolist()
        assert host_sent[:, -1].tolist() == inside.view(tokens, 2, 2).any(2).sum(0).tolist()
        assert host_received[:, -1].tolist() == by_source.view(2, 2).sum(1).tolist()
        assert meta.dtype == torch.uint8
        assert meta.view(torch.int32)[:, 0].tolist() == [s // 2 for s in there.source]
        assert meta.shape == (rows, 8)
        assert host_head.shape == (tokens, 2)
        assert nvl_head.shape == (rows, 2)
        assert [one.shape for one in (host_sent, sent, host_received, starts)] == [
            (2, channels),
            (4, channels),
            (2, channels),
            (4, channels),
        ]

    on_ranks(4, rank_main)


def test_a_handle_survives_being_taken_apart():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given[buffer.rank])
        members = list(handle)
        del handle
        again = buffer.dispatch(given[buffer.rank].x, handle=tuple(members))[0]
        assert same_bits(again, x)
        copies = tuple(one.clone() for one in members)
        assert same_bits(buffer.dispatch(given[buffer.rank].x, handle=copies)[0], x)

    on_ranks(2, rank_main)


def test_every_repetition_gives_the_same_bits():
    given = make_inputs([20, 21, 13])

    def rank_main(buffer):
        first = send(buffer, given[buffer.rank])
        for _ in range(3):
            again = send(buffer, given[buffer.rank])
            assert all(same_bits(first[i], again[i]) for i in range(3))

    on_ranks(3, rank_main)


def test_received_tensors_outlive_later_calls_and_the_buffer():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        return [send(buffer, given[buffer.rank])[0] for _ in range(3)]

    for rank, kept in enumerate(on_ranks(2, rank_main)):
        for x in kept:
            assert same_bits(x, rows_of(given, rank, lambda one: one.x))


BAD = {
    "topk without weights": ({"topk_weights": None}, RuntimeError, "both"),
    "weights in float64": ({"topk_weights": torch.zeros(9, K, dtype=torch.float64)}, RuntimeError, "topk_weights"),
    "indices in int32": ({"topk_idx": torch.zeros(9, K, dtype=torch.int32)}, RuntimeError, "topk_idx"),
    "worst tokens without topk": (
        {"topk_idx": None, "topk_weights": None, "num_worst_tokens": 50}, RuntimeError, "num_worst_tokens"),
    "rows that are not contiguous": ({"x": torch.zeros(9, 2 * H)[:, ::2]}, RuntimeError, "contiguous"),
    "rows of one dimension": ({"x": torch.zeros(9)}, RuntimeError, r"\[T, H\]"),
    "scales beside wide rows": ({"x": (torch.zeros(9, H), torch.zeros(9, 1))}, RuntimeError, "1 byte"),
    "scales in float64": (
        {"x": (torch.zeros(9, H, dtype=torch.int8), torch.zeros(9, 1, dtype=torch.float64))}, RuntimeError, "x_scales"),
    "scales of other tokens": (
        {"x": (torch.zeros(9, H, dtype=torch.int8), torch.zeros(8, 1))}, RuntimeError, "8 rows for 9"),
    "alignment 0": ({"expert_alignment": 0}, RuntimeError, "expert_alignment"),
    "weights without topk": ({"topk_idx": None}, RuntimeError, "both"),
    "weights of other columns": ({"topk_weights": torch.zeros(9, K + 1)}, RuntimeError, "topk_weights"),
    "indices of other tokens": ({"topk_idx": torch.zeros(8, K, dtype=torch.int64)}, RuntimeError, "topk_idx"),
    "a triple of rows": ({"x": (torch.zeros(9, H),) * 3}, RuntimeError, "tuple of 3"),
    "streams": ({"allocate_on_comm_stream": True}, RuntimeError, "previous_event"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_as_upstream_and_cost_nothing(case):
    options, error, text = BAD[case]
    given = make_inputs([9])

    def rank_main(buffer):
        with pytest.raises(error, match=text):
            send(buffer, given[0], **dict(options))
        send(buffer, given[0])

    on_ranks(1, rank_main)


def test_a_cached_dispatch_with_topk_is_an_assertion():
    given = make_inputs([9])

    def rank_main(buffer):
        *_, handle, _ = send(buffer, given[0])
        with pytest.raises(AssertionError, match="cached"):
            buffer.dispatch(given[0].x, handle=handle, topk_idx=given[0].topk_idx, topk_weights=given[0].topk_weights)
        with pytest.raises(AssertionError, match="get_dispatch_layout"):
            buffer.dispatch(given[0].x)
        with pytest.raises(RuntimeError, match="tokens"):
            buffer.dispatch(given[0].x[:3], handle=handle)

    on_ranks(1, rank_main)


def test_counts_that_are_not_those_of_the_tokens_are_refused():
    given = make_inputs([9])

    def rank_main(buffer):
        per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(given[0].topk_idx, E)
        with pytest.raises(RuntimeError, match="num_tokens_per_rank"):
            buffer.dispatch(given[0].x, None, per_rank + 1, None, inside, per_expert)

    on_ranks(1, rank_main)


@pytest.mark.parametrize("name", ["num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert"])
@pytest.mark.parametrize("how", ["dtype", "shape", "strides", "missing"])
def test_each_part_of_a_layout_is_checked(name, how):
    given = make_inputs([9, 9])[0]
    spoil = {
        "dtype": lambda one: one.long(),
        "shape": lambda one: one[..., :0] if name == "num_tokens_per_expert" else one.repeat(*[1] * (one.dim() - 1), 2),
        "strides": lambda one: one.repeat_interleave(2, -1)[..., ::2],
        "missing": lambda one: None,
    }[how]
    error, text = (AssertionError, "get_dispatch_layout") if how == "missing" else (RuntimeError, "must be")

    def rank_main(buffer):
        per_rank, _, per_expert, inside, _ = buffer.get_dispatch_layout(given.topk_idx, E)
        layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": inside, "num_tokens_per_expert": per_expert}
        routing = {"topk_idx": given.topk_idx, "topk_weights": given.topk_weights}
        with pytest.raises(error, match=text):
            buffer.dispatch(given.x, **layout | {name: spoil(layout[name])}, **routing)
        buffer.dispatch(given.x, **layout, **routing)

    on_ranks(2, rank_main)


def test_more_rows_than_the_fixed_number_are_an_error_on_all_ranks():
    import anyep

    given = make_inputs([9, 31])

    def rank_main(buffer):
        with pytest.raises(anyep.CapacityError, match="static_rows"):
            send(buffer, given[buffer.rank], num_worst_tokens=5)
        send(buffer, given[buffer.rank], num_worst_tokens=50)

    on_ranks(2, rank_main)
