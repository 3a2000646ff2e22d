"""Ring: what is sent to a neighbour arrives there, in order, whoever is slow."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

import anyep
from anyep.collectives import Ring

DTYPES = (torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex64, torch.float8_e4m3fn)


def drawn(seed, dtype=None, most=40):
    rng = random.Random(seed)
    shape = [rng.randrange(0, 5) for _ in range(rng.randrange(0, 4))]
    dtype = dtype or rng.choice(DTYPES)
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    flat = torch.randint(0, 2 if dtype is torch.bool else 120, (count * dtype.itemsize,), generator=generator)
    return flat.to(torch.uint8).view(dtype).reshape(shape)


def same(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool((one.reshape(-1).view(torch.uint8) == other.reshape(-1).view(torch.uint8)).all())
    )


def on_ranks(num_ranks, function, **options):
    def rank_main(member):
        with Ring(member, **{"max_bytes": 4096, "slots": 2, "timeout_s": 20.0, **options}) as ring:
            return function(ring)

    return anyep.local_group(num_ranks).run(rank_main)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_a_block_goes_round_the_ring(num_ranks):
    def rotate(ring):
        block, seen = torch.full((3, 5), ring.rank, dtype=torch.int16), []
        for _ in range(2 * ring.num_ranks):
            ring.send(block, to=ring.next)
            block = ring.recv(ring.previous)
            seen.append(int(block[0, 0]))
        return seen

    for rank, seen in enumerate(on_ranks(num_ranks, rotate)):
        assert seen == [(rank - 1 - i) % num_ranks for i in range(2 * num_ranks)]


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_and_shape_arrives_bit_by_bit(dtype, kernels):
    sent = [drawn(seed, dtype) for seed in range(20)]

    def exchange(ring):
        for one in sent:
            ring.send(one, to=ring.next)
            assert same(ring.recv(ring.previous), one)

    on_ranks(2, exchange, kernels=kernels)


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("seed", range(35))
def test_random_programs_of_slow_and_fast_ranks(num_ranks, slots, seed):
    """Messages in one random order, which every rank keeps to in a thread that sends and in one that receives.

    (Orders of each rank's own would be programs that wait for each other in a circle.)
    """
    rng = random.Random(seed)
    messages = [(sender, (sender + rng.choice((-1, 1))) % num_ranks) for sender in rng.choices(range(num_ranks), k=60)]

    def program(ring):
        own, faults = random.Random(seed * 100 + ring.rank), []
        slow = own.choice((0.0, 0.0, 0.001))

        def receive():
            try:
                for number, (sender, receiver) in enumerate(messages):
                    if receiver == ring.rank:
                        time.sleep(slow * own.random())
                        if not same(ring.recv(sender), drawn(number)):
                            faults.append(number)
            except Exception as error:
                faults.append(error)

        receiving = threading.Thread(target=receive)
        receiving.start()
        for number, (sender, receiver) in enumerate(messages):
            if sender == ring.rank:
                ring.send(drawn(number), to=receiver)
        receiving.join(30)
        assert not receiving.is_alive()
        return faults

    assert on_ranks(num_ranks, program, slots=slots) == [[]] * num_ranks


def test_a_sender_waits_while_the_slots_are_full():
    ahead = []

    def program(ring):
        if ring.rank == 1:
            while len(ahead) < 3:
                time.sleep(0.001)
            time.sleep(0.05)
            assert len(ahead) == 3
            return [int(ring.recv(0)) for _ in range(6)]
        for number in range(6):
            ring.send(torch.tensor(number), to=1)
            ahead.append(number)
        return None

    assert on_ranks(2, program, slots=3)[1] == list(range(6))


def test_the_sender_may_change_its_tensor_at_once():
    def program(ring):
        x = torch.ones(100)
        ring.send(x, to=ring.next)
        x.zero_()
        return bool((ring.recv(ring.previous) == 1).all())

    assert on_ranks(3, program) == [True] * 3


def test_strided_tensors_arrive_dense():
    def program(ring):
        ring.send(torch.arange(12).reshape(3, 4).T[::2], to=ring.next)
        return ring.recv(ring.previous).tolist()

    assert on_ranks(2, program) == [[[0, 4, 8], [2, 6, 10]]] * 2


def test_what_was_sent_can_be_received_after_its_sender_has_closed():
    closed = threading.Event()

    def rank_main(member):
        with Ring(member, max_bytes=64) as ring:
            if ring.rank == 1:
                ring.send(torch.tensor([7]), to=0)
            else:
                assert closed.wait(20)
                return ring.recv(1).tolist()
        closed.set()
        return None

    assert anyep.local_group(2).run(rank_main)[0] == [7]


def test_out_takes_the_tensor_and_a_wrong_one_leaves_it_in_the_ring():
    def program(ring):
        ring.send(torch.tensor([1, 2, 3]), to=ring.next)
        with pytest.raises(ValueError, match=r"out must be a contiguous cpu tensor \[3\], got \[2\]"):
            ring.recv(ring.previous, out=torch.zeros(2, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"out must be a tensor of torch.int64, got torch.float32"):
            ring.recv(ring.previous, out=torch.zeros(3))
        out = torch.zeros(3, dtype=torch.int64)
        assert ring.recv(ring.previous, out=out) is out
        return out.tolist()

    assert on_ranks(3, program) == [[1, 2, 3]] * 3


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda ring: ring.send(torch.ones(1), to=2), ValueError, "to must be a neighbour of rank 0 .* 1 or 3, got 2"),
        (lambda ring: ring.recv(0), ValueError, "source must be a neighbour"),
        (lambda ring: ring.send(torch.ones(1), to=4), ValueError, "to must be at least 0 and at most 3"),
        (lambda ring: ring.send(torch.ones(1), to=1.0), TypeError, "to must be an integer"),
        (lambda ring: ring.send([1.0], to=1), TypeError, "x must be a torch.Tensor, got list"),
        (lambda ring: ring.send(torch.ones(1025), to=1), ValueError, "4100 bytes, .* max_bytes=4096"),
        (lambda ring: ring.send(torch.ones([1] * 15), to=1), ValueError, "14 dimensions"),
        (lambda ring: ring.send(torch.ones(1, device="meta"), to=1), ValueError, "on meta"),
    ],
)
def test_a_refused_call_costs_nothing(call, kind, text):
    def program(ring):
        if ring.rank == 0:
            with pytest.raises(kind, match=text):
                call(ring)
        ring.send(torch.tensor(ring.rank), to=ring.next)
        return int(ring.recv(ring.previous))

    assert on_ranks(4, program) == [3, 0, 1, 2]


def test_a_rank_alone_is_told_that_it_would_wait_for_itself():
    def program(ring):
        with pytest.raises(ValueError, match="empty"):
            ring.recv(0)
        ring.send(torch.tensor(1), to=0)
        ring.send(torch.tensor(2), to=0)
        with pytest.raises(ValueError, match="all 2 slots"):
            ring.send(torch.tensor(3), to=0)
        return int(ring.recv(0)), int(ring.recv(0))

    assert on_ranks(1, program) == [(1, 2)]


def test_a_neighbour_that_takes_nothing_is_named_and_ends_the_ring():
    def program(ring):
        if ring.rank == 1:
            time.sleep(0.6)
            return None
        ring.send(torch.ones(1), to=1)
        with pytest.raises(anyep.PeerTimeout, match="send 2 to rank 1") as caught:
            ring.send(torch.ones(1), to=1)
        assert caught.value.ranks == (1,)
        with pytest.raises(anyep.ClosedError, match="PeerTimeout"):
            ring.send(torch.ones(1), to=1)
        return True

    assert on_ranks(2, program, slots=1, timeout_s=0.2)[0] is True


def test_ranks_further_on_learn_who_is_at_fault():
    def rank_main(member):
        with Ring(member, max_bytes=8, timeout_s=20.0) as ring:
            if ring.rank == 2:
                raise ZeroDivisionError
            try:
                ring.recv(ring.next)
            except anyep.PeerLost as error:
                told.append(error.ranks)
                raise

    told = []
    with pytest.raises(ZeroDivisionError):
        anyep.local_group(4).run(rank_main)
    assert told == [(2,)] * 3


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"max_bytes": -1}, ValueError, "max_bytes must be at least 0"),
        ({"slots": 0}, ValueError, "slots must be at least 1"),
        ({"slots": "2"}, TypeError, "slots must be an integer"),
        ({"timeout_s": 0}, ValueError, "timeout_s must be positive"),
        ({"timeout_s": None}, TypeError, "timeout_s must be a number"),
        ({"transport": "pigeon"}, ValueError, "transport must be one of"),
        ({"kernels": "none"}, ValueError, "kernels must be one of"),
    ],
)
def test_bad_arguments_of_one_rank_are_an_error_on_all(options, kind, text):
    def rank_main(member):
        mine = options if member.rank == 1 else {}
        with pytest.raises(kind, match=text), Ring(member, **{"max_bytes": 64, **mine}):
            pass

    anyep.local_group(3).run(rank_main)


def test_ranks_that_differ_are_told_in_what():
    def rank_main(member):
        with (
            pytest.raises(ValueError, match="slots differs between ranks"),
            Ring(member, max_bytes=64, slots=member.rank + 1),
        ):
            pass

    anyep.local_group(2).run(rank_main)


def test_a_closed_ring_says_so():
    def program(ring):
        ring.close()
        ring.close()
        with pytest.raises(anyep.ClosedError, match="this ring is closed"):
            ring.recv(ring.next)
        return repr(ring)

    assert "closed" in on_ranks(1, program)[0]
