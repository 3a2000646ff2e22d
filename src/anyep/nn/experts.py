"""The experts of a rank at work: tokens come, experts compute, weighted sums go back.

Legend: T tokens of this rank, H hidden, K top-k, N received rows, L local experts, W width of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from anyep.buffer import Buffer
from anyep.exchange.arguments import check_integer, shape_text
from anyep.nn.calls import Batch, combine, dispatch
from anyep.nn.pair import BufferPair, as_pair

Compute = Callable[[Batch], torch.Tensor]
"""Rows of a batch in the expert layout -> outputs [N, H], rows in the same order."""

_GROUPED_ALIGNMENT_BYTES = 16
"""torch's grouped product takes matrices whose rows begin at multiples of this"""


class Experts(torch.nn.Module):
    """Computes sum over k of topk_weights[t, k] * expert(topk_idx[t, k])(x[t]) on the ranks that own the experts.

    The hook for layers that have a gate already: put it where they compute their experts. ``experts``: a sequence of L
    modules, this rank's experts in the order of ``ep.local_experts``; or one module or function for all of them, from a
    :class:`Batch` (in the expert layout) to [N, H].

    ``reduce="expert"`` sums a token's rows in top-k order, the same bits for every number of ranks; ``"rank"`` by rank.
    Raises ValueError where ``experts`` are not as many as this rank owns.
    """

    def __init__(
        self,
        ep: Buffer | BufferPair,
        experts: Sequence[torch.nn.Module] | torch.nn.ModuleList | torch.nn.Module | Compute,
        *,
        reduce: str = "expert",
    ) -> None:
        super().__init__()
        self.ep = as_pair(ep)
        self.reduce = reduce
        self.compute: Compute
        if isinstance(experts, (Sequence, torch.nn.ModuleList)):
            self.compute = ExpertList(self.ep, experts)
        else:
            self.compute = experts

    def forward(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """``x`` [T, H], ``topk_idx`` [T, K], ``topk_weights`` [T, K] of any float dtype -> [T, H] in x's dtype.

        Rows travel and return in the pair's dtype, to which ``x`` is cast; weights are fp32. Collective, as
        :func:`anyep.nn.dispatch` and its backward, with the same errors.
        """
        batch = dispatch(self.ep, x.to(self.ep.dtype), topk_idx, topk_weights.float(), reduce=self.reduce)
        y = self.compute(batch)
        if y.shape != batch.x.shape:
            raise ValueError(
                f"experts must return [N, hidden] = {shape_text(batch.x.shape)}, one row for each they got, "
                f"got {shape_text(y.shape)}"
            )
        weighted = (y * batch.row_weights().unsqueeze(1)).to(self.ep.dtype)
        return combine(weighted, batch).to(x.dtype)

    def extra_repr(self) -> str:
        sizes = self.ep.forward.options
        return f"rank {self.ep.rank} of {self.ep.num_ranks}, wire={sizes.wire!r}, reduce={self.reduce!r}"


class ExpertList(torch.nn.Module):
    """Any modules as experts, one after the other: each takes its rows [n, H] and returns as many.

    An expert without rows computes on none, so that its parameters have gradients (zeros) on every rank and in every
    step, which optimisers and wrappers rely on.
    """

    def __init__(self, ep: BufferPair, experts: Sequence[torch.nn.Module] | torch.nn.ModuleList) -> None:
        super().__init__()
        if len(experts) != len(ep.local_experts):
            raise ValueError(
                f"rank {ep.rank} owns the {len(ep.local_experts)} experts {ep.local_experts}, got {len(experts)}: "
                "pass [make(expert) for expert in ep.local_experts]"
            )
        self.experts = torch.nn.ModuleList(experts)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Rows of the expert layout -> [N, H]."""
        sizes = batch.group_sizes
        parts = torch.split(batch.x, [*sizes, len(batch.x) - sum(sizes)])
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=False)]
        return torch.cat([*(y.to(batch.x.dtype) for y in outputs), torch.zeros_like(parts[-1])])

    def extra_repr(self) -> str:
        return "one after the other"


class GroupedMLP(torch.nn.Module):
    """This rank's experts as SwiGLU layers of width W: down(silu(gate(x)) * up(x)), all experts in three products.

    ``gate_up`` [L, H, 2 W] and ``down`` [L, W, H]. ``product``: "grouped" is torch.nn.functional.grouped_mm, "loop"
    a product for each expert, None the first where it is possible: a torch that has it, and H and W whose rows are
    multiples of 16 bytes. ``extra_repr`` tells which. Raises ValueError where "grouped" is asked for and impossible.

    ``seed``: expert e is filled from a generator seeded with (seed, e), so that it is the same for every number of
    ranks; None takes torch's own.
    """

    def __init__(
        self,
        ep: Buffer | BufferPair,
        *,
        width: int,
        product: str | None = None,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.ep = as_pair(ep)
        self.width = check_integer("width", width, at_least=1)
        hidden, local = self.ep.forward.options.hidden, len(self.ep.local_experts)
        self.gate_up = torch.nn.Parameter(torch.empty(local, hidden, 2 * width, dtype=dtype))
        self.down = torch.nn.Parameter(torch.empty(local, width, hidden, dtype=dtype))
        self.product, self.reason = _choose_product(product, self.ep.dtype, hidden, width)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Fill with normal numbers of variance 1 / inputs; each expert from its own generator if there is a seed."""
        for local, expert in enumerate(self.ep.local_experts):
            generator = None if seed is None else torch.Generator().manual_seed((seed << 20) + expert)
            for weights in (self.gate_up[local], self.down[local]):
                weights.normal_(0, 1 / math.sqrt(weights.shape[0]), generator=generator)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Rows of the expert layout -> [N, H]."""
        sizes = batch.group_sizes
        used = sum(sizes)
        gate, up = self._multiply(batch.x[:used], self.gate_up, sizes).chunk(2, dim=1)
        y = self._multiply(functional.silu(gate) * up, self.down, sizes)
        return y if used == len(batch.x) else functional.pad(y, (0, 0, 0, len(batch.x) - used))

    def _multiply(self, rows: torch.Tensor, weights: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        if self.product == "loop" or not len(rows):
            parts = [part @ one.to(part.dtype) for part, one in zip(torch.split(rows, sizes), weights, strict=True)]
            return torch.cat(parts) if parts else rows.new_zeros(0, weights.shape[2])
        ends = torch.tensor(sizes, device=rows.device).cumsum(0).to(torch.int32)
        product = functional.grouped_mm(rows.contiguous(), weights.to(rows.dtype), offs=ends)
        if product.requires_grad:  # its backward refuses strides of 0, such as those of an expanded gradient
            product.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]  # torch gives it no types
        return product

    def extra_repr(self) -> str:
        return f"{len(self.ep.local_experts)} experts of width {self.width}, product={self.product!r} ({self.reason})"


def _choose_product(asked: str | None, dtype: torch.dtype, hidden: int, width: int) -> tuple[str, str]:
    """Return "grouped" or "loop", and why."""
    if asked not in (None, "grouped", "loop"):
        raise ValueError(f"product must be 'grouped', 'loop' or None, got {asked!r}")
    if asked == "loop":
        return "loop", "asked for"
    obstacle = _obstacle(dtype, hidden, width)
    if obstacle is None:
        return "grouped", "torch.nn.functional.grouped_mm"
    if asked == "grouped":
        raise ValueError(f"product='grouped' is impossible: {obstacle}; use product='loop'")
    return "loop", obstacle


def _obstacle(dtype: torch.dtype, hidden: int, width: int) -> str | None:
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    for name, size in (("hidden", hidden), ("width", width)):
        if size * dtype.itemsize % _GROUPED_ALIGNMENT_BYTES:
            return f"rows of {name}={size} {dtype} are no multiple of {_GROUPED_ALIGNMENT_BYTES} bytes"
    return None
