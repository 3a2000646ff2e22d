"""Routing traces on file: recorded once, replayed by benchmarks.

``routing_trace`` is the trace itself, ``trace_npz`` the file's format. Legend: T tokens of a batch, K top-k, E experts.
"""

from __future__ import annotations

import os
from types import TracebackType

import numpy as np
import torch

from anyep.errors import ClosedError
from anyep.layout.routing_trace import (
    Choices,
    RankRouting,
    RoutingTrace,
    TraceEntry,
    Weights,
    check_range,
    check_shape,
    check_sizes,
    shipped_trace,
)
from anyep.layout.trace_npz import npz_path, rank_path

__all__ = ["RankRouting", "RoutingTrace", "TraceEntry", "TraceRecorder", "shipped_trace"]


class TraceRecorder:
    """Collects the routing of one rank's batches in memory; :meth:`close` writes the file.

    ``rank`` None writes ``path`` itself; a rank's number goes into the name (``trace.npz``, 3: ``trace.rank3.npz``), so
    that all ranks of a job can be given one path. Entry n counts as layer ``n % num_layers`` of step
    ``n // num_layers`` unless ``add`` says otherwise.

    Raises ValueError for bad sizes or a path that does not end in .npz, FileNotFoundError for a missing directory, all
    before anything was recorded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_experts: int,
        num_topk: int,
        rank: int | None = None,
        num_layers: int = 1,
        description: str = "",
    ) -> None:
        check_sizes(num_experts, num_topk)
        if num_layers < 1 or (rank is not None and rank < 0):
            raise ValueError(f"num_layers must be at least 1 and rank at least 0, got {num_layers} and {rank}")
        file = npz_path(path)
        if not file.parent.is_dir():
            raise FileNotFoundError(f"cannot record a routing trace at {file}: there is no directory {file.parent}")
        self.path = file if rank is None else rank_path(file, rank)
        self._num_experts = num_experts
        self._num_topk = num_topk
        self._rank = rank or 0
        self._num_layers = num_layers
        self._description = description
        self._entries: list[TraceEntry] = []
        self._closed = False

    def add(
        self,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        *,
        layer: int | None = None,
        step: int | None = None,
    ) -> None:
        """Copy one batch: ``topk_idx`` int32 or int64 [T, K], ``topk_weights`` floating [T, K].

        None for weights means 1 where an expert is. Raises TypeError for other dtypes, ValueError for a wrong shape or
        an expert outside [-1, E), ClosedError after :meth:`close`.
        """
        if self._closed:
            raise ClosedError(f"the recorder of {self.path} is closed; add came after close")
        idx = _recorded_idx(topk_idx, self._num_experts, self._num_topk)
        weights = _recorded_weights(topk_weights, idx)
        count = len(self._entries)
        self._entries.append(
            TraceEntry(
                layer=count % self._num_layers if layer is None else layer,
                step=count // self._num_layers if step is None else step,
                rank=self._rank,
                topk_idx=idx,
                topk_weights=weights,
            )
        )

    def trace(self) -> RoutingTrace:
        """Return what was recorded so far."""
        return RoutingTrace(
            num_experts=self._num_experts,
            num_topk=self._num_topk,
            entries=tuple(self._entries),
            description=self._description,
        )

    def close(self) -> None:
        """Write the file. Idempotent. Raises OSError when that fails; :meth:`trace` still has everything."""
        if not self._closed:
            self._closed = True
            self.trace().save(self.path)

    def __enter__(self) -> TraceRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _recorded_idx(topk_idx: torch.Tensor, num_experts: int, num_topk: int) -> Choices:
    if topk_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_idx must be int32 or int64, got {topk_idx.dtype}")
    given = topk_idx.detach().cpu().numpy()
    check_shape("topk_idx", given, (None, num_topk))
    check_range("topk_idx", given, num_experts)
    return given.astype(np.int32)


def _recorded_weights(topk_weights: torch.Tensor | None, idx: Choices) -> Weights:
    if topk_weights is None:
        return (idx >= 0).astype(np.float16)
    if not topk_weights.is_floating_point():
        raise TypeError(f"topk_weights must be floating point, got {topk_weights.dtype}")
    weights: Weights = topk_weights.detach().to("cpu", torch.float16, copy=True).numpy()
    check_shape("topk_weights", weights, idx.shape)
    return weights
