"""A Mixture-of-Experts layer whose experts live on all ranks.

Legend: T tokens of this rank, H hidden, K top-k, L local experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anyep.buffer import Buffer
from anyep.nn.experts import Compute, Experts
from anyep.nn.pair import BufferPair
from anyep.nn.router import Router, Routing


class MoE(torch.nn.Module):
    """Router, experts and an optional shared expert: the layer of section 2.1.2 of DeepSeek-V3, without the residual.

    ``experts``: as :class:`anyep.nn.Experts` takes them. ``shared``: a module [T, H] -> [T, H] that every rank holds
    a copy of, computed for all tokens. ``router``: a :class:`Router`, or any module [T, H] -> Routing.

    Parameters of ``router`` and ``shared`` must be alike on all ranks and their gradients summed
    (:func:`anyep.nn.sum_gradients` of :meth:`replicated_parameters`); those of experts are this rank's own. Raises
    ValueError where the router's sizes are not the buffer's.

    >>> from anyep import local_group, nn
    >>> def rank_main(member):
    ...     torch.manual_seed(0)
    ...     sizes = dict(hidden=8, num_experts=4, num_topk=2)
    ...     with nn.open_pair(member, max_tokens_per_rank=3, wire="fp32", **sizes) as ep:
    ...         layer = nn.MoE(ep, nn.Router(**sizes), nn.GroupedMLP(ep, width=4, seed=0))
    ...         layer(torch.ones(3, 8)).sum().backward()
    ...         return layer.router.weight.grad.shape
    >>> local_group(2).run(rank_main)
    [torch.Size([4, 8]), torch.Size([4, 8])]
    """

    def __init__(
        self,
        ep: Buffer | BufferPair,
        router: torch.nn.Module,
        experts: Sequence[torch.nn.Module] | torch.nn.ModuleList | torch.nn.Module | Compute,
        *,
        shared: torch.nn.Module | None = None,
        reduce: str = "expert",
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(ep, experts, reduce=reduce)
        self.shared = shared
        if isinstance(router, Router):
            self._check_sizes(router)

    def _check_sizes(self, router: Router) -> None:
        sizes = self.experts.ep.forward.options
        for name in ("hidden", "num_experts", "num_topk"):
            if getattr(router, name) != getattr(sizes, name):
                raise ValueError(
                    f"the router has {name}={getattr(router, name)}, but the buffer was made with "
                    f"{name}={getattr(sizes, name)}; make both alike"
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] to the same shape and dtype. Collective, in backward too."""
        x_TH = x.reshape(-1, x.shape[-1])
        routing: Routing = self.router(x_TH)
        out: torch.Tensor = self.experts(x_TH, routing.topk_idx, routing.topk_weights)
        if self.shared is not None:
            out = out + self.shared(x_TH)
        return out.view(x.shape)

    def replicated_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that every rank holds a copy of: all but the experts'."""
        own = {id(parameter) for parameter in self.experts.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]
