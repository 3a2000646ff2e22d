"""layout="padded": blocks of experts, scales column-major, weights at the origin; ways that change with the load."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import anyep
from anyep.exchange import setup
from anyep.exchange.eager import EagerRule
from anyep.numerics.logfmt import decode_logfmt, encode_logfmt
from anyep.testing.oracle import PADDING
from anyep.testing.oracle_sums import expected_sum
from tests.exchange.cases import Case
from tests.exchange.rounds import ReceivedCopy, assert_same, check, check_received, open_buffer, play
from tests.exchange.test_behaviour import CASE, on_ranks

PADDED = replace(CASE, layout="padded", reduce="expert", max_tokens=40)
WAYS = {"eager": 1 << 20, "direct": 0, "both": 12_000}


def outputs_of(received, rank, case):
    """Return another value for every row, defined or not."""
    generator = torch.Generator().manual_seed(7 + rank)
    return torch.randn(received.x.shape, generator=generator).bfloat16()


def expected(case: Case, rank, outputs, factors, *, coded=False, reduce="expert", bias=()):
    def rows(owner, row):
        chosen = outputs[owner].view(-1, case.hidden)[row]
        return decode_logfmt(encode_logfmt(chosen), case.hidden) if coded else chosen

    return expected_sum(case.exchange, rank, rows, dtype=torch.bfloat16, reduce=reduce, bias=bias, factors=factors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("scales", "columns", "dtype"), [("fp32", 3, torch.float32), ("pow2", 3, torch.float32), ("ue8m0", 1, torch.int32)]
)
def test_scales_are_column_major_in_every_block(scales, columns, dtype, way):
    case = replace(PADDED, wire="fp8", scales=scales, hidden=300)

    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        block = 3 * 40
        assert received.x.shape == (4, block, 300)
        assert received.x.is_contiguous()
        assert received.scales.dtype == dtype
        assert received.scales.shape == (4, block, columns)
        assert received.scales.stride() == (columns * block, 1, block)
        return ReceivedCopy.of(received)

    for rank, received in enumerate(on_ranks(case, rank_main, eager_bytes=WAYS[way])):
        check_received(case, rank, received)


@pytest.mark.parametrize("way", WAYS)
def test_every_row_says_where_it_comes_from(way):
    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        assert received.topk_idx is None
        assert received.topk_weights is None
        assert received.scales is None
        for of_source in (received.source_begin, received.source_count):
            assert (of_source.dtype, of_source.shape) == (torch.int32, (4, 3))
        assert (received.source_token.dtype, received.source_token.shape) == (torch.int32, (4, 120))
        assert received.source_count.sum(dim=1).tolist() == received.counts
        for expert in range(4):
            for source in range(3):
                begin = int(received.source_begin[expert, source])
                rows = slice(begin, begin + int(received.source_count[expert, source]))
                tokens = received.source_token[expert, rows]
                assert tokens.tolist() == sorted(tokens.tolist())
                assert_same("x", received.x[expert, rows], PADDED.batches[source].x[tokens])

    on_ranks(PADDED, rank_main, eager_bytes=WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduce", ["rank", "expert"])
def test_rows_are_weighted_at_the_origin_by_what_was_given_last(reduce, way):
    def rank_main(ep, batch):
        other = torch.rand(batch.topk_weights.shape, generator=torch.Generator().manual_seed(ep.rank))
        plain = ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        weighted = ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights, layout="padded")
        y = outputs_of(plain, ep.rank, PADDED)
        sums = [
            (None, ep.combine(y, plain.handle, reduce=reduce)),
            (batch.topk_weights, ep.combine(y, weighted.handle, reduce=reduce)),
            (other, ep.combine(y, plain.handle, topk_weights=other, reduce=reduce)),
            (other, ep.combine(y, weighted.handle, topk_weights=other, reduce=reduce)),
        ]
        return y, sums

    results = on_ranks(PADDED, rank_main, eager_bytes=WAYS[way])
    outputs = [y for y, _ in results]
    for rank, (_, sums) in enumerate(results):
        for factors, out in sums:
            assert_same("combined", out, expected(PADDED, rank, outputs, factors, reduce=reduce))


def test_weights_of_the_dispatch_are_those_of_the_call():
    """What the caller does to them afterwards changes nothing."""

    def rank_main(ep, batch):
        weights = batch.topk_weights.clone()
        received = ep.dispatch(batch.x, batch.topk_idx, weights, layout="padded")
        y = outputs_of(received, ep.rank, PADDED)
        before = ep.combine(y, received.handle)
        weights.fill_(9)
        assert_same("combined", ep.combine(y, received.handle), before)

    on_ranks(PADDED, rank_main)


@pytest.mark.parametrize("hidden", [1, 129, 256])
@pytest.mark.parametrize("inside", [False, True])
def test_logfmt_is_the_round_trip_of_every_row(hidden, inside):
    case = replace(PADDED, hidden=hidden, num_bias=2)

    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights, layout="padded")
        y = outputs_of(received, ep.rank, case) * 0.1
        given = ep.empty_output(received.handle).copy_(y) if inside else y
        out = ep.combine(given, received.handle, bias=batch.bias, wire="logfmt10")
        split = ep.combine(given, received.handle, bias=batch.bias, wire="logfmt10", wait=False)
        assert_same("combined", split.wait(), out)
        return y, out

    results = on_ranks(case, rank_main)
    for rank, (_, out) in enumerate(results):
        batch = case.batches[rank]
        options = {"coded": True, "bias": batch.bias}
        assert_same("combined", out, expected(case, rank, [y for y, _ in results], batch.topk_weights, **options))


def test_only_defined_rows_are_copied():
    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        inside = ep.empty_output(received.handle)
        assert inside.shape == received.x.shape
        inside.copy_(outputs_of(received, ep.rank, PADDED))
        outside = inside.clone()
        out = torch.full_like(batch.x, float("nan"))
        counts = [ep.stats().copied_in_bytes]
        assert ep.combine(inside, received.handle, out=out) is out
        counts.append(ep.stats().copied_in_bytes)
        assert_same("combined", ep.combine(outside, received.handle), out)
        counts.append(ep.stats().copied_in_bytes)
        assert [b - a for a, b in pairwise(counts)] == [0, sum(received.counts) * 2 * 256]
        assert_same("combined", ep.combine(inside.float(), received.handle).bfloat16().isfinite(), out.isfinite())

    on_ranks(PADDED, rank_main, eager_bytes=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_cached_dispatch_brings_other_rows_to_the_same_places(way):
    def rank_main(ep, batch):
        first = ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        second = ep.dispatch(batch.x + 1, handle=first.handle)
        fresh = ep.dispatch(batch.x + 1, batch.topk_idx, layout="padded")
        for name in ("source_begin", "source_count"):
            assert_same(name, getattr(second, name), getattr(fresh, name))
        for expert, count in enumerate(fresh.counts):
            assert_same("x", second.x[expert, :count], fresh.x[expert, :count])
            assert_same("source_token", second.source_token[expert, :count], fresh.source_token[expert, :count])
        assert second.counts == fresh.counts

    on_ranks(PADDED, rank_main, eager_bytes=WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_a_block_that_overflows_is_an_error_on_every_rank_and_the_buffer_goes_on(way):
    def rank_main(ep, batch):
        x = torch.ones(40, 256).bfloat16()
        twice = torch.zeros(40, 4, dtype=torch.int64)  # expert 0, four times a token
        too_many = r"more than R \* max_tokens_per_rank = 120 rows.*twice"
        pending = ep.dispatch(x, twice, layout="padded", wait=False)
        with pytest.raises(anyep.CapacityError, match=too_many):
            ep.dispatch(x, twice, layout="padded")
        with pytest.raises(anyep.CapacityError, match=too_many):
            pending.wait()
        once = ep.dispatch(x, torch.tensor([[0, -1, -1, -1]] * 40), layout="padded")
        assert once.counts[0] == (120 if ep.rank == 0 else 0)
        assert torch.equal(ep.combine(once.x, once.handle), x)
        return ep.stats().refused

    assert on_ranks(PADDED, rank_main, eager_bytes=WAYS[way]) == [2, 2, 2]


def test_duplicates_that_fit_a_block_are_rows_of_their_own():
    def rank_main(ep, batch):
        x = torch.ones(10, 256).bfloat16()
        received = ep.dispatch(x, torch.full((10, 4), 5), torch.ones(10, 4), layout="padded")
        assert received.counts == ([0, 120, 0, 0] if ep.rank == 1 else [0] * 4)
        assert torch.equal(ep.combine(received.x, received.handle), 4 * x)

    on_ranks(PADDED, rank_main)


@pytest.mark.parametrize("most", [0, 5])
@pytest.mark.parametrize("num_tokens", [(0, 0, 0), (5, 0, 0), (0, 0, 5)])
def test_ranks_without_tokens(num_tokens, most):
    if max(num_tokens) <= most:
        case = replace(PADDED, num_tokens=num_tokens, max_tokens=most)
        for eager_bytes in WAYS.values():
            check(case, on_ranks(case, lambda ep, batch: play(case, ep), eager_bytes=eager_bytes))


def bursts():
    """Batches one after another in one buffer: quiet, rank 2 with 40 times as much, all to one expert, some empty."""
    quiet = replace(PADDED, num_tokens=(1, 1, 1), wire="bf16", with_weights=True)
    return [
        quiet,
        replace(quiet, num_tokens=(1, 1, 40), seed=5),
        replace(quiet, num_tokens=(40, 0, 0), skew=1e6, seed=6),
        replace(quiet, num_tokens=(0, 0, 40), seed=7),
        replace(quiet, num_tokens=(0, 0, 0), seed=8),
        replace(quiet, num_tokens=(40, 40, 40), seed=9),
        quiet,
    ]


@pytest.mark.parametrize("layout", ["compact", "expert", "padded"])
def test_a_burst_changes_the_way_in_the_same_call(layout):
    reduce = "rank" if layout == "compact" else "expert"
    chosen = [replace(case, layout=layout, reduce=reduce) for case in bursts()]
    eager_bytes = 3 * 600  # three rows a pair

    def rank_main(ep, batch):
        played, ways = [], []
        for case in chosen:
            before = ep.stats()
            played.append(play(case, ep))
            after = ep.stats()
            names = ("eager_rows", "direct_rows", "second_offers")
            ways.append([getattr(after, name) - getattr(before, name) for name in names])
        return played, ways

    results = on_ranks(chosen[0], rank_main, eager_bytes=eager_bytes)
    for number, case in enumerate(chosen):
        check(case, [played[number] for played, _ in results])
    for rank, (_, ways) in enumerate(results):
        eager, direct, second = zip(*ways, strict=True)
        assert direct[0] == direct[4] == direct[6] == 0, "three rows or fewer come along"
        assert eager[0] > 0
        assert eager[0] == eager[6]
        assert direct[5] > 0
        if rank == 2:
            assert direct[1] > 0, "40 tokens do not"
        if layout == "padded":
            assert sum(second) == 0, "a block has room for every case"
        else:
            assert second[1] > 0, "no rank expects 40 tokens after one"


@pytest.mark.parametrize("one_way", [True, False])
@pytest.mark.parametrize("layout", ["compact", "expert", "padded"])
def test_a_ranks_rows_go_the_way_of_most_where_its_pairs_differ(layout, one_way, monkeypatch):
    reduce = "rank" if layout == "compact" else "expert"
    chosen = [replace(case, layout=layout, reduce=reduce) for case in bursts()]
    rule = EagerRule(pair_bytes=3 * 600, reason="three rows a pair", one_way=one_way)
    monkeypatch.setattr(setup, "given_rule", lambda _: rule)

    def rank_main(ep, batch):
        played, ways = [], []
        for case in chosen:
            played.append(play(case, ep))
            own = case.batches[ep.rank]
            begun = ep.stats()
            received = ep.dispatch(own.x, own.topk_idx, own.topk_weights, layout=layout)
            between = ep.stats()
            ep.combine(received.x, received.handle)
            for before, after in pairwise((begun, between, ep.stats())):
                ways.append((after.eager_rows - before.eager_rows, after.direct_rows - before.direct_rows))
        return played, ways

    results = on_ranks(chosen[0], rank_main, eager_bytes=1 << 20)
    for number, case in enumerate(chosen):
        check(case, [played[number] for played, _ in results])
    ways = [way for _, of_rank in results for way in of_rank]
    assert any(eager for eager, _ in ways)
    assert any(direct for _, direct in ways)
    assert any(eager and direct for eager, direct in ways) != one_way


def test_all_rows_are_one_way_or_the_other():
    sent = sum(there.num_rows - int((there.source == PADDING).sum()) for there in PADDED.exchange.arrivals)

    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.topk_idx, layout="padded")
        stats = ep.stats()
        ep.combine(received.x, received.handle)
        back = ep.stats()
        came_back = back.eager_rows + back.direct_rows - stats.eager_rows - stats.direct_rows
        assert came_back == sum(received.counts)
        assert stats.rows_by_expert.tolist() == received.counts
        assert stats.rows_by_source.tolist() == received.source_count.sum(dim=0).tolist()
        return stats.rows_sent, stats.eager_rows, stats.direct_rows

    for name, eager_bytes in WAYS.items():
        rows = on_ranks(PADDED, rank_main, eager_bytes=eager_bytes)
        assert sum(all_rows for all_rows, _, _ in rows) == sent
        assert (sum(eager for _, eager, _ in rows) > 0) == (name != "direct")
        assert (sum(direct for _, _, direct in rows) > 0) == (name != "eager")


def test_explain_names_the_limits():
    def rank_main(ep, batch):
        return str(ep.explain())

    assert "every row straight to its final place" in on_ranks(PADDED, rank_main, eager_bytes=0)[0]
    assert "2.0 KiB" in on_ranks(PADDED, rank_main, eager_bytes=2048)[0]
    assert "a round of messages takes" in on_ranks(PADDED, rank_main, eager_bytes=None)[0]
    with open_buffer(replace(PADDED, num_tokens=(3,)), anyep.local_group(1)[0]) as ep:
        assert "a single rank" in str(ep.explain())
