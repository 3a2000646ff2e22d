"""What is no tensor, number or handle, and handles whose fields no longer fit: refused by name, and calls go on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from tests.compat.v1_oracle import E, make_inputs, on_ranks, send
from tests.compat.v2_world import World, poisoned, same_bits  # noqa: F401

WORLD = World(num_tokens=(5, 7))


def quantised(tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(tokens, 8), 1.0, 0, torch.quint8)


NUMBERS = {
    "num_worst_tokens=5.5": lambda b, g: send(b, g, num_worst_tokens=5.5),
    "expert_alignment=2.0": lambda b, g: send(b, g, expert_alignment=2.0),
    "num_experts=12.0": lambda b, g: b.get_dispatch_layout(g.topk_idx, 12.0),
    "Tmax=32.0": lambda b, g: b.low_latency_dispatch(g.x, g.topk_idx, 32.0, E),
    "config=3": lambda b, g: send(b, g, config=3),
    "previous_event=3": lambda b, g: send(b, g, previous_event=3),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_what_upstreams_binding_does_not_take_is_a_type_error(case):
    given = make_inputs([9, 31])

    def rank_main(buffer):
        with pytest.raises(TypeError, match=r"whole number|Config|capture"):
            NUMBERS[case](buffer, given[buffer.rank])
        send(buffer, given[buffer.rank])

    on_ranks(2, rank_main, low_latency_mode=True)


def test_a_negative_number_of_rows_and_rows_of_a_quantised_dtype_are_refused():
    given = make_inputs([9])[0]

    def rank_main(buffer):
        with pytest.raises(RuntimeError, match="num_worst_tokens must be at least 0, got -1"):
            send(buffer, given, num_worst_tokens=-1)
        with pytest.raises(RuntimeError, match="int_repr"):
            send(buffer, given, quantised(9))
        send(buffer, given)

    on_ranks(1, rank_main)


def dispatch(buffer, i, **options):
    good = {"x": i.x, "topk_idx": i.idx, "topk_weights": i.weights, "num_experts": 8}
    return buffer.dispatch(**good | options)


NO_TENSORS = {
    "x must be a tensor": lambda b, i, h: dispatch(b, i, x=i.x.tolist()),
    "topk_idx must be a tensor": lambda b, i, h: dispatch(b, i, topk_idx=i.idx.numpy()),
    "topk_weights must be a tensor": lambda b, i, h: dispatch(b, i, topk_weights=i.weights.tolist()),
    "the scales must be a tensor": lambda b, i, h: dispatch(b, i, x=(i.x, i.weights.numpy())),
    "a pair of rows and scales": lambda b, i, h: dispatch(b, i, x=(i.x, i.x, i.x)),
    "x must be plain numbers": lambda b, i, h: dispatch(b, i, x=quantised(len(i.x))),
    "topk_idx must be plain numbers": lambda b, i, h: dispatch(b, i, topk_idx=i.idx.to_sparse()),
    "stats must be a tensor": lambda b, i, h: dispatch(b, i, cumulative_local_expert_recv_stats=[0] * 4),
    "handle must be an EPHandle, got tuple": lambda b, i, h: b.dispatch(i.x, handle=(1, 2)),
    "x must be a tensor, got NoneType": lambda b, i, h: b.dispatch(None, handle=h),
    "x must be a tensor, got list": lambda b, i, h: b.combine([1.0], h),
    "handle must be an EPHandle, got int": lambda b, i, h: b.combine(i.x, 3),
}


@pytest.mark.parametrize("text", NO_TENSORS)
def test_what_is_no_tensor_or_handle_is_refused_by_name(text):
    def rank_main(buffer, i):
        handle = dispatch(buffer, i)[3]
        with pytest.raises(RuntimeError, match=text):
            NO_TENSORS[text](buffer, i, handle)
        return len(dispatch(buffer, i)[0])

    assert WORLD.run(rank_main) == [len(WORLD.arrivals(rank)) for rank in range(2)]


SPOILT = {
    "names rows from": lambda h: h.recv_src_metadata.fill_(77),
    r"recv_src_metadata must be \[": lambda h: setattr(h, "recv_src_metadata", h.recv_src_metadata[:2]),
    "int32 tensor": lambda h: setattr(h, "recv_src_metadata", None),
    "ends with 99": lambda h: h.psum_num_recv_tokens_per_scaleup_rank.fill_(99),
    "it says where tokens went": lambda h: setattr(h, "topk_idx", None),
}


@pytest.mark.parametrize("text", SPOILT)
@pytest.mark.parametrize("made_again", [False, True])
@pytest.mark.parametrize("options", [{}, {"async_with_compute_stream": True}])
def test_a_handle_whose_fields_point_elsewhere_is_refused_before_anything_is_written(text, made_again, options):
    def rank_main(buffer, i):
        x, _, weights, handle, _ = dispatch(buffer, i, do_expand=True, expert_alignment=2)
        expected = buffer.combine(x, handle, weights)[0]
        spoilt = copy.deepcopy(handle)
        SPOILT[text](spoilt)
        spoilt = copy.copy(spoilt) if made_again else spoilt
        for call in (
            lambda: buffer.combine(x, spoilt, weights, **options),
            lambda: buffer.dispatch(i.x, handle=spoilt, do_expand=True, **options),
        ):
            with pytest.raises(RuntimeError, match=text):
                call()
        assert same_bits(buffer.combine(x, handle, weights)[0], expected)
        return same_bits(buffer.dispatch(i.x, handle=handle, do_expand=True)[0], x)

    assert WORLD.run(rank_main) == [True, True]


@pytest.mark.parametrize("expand", [False, True])
def test_indices_that_a_caller_writes_to_a_shared_handle_are_those_that_combine_reads(expand):
    """With do_handle_copy=False the handle has the caller's own indices: another order of columns is another sum's."""

    def rank_main(buffer, i):
        idx = i.idx.clone()
        options = {"num_experts": 8, "do_expand": expand, "do_handle_copy": False}
        x, _, _, handle, _ = buffer.dispatch(i.x, idx, **options)
        idx.fill_(99)
        for call in (lambda: buffer.combine(x, handle), lambda: buffer.dispatch(i.x, handle=handle, do_expand=expand)):
            with pytest.raises(ValueError, match=r"topk_idx\[0, 0\] is 99"):
                call()
        idx.copy_(i.idx)
        return same_bits(buffer.dispatch(i.x, handle=handle, do_expand=expand)[0], x)

    assert WORLD.run(rank_main) == [True, True]


def test_more_rows_than_a_low_latency_block_holds_are_an_error_on_all_ranks():
    """Tokens that name an expert several times: more rows than R * Tmax."""
    import anyep

    idx = torch.zeros(4, 3, dtype=torch.int64)

    def rank_main(buffer):
        x = torch.ones(4, 128).bfloat16()
        with pytest.raises(anyep.CapacityError, match="names one expert twice"):
            buffer.low_latency_dispatch(x, idx, 4, 4, use_fp8=False)
        *_, hook = buffer.low_latency_dispatch(x, idx, 4, 4, use_fp8=False, return_recv_hook=True)
        with pytest.raises(anyep.CapacityError, match="names one expert twice"):
            hook()
        _, count, *_ = buffer.low_latency_dispatch(x, idx, 12, 4, use_fp8=False)
        return count.tolist()

    assert on_ranks(2, rank_main, low_latency_mode=True) == [[24, 0], [0, 0]]
