"""A program for DeepEP: forward and backward of an expert layer, written as its documentation shows. It is not changed.

Started like torchrun does: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who this is.
"""

import torch
import torch.distributed as dist
from deep_ep import Buffer, EventOverlap
from deep_ep.utils.math import per_token_cast_back, per_token_cast_to_fp8

Buffer.set_num_sms(24)


def get_buffer(group, hidden_bytes):
    nvl_bytes = rdma_bytes = 0
    for config in (Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())):
        nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size()), nvl_bytes)
        rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size()), rdma_bytes)
    return Buffer(group, nvl_bytes, rdma_bytes)


def dispatch_forward(buffer, x, topk_idx, topk_weights, num_experts, previous_event=None):
    per_rank, per_rdma_rank, per_expert, in_rank, previous_event = buffer.get_dispatch_layout(
        topk_idx,
        num_experts,
        previous_event=previous_event,
        async_finish=True,
        allocate_on_comm_stream=previous_event is not None,
    )
    return buffer.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=previous_event,
        async_finish=True,
        allocate_on_comm_stream=True,
    )


def main():
    dist.init_process_group("gloo")
    group = dist.new_group(list(range(dist.get_world_size())))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens, hidden, experts, topk = 40 + rank, 256, 8 * ranks, 4
    torch.manual_seed(rank)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    topk_weights, topk_idx = torch.rand(tokens, experts).topk(topk, dim=1)
    buffer = get_buffer(group, hidden * 2)

    for rows in (x, per_token_cast_to_fp8(x)):
        recv_x, recv_idx, recv_weights, counts, handle, event = dispatch_forward(
            buffer, rows, topk_idx, topk_weights, experts, EventOverlap(Buffer.capture().event)
        )
        event.current_stream_wait()
        recv = recv_x if isinstance(recv_x, torch.Tensor) else per_token_cast_back(*recv_x)
        assert len(counts) == experts // ranks
        assert sum(counts) == int((recv_idx >= 0).sum())
        expert_out = (recv.float() * recv_weights.sum(1, keepdim=True)).bfloat16()
        combined, weights, event = buffer.combine(expert_out, handle, topk_weights=recv_weights, async_finish=True)
        event.current_stream_wait()
        assert torch.equal(weights, topk_weights)
        expected = x.float() * topk_weights.sum(1, keepdim=True)
        assert (combined.float() - expected).norm() / expected.norm() < 0.04

        # backward of combine is a dispatch the same way, backward of dispatch a combine
        grad, _, _, _, _, event = buffer.dispatch(combined, handle=handle, async_finish=True)
        event.current_stream_wait()
        assert grad.shape == recv.shape
        grad_x, grad_weights, event = buffer.combine(
            grad, handle, topk_weights=recv_weights, previous_event=event, async_finish=True
        )
        with event:
            pass
        assert grad_x.shape == x.shape
        assert grad_weights.shape == topk_weights.shape

    dist.barrier()
    print(f"prefill {rank} of {ranks}: fine")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
