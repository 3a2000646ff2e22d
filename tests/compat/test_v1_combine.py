"""Normal combine: bits of the sums, biases, weights, two roundings between hosts, calls that go on."""

from __future__ import annotations

import pytest
import torch

from tests.compat.test_v1_dispatch import check_received
from tests.compat.v1_oracle import E, H, K, arrival, make_inputs, on_ranks, same_bits, send, summed


def outputs_for(rank, rows, hidden=H):
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(50 + rank)).bfloat16()


def bias_for(rank, tokens, count):
    generator = torch.Generator().manual_seed(80 + rank)
    return [torch.randn(tokens, H, generator=generator).bfloat16() for _ in range(count)]


def cancelling(seed, rows):
    """Return large numbers that cancel and small ones that they swallow, as the order will."""
    numbers = torch.tensor([2.0**26, -(2.0**26), 2.0**9, -(2.0**9), 3.0, 0.5])
    generator = torch.Generator().manual_seed(seed)
    return numbers[torch.randint(len(numbers), (rows, H), generator=generator)].bfloat16()


def cancelling_bias(rank, tokens, count):
    return [cancelling(60 + 2 * rank + number, tokens) for number in range(count)]


def check_sums(given, per_host, biases, *, experts=E, outputs=outputs_for, bias_of=bias_for, homes=None):
    """Dispatch and combine; hold what comes, sums and weights against plain torch."""

    def rank_main(buffer):
        sent = given[buffer.rank]
        x, weights, handle = check_received(buffer, given, experts)
        y, bias = outputs(buffer.rank, len(x)), bias_of(buffer.rank, len(sent.x), biases)
        argument = None if not bias else bias[0] if len(bias) == 1 else tuple(bias)
        out, back, event = buffer.combine(y, handle, topk_weights=weights, bias=argument)
        assert event.event is None
        assert same_bits(back, sent.topk_weights.masked_fill(sent.topk_idx < 0, 0))
        return y, bias, out

    results = on_ranks(len(given), rank_main)
    for rank, (_, bias, out) in enumerate(results):
        assert same_bits(out, summed(given, [y for y, _, _ in results], rank, bias, per_host, experts, homes))


@pytest.mark.parametrize("biases", [0, 1, 2])
@pytest.mark.parametrize(
    ("tokens", "per_host"),
    [([23], 8), ([9, 31], 8), ([20, 0, 13], 8), ([5, 33, 12, 8], 8), ([5, 33, 12, 8], 2), ([6, 7, 5], 2), ([4, 9], 1)],
)
def test_sums_are_in_fp32_from_the_bias_on_in_rank_order_and_rounded_as_specified(
    tokens, per_host, biases, monkeypatch
):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    check_sums(make_inputs(tokens), per_host, biases)


@pytest.mark.parametrize("biases", [0, 1, 2])
@pytest.mark.parametrize(("tokens", "per_host"), [([19, 8, 11, 9], 8), ([19, 8, 11, 9], 2), ([19, 8, 0, 9, 12], 2)])
def test_numbers_that_cancel_tell_the_order_and_the_place_of_every_rounding(tokens, per_host, biases, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    experts = 5 * len(tokens)
    given = make_inputs(tokens, topk=10, experts=experts)  # nearly every token goes nearly everywhere
    check_sums(given, per_host, biases, experts=experts, outputs=cancelling, bias_of=cancelling_bias)


@pytest.mark.parametrize("per_host", [8, 2])
def test_weights_of_any_column_are_added_up_over_ranks(per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    given = make_inputs([5, 33, 12, 8])

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given[buffer.rank])
        mine = torch.tensor([1.0, 10.0, 100.0]) * 2**buffer.rank
        return buffer.combine(x, handle, topk_weights=mine.repeat(len(x), 1))[1]

    for rank, back in enumerate(on_ranks(4, rank_main)):
        owners = torch.where(given[rank].topk_idx < 0, -1, given[rank].topk_idx // 3)
        reach = torch.stack([(owners == other).any(1) * 2.0**other for other in range(4)], 1).sum(1, keepdim=True)
        assert same_bits(back, reach * torch.tensor([1.0, 10.0, 100.0]))


def test_tokens_that_went_nowhere_are_zero_or_their_bias():
    given = make_inputs([9])

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given[0])
        bias = bias_for(0, 9, 1)[0]
        assert not buffer.combine(x, handle)[0][4].any()
        assert same_bits(buffer.combine(x, handle, bias=bias)[0][4], bias[4])
        assert buffer.combine(x, handle)[1] is None

    on_ranks(1, rank_main)


@pytest.mark.parametrize("with_weights", [False, True])
def test_an_asynchronous_combine_is_valid_once_its_event_was_waited_for(with_weights):
    given = make_inputs([9, 31])

    def rank_main(buffer):
        x, _, weights, _, handle, _ = send(buffer, given[buffer.rank])
        weights = weights if with_weights else None
        now, _, _ = buffer.combine(x, handle, weights)
        out, back, event = buffer.combine(x, handle, weights, async_finish=True)
        called = []
        event.register_hook_after_wait(lambda: called.append(1))
        with event:
            pass
        assert called == [1]
        assert same_bits(out, now)
        assert (back is not None) == with_weights

    on_ranks(2, rank_main)


def test_any_number_of_events_may_be_held():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given[buffer.rank])
        now = buffer.combine(x, handle)[0]
        held = [buffer.combine(x, handle, async_finish=True) for _ in range(12)]
        for out, _, event in reversed(held):
            event.current_stream_wait()
            assert same_bits(out, now)

    on_ranks(2, rank_main)


