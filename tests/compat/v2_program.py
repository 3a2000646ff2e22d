"""One training step as users of DeepEP V2 write it: a program of its own, two ranks by torchrun's variables."""

import os

import deep_ep
import torch
import torch.distributed as dist

NUM_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK = 64, 16, 8, 3
buffer = None


def get_buffer(group):
    global buffer
    if buffer is None:
        num_bytes = deep_ep.ElasticBuffer.get_buffer_size_hint(group, NUM_TOKENS, HIDDEN, NUM_TOPK)
        buffer = deep_ep.ElasticBuffer(group, num_bytes, num_max_tokens_per_rank=NUM_TOKENS, explicitly_destroy=True)
    return buffer


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_idx, topk_weights, group):
        ep = get_buffer(group)
        recv_x, _, recv_weights, handle, event = ep.dispatch(
            x, topk_idx, topk_weights, num_experts=NUM_EXPERTS, expert_alignment=8, do_expand=True,
            do_zero_padding=True, previous_event=ep.capture(), async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )  # fmt: skip
        event.current_stream_wait()
        ctx.ep, ctx.handle = ep, handle
        return recv_x, recv_weights, handle

    @staticmethod
    def backward(ctx, grad_x, grad_weights, _):
        out, weights, event = ctx.ep.combine(
            grad_x, ctx.handle, topk_weights=grad_weights, async_with_compute_stream=True
        )
        event.current_stream_wait()
        return out, None, weights, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, handle, group):
        ctx.ep, ctx.handle = get_buffer(group), handle
        return ctx.ep.combine(x, handle)[0]

    @staticmethod
    def backward(ctx, grad):
        recv_grad, _, _, _, _ = ctx.ep.dispatch(grad, handle=ctx.handle, do_expand=True)
        return recv_grad, None, None


def experts(rows, handle, scales):
    out = torch.zeros_like(rows)
    begin = 0
    for local, end in enumerate(handle.psum_num_recv_tokens_per_expert.tolist()):
        out[begin:end] = rows[begin:end] * scales[local]
        begin = -(-end // handle.expert_alignment) * handle.expert_alignment
    return out


def main():
    dist.init_process_group("gloo")
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    x = torch.randint(-1, 2, (NUM_TOKENS, HIDDEN)).bfloat16().requires_grad_()
    topk_idx = torch.rand(NUM_TOKENS, NUM_EXPERTS).topk(NUM_TOPK).indices.to(torch.int64)
    weights = torch.randint(1, 3, (NUM_TOKENS, NUM_TOPK)).float().requires_grad_()
    scales = torch.arange(1.0, 1 + NUM_EXPERTS).bfloat16()
    mine = scales.chunk(size)[rank]

    rows, row_weights, handle = Dispatch.apply(x, topk_idx, weights, group)
    y = experts(rows, handle, mine) * row_weights.unsqueeze(1).bfloat16()
    out = Combine.apply(y, handle, group)
    target = torch.arange(HIDDEN) % 3  # small whole numbers, as all others: every sum is exact in bfloat16
    (out.float() * target).sum().backward()

    x1, weights1 = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    factor = (weights1 * scales[topk_idx].float()).sum(1, keepdim=True)
    reference = (x1.float() * factor).bfloat16()
    (reference.float() * target).sum().backward()
    assert torch.equal(out, reference), "forward"
    assert torch.equal(x.grad, x1.grad), "gradient of x"
    assert torch.equal(weights.grad, weights1.grad), "gradient of the weights"
    get_buffer(group).destroy()
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        print("trained a step on", deep_ep.__name__)


main()
