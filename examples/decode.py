"""A decode loop: the shared expert runs while tokens travel to the routed ones, and while their outputs travel back."""

from __future__ import annotations

import torch

import anyep

TOKENS, HIDDEN, EXPERTS, TOPK, STEPS, RANKS = 16, 512, 32, 4, 3, 4
Tensor = torch.Tensor


def expert_weights(expert: int) -> Tensor:
    generator = torch.Generator().manual_seed(expert)
    return torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5


def decode(ep: anyep.Buffer, x: Tensor, gate: Tensor, shared: Tensor, experts: list[Tensor]) -> Tensor:
    """One Mixture-of-Experts layer of one step: [T, H] to [T, H]."""
    topk_weights, topk_idx = (x.float() @ gate).softmax(dim=1).topk(TOPK)
    sending = ep.dispatch(x, topk_idx, topk_weights, layout="padded", wait=False)
    first_half = torch.tanh(x.float() @ shared)  # runs while tokens travel
    received = sending.wait()  # x [L, R * T, H] in FP8, counts[l] rows of each block are there

    y = ep.empty_output(received.handle)  # combine reads it where it lies
    for local, count in enumerate(received.counts):
        scales = received.scales[local, :count].repeat_interleave(128, dim=1)[:, :HIDDEN]
        y[local, :count] = (received.x[local, :count].float() * scales) @ experts[local]

    returning = ep.combine(y, received.handle, wire="logfmt10", wait=False)
    second_half = first_half @ shared  # runs while the outputs travel
    return (x + second_half + returning.wait()).bfloat16()  # weights were applied, in top-k order


def rank_main(member: object) -> Tensor:
    """Decode some steps on one rank."""
    sizes = {"hidden": HIDDEN, "num_experts": EXPERTS, "num_topk": TOPK, "max_tokens_per_rank": TOKENS}
    with anyep.Buffer(member, **sizes, wire="fp8") as ep:
        share = EXPERTS // ep.num_ranks
        experts = [expert_weights(expert) for expert in range(ep.rank * share, (ep.rank + 1) * share)]
        shared = expert_weights(EXPERTS)
        gate = torch.randn(HIDDEN, EXPERTS, generator=torch.Generator().manual_seed(EXPERTS + 1))
        x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(ep.rank)).bfloat16()
        for _ in range(STEPS):
            x = decode(ep, x, gate, shared, experts)
            x = x / x.float().square().mean(dim=1, keepdim=True).sqrt().bfloat16()
        return x


if __name__ == "__main__":
    for rank, tokens in enumerate(anyep.local_group(RANKS).run(rank_main)):
        print(f"rank {rank}: {list(tokens.shape)}, the first token begins {tokens[0, :4].tolist()}")
