"""In which thread a backward pass exchanges: torch has one for each GPU, whoever calls backward."""

from __future__ import annotations

import torch

from anyep.buffer import Buffer
from anyep.errors import Unavailable


def check_backward_thread(ep: Buffer) -> None:
    """Raise Unavailable where an exchange in a backward pass would wait for one that is queued behind it.

    On a GPU torch runs every backward pass of a process in one thread. Ranks that are threads and share the GPU would
    take turns there, and the first would wait for the second's exchange until its time is up.
    """
    if ep.num_ranks > 1 and _shares_gpu(ep) and torch._C._is_multithreading_enabled():
        raise Unavailable(
            "ranks are threads that share a GPU, and torch runs all their backward passes in one thread, where one "
            "rank would wait for ever for the next; call backward in every rank within "
            "torch.autograd.set_multithreading_enabled(False), or give each rank a process and a GPU"
        )


def _shares_gpu(ep: Buffer) -> bool:
    return ep._end.where.type == "cuda" and "inprocess" in ep._end.transport.name
