"""A device's tensors between hosts: the bits of CPU tensors, copies in any order, errors by name. Devices are fakes."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyep
from anyep.errors import CapacityError, PeerLost, PeerTimeout, Unavailable
from anyep.exchange.device import staged_halves, staged_setup
from anyep.exchange.device.pinned import Passage
from anyep.exchange.wire import carrying_wire
from anyep.kernels.gpu.target import SM_80
from anyep.layout.hosts import group_ranks
from anyep.testing.lazy_device import LazyDevice
from anyep.testing.pretend_device import PretendDevice, pretended
from anyep.testing.processes import RankProcesses, run_processes
from anyep.transport.shared import SharedTransport
from tests.exchange.cases import LAYOUTS, cases
from tests.exchange.programs import Player, check_program, programs
from tests.exchange.rounds import assert_same, check, open_buffer, play
from tests.gpu.exchanged import draw
from tests.gpu.programs import needs_triton, run_program
from tests.nn.reference import assert_results, make_case, reference
from tests.nn.test_gradients import TOKENS
from tests.nn.test_gradients import play as play_gradients

PATIENT = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
TOPOLOGIES = {"2x1": ((17, 5), 1), "2x2": ((17, 0, 40, 9), 2), "3x2+1": ((5, 40, 0, 7, 30, 1, 20), 2)}
SIZES = {"hidden": 64, "num_experts": 8, "num_topk": 2, "max_tokens_per_rank": 8}
X = torch.ones(8, 64).bfloat16()
IDX = torch.stack([torch.arange(8), (torch.arange(8) + 4) % 8], 1)
"""Experts of two ranks for each token."""


@pytest.fixture
def played(monkeypatch):
    """Return a function that sets how many ranks a host has."""
    return lambda number: monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(number))


@pytest.fixture
def device(played):
    played(2)
    with pretended(PretendDevice()) as device:
        yield device


def run(case, device="cuda", **options):
    def rank_main(member):
        with open_buffer(case, member, device=device, **options) as ep:
            assert (ep.num_hosts > 1) == (case.num_ranks > 1)
            return play(case, ep)

    return anyep.local_group(case.num_ranks).run(rank_main)


WAYS = [
    (layout, wire, reduce)
    for layout in LAYOUTS
    for wire in ("bf16", "fp8")
    for reduce in (("rank",) if layout == "compact" else ("rank", "expert"))
]


@pytest.mark.parametrize("straight_bytes", [0, 1 << 20], ids=["forwarded", "straight"])
@pytest.mark.parametrize(("layout", "wire", "reduce"), WAYS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bits_are_those_of_cpu_tensors(played, topology, layout, wire, reduce, straight_bytes):
    num_tokens, ranks_per_host = TOPOLOGIES[topology]
    played(ranks_per_host)
    case = replace(draw(0), num_tokens=num_tokens, layout=layout, wire=wire, reduce=reduce, num_bias=1, num_topk=3)
    case = replace(case, hidden=130, num_experts=8, with_weights=True, scales="ue8m0" if wire == "fp8" else "fp32")
    with pretended(LazyDevice(len(num_tokens))):
        found = run(case, straight_bytes=straight_bytes)
    check(case, found, group_ranks(len(num_tokens), ranks_per_host))
    for ours, theirs in zip(found, run(case, device=None, straight_bytes=straight_bytes), strict=True):
        assert_same("combined", ours.combined, theirs.combined)
        assert ours.received.counts == theirs.received.counts


def exchange(case, ranks_per_host, seed):
    """Play a case on copies of any size in an order that the seed decides."""
    with pytest.MonkeyPatch.context() as patch, pretended(LazyDevice(seed)):
        patch.setenv("ANYEP_RANKS_PER_HOST", str(ranks_per_host))
        patch.setattr(staged_setup, "SLOT_BYTES", 700)

        def rank_main(member):
            with open_buffer(case, member, device="cuda") as ep:
                return play(case, ep)

        check(case, anyep.local_group(case.num_ranks).run(rank_main), group_ranks(case.num_ranks, ranks_per_host))


def run_through(program, ranks_per_host, seed):
    """The same of operations in flight."""
    with pytest.MonkeyPatch.context() as patch, pretended(LazyDevice(seed)):
        patch.setenv("ANYEP_RANKS_PER_HOST", str(ranks_per_host))

        def rank_main(member):
            with open_buffer(program.base, member, device="cuda", max_in_flight=program.max_in_flight) as ep:
                return Player(program, ep).play()

        diaries = anyep.local_group(program.base.num_ranks).run(rank_main)
        check_program(program, diaries, group_ranks(program.base.num_ranks, ranks_per_host))


RANDOM = {"case": cases(numbers=1 << 16), "ranks_per_host": st.integers(1, 3), "seed": st.integers(0, 1000)}
IN_FLIGHT = {"program": programs(), "ranks_per_host": st.integers(1, 3), "seed": st.integers(0, 1000)}


@settings(max_examples=25, **PATIENT)
@given(**RANDOM)
def test_copies_in_any_order_and_of_any_size_bring_the_same_bits(case, ranks_per_host, seed):
    exchange(case, ranks_per_host, seed)


@settings(max_examples=25, **PATIENT)
@given(**IN_FLIGHT)
def test_operations_in_flight_are_exact(program, ranks_per_host, seed):
    run_through(program, ranks_per_host, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=500, **{**PATIENT, "derandomize": False})
@given(**RANDOM)
def test_copies_in_any_order_bring_the_same_bits_at_length(case, ranks_per_host, seed):
    exchange(case, ranks_per_host, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=1000, **{**PATIENT, "derandomize": False})
@given(**IN_FLIGHT)
def test_operations_in_flight_are_exact_at_length(program, ranks_per_host, seed):
    run_through(program, ranks_per_host, seed)


def test_inputs_may_be_written_over_when_a_call_has_returned(played):
    played(1)

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda", eager_bytes=0, straight_bytes=0) as ep:
            mine, where = X * (member.rank + 1), IDX.clone()
            pending = ep.dispatch(mine, where, wait=False)
            mine.fill_(float("nan"))
            where.fill_(-7)
            received = pending.wait()
            y = received.x.clone()
            summing = ep.combine(y, received.handle, wait=False)
            y.fill_(float("nan"))
            assert torch.equal(summing.targets.x, summing.wait())
            return summing.targets.x

    with pretended(LazyDevice(3)):
        for rank, out in enumerate(anyep.local_group(2).run(rank_main)):
            assert torch.equal(out, 2 * (rank + 1) * X)


def test_rows_travel_while_a_rank_computes(played):
    """Rank 0 awaits its batch when rank 1 has everything: what rank 1 needs of it has moved in the background."""
    played(1)
    rank_1_has_all = threading.Event()

    def rank_main(member):
        options = {"eager_bytes": 0, "straight_bytes": 0, "timeout_s": 10.0}
        with anyep.Buffer(member, **SIZES, **options, device="cuda") as ep:
            if member.rank == 1:
                received = ep.dispatch(X, IDX)
                rank_1_has_all.set()
            else:
                pending = ep.dispatch(X, IDX, wait=False)
                assert rank_1_has_all.wait(10.0)
                received = pending.wait()
            return ep.combine(received.x, received.handle)

    with pretended(LazyDevice(5)):
        assert all(torch.equal(out, 2 * X) for out in anyep.local_group(2).run(rank_main))


def test_tensors_may_need_gradients_or_be_of_inference_mode(played):
    """A call's tensors are bytes: no graph grows behind the slots, which serve calls in both modes."""
    played(1)

    def rank_main(member):
        with torch.inference_mode():
            ep = anyep.Buffer(member, **SIZES, device="cuda")
        with ep:
            x = X.clone().requires_grad_()
            received = ep.dispatch(x, IDX)
            assert not received.x.requires_grad
            out = torch.empty(8, 64, dtype=torch.bfloat16, requires_grad=True)
            ep.combine(received.x, received.handle, out=out)
            with torch.inference_mode():
                pending = ep.combine(received.x.clone(), received.handle, wait=False)
            return out.detach(), pending.wait().clone()

    with pretended(LazyDevice(1)):
        for pair in anyep.local_group(2).run(rank_main):
            assert all(torch.equal(out, 2 * X) for out in pair)


