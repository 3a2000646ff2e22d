"""Sums over the ranks of a group, for what every rank holds a copy of: gradients of dense parameters, loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from anyep.transport.rendezvous import TorchRendezvous, find_rendezvous


class RankSum:
    """Sums a tensor over ranks, with the same bits on all of them. Making one is cheap; each call is collective.

    ``group`` as for :class:`anyep.Buffer`. torch.distributed's all_reduce does it where ``group`` is a process group.
    Elsewhere bytes are gathered and added in rank order: right, and slow (all ranks' tensors go to every rank, through
    torchrun's store for example), which is enough for loads and for small models.
    """

    def __init__(self, group: object) -> None:
        self._meeting = find_rendezvous(group)
        self._group: Any = group if isinstance(self._meeting, TorchRendezvous) else None
        self._reduces = isinstance(self._meeting, TorchRendezvous)

    @property
    def num_ranks(self) -> int:
        """R."""
        return self._meeting.size

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' ``tensor``, a CPU tensor of one shape and dtype on all ranks; a new tensor."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        if self._reduces:
            import torch.distributed as dist

            dist.all_reduce(total, group=self._group)
            return total
        pieces = self._meeting.allgather(total.reshape(-1).view(torch.uint8).numpy().tobytes())
        sizes = {len(piece) for piece in pieces}
        if sizes != {total.nbytes}:
            raise ValueError(
                f"all ranks must sum tensors of one size, this rank's has {total.nbytes} bytes, "
                f"others have {', '.join(str(size) for size in sorted(sizes - {total.nbytes}))}"
            )
        if not total.numel():
            return total
        copies = [torch.frombuffer(bytearray(piece), dtype=total.dtype).view_as(total) for piece in pieces]
        for copy in copies[1:]:
            copies[0] += copy
        return copies[0]


@torch.no_grad()
def sum_gradients(parameters: Iterable[torch.nn.Parameter], over_ranks: RankSum) -> None:
    """Replace each parameter's gradient by its sum over ranks, in one exchange for each dtype. Collective.

    For parameters that every rank holds a copy of: everything but experts, whose gradients are sums already, as
    combine's backward brings them the gradients of all ranks' tokens. A gradient that is None counts as zeros. Losses
    must be sums over tokens divided by a number that all ranks share (not each rank's own mean).
    """
    by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        flat = torch.cat(
            [
                (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)
                for parameter in group
            ]
        )
        totals = torch.split(over_ranks(flat), [parameter.numel() for parameter in group])
        for parameter, total in zip(group, totals, strict=True):
            parameter.grad = total.view(parameter.shape).clone()
