"""Whole exchanges on a device, bit for bit against the oracle: with the reference's kernels, and interpreted ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import anyep
from anyep.errors import CapacityError, Unavailable
from anyep.testing.lazy_device import LazyDevice
from anyep.testing.pretend_device import PretendDevice, pretended
from tests.exchange.cases import cases
from tests.exchange.rounds import ReceivedCopy, check, check_received, expected_sum, open_buffer, play
from tests.gpu.exchanged import draw
from tests.gpu.programs import needs_triton, run_program

PATIENT = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture(autouse=True)
def device():
    with pretended(PretendDevice()) as device:
        yield device


def run(case, **options):
    def rank_main(member):
        with open_buffer(case, member, device="cuda", **options) as ep:
            return play(case, ep)

    return anyep.local_group(case.num_ranks).run(rank_main)


@settings(max_examples=15, **PATIENT)
@given(cases())
def test_exchange_is_exact(case):
    small = tuple(min(tokens, 40) for tokens in case.num_tokens)
    case = replace(case, num_tokens=small, hidden=min(case.hidden, 300))
    check(case, run(case))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=1500, **PATIENT)
@given(cases())
def test_exchange_is_exact_at_length(case):
    check(case, run(case))


@needs_triton
def test_interpreted_kernels_exchange_the_same_bits(tmp_path):
    seeds = [str(seed) for seed in (0, 3, 4, 7, 8, 11)]  # BF16 and FP8 in every layout
    assert run_program("exchanged", *seeds, cache=tmp_path, interpreted=True) == dict.fromkeys(seeds, "")


@needs_triton
def test_deep_eps_interface_brings_the_same_bits_with_interpreted_kernels(tmp_path):
    assert run_program("drop_in", cache=tmp_path, interpreted=True) == {"V1": "", "V2": ""}


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_interpreted_kernels_exchange_the_same_bits_at_length(tmp_path):
    found = run_program("exchanged", *map(str, range(200)), cache=tmp_path, interpreted=True, timeout=1700)
    assert [trace for trace in found.values() if trace] == []


def test_a_batch_larger_than_the_forecast_is_offered_memory_again():
    case = replace(draw(0), num_tokens=(40, 40), num_experts=8, num_topk=1, skew=0.05, spare_rows=None, hidden=8)

    def rank_main(member):
        with open_buffer(case, member, device="cuda") as ep:
            return play(case, ep), ep.stats().second_offers

    outcomes, offers = zip(*anyep.local_group(2).run(rank_main), strict=True)
    check(case, list(outcomes))
    assert offers == (1, 1)


def one_by_one(calls):
    received = {rank: calls[rank].wait() for rank in (1, 0)}
    return [received[0], received[1]]


def by_two_threads(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call.wait(), calls))


@pytest.mark.parametrize(
    ("make", "options", "wait"),
    [
        (PretendDevice, {}, one_by_one),
        (lambda: LazyDevice(0), {}, one_by_one),
        (lambda: LazyDevice(1), {}, by_two_threads),
        (lambda: LazyDevice(2), {"concurrent": True}, by_two_threads),
    ],
)
def test_one_thread_that_plays_all_ranks_offers_for_all_of_them(make, options, wait):
    case = replace(draw(0), num_tokens=(40, 40), num_experts=8, num_topk=1, skew=0.05, spare_rows=None, hidden=8)
    with pretended(make()):
        buffers = anyep.local_group(2).run(lambda member: open_buffer(case, member, device="cuda", **options))
        for _ in range(2):  # as many rows again fit what is offered first
            calls = [
                ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights, layout="compact", wait=False)
                for ep, batch in zip(buffers, case.batches, strict=True)
            ]
            for rank, (ep, received) in enumerate(zip(buffers, wait(calls), strict=True)):
                check_received(case, rank, ReceivedCopy.of(received))
                assert ep.stats().second_offers == 1
        for ep in buffers:
            ep.close()


@pytest.mark.parametrize("waiting", [(0, 1), (1, 0)])
def test_one_thread_that_plays_all_ranks_refuses_where_one_lacks_memory(monkeypatch, waiting):
    case = replace(draw(0), num_tokens=(40, 40), num_experts=8, num_topk=1, skew=0.05, spare_rows=None, hidden=8)
    buffers = anyep.local_group(2).run(lambda member: open_buffer(case, member, device="cuda"))

    def begin():
        return [ep.dispatch(b.x, b.topk_idx, wait=False) for ep, b in zip(buffers, case.batches, strict=True)]

    def full(*_):
        raise CapacityError("full")

    calls = begin()
    with monkeypatch.context() as patch:
        patch.setattr("anyep.exchange.device.dispatch.cut_landing", full)
        for rank in waiting:
            with pytest.raises(CapacityError, match="could not allocate"):
                calls[rank].wait()
    assert [len(call.wait().x) for call in begin()] == [len(call.wait().x) for call in begin()]
    for ep in buffers:
        ep.close()


@pytest.mark.parametrize("layout", ["compact", "expert", "padded"])
def test_one_thread_plays_all_ranks_with_first_halves_first(layout):
    case = replace(draw(LAYOUT_SEEDS[layout]), num_tokens=(5, 0, 7), spare_rows=4, num_experts=8, hidden=130)
    buffers = anyep.local_group(3).run(lambda member: open_buffer(case, member, device="cuda"))
    batches = list(zip(buffers, case.batches, strict=True))
    calls = [ep.dispatch(b.x, b.topk_idx, b.topk_weights, layout=layout, wait=False) for ep, b in batches]
    received = [call.wait() for call in calls]
    outputs = [one.x.float().to(torch.bfloat16) for one in received]
    returns = [ep.combine(y, one.handle, wait=False) for ep, y, one in zip(buffers, outputs, received, strict=True)]
    combined = [call.wait() for call in returns]
    for rank, ep in enumerate(buffers):
        check_received(case, rank, ReceivedCopy.of(received[rank]))
        factors = case.batches[rank].topk_weights if layout == "padded" else None
        expected = expected_sum(
            case.exchange,
            rank,
            lambda owner, rows: outputs[owner].view(-1, case.hidden)[rows],
            dtype=torch.bfloat16,
            reduce="expert" if layout == "padded" else "rank",
            factors=factors,
        )
        assert torch.equal(combined[rank].view(torch.int16), expected.view(torch.int16))
        ep.close()


LAYOUT_SEEDS = {"compact": 3, "expert": 7, "padded": 11}
"""Cases of :func:`draw` with FP8."""


def test_logfmt_sums_are_those_of_the_host():
    case = replace(draw(8), num_tokens=(6, 3), num_experts=4, num_topk=2, hidden=200, wire="bf16")

    def rank_main(member, **options):
        with open_buffer(case, member, **options) as ep:
            batch = case.batches[ep.rank]
            got = ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights, layout="padded")
            return ep.combine(got.x.nan_to_num(), got.handle, wire="logfmt10", bias=batch.bias or None)

    on_host, on_device = (
        anyep.local_group(2).run(lambda member, where=where: rank_main(member, device=where))
        for where in (None, "cuda")
    )
    for expected, got in zip(on_host, on_device, strict=True):
        assert torch.equal(expected.view(torch.int16), got.view(torch.int16))


@pytest.mark.parametrize(("layout", "spare_rows"), [("padded", None), ("compact", 3), ("expert", 3)])
def test_with_a_fixed_number_of_rows_the_host_waits_for_nothing(device, monkeypatch, layout, spare_rows):
    case = replace(draw(LAYOUT_SEEDS[layout]), num_tokens=(4, 5), spare_rows=spare_rows)
    fetch, fetched = device.fetch, []

    def never_after_opening(words):
        fetched.append(words)
        return fetch(words) if len(fetched) <= case.num_ranks else NeverThere()

    monkeypatch.setattr(device, "fetch", never_after_opening)

    def rank_main(member):
        with open_buffer(case, member, device="cuda") as ep:
            return play(case, ep)

    check(case, anyep.local_group(2).run(rank_main))


class NeverThere:
    """Words that the host would wait for in vain."""

    def done(self):
        return False

    def wait(self):
        raise AssertionError("the host waited for the device")


def test_without_one_it_waits_once_in_a_dispatch_and_never_in_a_combine(device, monkeypatch):
    case = replace(draw(0), num_tokens=(4, 5), spare_rows=None)
    waits = []
    fetch = device.fetch

    class Counted:
        def __init__(self, words):
            self.words = fetch(words)

        def wait(self):
            waits.append(1)
            return self.words.wait()

    monkeypatch.setattr(device, "fetch", Counted)
    check(case, run(case))
    assert (
        len(waits) == 2 * case.num_ranks
    )  # one when it is made; play dispatches, combines, and dispatches again with the handle


def test_what_cpu_tensors_alone_can_do_is_refused_by_name():
    case = draw(0)

    def rank_main(member):
        with open_buffer(case, member, device="cuda") as ep:
            for call in (
                lambda: ep.handles.ask(torch.zeros(1, 1)),
                lambda: ep.handles.by_group(None, 2),
            ):
                with pytest.raises(Unavailable, match="works on CPU tensors"):
                    call()

    anyep.local_group(2).run(rank_main)


@pytest.mark.parametrize("options", [{}, {"eager_bytes": 0}, {"arena_bytes": 1 << 26, "wire": "fp8"}])
def test_the_account_of_a_device_is_known_before_anything_is_allocated(options):
    sizes = {"hidden": 512, "num_experts": 8, "num_topk": 4, "max_tokens_per_rank": 100, **options}

    def rank_main(member):
        with anyep.Buffer(member, **sizes, device="cuda") as ep:
            end = ep._end
            slots = 0 if end.padded_slots is None else end.padded_slots.memory.nbytes
            return ep.explain().memory, end.boards.memory.nbytes + slots

    for rank, (memory, taken) in enumerate(anyep.local_group(3).run(rank_main)):
        assert memory == anyep.memory_account(3, rank=rank, device="cuda", **sizes)
        assert memory.committed_bytes == taken
