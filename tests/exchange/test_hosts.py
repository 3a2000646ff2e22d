"""Ranks of several hosts, played by threads: every received bit is that of one host, every sum that of the oracle."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyep
from anyep.exchange import across, courier, setup, sums_in
from anyep.exchange.courier import Outbox
from anyep.exchange.straight import StraightIn
from anyep.layout.hosts import group_ranks, map_hosts
from anyep.transport import hierarchical, registry
from tests.exchange.cases import LAYOUTS, Case, cases
from tests.exchange.programs import Player, check_program, programs
from tests.exchange.rounds import check, open_buffer, play

PATIENT = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
}


@pytest.fixture(scope="module")
def played():
    """Return a function that sets how many ranks a host has."""
    with pytest.MonkeyPatch.context() as patch:
        yield lambda number: patch.setenv("ANYEP_RANKS_PER_HOST", str(number))


STRAIGHT_BYTES = st.sampled_from([0, 0, 3000, 50_000, 1 << 20, None])
"""Everything forwarded, rows of some pairs of ranks and hosts straight, of more, of all; measured."""


def run(case: Case, straight_bytes: int | None = 0, kernels: str = "cpu") -> list:
    def rank_main(member):
        with open_buffer(case, member, kernels=kernels, straight_bytes=straight_bytes) as ep:
            return play(case, ep)

    return anyep.local_group(case.num_ranks).run(rank_main)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exchange_between_hosts_is_exact(played, layout):
    """3 x 40 cases."""

    @settings(max_examples=40, **PATIENT)
    @given(cases(layouts=[layout]), st.integers(1, 4), STRAIGHT_BYTES)
    def property_holds(case, ranks_per_host, straight_bytes):
        played(ranks_per_host)
        check(case, run(case, straight_bytes), group_ranks(case.num_ranks, ranks_per_host))

    property_holds()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=3_000, **{**PATIENT, "derandomize": False})
@given(cases(), st.integers(1, 4), STRAIGHT_BYTES, st.sampled_from([64, 5000, 256 << 10]))
def test_an_exchange_between_hosts_is_exact_at_length(played, case, ranks_per_host, straight_bytes, chunk_bytes):
    played(ranks_per_host)
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, chunk_bytes)
        outcomes = run(case, straight_bytes)
    check(case, outcomes, group_ranks(case.num_ranks, ranks_per_host))


@settings(max_examples=10, **PATIENT)
@given(cases(), st.integers(1, 3), STRAIGHT_BYTES)
def test_the_reference_kernels_cross_hosts_alike(played, case, ranks_per_host, straight_bytes):
    played(ranks_per_host)
    check(case, run(case, straight_bytes, kernels="reference"), group_ranks(case.num_ranks, ranks_per_host))


@settings(max_examples=40, **PATIENT)
@given(programs(), st.integers(1, 3), STRAIGHT_BYTES)
def test_operations_in_flight_between_hosts_are_exact(played, program, ranks_per_host, straight_bytes):
    played(ranks_per_host)

    def rank_main(member):
        options = {"max_in_flight": program.max_in_flight, "straight_bytes": straight_bytes}
        with open_buffer(program.base, member, **options) as ep:
            return Player(program, ep).play()

    diaries = anyep.local_group(program.base.num_ranks).run(rank_main)
    check_program(program, diaries, group_ranks(program.base.num_ranks, ranks_per_host))


def cut_small(patch, num_bytes: int) -> None:
    """Let rows cross in pieces of this size."""
    patch.setattr(across, "CHUNK_BYTES", num_bytes)


@settings(max_examples=25, **PATIENT)
@given(programs(), st.integers(1, 3), st.sampled_from([64, 700, 5000]), st.sampled_from([0, 0, 3000]))
def test_rows_that_cross_in_many_pieces_are_exact(played, program, ranks_per_host, chunk_bytes, straight_bytes):
    played(ranks_per_host)

    def rank_main(member):
        options = {"max_in_flight": program.max_in_flight, "straight_bytes": straight_bytes}
        with open_buffer(program.base, member, **options) as ep:
            return Player(program, ep).play()

    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, chunk_bytes)
        diaries = anyep.local_group(program.base.num_ranks).run(rank_main)
    check_program(program, diaries, group_ranks(program.base.num_ranks, ranks_per_host))


@settings(max_examples=30, **PATIENT)
@given(cases(), st.lists(st.sampled_from("abc"), min_size=9, max_size=9), STRAIGHT_BYTES)
def test_hosts_whose_ranks_take_turns_are_exact(played, case, names, straight_bytes):
    """A host's sum stands where its first rank would: the order of addition is one that can be written down."""
    played(1)
    hosts = map_hosts(names[: case.num_ranks])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "group_ranks", lambda *_: hosts)
        outcomes = run(case, straight_bytes)
    check(case, outcomes, hosts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_that_leave_right_after_a_look_are_followed_by_the_rest(played, monkeypatch, layout):
    """Nine pieces, two under way at most: whenever there is no room for another, both leave a moment later."""
    played(1)
    cut_small(monkeypatch, 64)
    room = Outbox.room

    def room_a_moment_ago(box):
        had_room = room(box)
        deadline = time.monotonic() + 1.0
        while not had_room and time.monotonic() < deadline:
            if all(transfer.done() for transfer in box.pending()):
                break
            time.sleep(0.001)
        return had_room

    monkeypatch.setattr(Outbox, "room", room_a_moment_ago)

    def rank_main(member):
        options = {"hidden": 64, "num_experts": 2, "num_topk": 1, "max_tokens_per_rank": 9, "timeout_s": 3.0}
        with anyep.Buffer(member, straight_bytes=0, **options) as ep:
            tokens = 9 * (member.rank == 0)
            x = torch.arange(float(tokens))[:, None].expand(tokens, 64).bfloat16()
            received = ep.dispatch(x, torch.ones(tokens, 1, dtype=torch.int64), layout=layout)
            y = ep.empty_output(received.handle).copy_(received.x)
            assert torch.equal(ep.combine(y, received.handle), x)

    anyep.local_group(2).run(rank_main)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_straight_rows_that_come_right_after_the_turn_of_their_sums_are_summed(played, monkeypatch, layout):
    """They are not here when sums may begin, and are when it is asked what is still to come."""
    played(1)
    pending = StraightIn.pending
    looks: Counter[StraightIn] = Counter()

    def pending_a_moment_later(rows):
        looks[rows] += 1
        if looks[rows] == 1:
            return list(rows._asked)
        deadline = time.monotonic() + 5.0
        while pending(rows) and time.monotonic() < deadline:
            time.sleep(0.001)
        return pending(rows)

    monkeypatch.setattr(StraightIn, "pending", pending_a_moment_later)

    def rank_main(member):
        options = {"hidden": 64, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 9, "timeout_s": 20.0}
        with anyep.Buffer(member, straight_bytes=1 << 20, **options) as ep:
            x = torch.arange(9.0)[:, None].expand(9, 64).bfloat16()
            received = ep.dispatch(x, torch.tensor([[0, 3]]).repeat(9, 1), torch.ones(9, 2), layout=layout)
            y = ep.empty_output(received.handle).copy_(received.x)
            sums = ep.combine(y, received.handle, out=torch.full((9, 64), -1.0).bfloat16())
            assert torch.equal(sums, 2 * x)

    anyep.local_group(2).run(rank_main)
    assert looks, "rows went straight"


@pytest.mark.parametrize("straight_bytes", [0, 1 << 20], ids=["forwarded", "straight"])
@pytest.mark.parametrize("end", ["raises", "closes", "sleeps"])
def test_a_rank_of_another_host_that_ends_is_named_everywhere(played, end, straight_bytes):
    """Rank 3 of 4 does not come to combine; rank 1 may forward for it, so that rank 0 hears of it at second hand."""
    played(2)
    kind = anyep.PeerTimeout if end == "sleeps" else anyep.PeerLost

    def rank_main(member):
        options = {"hidden": 64, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 8, "timeout_s": 1.0}
        with anyep.Buffer(member, straight_bytes=straight_bytes, **options) as ep:
            tokens = torch.arange(8)
            received = ep.dispatch(torch.ones(8, 64).bfloat16(), torch.stack([tokens, (tokens + 3) % 8], 1))
            if member.rank == 3:
                if end == "raises":
                    raise ArithmeticError("not its day")
                if end == "sleeps":
                    time.sleep(2.5)
                return
            with pytest.raises(kind) as caught:
                ep.combine(received.x, received.handle)
            assert caught.value.ranks == (3,)

    group = anyep.local_group(4)
    if end == "raises":
        with pytest.raises(ArithmeticError):
            group.run(rank_main)
    else:
        group.run(rank_main)


@pytest.mark.parametrize("idle", ["forwarder", "source"])
def test_a_forwarder_that_computes_is_named_and_not_the_source_that_has_sent(played, idle):
    """Rank 1 forwards for rank 3. Rank 0 misses rank 3's rows; who computes for longer than timeout_s is to blame."""
    played(2)
    idler = {"forwarder": 1, "source": 3}[idle]

    def rank_main(member):
        late = member.rank == idler
        options = {"hidden": 64, "num_experts": 4, "num_topk": 1, "max_tokens_per_rank": 8, "straight_bytes": 0}
        with anyep.Buffer(member, timeout_s=6.0 if late else 1.0, **options) as ep:
            tokens = 8 * (member.rank == 3)
            x, idx = torch.ones(tokens, 64).bfloat16(), torch.zeros(tokens, 1, dtype=torch.int64)
            if late and idle == "source":
                time.sleep(2.0)
            pending = ep.dispatch(x, idx, layout="padded", wait=False)
            if late:
                time.sleep(2.0)
                with pytest.raises(anyep.PeerError):
                    pending.wait()
            elif member.rank == 0:
                with pytest.raises(anyep.PeerTimeout) as caught:
                    pending.wait()
                assert caught.value.ranks == (idler,)
            else:
                with contextlib.suppress(anyep.PeerError):
                    pending.wait()

    anyep.local_group(4).run(rank_main)


def test_a_rank_that_fails_while_buffers_are_made_is_named_everywhere(played, monkeypatch):
    """Rank 3 of 4 fails; whoever hears of it leaves too, says why, and is not taken for the culprit."""
    played(2)
    measured_rule = setup.measured_rule

    def fails_on_rank_3(transport, *args, **options):
        if transport.rank == 3:
            raise ArithmeticError("not its day")
        return measured_rule(transport, *args, **options)

    monkeypatch.setattr(setup, "measured_rule", fails_on_rank_3)

    def rank_main(member):
        with pytest.raises(ArithmeticError if member.rank == 3 else anyep.PeerLost) as caught:
            anyep.Buffer(member, hidden=64, num_experts=8, num_topk=2, max_tokens_per_rank=8, timeout_s=2.0)
        return getattr(caught.value, "ranks", None)

    assert anyep.local_group(4).run(rank_main) == [(3,), (3,), (3,), None]


def test_rows_of_a_rank_that_gave_up_do_not_cross(played):
    """Rank 3 lends its rows, gives up and writes over them; rank 2 forwards for rank 0, which reads nothing else."""
    played(2)
    together, gone = threading.Barrier(4), threading.Event()

    def rank_main(member):
        options = {"hidden": 64, "num_experts": 4, "num_topk": 1, "max_tokens_per_rank": 8, "timeout_s": 5.0}
        with anyep.Buffer(member, eager_bytes=0, straight_bytes=0, **options) as ep:
            tokens = 8 * (member.rank == 0)
            x = torch.ones(tokens, 64).bfloat16()
            received = ep.dispatch(x, torch.full((tokens, 1), 3), layout="padded")
            y = ep.empty_output(received.handle).fill_(1.0)
            pending = ep.combine(y, received.handle, wait=False)
            while not pending.done():  # low latency: until somebody waits only the announcements have come
                time.sleep(0.001)
            together.wait()
            if member.rank == 3:
                try:
                    raise ArithmeticError("not its day")
                except ArithmeticError as error:
                    ep.__exit__(ArithmeticError, error, None)
                y.fill_(float("nan"))
                gone.set()
                return
            assert gone.wait(5.0)
            if member.rank == 2:
                time.sleep(0.2)  # rank 0 waits by now
            elif member.rank == 1:
                return
            with pytest.raises(anyep.PeerLost) as caught:
                pending.wait()
            assert caught.value.ranks == (3,)

    anyep.local_group(4).run(rank_main)


@pytest.mark.parametrize("straight_bytes", [0, 1 << 20], ids=["forwarded", "straight"])
@pytest.mark.parametrize("refusal", ["too many rows", "another call", "a barrier"])
def test_what_was_sent_ahead_of_a_refusal_is_not_taken_for_a_later_message(
    played, monkeypatch, refusal, straight_bytes
):
    """Messages of an operation and of the eighth after it have the same tags here, instead of the 4096th."""
    played(2)
    cut_small(monkeypatch, 700)
    monkeypatch.setattr(hierarchical, "_EPOCH_BITS", 3)
    options = {"hidden": 64, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 40, "max_in_flight": 2}
    tokens = torch.arange(40)
    idx = torch.stack([tokens % 8, (tokens + 4) % 8], 1)

    def call(ep, x):
        if refusal == "too many rows":
            ep.dispatch(x, idx * 0 + 7)
        elif ep.rank != 2:
            ep.dispatch(x, idx)
        elif refusal == "a barrier":
            ep.barrier()
        else:
            ep.dispatch(x, idx, layout="expert")

    def rank_main(member):
        x = torch.full((40, 64), member.rank + 1.0).bfloat16()
        with anyep.Buffer(member, static_rows=90, straight_bytes=straight_bytes, **options) as ep:
            with pytest.raises((anyep.CapacityError, ValueError)):
                call(ep, x)
            for number in range(10):
                batch = x * (number + 1)
                received = ep.dispatch(batch[: 20 + number], idx[: 20 + number])
                y = ep.empty_output(received.handle).copy_(received.x)
                assert torch.equal(ep.combine(y, received.handle), 2 * batch[: 20 + number])

    anyep.local_group(4).run(rank_main)


def test_what_was_chosen_is_told(played):
    played(2)

    def rank_main(member):
        with anyep.Buffer(member, hidden=8, num_experts=4, num_topk=2, max_tokens_per_rank=4) as ep:
            received = ep.dispatch(torch.ones(1, 8).bfloat16(), torch.tensor([[0, 3]]))
            ep.combine(received.x, received.handle)
            return str(ep.explain()), ep.stats()

    outcomes = anyep.local_group(3).run(rank_main)
    assert all("ANYEP_RANKS_PER_HOST=2: threads play 2 hosts" in text for text, _ in outcomes)
    assert all("(ranks 0-1; rank 2)" in text for text, _ in outcomes)
    assert all("rows cross in pieces of 1024 KiB, 2 of a stream on their way" in text for text, _ in outcomes)
    assert all("up to 1024.0 KiB to another host that need not take" in text for text, _ in outcomes)
    assert all("a round of announcements takes" in text for text, _ in outcomes)
    assert [stats.far_rows for _, stats in outcomes] == [2, 1, 3]  # rank 2 owns expert 3, rank 0 expert 0
    assert all(stats.network_bytes > 0 for _, stats in outcomes)


@pytest.mark.parametrize(("straight_bytes", "straight_rows"), [(0, [0, 0]), (80, [0, 0]), (200, [6, 6])])
def test_rows_go_straight_to_another_host_up_to_as_many_bytes_as_were_asked_for(played, straight_bytes, straight_rows):
    """Three rows of 16 bytes each way, with an index of 16 bytes."""
    played(1)

    def rank_main(member):
        sizes = {"hidden": 8, "num_experts": 2, "num_topk": 2, "max_tokens_per_rank": 4}
        with anyep.Buffer(member, straight_bytes=straight_bytes, **sizes) as ep:
            received = ep.dispatch(torch.ones(3, 8).bfloat16(), torch.tensor([[1, 0]] * 3))
            ep.combine(received.x, received.handle)
            return ep.stats().straight_rows

    assert anyep.local_group(2).run(rank_main) == straight_rows


def test_the_account_is_that_of_a_buffer_between_hosts(played):
    played(2)
    sizes = {"hidden": 512, "num_experts": 8, "num_topk": 4, "max_tokens_per_rank": 100}

    def rank_main(member):
        with anyep.Buffer(member, **sizes) as ep:
            return ep.explain().memory

    for rank, memory in enumerate(anyep.local_group(5).run(rank_main)):
        assert memory == anyep.memory_account(5, rank=rank, ranks_per_host=2, **sizes)
        assert f"{memory.crossing_bytes / 2**20:.1f} MiB on their way between hosts" in str(memory)
    assert anyep.memory_account(5, ranks_per_host=5, **sizes).crossing_bytes == 0


def test_all_ranks_choose_the_same_way_for_announcements(played):
    played(2)

    def rank_main(member):
        with anyep.Buffer(member, hidden=8, num_experts=4, num_topk=2, max_tokens_per_rank=4) as ep:
            return {choice.topic: choice.reason for choice in ep.explain().choices}["straight"]

    assert len(set(anyep.local_group(5).run(rank_main))) == 1


class Pieces:
    """Stands for the memory of pieces: poisoned, and counted by what of it is alive."""

    def __init__(self):
        self.alive = self.most = 0
        self._counting = threading.Lock()

    def make(self, num_bytes: int) -> np.ndarray:
        memory = np.full(num_bytes, 0xFF, np.uint8)
        with self._counting:
            self.alive += num_bytes
            self.most = max(self.most, self.alive)
        weakref.finalize(memory, self._gone, num_bytes)
        return memory

    def _gone(self, num_bytes: int) -> None:
        with self._counting:
            self.alive -= num_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_on_its_way_is_as_much_as_the_account_says_at_most(played, monkeypatch, layout):
    """400 tokens of 128 bytes a rank in pieces of 700 bytes: eight a stream, and not the rows of a batch."""
    played(2)
    cut_small(monkeypatch, 700)
    pieces = Pieces()
    monkeypatch.setattr(courier, "piece_memory", pieces.make)
    monkeypatch.setattr(sums_in, "piece_memory", pieces.make)
    tokens = torch.arange(400)
    idx = torch.stack([tokens % 8, (tokens + 3) % 8], 1)

    def rank_main(member):
        x = (torch.arange(400.0)[:, None] + member.rank).expand(400, 64).bfloat16().contiguous()
        sizes = {"hidden": 64, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 400}
        with anyep.Buffer(member, straight_bytes=0, **sizes) as ep:
            received = ep.dispatch(x, idx, torch.full((400, 2), 0.5), layout=layout)
            out = ep.combine(received.x, received.handle, topk_weights=received.topk_weights)
            assert torch.equal(out if layout == "padded" else out.x, x if layout == "padded" else 2 * x)
            return ep.explain().memory.crossing_bytes

    bounds = anyep.local_group(4).run(rank_main)
    assert 2 * 700 < pieces.most <= sum(bounds)
    assert sum(bounds) < 4 * 2 * 400 * 128, "less than the rows that cross"