def is_right(seed):
    case = replace(draw(0), num_tokens=(6, 4, 5), num_topk=2, num_experts=8)
    try:
        with pretended(LazyDevice(seed)):
            check(case, run(case), group_ranks(3, 1))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("who", ["the host", "the caller"])
def test_who_does_not_wait_for_a_copy_is_found_out(played, monkeypatch, who):
    """A test of the tests: with both waits bits are right, and without one they are not."""
    played(1)
    assert all(is_right(seed) for seed in range(4))
    if who == "the host":
        monkeypatch.setattr(Passage, "_settle", lambda passage, slot: None)
    else:
        follow = LazyDevice.follow

        def careless(device, stream, event):
            if stream is not device.current_stream():
                follow(device, stream, event)

        monkeypatch.setattr(LazyDevice, "follow", careless)
    assert not all(is_right(seed) for seed in range(4))


def test_layers_have_the_gradients_of_a_dense_model(device):
    case = make_case(TOKENS[4], seed=4)
    assert_results(play_gradients(case, reduce="rank", options={"device": "cuda"}), reference(case))


@pytest.mark.parametrize(
    "options", [{}, {"wire": "fp8", "eager_bytes": 0}, {"arena_bytes": 1 << 22, "max_in_flight": 2}]
)
@pytest.mark.parametrize(("num_ranks", "ranks_per_host"), [(5, 2), (3, 1), (3, 3), (3, 4)])
def test_the_account_is_known_before_anything_is_allocated(played, num_ranks, ranks_per_host, options):
    """On one host all memory is the device's; between hosts the host's, and what is pinned of it."""
    played(ranks_per_host)
    sizes = {"hidden": 512, "num_experts": 15, "num_topk": 4, "max_tokens_per_rank": 100, **options}

    def rank_main(member):
        with anyep.Buffer(member, **sizes, device="cuda") as ep:
            return ep.explain().memory

    with pretended(PretendDevice()):
        memories = anyep.local_group(num_ranks).run(rank_main)
    for rank, memory in enumerate(memories):
        told = anyep.memory_account(num_ranks, rank=rank, ranks_per_host=ranks_per_host, device="cuda", **sizes)
        assert memory == told
        assert (memory.pinned_bytes > 0) == (memory.crossing_bytes > 0) == (num_ranks > ranks_per_host)