def test_a_call_behind_an_event_comes_after_it():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        x, *_, handle, event = send(buffer, given[buffer.rank], async_finish=True)
        out, _, first = buffer.combine(x, handle, previous_event=event, async_finish=True, allocate_on_comm_stream=True)
        again, *_ = buffer.dispatch(out, handle=handle, previous_event=first)
        assert same_bits(again, buffer.dispatch(out, handle=handle)[0])

    on_ranks(2, rank_main)


def test_a_handle_of_fp8_rows_brings_back_bf16_rows_of_another_width():
    given = make_inputs([9, 31])

    def rank_main(buffer):
        mine = given[buffer.rank]
        q = mine.x.float().to(torch.float8_e4m3fn)
        (x, _), *_, handle, _ = send(buffer, mine, (q, torch.ones(len(q), 1)))
        y = outputs_for(buffer.rank, len(x), 40)
        return y, buffer.combine(y, handle)[0]

    results = on_ranks(2, rank_main)
    for rank, (_, out) in enumerate(results):
        assert same_bits(out, summed(given, [y for y, _ in results], rank, [], 8))


BAD = {
    "rows in float32": (lambda x: {"x": x.float()}, "Unsupported type"),
    "too few rows": (lambda x: {"x": x[1:]}, "N, H"),
    "one bias in a tuple": (lambda x: {"bias": (torch.zeros(9, H).bfloat16(),)}, "bias"),
    "three biases": (lambda x: {"bias": (torch.zeros(9, H).bfloat16(),) * 3}, "bias"),
    "a bias in float32": (lambda x: {"bias": torch.zeros(9, H)}, "bias"),
    "weights in float64": (lambda x: {"topk_weights": torch.zeros(len(x), K).double()}, "topk_weights"),
    "a handle of another kind": (lambda x: {"handle": (1, 2, 3)}, "handle"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_runtime_errors_and_cost_nothing(case):
    make, text = BAD[case]
    given = make_inputs([9])

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given[0])
        with pytest.raises(RuntimeError, match=text):
            buffer.combine(**({"x": x, "handle": handle} | make(x)))
        buffer.combine(x, handle)

    on_ranks(1, rank_main)


def test_five_ranks_of_two_hosts(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "3")
    given = make_inputs([6, 3, 9, 0, 4], experts=10)

    def rank_main(buffer):
        x, *_, handle, _ = send(buffer, given[buffer.rank], experts=10)
        assert len(handle) == 10
        assert len(x) == len(arrival(given, buffer.rank, 10).token)
        out, _, _ = buffer.combine(x, handle)
        reach = handle[0].sum(1, keepdim=True)
        small = reach[:, 0] <= 2  # few equal rows: every partial sum is exact
        assert torch.equal(out[small], (given[buffer.rank].x.float() * reach)[small].bfloat16())

    on_ranks(5, rank_main)
