"""An expert-parallel MoE layer with gradients in five lines; the rest gives it ranks and tokens.

python examples/moe_layer.py
"""

from __future__ import annotations

import torch

import anyep
from anyep import nn

RANKS, TOKENS, HIDDEN, EXPERTS, TOPK = 2, 64, 128, 8, 2


def rank_main(group: object) -> tuple[torch.Size, float, float]:
    """Be one rank; ``group`` may as well be a torch.distributed process group, or None under torchrun."""
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)

    sizes = {"hidden": HIDDEN, "num_experts": EXPERTS, "num_topk": TOPK}
    with nn.open_pair(group, max_tokens_per_rank=TOKENS, wire="fp32", **sizes) as ep:
        layer = nn.MoE(ep, nn.Router(**sizes, scoring="sigmoid"), nn.GroupedMLP(ep, width=4 * HIDDEN))
        out = layer(x)
        out.square().mean().backward()

        return out.shape, float(x.grad.norm()), float(layer.experts.compute.down.grad.norm())


if __name__ == "__main__":
    for rank, (shape, x_norm, expert_norm) in enumerate(anyep.local_group(RANKS).run(rank_main)):
        print(f"rank {rank}: out {list(shape)}, |dL/dx| {x_norm:.4f}, |dL/d experts| {expert_norm:.4f}")