@pytest.mark.parametrize(
    ("wrong", "error", "reason"),
    [
        ({"device": "meta"}, ValueError, "device must be a CUDA device"),
        ({"device": 7}, ValueError, "device must be 'cuda'"),
        ({"ranks_per_host": 0}, ValueError, "ranks_per_host must be at least 1"),
        ({"ranks_per_host": 2.0}, TypeError, "ranks_per_host must be an integer"),
        ({"rank": 3}, ValueError, "rank must be at least 0 and at most 2"),
    ],
)
def test_an_account_of_what_cannot_be_is_refused(wrong, error, reason):
    sizes = {"hidden": 512, "num_experts": 15, "num_topk": 4, "max_tokens_per_rank": 100, "device": "cuda"}
    with pytest.raises(error, match=reason):
        anyep.memory_account(3, **sizes | wrong)


def test_what_was_chosen_and_what_it_costs_is_told(device):
    def rank_main(member):
        with anyep.Buffer(member, **SIZES, wire="fp8", device="cuda") as ep:
            return ep.explain()

    explanation = anyep.local_group(4).run(rank_main)[0]
    assert explanation.memory.pinned_bytes == 8 << 20
    assert "8.0 MiB pinned" in str(explanation)
    assert "rows pass through 2 slots of pinned host memory, 8 MiB" in str(explanation)
    row = 64 + 4 + 2 * 8  # one group's scale, two indices
    assert f"{row} bytes a token to the host, quantised by the device before, {row} bytes a received" in str(
        explanation
    )
    assert "combine: 128 bytes a row to the host, 128 bytes a token to the device" in str(explanation)
    assert "not registered with the network  (the engine carries host memory alone)" in str(explanation)
    assert "threads play 2 hosts" in str(explanation)
    assert len({choice.topic for choice in explanation.choices}) == len(explanation.choices)


def test_what_nixl_would_take_is_told():
    told = staged_setup._offered({"engine": "NIXL, UCX inside", "ucx memory": "DRAM_SEG, VRAM_SEG"})
    assert told.startswith("nothing here sends from it; UCX names DRAM_SEG, VRAM_SEG, and anyep doctor tries")


