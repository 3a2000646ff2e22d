"""What callers rely on, one behaviour a test, on ranks as threads."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch

import anyep
from anyep.collectives import Gatherer, Ring, RowStore
from anyep.layout.routing_trace import RoutingTrace
from anyep.numerics.fp8 import quantise_fp8
from tests.exchange.cases import Case
from tests.exchange.rounds import assert_same, check, open_buffer, play

CASE = Case(
    num_tokens=(17, 0, 40),
    hidden=256,
    num_topk=4,
    num_experts=12,
    wire="bf16",
    scales="fp32",
    layout="compact",
    alignment=1,
    idx_dtype=torch.int64,
    with_weights=True,
    num_bias=0,
    reduce="rank",
    skew=1.0,
    placement=None,
    spare_rows=None,
    num_threads=1,
    seed=4,
)


def on_ranks(case: Case, rank_main, **options):
    """Run ``rank_main(ep, batch)`` on every rank of a case."""

    def thread_main(member):
        with open_buffer(case, member, **options) as ep:
            return rank_main(ep, case.batches[member.rank])

    return anyep.local_group(case.num_ranks).run(thread_main)


def same_bits(first: anyep.Received, second: anyep.Received) -> None:
    assert_same("x", first.x, second.x)
    assert_same("topk_idx", first.topk_idx, second.topk_idx)
    assert first.counts == second.counts


def test_received_tensors_stay_valid_whatever_comes_next():
    def rank_main(ep, batch):
        first = ep.dispatch(batch.x, batch.topk_idx)
        kept = first.x.clone()
        for _ in range(20):
            later = ep.dispatch(batch.x + 1, batch.topk_idx)
            ep.combine(later.x, later.handle)
        return first.x, kept

    for x, kept in on_ranks(CASE, rank_main):
        assert_same("x", x, kept)


def test_memory_comes_back_when_tensors_die():
    def rank_main(ep, batch):
        for _ in range(5):
            received = ep.dispatch(batch.x, batch.topk_idx)
        del received
        gc.collect()
        committed = ep._end.transport.describe()
        for _ in range(200):
            received = ep.dispatch(batch.x, batch.topk_idx)
            ep.combine(ep.empty_output(received.handle).fill_(1), received.handle)
        return committed, ep._end.transport.describe()

    for before, after in on_ranks(CASE, rank_main):
        assert before == after


def test_keeping_weights_does_not_keep_rows():
    def rank_main(ep, batch):
        kept = [ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights).topk_weights for _ in range(50)]
        return kept, int(ep._end.transport.describe()["arena"].split(" MiB")[0])

    big = replace(CASE, hidden=65536, num_tokens=(40, 40, 40))
    for kept, committed_mib in on_ranks(big, rank_main, arena_bytes=1 << 20):
        rows_mib = len(kept[0]) * big.hidden * 2 >> 20
        assert rows_mib > 8
        assert committed_mib < 4 * rows_mib, "50 batches' weights, and not 50 batches"


def test_the_arena_grows_when_a_batch_does_not_fit():
    def rank_main(ep, batch):
        held = [ep.dispatch(batch.x, batch.topk_idx) for _ in range(10)]
        for received in held[1:]:
            same_bits(received, held[0])
        combined = [ep.combine(received.x, received.handle) for received in held]
        for one in combined[1:]:
            assert_same("combined", one, combined[0])

    on_ranks(replace(CASE, hidden=32768), rank_main, arena_bytes=1)


def test_static_rows_that_are_too_few_are_an_error_on_every_rank_and_the_buffer_goes_on():
    case = replace(CASE, spare_rows=0)
    needed = case.static_rows

    def rank_main(member):
        batch = case.batches[member.rank]
        with open_buffer(case, member) as ep:
            many = torch.zeros_like(batch.topk_idx)  # the expert layout makes a row of every column of every token
            with pytest.raises(
                anyep.CapacityError, match=rf"static_rows={needed} is too small: rank 0 would receive \d+"
            ):
                ep.dispatch(batch.x, many, batch.topk_weights, layout="expert")
            good = ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights)
            assert good.x.shape[0] == needed
            return ep.stats().refused

    assert anyep.local_group(3).run(rank_main) == [1, 1, 1]


def test_overlapping_operations_in_the_background():
    def rank_main(ep, batch):
        plain = ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights)
        pendings = [ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights, wait=False) for _ in range(5)]
        received = [pending.wait() for pending in pendings]
        back = [ep.combine(one.x, one.handle, wait=False) for one in received]
        sync = ep.combine(plain.x, plain.handle)
        for one, pending in zip(received, back, strict=True):
            same_bits(one, plain)
            assert_same("combined", pending.wait(), sync)
            assert pending.done()
            with pytest.raises(ValueError, match="already waited"):
                pending.wait()

    on_ranks(CASE, rank_main, max_in_flight=5)


def test_a_batch_from_the_background_comes_back_too():
    def rank_main(ep, batch):
        for _ in range(3):
            ep.dispatch(batch.x, batch.topk_idx)  # leaves the memory that it offered and did not need for the next one
        gc.collect()
        before = ep._end.transport._open.arena.used_bytes
        held = ep.dispatch(batch.x, batch.topk_idx, wait=False).wait()
        del held
        ep.barrier()
        gc.collect()
        return ep._end.transport._open.arena.used_bytes - before

    for eager_bytes in (0, 1 << 20):
        assert on_ranks(CASE, rank_main, eager_bytes=eager_bytes) == [0, 0, 0]


def test_a_default_device_changes_nothing():
    def rank_main(ep, batch):
        plain = ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights)
        with torch.device("meta"):
            received = ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights)
            combined = ep.combine(received.x, received.handle, topk_weights=received.topk_weights)
        same_bits(received, plain)
        assert_same("combined", combined.x, ep.combine(plain.x, plain.handle))

    on_ranks(CASE, rank_main)


def test_a_handle_may_be_taken_with_weights_or_without():
    """Whatever the handle's dispatch had; combine of the padded layout takes the last that were given."""

    def rank_main(ep, batch):
        x, idx = torch.ones(4, 256).bfloat16(), torch.arange(8).view(4, 2).repeat(1, 2) + torch.tensor([0, 0, 2, 2])
        weights = torch.full((4, 4), 0.5)
        for layout in ("compact", "expert", "padded"):
            for first in (None, weights):
                handle = ep.dispatch(x, idx, first, layout=layout).handle
                for then in (None, weights, 4 * weights):
                    again = ep.dispatch(x, None, then, handle=handle)
                    fresh = ep.dispatch(x, idx, then, layout=layout)
                    if layout == "padded":
                        last = first if then is None else then
                        factor = 1.0 if last is None else last[0, 0].item()
                        out = ep.combine(torch.full_like(again.x, 2.0), again.handle)
                        assert (out == 8 * factor).all()
                    elif then is None:
                        assert again.topk_weights is None
                    else:
                        assert torch.equal(again.topk_weights, fresh.topk_weights)

    for eager_bytes in (0, 1 << 20):
        on_ranks(CASE, rank_main, eager_bytes=eager_bytes)


