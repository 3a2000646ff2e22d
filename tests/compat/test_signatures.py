"""Names, order and defaults of arguments, but for the main calls, which the tests of each version hold."""

from __future__ import annotations

import inspect

import pytest

from anyep.compat import deep_ep
from anyep.compat.deep_ep import Buffer, Config, ElasticBuffer, EPHandle, EventHandle, EventOverlap

OTHERS = {
    Config: "num_sms=20 num_max_nvl_chunked_send_tokens=6 num_max_nvl_chunked_recv_tokens=256"
    " num_max_rdma_chunked_send_tokens=6 num_max_rdma_chunked_recv_tokens=256",
    Config().get_nvl_buffer_size_hint: "hidden_bytes num_ranks",
    Config().get_rdma_buffer_size_hint: "hidden_bytes num_ranks",
    EventHandle: "",
    EventOverlap: "event=None extra_tensors=None",
    EventOverlap().current_stream_wait: "release_handle=False",
    Buffer.get_dispatch_config: "num_ranks",
    Buffer.get_combine_config: "num_ranks",
    Buffer.get_low_latency_rdma_size_hint: "num_max_dispatch_tokens_per_rank hidden num_ranks num_experts",
    Buffer.set_num_sms: "new_num_sms",
    Buffer.is_sm90_compiled: "",
    Buffer.capture: "",
    Buffer.destroy: "self",
    Buffer.get_comm_stream: "self",
    Buffer.clean_low_latency_buffer: "self num_max_dispatch_tokens_per_rank hidden num_experts",
    Buffer.get_next_low_latency_combine_buffer: "self handle",
    Buffer.low_latency_query_mask_buffer: "self mask_status",
    Buffer.low_latency_clean_mask_buffer: "self",
    deep_ep.get_physical_domain_size: "group",
    deep_ep.get_logical_domain_size: "group allow_hybrid_mode=True",
    ElasticBuffer.get_buffer_size_hint: "group num_max_tokens_per_rank hidden num_topk=0 use_fp8_dispatch=False"
    " allow_hybrid_mode=True allow_multiple_reduction=True",
    ElasticBuffer.get_physical_domain_size: "self",
    ElasticBuffer.get_logical_domain_size: "self",
    ElasticBuffer.capture: "",
    ElasticBuffer.destroy: "self",
    ElasticBuffer.get_comm_stream: "self",
    ElasticBuffer.barrier: "self use_comm_stream=True with_cpu_sync=False sequential=True",
    ElasticBuffer.get_theoretical_num_qps: "self num_sms",
    ElasticBuffer.engram_write: "self storage sf=None",
    ElasticBuffer.engram_fetch: "self indices num_qps=0 use_tma_aligned_col_major_sf=False",
    ElasticBuffer.create_agrs_session: "self",
    ElasticBuffer.destroy_agrs_session: "self",
    ElasticBuffer.agrs_new_session: "self enabled=True",
    ElasticBuffer.agrs_get_inplace_tensor: "self shapes dtype",
    ElasticBuffer.all_gather: "self t",
    ElasticBuffer.get_agrs_num_max_session_bytes: "group shapes dtype",
}
"""The constructors, and what is called by name or place."""
NUMBERED = {
    ElasticBuffer.get_theoretical_num_sms: [0, 0, 0, 200, 50],
    ElasticBuffer.get_engram_storage_size_hint: ["torch.bfloat16"],
    ElasticBuffer.pp_send: [0],
    ElasticBuffer.pp_recv: [0],
}
"""Defaults of what is called by place."""


def parameters(function):
    return list(inspect.signature(function).parameters.values())


@pytest.mark.parametrize("function", OTHERS, ids=lambda one: getattr(one, "__qualname__", str(one)))
def test_arguments_have_upstreams_names_order_and_defaults(function):
    written = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters(function)]
    assert written == OTHERS[function].split()


@pytest.mark.parametrize("function", NUMBERED, ids=lambda one: one.__qualname__)
def test_defaults_of_other_calls_are_upstreams(function):
    defaults = [p.default for p in parameters(function) if p.default is not p.empty]
    assert [one if isinstance(one, (int, float)) else str(one) for one in defaults] == NUMBERED[function]


def test_a_handle_is_made_from_its_fields_by_name():
    required = [p.name for p in parameters(EPHandle) if p.default is p.empty]
    assert required == [
        *["do_expand", "num_experts", "expert_alignment", "num_max_tokens_per_rank", "num_sms", "topk_idx"],
        *["num_recv_tokens", "num_expanded_tokens", "num_recv_tokens_per_expert_list"],
        *["psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert"],
        *["num_unaligned_recv_tokens_per_expert", "recv_src_metadata"],
    ]