def test_no_call_can_be_captured_and_the_buffer_goes_on(device):
    all_have_tried = threading.Barrier(4, timeout=60)

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda", static_rows=40) as ep:
            received = ep.dispatch(X, IDX)
            ep.barrier()
            device.captures = True
            for call in (
                lambda: ep.dispatch(X, IDX, layout="padded"),
                lambda: ep.dispatch(X, None, handle=received.handle),
                lambda: ep.combine(received.x, received.handle),
                ep.barrier,
            ):
                with pytest.raises(Unavailable, match="the CPU takes part in every call, which a graph cannot record"):
                    call()
            all_have_tried.wait()
            device.captures = False
            return ep.combine(received.x, received.handle)

    assert all(torch.equal(out, 2 * X) for out in anyep.local_group(4).run(rank_main))


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_a_default_device_of_torch_changes_nothing(device, wire):
    def rank_main(member):
        with torch.device("meta"), anyep.Buffer(member, **SIZES, wire=wire, device="cuda") as ep:
            received = ep.dispatch(X, IDX)
            assert received.x.device == X.device
            return ep.combine(ep.empty_output(received.handle).fill_(1), received.handle)

    assert all(torch.equal(out, 2 * X) for out in anyep.local_group(4).run(rank_main))


def test_a_bad_call_is_refused_before_a_word_is_sent(device):

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda") as ep:
            if member.rank == 3:
                with pytest.raises(ValueError, match="x is on meta; this buffer works on cpu tensors"):
                    ep.dispatch(X.to("meta"), IDX)
                with pytest.raises(ValueError, match=r"topk_idx\[2, 1\] is 8; experts are 0 to 7"):
                    ep.dispatch(X, IDX.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(8)))
                with pytest.raises(Unavailable, match="works on CPU tensors"):
                    ep.dispatch(X, IDX, wait="sizes")
                with pytest.raises(Unavailable, match="expel_absent needs all ranks on one host"):
                    ep.expel_absent()
                with pytest.raises(Unavailable, match="expert_rows goes with CPU tensors"):
                    ep.dispatch(X, IDX, expert_rows=torch.zeros(8, dtype=torch.int32))
            received = ep.dispatch(X, IDX)
            assert torch.equal(received.handle.topk_idx(), IDX)
            return ep.combine(received.x, received.handle)

    assert all(torch.equal(out, 2 * X) for out in anyep.local_group(4).run(rank_main))