def test_background_errors_arrive_at_wait():
    def rank_main(ep, batch):
        layout = "compact" if ep.rank else "expert"
        pending = ep.dispatch(batch.x, batch.topk_idx, layout=layout, wait=False)
        with pytest.raises(ValueError, match="layout is"):
            pending.wait()
        ep.barrier()

    on_ranks(CASE, rank_main)


@pytest.mark.parametrize("wire", ["bf16", "fp32"])
def test_reduce_by_expert_gives_the_same_bits_for_every_number_of_ranks(wire):
    total = replace(CASE, num_tokens=(60,), wire=wire, layout="expert", reduce="expert")
    batch = total.batches[0]

    def tokens_of(rank: int, num_ranks: int) -> slice:
        return slice(60 * rank // num_ranks, 60 * (rank + 1) // num_ranks)

    def combined(num_ranks: int) -> torch.Tensor:
        def rank_main(member):
            mine = tokens_of(member.rank, num_ranks)
            with anyep.Buffer(member, hidden=256, num_experts=12, num_topk=4, max_tokens_per_rank=60, wire=wire) as ep:
                received = ep.dispatch(batch.x[mine], batch.topk_idx[mine], batch.topk_weights[mine], layout="expert")
                y = received.x * received.topk_weights.sum(dim=1, keepdim=True).to(received.x.dtype)
                return ep.combine(y, received.handle, reduce="expert")

        return torch.cat(anyep.local_group(num_ranks).run(rank_main))

    single = combined(1)
    for num_ranks in (2, 3, 4, 7):
        assert_same(f"{num_ranks} ranks", combined(num_ranks), single)


def test_results_do_not_depend_on_threads():
    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights)
        return received.x.clone(), ep.combine(received.x, received.handle)

    wide = replace(CASE, hidden=8192)  # enough bytes for each of 8 threads
    single = on_ranks(wide, rank_main)
    for threads in (2, 3, 8):
        several = on_ranks(replace(wide, num_threads=threads), rank_main)
        for (x, out), (expected_x, expected_out) in zip(several, single, strict=True):
            assert_same("x", x, expected_x)
            assert_same("combined", out, expected_out)


