"""agrs_* and all_gather: gathers within sessions, in place or not, one tensor or several."""

from __future__ import annotations

import pytest
import torch

from tests.compat.elastic_host import on_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_one_tensor_gives_the_result_and_a_call_that_waits(num_ranks):
    def program(buffer):
        buffer.agrs_set_config(1 << 16, 4)
        for turn in range(5):
            buffer.create_agrs_session()
            out, handle = buffer.all_gather(torch.full((2, 4), float(buffer.rank_idx + turn)))
            handle()
            handle()
            assert out.shape == (num_ranks, 2, 4)
            assert out[:, 1, 3].tolist() == [float(rank + turn) for rank in range(num_ranks)]
            buffer.destroy_agrs_session()

    on_ranks(num_ranks, program)


def test_a_sequence_gives_its_results_and_one_call():
    def program(buffer):
        buffer.agrs_set_config(1 << 16, 1)
        with buffer.agrs_new_session():
            first, second, handle = buffer.all_gather((torch.full((8,), buffer.rank_idx), torch.ones(2, 4).bfloat16()))
            handle()
            return first[:, 7].tolist(), second.shape, second.dtype

    assert on_ranks(2, program) == [([0, 1], (2, 2, 4), torch.bfloat16)] * 2


def test_in_place_tensors_are_the_ranks_own_part_of_the_result():
    def program(buffer):
        buffer.agrs_set_config(1 << 16, 2)
        with buffer.agrs_new_session():
            one = buffer.agrs_get_inplace_tensor((4, 2), torch.float32)
            assert buffer.agrs_get_inplace_tensor((4, 2), torch.float32).data_ptr() == one.data_ptr()
            one.fill_(buffer.rank_idx)
            out, handle = buffer.all_gather(one)
            handle()
            assert out[buffer.rank_idx].data_ptr() == one.data_ptr()
            pair = buffer.agrs_get_inplace_tensor([(8,), (16,)], torch.int32)
            assert isinstance(pair, tuple)
            for tensor in pair:
                tensor.fill_(buffer.rank_idx + 5)
            *outs, handle = buffer.all_gather(pair)
            handle()
            return out[:, 3, 1].tolist(), [result[:, -1].tolist() for result in outs]

    assert on_ranks(3, program) == [([0.0, 1.0, 2.0], [[5, 6, 7]] * 2)] * 3


def test_results_hold_for_the_session_whatever_is_gathered_later():
    def program(buffer):
        buffer.agrs_set_config(1 << 16, 32)
        with buffer.agrs_new_session():
            pairs = [buffer.all_gather(torch.full((8,), 10 * buffer.rank_idx + i)) for i in range(32)]
            for _, handle in reversed(pairs):
                handle()
            return all(out[:, 0].tolist() == [i, 10 + i] for i, (out, _) in enumerate(pairs))

    assert on_ranks(2, program) == [True, True]


def test_a_disabled_session_is_none():
    def program(buffer):
        with buffer.agrs_new_session(enabled=False), pytest.raises(RuntimeError, match="no session is open"):
            buffer.all_gather(torch.ones(8))

    on_ranks(1, program)


def test_a_session_ends_with_its_block_whatever_happens_there():
    def program(buffer):
        buffer.agrs_set_config(1 << 10, 1)
        with pytest.raises(ZeroDivisionError), buffer.agrs_new_session():
            raise ZeroDivisionError
        with buffer.agrs_new_session():
            buffer.destroy_agrs_session()
        with buffer.agrs_new_session():
            out, handle = buffer.all_gather(torch.ones(8))
            handle()
            return float(out.sum())

    assert on_ranks(2, program) == [16.0, 16.0]


def test_sessions_can_be_configured_anew():
    def program(buffer):
        for session_bytes in (256, 1 << 16, 512):
            buffer.agrs_set_config(session_bytes, 1)
            with buffer.agrs_new_session():
                out, handle = buffer.all_gather(torch.ones(32))
                handle()
                assert out.sum() == 64

    on_ranks(2, program)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda b: b.create_agrs_session(), "a session is open"),
        (lambda b: b.agrs_set_config(1024, 1), "within a session"),
        (lambda b: b.all_gather(torch.ones(8, 8).T), "contiguous"),
        (lambda b: b.all_gather(torch.ones(1024)), "session_bytes=1024"),
        (lambda b: b.agrs_get_inplace_tensor((1024,), torch.float32), "session_bytes=1024"),
        (lambda b: [b.all_gather(torch.ones(8)) for _ in range(3)], "max_gathers=2"),
        (lambda b: b.all_gather(b.agrs_get_inplace_tensor((8,), torch.float32)[1:]), "not at its place"),
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_what_upstream_refuses_within_a_session_is_refused(call, text, kind):
    def program(buffer):
        buffer.agrs_set_config(1024, 2)
        with buffer.agrs_new_session(), pytest.raises(kind, match=text):
            call(buffer)

    on_ranks(2, program)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda b: b.create_agrs_session(), "agrs_set_config"),
        (lambda b: b.destroy_agrs_session(), "no session is open"),
        (lambda b: b.agrs_get_inplace_tensor((1,), torch.int8), "no session is open"),
        (lambda b: b.all_gather(torch.ones(1)), "no session is open"),
        (lambda b: b.agrs_set_config(1024, 33), "1 to 32 gathers, got 33"),
        (lambda b: b.agrs_set_config(5 << 20, 1), "exceeds the buffer's 4194304"),
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_what_upstream_refuses_outside_is_refused(call, text, kind):
    def program(buffer):
        with pytest.raises(kind, match=text):
            call(buffer)

    on_ranks(1, program)


def test_waiting_is_for_the_session_that_gathered():
    def program(buffer):
        buffer.agrs_set_config(1024, 2)
        with buffer.agrs_new_session():
            _, handle = buffer.all_gather(torch.ones(8))
        with pytest.raises(RuntimeError, match="this session was closed"):
            handle()

    on_ranks(2, program)
