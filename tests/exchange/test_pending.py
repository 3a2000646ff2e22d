"""Results under way: too many, waited for twice, dropped, polled, refused, and from several threads."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

import anyep
from anyep.transport.shared import SharedTransport

SIZES = {"hidden": 64, "num_experts": 6, "num_topk": 2, "max_tokens_per_rank": 64}
WAYS = {"eager": 1 << 20, "background": 0}
"""``eager_bytes`` for operations whose second half runs in ``wait``, and for those that run in the background."""


def batch(num_tokens=4, rank=0):
    x = torch.full((num_tokens, 64), float(rank + 1)).bfloat16()
    return x, torch.arange(2 * num_tokens).view(num_tokens, 2) % 6


def on_ranks(num_ranks, rank_main, **options):
    """Run ``rank_main(ep)`` on every rank, with a buffer that is left normally."""

    def thread_main(member):
        with anyep.Buffer(member, **SIZES | {"timeout_s": 30.0} | options) as ep:
            return rank_main(ep)

    return anyep.local_group(num_ranks).run(thread_main)


def used_bytes(ep):
    gc.collect()
    return ep._end.transport._open.arena.used_bytes


@pytest.mark.parametrize("way", WAYS)
def test_one_result_too_many_names_those_in_flight_and_the_buffer_goes_on(way):
    def rank_main(ep):
        first, second = ep.dispatch(*batch(), wait=False), ep.dispatch(*batch(), wait=False)
        for call in (lambda: ep.dispatch(*batch(), wait=False), lambda: ep.dispatch(*batch(), wait=False)):
            with pytest.raises(ValueError, match=r"2 operations are in flight \(dispatch 1, dispatch 2\).*=2") as error:
                call()
            assert "wait for one before this dispatch" in str(error.value)
        ep.barrier()  # what is waited for at once needs no room
        received = first.wait()
        back = ep.combine(received.x, received.handle, wait=False)
        with pytest.raises(ValueError, match=r"\(dispatch 2, combine 4\)"):
            ep.dispatch(*batch(), wait=False)
        assert torch.equal(second.wait().x, received.x)
        assert torch.equal(back.wait(), ep.combine(received.x, received.handle))

    on_ranks(3, rank_main, max_in_flight=2, eager_bytes=WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_waiting_twice_says_what_was_waited_for(way):
    def rank_main(ep):
        pending = ep.dispatch(*batch(), wait=False)
        received = pending.wait()
        with pytest.raises(ValueError, match="this dispatch was already waited for"):
            pending.wait()
        ep.combine(received.x, received.handle)

    on_ranks(2, rank_main, eager_bytes=WAYS[way])


@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize("way", WAYS)
def test_dropped_results_cost_neither_room_nor_memory(way, layout):
    def rank_main(ep):
        received = ep.dispatch(*batch(), layout=layout)
        y = received.x.clone()
        expected = ep.combine(y, received.handle)
        before = used_bytes(ep)
        for _ in range(5):
            for _ in range(3):
                ep.dispatch(*batch(), layout=layout, wait=False)
                ep.combine(y, received.handle, wait=False)
            again = ep.dispatch(*batch(), layout=layout)
            assert torch.equal(ep.combine(y, again.handle), expected)
            del again
            ep.barrier()
        return used_bytes(ep) - before, len(ep._flights._flying)

    assert on_ranks(3, rank_main, max_in_flight=2, eager_bytes=WAYS[way]) == [(0, 0)] * 3


def test_waiting_or_not_is_each_ranks_own_affair():
    def rank_main(ep):
        for turn in range(6):
            x, idx = batch(rank=ep.rank)
            if (ep.rank + turn) % 3:
                received = ep.dispatch(x, idx)
                out = ep.combine(received.x, received.handle)
            else:
                received = ep.dispatch(x, idx, wait=False).wait()
                out = ep.combine(received.x, received.handle, wait=False).wait()
            expected = (idx // 2)[:, :1] != (idx // 2)[:, 1:]  # tokens whose experts live on two ranks come twice
            assert torch.equal(out, x * (1 + expected.to(x.dtype)))

    for eager_bytes in WAYS.values():
        on_ranks(3, rank_main, eager_bytes=eager_bytes)


@pytest.mark.parametrize("way", WAYS)
def test_polling_ends(way):
    def rank_main(ep):
        for _ in range(10):
            pending = ep.dispatch(*batch(), wait=False)
            while not pending.done():
                time.sleep(0.0001)
            received = pending.wait()
            assert pending.done()
            back = ep.combine(received.x, received.handle, wait=False)
            while not back.done():
                time.sleep(0.0001)
            back.wait()

    on_ranks(3, rank_main, eager_bytes=WAYS[way])


@pytest.mark.parametrize("first", [0, 1])
def test_an_older_operation_that_must_offer_again_does_not_hold_up_a_newer_one(first):
    """Rank 0 has few rows to send in operation 2, but must offer more memory; rank 1's operation 3 comes behind it."""

    def rank_main(ep):
        few, many = batch(1), batch(60)
        everything_to_0 = torch.zeros_like(many[1])
        ep.dispatch(*few)
        burst = few if ep.rank == 0 else (many[0], everything_to_0)
        pendings = [ep.dispatch(*burst, wait=False), ep.dispatch(*many, wait=False)]
        order = [1, 0] if ep.rank == first else [0, 1]
        rows = {i: pendings[i].wait().x.shape[0] for i in order}
        assert ep.stats().second_offers >= 1
        return rows[0]

    few_bytes = 2 * (128 + 16)
    assert on_ranks(2, rank_main, eager_bytes=few_bytes, timeout_s=8.0)[0] == 61