def test_quantised_input_travels_as_it_is():
    case = replace(CASE, wire="fp8", scales="fp32")

    def rank_main(ep, batch):
        q, scales = quantise_fp8(batch.x)
        column_major = scales.T.contiguous().T
        given = ep.dispatch((q, column_major), batch.topk_idx)
        made = ep.dispatch(batch.x, batch.topk_idx)
        same_bits(given, made)
        assert_same("scales", given.scales, made.scales)

    on_ranks(case, rank_main)


def test_copy_free_and_copied_outputs_agree():
    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.topk_idx)
        y = ep.empty_output(received.handle)
        y.copy_(received.x)
        before = ep.stats().copied_in_bytes
        inside = ep.combine(y, received.handle)
        assert ep.stats().copied_in_bytes == before, "y lies in the arena"
        outside = ep.combine(received.x.clone(), received.handle)
        assert ep.stats().copied_in_bytes - before == received.x.nbytes
        assert_same("combined", inside, outside)

    on_ranks(CASE, rank_main, eager_bytes=0)


def test_out_is_written_and_returned():
    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.topk_idx)
        out = torch.full_like(batch.x, float("nan"))
        assert ep.combine(received.x, received.handle, out=out) is out
        assert_same("out", out, ep.combine(received.x, received.handle))

    on_ranks(CASE, rank_main)


def test_two_buffers_of_one_group_at_the_same_time():
    def thread_main(member):
        batch = CASE.batches[member.rank]
        with open_buffer(CASE, member) as first, open_buffer(replace(CASE, wire="fp32"), member) as second:
            a = first.dispatch(batch.x, batch.topk_idx)
            b = second.dispatch(batch.x.float(), batch.topk_idx)
            assert_same("x", a.x.float(), b.x)

    anyep.local_group(3).run(thread_main)


def test_recording_and_replaying(tmp_path):
    path = tmp_path / "trace.npz"

    def rank_main(ep, batch):
        for _ in range(2):
            ep.dispatch(batch.x, batch.topk_idx, batch.topk_weights)

    on_ranks(CASE, rank_main, record=str(path))
    trace = RoutingTrace.load(path)
    assert trace.num_experts == 12
    assert trace.num_topk == 4
    assert len(trace.entries) == 6


def test_a_bad_recording_path_is_an_error_before_anything_is_made(tmp_path):
    def thread_main(member):
        with pytest.raises(FileNotFoundError):
            open_buffer(CASE, member, record=str(tmp_path / "nowhere" / "trace.npz"))

    anyep.local_group(3).run(thread_main)


def test_the_memory_account_is_what_gets_committed():
    sizes = {"hidden": 777, "num_experts": 12, "num_topk": 4, "max_tokens_per_rank": 3000, "wire": "fp8"}

    def thread_main(member):
        with anyep.Buffer(member, **sizes) as ep:
            return ep._end.transport.describe()["arena"]

    committed = anyep.local_group(3).run(thread_main)
    for rank in range(3):
        account = anyep.memory_account(3, rank=rank, **sizes)
        assert committed[rank].startswith(f"{account.committed_bytes >> 20} MiB in 1 segments")
        assert f"{account.step.worst_rows} rows" in str(account)
        assert f"{account.committed_bytes / 2**20:.2f} MiB committed" in str(account)


def test_explain_and_stats():
    def rank_main(ep, batch):
        received = ep.dispatch(batch.x, batch.topk_idx)
        ep.combine(received.x, received.handle)
        once = ep.stats()
        ep.dispatch(batch.x, handle=received.handle)
        ep.barrier()
        return str(ep.explain()), once, ep.stats()

    for text, once, stats in on_ranks(CASE, rank_main):
        assert "inprocess" in text
        assert "threads of this process" in text
        assert "MiB" in text
        assert (stats.dispatches, stats.cached_dispatches, stats.combines, stats.barriers) == (1, 1, 1, 1)
        assert stats.waiting_s > 0
        assert once.rows_by_source.sum() > 0
        assert torch.equal(stats.rows_by_source, 2 * once.rows_by_source)
        assert torch.equal(stats.rows_by_expert, 2 * once.rows_by_expert)