@pytest.mark.parametrize("layout", ["compact", "expert"])
def test_variants_move_rows_of_other_kinds(device, layout):
    """Rows of int16 with two words beside each: all arrive as on CPU tensors."""
    rows, words = torch.arange(8 * 6).view(8, 6).short(), torch.arange(16).view(8, 2).int()

    def rank_main(member, where):
        with anyep.Buffer(member, **SIZES, device=where) as ep:
            wire = carrying_wire(torch.int16, 6, 2, torch.int32)
            calls = ep.variant(wire=wire, num_topk=2, max_tokens_per_rank=8, source_tokens=True)
            received = calls.dispatch((rows * (member.rank + 1), words + member.rank), IDX, layout=layout)
            again = calls.dispatch((rows, words), handle=received.handle)
            return [one.clone() for one in (received.x, received.scales, received.source_token, again.x)]

    ours, theirs = (
        anyep.local_group(4).run(lambda member, where=where: rank_main(member, where)) for where in ("cuda", None)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert a[0].numel() > 0


def test_ranks_that_call_differently_all_refuse(device):

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda") as ep:
            with pytest.raises(ValueError, match="ranks disagree: layout is 'compact' on ranks 0, 1, 3 and 'expert'"):
                ep.dispatch(X, IDX, layout="expert" if member.rank == 2 else "compact")
            received = ep.dispatch(X, IDX)
            return ep.combine(received.x, received.handle)

    assert all(torch.equal(out, 2 * X) for out in anyep.local_group(4).run(rank_main))


def test_a_device_without_room_for_a_batch_is_an_error_of_its_rank_and_the_buffer_goes_on(device, monkeypatch):
    real = staged_halves.allocate

    def rank_main(member):
        this_rank = threading.get_ident()
        with anyep.Buffer(member, **SIZES, device="cuda") as ep:

            def scarce(where, shape, dtype, account):
                if threading.get_ident() == this_rank:
                    raise CapacityError("full")
                return real(where, shape, dtype, account)

            if member.rank == 1:
                monkeypatch.setattr(staged_halves, "allocate", scarce)
            ep.barrier()
            if member.rank == 1:
                with pytest.raises(CapacityError, match="full"):
                    ep.dispatch(X, IDX)
                monkeypatch.setattr(staged_halves, "allocate", real)
            else:
                ep.dispatch(X, IDX)
            received = ep.dispatch(X, IDX)
            return ep.combine(received.x, received.handle)

    assert all(torch.equal(out, 2 * X) for out in anyep.local_group(4).run(rank_main))


def test_a_full_arena_makes_all_ranks_refuse_a_combine(device, monkeypatch):
    allocate = SharedTransport.allocate

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda", eager_bytes=0, straight_bytes=0) as ep:
            received = ep.dispatch(X, IDX)

            def full(transport, num_bytes):
                if transport.rank == 1:
                    raise CapacityError("the arena is full")
                return allocate(transport, num_bytes)

            ep.barrier()
            monkeypatch.setattr(SharedTransport, "allocate", full)
            ep.barrier()
            with pytest.raises(CapacityError, match="rank 1 could not allocate"):
                ep.combine(received.x, received.handle)
            ep.barrier()
            monkeypatch.setattr(SharedTransport, "allocate", allocate)
            ep.barrier()
            return ep.combine(received.x, received.handle)

    assert all(torch.equal(out, 2 * X) for out in anyep.local_group(4).run(rank_main))


@pytest.mark.parametrize(
    ("fake", "options", "kind", "words"),
    [
        (PretendDevice(free_bytes=100), {}, CapacityError, r"GiB free, too little for this buffer: .* a balanced step"),
        (None, {"wire": "fp8"}, Unavailable, "this is sm_80; use wire='bf16'"),
        (PretendDevice(), {"transport": "shm"}, Unavailable, "or between hosts 'gloo' or 'nixl'"),
        (PretendDevice(), {"wire": "raw8"}, Unavailable, "a device has bf16, fp16, fp32 and fp8"),
    ],
)
def test_buffers_that_cannot_be_made(played, fake, options, kind, words):
    played(1)
    if fake is None:
        fake = PretendDevice()
        fake.target = SM_80

    def rank_main(member):
        with pytest.raises(kind, match=words):
            anyep.Buffer(member, **SIZES, **options, device="cuda")

    with pretended(fake):
        anyep.local_group(2).run(rank_main)


@pytest.mark.parametrize("end", ["raises", "closes", "sleeps"])
def test_a_rank_of_another_host_that_ends_is_named_everywhere(device, end):
    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda", timeout_s=1.0) as ep:
            tokens = torch.arange(8)
            received = ep.dispatch(torch.ones(8, 64).bfloat16(), torch.stack([tokens, (tokens + 3) % 8], 1))
            if member.rank == 3:
                if end == "raises":
                    raise ArithmeticError("not its day")
                if end == "sleeps":
                    time.sleep(2.5)
                return
            with pytest.raises(PeerTimeout if end == "sleeps" else PeerLost) as caught:
                ep.combine(received.x, received.handle)
            assert caught.value.ranks == (3,)

    group = anyep.local_group(4)
    if end == "raises":
        with pytest.raises(ArithmeticError):
            group.run(rank_main)
    else:
        group.run(rank_main)


def exchange_in_processes(group, rank):
    """A pretended device a process, gloo between them."""
    os.environ["ANYEP_RANKS_PER_HOST"] = "2"
    x = X * (rank + 1)
    with pretended(LazyDevice(rank)), anyep.Buffer(group, **SIZES, device="cuda", transport="gloo") as ep:
        received = ep.dispatch(x, IDX)
        out = ep.combine(received.x, received.handle)
        return bool(torch.equal(out, 2 * x)), str(ep.explain())


def test_processes_exchange_over_an_engine():
    for exact, told in run_processes(4, exchange_in_processes):
        assert exact
        assert "gloo of torch" in told


@needs_triton
def test_interpreted_kernels_quantise_the_same_bits(tmp_path):
    seeds = ["3", "7", "11"]  # FP8 in every layout
    hosts = {"ANYEP_RANKS_PER_HOST": "1"}
    assert run_program("staged", *seeds, cache=tmp_path, interpreted=True, also=hosts) == dict.fromkeys(seeds, "")


def lose_one(group, rank):
    os.environ["ANYEP_RANKS_PER_HOST"] = "2"
    with pretended(LazyDevice(rank)), anyep.Buffer(group, **SIZES, device="cuda") as ep:
        received = ep.dispatch(X, IDX)
        ep.combine(received.x, received.handle)
        if rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            ep.dispatch(X, IDX)
        except anyep.PeerError as error:
            return type(error).__name__, error.ranks
    return None


def test_a_killed_rank_is_named_on_all_hosts():
    with RankProcesses(4, lose_one) as ranks:
        outcomes = ranks.outcomes(timeout_s=60)
    assert outcomes[3].how == "died"
    assert [outcome.value for outcome in outcomes[:3]] == [("PeerLost", (3,))] * 3