def test_a_refused_operation_does_not_spoil_a_newer_one():
    def rank_main(ep):
        refused = ep.dispatch(*batch(), layout=["compact", "expert"][ep.rank], wait=False)
        good = ep.dispatch(*batch(), wait=False)
        assert good.wait().x.shape[0] > 0
        with pytest.raises(ValueError, match=r"dispatch 1: ranks disagree: layout is"):
            refused.wait()
        ep.dispatch(*batch(), layout=["compact", "expert"][ep.rank], wait=False)  # nobody hears of it
        ep.barrier()
        good = ep.dispatch(*batch())
        assert ep.combine(good.x, good.handle).shape == (4, 64)

    for eager_bytes in WAYS.values():
        on_ranks(2, rank_main, eager_bytes=eager_bytes)


def test_two_threads_of_a_rank_may_post_and_wait():
    def rank_main(ep):
        received = [None] * 40
        posted = []

        def wait_for_each():
            for number in range(40):
                while len(posted) <= number:
                    time.sleep(0.0001)
                received[number] = posted[number].wait()

        waiter = threading.Thread(target=wait_for_each)
        waiter.start()
        for number in range(40):
            while number - sum(one is not None for one in received) >= ep._flights.max_in_flight:
                time.sleep(0.0001)
            posted.append(ep.dispatch(*batch(8, number % 7), wait=False))
        waiter.join()
        for number, one in enumerate(received):
            assert (one.x == number % 7 + 1).all()
            assert one.x.shape == received[0].x.shape

    for eager_bytes in WAYS.values():
        on_ranks(2, rank_main, eager_bytes=eager_bytes)


def test_the_same_calls_from_two_threads_of_every_rank():
    def rank_main(ep):
        expected = ep.dispatch(*batch(8))

        def dispatch_often(wrong):
            for turn in range(30):
                one = ep.dispatch(*batch(8)) if turn % 2 else ep.dispatch(*batch(8), wait=False).wait()
                if not torch.equal(one.x, expected.x):
                    wrong.append(turn)

        wrong = []
        threads = [threading.Thread(target=dispatch_often, args=(wrong,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong, ep.stats().dispatches

    for eager_bytes in WAYS.values():
        assert on_ranks(3, rank_main, eager_bytes=eager_bytes) == [([], 61)] * 3


@pytest.mark.parametrize("max_in_flight", [1, 3, 5])
def test_a_rank_that_dawdles_at_the_opening_finds_its_messages(monkeypatch, max_in_flight):
    wait = SharedTransport.wait

    def late(self, lane, epoch, step, ranks=None):
        if self.rank == 1 and step.startswith("opening"):
            time.sleep(0.2)
        return wait(self, lane, epoch, step, ranks)

    monkeypatch.setattr(SharedTransport, "wait", late)

    def rank_main(ep):
        pendings = [ep.dispatch(*batch(), wait=False) for _ in range(max_in_flight)]
        return [pending.wait().x.shape[0] for pending in pendings]

    options = {"eager_bytes": 700, "max_in_flight": max_in_flight, "timeout_s": 5.0}
    assert on_ranks(2, rank_main, **options) == [[6] * max_in_flight, [4] * max_in_flight]


def test_different_most_tokens_are_an_error_on_every_rank():
    def thread_main(member):
        with pytest.raises(ValueError, match=r"max_tokens_per_rank differs between ranks: .*65.*every rank must"):
            anyep.Buffer(member, **SIZES | {"max_tokens_per_rank": 64 + (member.rank == 2)})

    anyep.local_group(3).run(thread_main)


@pytest.mark.parametrize("way", WAYS)
def test_a_dispatch_that_waits_for_sizes_says_where_its_batch_will_stand(way):
    def rank_main(ep):
        x, idx = batch(rank=ep.rank)
        plain = ep.dispatch(x, idx)
        pending = ep.dispatch(x, idx, wait="sizes")
        targets = pending.targets
        again = ep.dispatch(x, handle=targets.handle, wait=False)  # before the first one's rows are here
        received, repeated = pending.wait(), again.wait()
        assert received.handle is targets.handle
        for name in ("x", "topk_idx"):
            assert getattr(received, name).data_ptr() == getattr(targets, name).data_ptr()
            assert torch.equal(getattr(received, name), getattr(plain, name))
        assert repeated.x.data_ptr() == again.targets.x.data_ptr()
        assert torch.equal(repeated.x, plain.x)

    on_ranks(3, rank_main, eager_bytes=WAYS[way])


def test_ranks_that_disagree_learn_it_where_they_wait_for_sizes_and_go_on():
    def rank_main(ep):
        x, idx = batch()
        with pytest.raises(ValueError, match="ranks disagree"):
            ep.dispatch(x, idx if ep.rank else idx.int(), wait="sizes")
        assert torch.equal(ep.dispatch(x, idx, wait="sizes").wait().x, ep.dispatch(x, idx).x)

    on_ranks(3, rank_main)
