"""A program for DeepEP: decoding with low-latency calls and hooks, two batches by turns. It is not changed."""

import torch
import torch.distributed as dist
from deep_ep import Buffer
from deep_ep.utils.math import per_token_cast_back


def get_buffer(group, most_tokens, hidden, experts):
    size = Buffer.get_low_latency_rdma_size_hint(most_tokens, hidden, group.size(), experts)
    return Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=experts // group.size())


def experts_of(recv, count):
    q, scales = recv
    out = torch.zeros(q.shape, dtype=torch.bfloat16)
    for expert, rows in enumerate(count.tolist()):
        out[expert, :rows] = per_token_cast_back(q[expert, :rows], scales[expert, :rows])
    return out


def main():
    dist.init_process_group("gloo")
    group = dist.new_group(list(range(dist.get_world_size())))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    most_tokens, hidden, experts, topk = 32, 512, 8 * ranks, 4
    buffer = get_buffer(group, most_tokens, hidden, experts)
    torch.manual_seed(rank)
    batches = []
    for tokens in (32 - rank, 7 * rank):
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        weights, idx = torch.rand(tokens, experts).topk(topk, dim=1)
        batches.append((x, idx, weights))

    for _ in range(3):
        sent = [
            buffer.low_latency_dispatch(x, idx, most_tokens, experts, use_fp8=True, return_recv_hook=True)
            for x, idx, _ in batches
        ]
        answers = []
        for (_, idx, weights), (recv, count, handle, _event, hook) in zip(batches, sent, strict=True):
            hook()
            out = experts_of(recv, count)
            answers.append(buffer.low_latency_combine(out, idx, weights, handle, return_recv_hook=True))
        for (x, _, weights), (combined, _event, hook) in zip(batches, answers, strict=True):
            hook()
            expected = x.float() * weights.sum(1, keepdim=True)
            assert combined.shape == x.shape
            if len(x):
                assert (combined.float() - expected).norm() / expected.norm() < 0.04

    dist.barrier()
    print(f"decode {rank} of {ranks}: fine")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