def test_a_buffer_nobody_closes_warns():
    def thread_main(member):
        ep = open_buffer(CASE, member)
        ep.barrier()
        return ep

    buffers = anyep.local_group(3).run(thread_main)
    with pytest.warns(ResourceWarning, match="never closed"):
        buffers[0].__del__()
    for ep in buffers:
        ep.close()


def test_an_argument_with_a_wrong_name_is_the_only_error(monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    for kind in (anyep.Buffer, Ring, RowStore, Gatherer):
        with pytest.raises(TypeError, match="hiden"):
            kind(None, hiden=8)
        gc.collect()
    assert not ignored


def test_copies_are_the_buffer_itself_and_pickles_are_refused():
    with anyep.Buffer(
        anyep.local_group(1)[0], hidden=8, num_experts=2, num_topk=1, max_tokens_per_rank=4, timeout_s=20
    ) as ep:
        assert copy.copy(ep) is ep
        assert copy.deepcopy(ep) is ep
        with pytest.raises(TypeError, match=r"a Buffer cannot be pickled: .* make one in each process"):
            pickle.dumps(ep)


def test_ranks_to_leave_out_are_a_collection():
    with (
        anyep.Buffer(
            anyep.local_group(1)[0], hidden=8, num_experts=2, num_topk=1, max_tokens_per_rank=4, timeout_s=20
        ) as ep,
        pytest.raises(TypeError, match=r"ranks must be a collection of ranks, got 1; for one rank pass \[1\]"),
    ):
        ep.leave_out(1)


def test_a_handle_is_printed_without_its_tensors():
    def thread_main(member):
        with open_buffer(CASE, member) as ep:
            x, idx = torch.zeros(2, CASE.hidden, dtype=torch.bfloat16), torch.zeros(2, CASE.num_topk, dtype=torch.int64)
            return repr(ep.dispatch(x, idx).handle)

    first = anyep.local_group(3).run(thread_main)[0]
    assert first == "<anyep.Handle of a compact dispatch: 2 tokens sent, a batch of 6 rows>"


def test_a_raising_rank_is_named_by_the_others():
    def thread_main(member):
        with open_buffer(CASE, member) as ep:
            ep.barrier()
            if member.rank == 1:
                raise ZeroDivisionError("mine")
            try:
                ep.barrier()
            except anyep.PeerLost as error:
                lost = error
            with pytest.raises(anyep.ClosedError, match="ended with PeerLost"):
                ep.barrier()
            raise lost

    with pytest.raises(ZeroDivisionError, match="mine"):
        anyep.local_group(3).run(thread_main)


def test_survivors_of_a_raising_rank_name_it():
    caught = {}

    def thread_main(member):
        with open_buffer(CASE, member) as ep:
            if member.rank == 1:
                return
            with pytest.raises(anyep.PeerLost, match="rank 1") as error:
                ep.dispatch(CASE.batches[member.rank].x, CASE.batches[member.rank].topk_idx)
            caught[member.rank] = error.value

    anyep.local_group(3).run(thread_main)
    assert {rank: error.rank for rank, error in caught.items()} == {0: 1, 2: 1}
    assert all("dispatch 1" in error.step for error in caught.values())


def test_a_silent_rank_is_named_after_the_time_limit():
    def thread_main(member):
        with anyep.Buffer(member, hidden=8, num_experts=4, num_topk=2, max_tokens_per_rank=4, timeout_s=0.3) as ep:
            if member.rank == 2:
                time.sleep(1.0)
                return None
            with pytest.raises(anyep.PeerTimeout, match=r"no message from rank 2 within timeout_s=0\.3") as error:
                ep.barrier()
            return error.value.rank, error.value.step

    results = anyep.local_group(3).run(thread_main)
    assert results[:2] == [(2, "barrier 1: announcement")] * 2


def test_the_public_names_exist():
    for name in anyep.__all__:
        assert getattr(anyep, name) is not None


def test_play_is_checked_by_the_oracle_on_a_fixed_case():
    for layout, reduce in (("compact", "rank"), ("expert", "rank"), ("expert", "expert")):
        case = replace(CASE, layout=layout, reduce=reduce, num_bias=2, alignment=8)
        check(case, on_ranks(case, lambda ep, batch, case=case: play(case, ep)))


def test_warnings_are_errors_here():
    with pytest.raises(UserWarning):
        warnings.warn("if this passes, a warning could go unseen", stacklevel=1)
