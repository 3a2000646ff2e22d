"""A program for DeepEP V2: prefill with expanded FP8 batches, decode without a CPU sync. It is not changed."""

import torch
import torch.distributed as dist
from deep_ep import ElasticBuffer
from deep_ep.utils.math import align, per_token_cast_back, per_token_cast_to_fp8

ALIGNMENT = 16


def get_buffer(group, most_tokens, hidden, topk):
    num_bytes = ElasticBuffer.get_buffer_size_hint(group, most_tokens, hidden, topk, use_fp8_dispatch=True)
    return ElasticBuffer(
        group,
        num_bytes,
        num_max_tokens_per_rank=most_tokens,
        hidden=hidden,
        num_topk=topk,
        use_fp8_dispatch=True,
        explicitly_destroy=True,
    )


def run_experts(x, scales, weights, handle):
    """Each expert returns its rows times their weights; padding is 0 and stays so."""
    out = (per_token_cast_back(x, scales).float() * weights.unsqueeze(1)).bfloat16()
    begin = 0
    ends, counts = handle.psum_num_recv_tokens_per_expert.tolist(), handle.num_recv_tokens_per_expert_list
    for end, count in zip(ends, counts, strict=True):
        assert begin % ALIGNMENT == 0
        assert align(end, ALIGNMENT) - begin == count
        assert not out[end : begin + count].any()
        begin += count
    assert begin == len(x) == handle.num_expanded_tokens
    return out


def close(found, expected):
    return len(expected) == 0 or (found.float() - expected).norm() <= 0.04 * expected.norm()


def main():
    dist.init_process_group("gloo")
    group = dist.new_group(list(range(dist.get_world_size())))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    most_tokens, hidden, experts, topk = 48, 256, 8 * ranks, 4
    buffer = get_buffer(group, most_tokens, hidden, topk)
    assert buffer.num_scaleout_ranks * buffer.num_scaleup_ranks == ranks
    torch.manual_seed(rank)
    stats = torch.zeros(experts // ranks, dtype=torch.int32)
    received = 0

    for tokens in (most_tokens - rank, 5 * rank):
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        topk_weights, topk_idx = torch.rand(tokens, experts).topk(topk, dim=1)
        (q, scales), none, weights, handle, event = buffer.dispatch(
            per_token_cast_to_fp8(x),
            topk_idx,
            topk_weights,
            cumulative_local_expert_recv_stats=stats,
            num_experts=experts,
            expert_alignment=ALIGNMENT,
            previous_event=buffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
            do_expand=True,
            do_zero_padding=True,
            use_tma_aligned_col_major_sf=True,
        )
        with event:
            pass
        assert none is None
        assert scales.stride() == (1, align(len(q), 4))
        received += handle.num_unaligned_recv_tokens_per_expert
        y = run_experts(q, scales, weights, handle)
        combined, none, event = buffer.combine(y, handle, bias=x, async_with_compute_stream=True)
        event.current_stream_wait()
        assert none is None
        assert close(combined, x.float() * (1 + topk_weights.sum(1, keepdim=True)))

        # another layer of the same batch goes the same way, without a count
        again, _, _, same, _ = buffer.dispatch(per_token_cast_to_fp8(-x), handle=handle, do_expand=True)
        assert same is handle
        y = run_experts(*again, weights, handle)
        assert close(buffer.combine(y, handle)[0], -x.float() * topk_weights.sum(1, keepdim=True))
    assert torch.equal(stats, received)

    for tokens in (7, 3 * rank, 0):  # decode: batches as large as they can be, for nobody waits for sizes
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        topk_weights, topk_idx = torch.rand(tokens, experts).topk(topk, dim=1)
        recv_x, recv_idx, recv_weights, handle, _ = buffer.dispatch(
            x, topk_idx, topk_weights, num_experts=experts, num_max_tokens_per_rank=16, do_cpu_sync=False
        )
        assert recv_x.shape == (16 * ranks, hidden)
        assert handle.num_recv_tokens_per_expert_list == []
        y = recv_x.float() * recv_weights.masked_fill(recv_idx < 0, 0).sum(1, keepdim=True)
        combined, back, _ = buffer.combine(y.bfloat16(), handle, topk_weights=recv_weights)
        assert close(combined, x.float() * topk_weights.sum(1, keepdim=True))
        assert torch.equal(back, topk_weights)

    buffer.barrier()
    buffer.destroy()
    print(f"elastic {rank} of {ranks} on {buffer.num_scaleout_ranks} hosts: fine")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
