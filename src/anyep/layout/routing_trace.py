"""A routing trace: which experts real tokens chose.

``trace_npz`` has the file's format. Legend: T tokens of an entry, K top-k, E experts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.layout.trace_npz import TraceColumns, decode, encode, npz_path, rank_path, write_whole

SHIPPED = "stdlib-256x8.npz"
"""the trace that comes with the package"""
_MAX_EXPERTS = 2**31 - 1

Choices = NDArray[np.int32]
Weights = NDArray[np.float16]


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceEntry:
    """The routing of one batch of T tokens at one layer."""

    layer: int
    step: int
    rank: int
    topk_idx: Choices
    """[T, K], -1 where no expert was chosen"""
    topk_weights: Weights
    """[T, K]"""

    @property
    def num_tokens(self) -> int:
        return len(self.topk_idx)


@dataclass(frozen=True, kw_only=True, eq=False)
class RankRouting:
    """What one rank passes to a dispatch."""

    topk_idx: torch.Tensor
    """int64 [T, K], -1 where no expert was chosen"""
    topk_weights: torch.Tensor
    """fp32 [T, K]"""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Entries of one model, in the order in which they were recorded. Raises ValueError where they contradict it."""

    num_experts: int
    num_topk: int
    entries: tuple[TraceEntry, ...]
    description: str = ""

    def __post_init__(self) -> None:
        check_sizes(self.num_experts, self.num_topk)
        for number, entry in enumerate(self.entries):
            if min(entry.layer, entry.step, entry.rank) < 0:
                raise ValueError(
                    f"entry {number} has layer {entry.layer}, step {entry.step} and rank {entry.rank}; "
                    "none may be negative"
                )
            if entry.topk_idx.dtype != np.int32 or entry.topk_weights.dtype != np.float16:
                raise ValueError(
                    f"entry {number} has {entry.topk_idx.dtype} indices and {entry.topk_weights.dtype} weights, "
                    "expected int32 and float16"
                )
            check_shape(f"topk_idx of entry {number}", entry.topk_idx, (None, self.num_topk))
            check_shape(f"topk_weights of entry {number}", entry.topk_weights, entry.topk_idx.shape)
            check_range(f"topk_idx of entry {number}", entry.topk_idx, self.num_experts)

    def __repr__(self) -> str:
        return (
            f"<RoutingTrace: top-{self.num_topk} of {self.num_experts} experts, {self.num_tokens} tokens in "
            f"{len(self.entries)} entries, description {self.description!r}>"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all entries; a token counts once for each layer."""
        return sum(entry.num_tokens for entry in self.entries)

    @property
    def layers(self) -> tuple[int, ...]:
        """The recorded layers, ascending."""
        return tuple(sorted({entry.layer for entry in self.entries}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file at once or not at all. Raises ValueError unless ``path`` ends in .npz, and OSError."""
        write_whole(npz_path(path), encode(_columns(self)))

    @classmethod
    def load(cls, *paths: str | os.PathLike[str]) -> RoutingTrace:
        """Read one file, or several of one model as one trace.

        A ``trace.npz`` that does not exist stands for all ``trace.rank*.npz`` beside it, as ranks record them.
        Raises FileNotFoundError, and ValueError for a file that is no trace, is damaged, or contradicts the others.
        """
        files = [file for path in paths for file in _existing(Path(path))]
        if not files:
            raise ValueError("load needs at least one path of a routing trace")
        return _merged({str(file): _trace(file.read_bytes(), str(file)) for file in files})

    def batches(
        self, num_ranks: int, num_tokens: int, *, num_experts: int | None = None, num_topk: int | None = None
    ) -> list[RankRouting]:
        """Return each rank's routing of ``num_tokens`` tokens, the same on every call.

        The tokens of the lowest layer in the order of (step, rank) are dealt out in runs: the first ``num_tokens`` to
        rank 0, the next to rank 1. When a layer is used up the next one follows, and after the last the first again.
        With fewer ``num_topk`` than recorded a token keeps its first columns, unscaled.

        Raises ValueError when the trace was recorded with another number of experts or with fewer choices.
        """
        topk = self.num_topk if num_topk is None else num_topk
        self._check_request(self.num_experts if num_experts is None else num_experts, topk)
        if num_ranks < 1 or num_tokens < 0:
            raise ValueError(
                f"expected at least 1 rank and 0 tokens, got num_ranks={num_ranks}, num_tokens={num_tokens}"
            )
        idx_NK, weights_NK = self._first_tokens(num_ranks * num_tokens)
        rows_RT = (np.arange(num_ranks * num_tokens) % max(len(idx_NK), 1)).reshape(num_ranks, num_tokens)
        return [
            RankRouting(
                topk_idx=torch.from_numpy(idx_NK[rows_T, :topk].astype(np.int64)),
                topk_weights=torch.from_numpy(weights_NK[rows_T, :topk].astype(np.float32)),
            )
            for rows_T in rows_RT
        ]

    def _check_request(self, num_experts: int, num_topk: int) -> None:
        if num_experts != self.num_experts or not 1 <= num_topk <= self.num_topk:
            raise ValueError(
                f"asked for top-{num_topk} of {num_experts} experts, but this trace has top-{self.num_topk} of "
                f"{self.num_experts}; choices are recorded, not made up: ask for {self.num_experts} experts and at "
                f"most top-{self.num_topk}, or record another trace"
            )

    def _first_tokens(self, wanted: int) -> tuple[Choices, Weights]:
        """Return the first ``wanted`` tokens by (layer, step, rank), whole entries, or all where there are fewer."""
        found = 0
        taken: list[TraceEntry] = []
        for entry in sorted(self.entries, key=lambda entry: (entry.layer, entry.step, entry.rank)):
            if found >= wanted:
                break
            taken.append(entry)
            found += entry.num_tokens
        if wanted > 0 and found == 0:
            raise ValueError("this trace holds no tokens to replay")
        return _joined(taken, self.num_topk)


def shipped_trace() -> RoutingTrace:
    """Return the trace that comes with the package, top-8 of 256 experts; see docs/routing-traces.md."""
    return _trace((resources.files("anyep") / "traces" / SHIPPED).read_bytes(), SHIPPED)


def _columns(trace: RoutingTrace) -> TraceColumns:
    idx, weights = _joined(trace.entries, trace.num_topk)
    table = [(entry.layer, entry.step, entry.rank, entry.num_tokens) for entry in trace.entries]
    return TraceColumns(
        description=trace.description,
        num_experts=trace.num_experts,
        num_topk=trace.num_topk,
        table=np.array(table, np.int64).reshape(-1, 4),
        topk_idx=idx,
        topk_weights=weights,
    )


def _trace(content: bytes, name: str) -> RoutingTrace:
    columns = decode(content, name)
    ends = columns.table[:, 3].cumsum()
    entries = tuple(
        TraceEntry(
            layer=int(layer),
            step=int(step),
            rank=int(rank),
            topk_idx=columns.topk_idx[end - num_tokens : end],
            topk_weights=columns.topk_weights[end - num_tokens : end],
        )
        for (layer, step, rank, num_tokens), end in zip(columns.table, ends, strict=True)
    )
    try:
        return RoutingTrace(
            num_experts=columns.num_experts,
            num_topk=columns.num_topk,
            entries=entries,
            description=columns.description,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _merged(traces: Mapping[str, RoutingTrace]) -> RoutingTrace:
    first_name, first = next(iter(traces.items()))
    for name, trace in traces.items():
        if (trace.num_experts, trace.num_topk) != (first.num_experts, first.num_topk):
            raise ValueError(
                f"{name} has top-{trace.num_topk} of {trace.num_experts} experts, but {first_name} has "
                f"top-{first.num_topk} of {first.num_experts}; only files of one model make one trace"
            )
    return RoutingTrace(
        num_experts=first.num_experts,
        num_topk=first.num_topk,
        entries=tuple(entry for trace in traces.values() for entry in trace.entries),
        description="\n".join(dict.fromkeys(trace.description for trace in traces.values())),
    )


def _joined(entries: Sequence[TraceEntry], num_topk: int) -> tuple[Choices, Weights]:
    """Return the entries' indices and weights one after another, [N, K] each."""
    idx: list[Choices] = [np.empty((0, num_topk), np.int32), *(entry.topk_idx for entry in entries)]
    weights: list[Weights] = [np.empty((0, num_topk), np.float16), *(entry.topk_weights for entry in entries)]
    return np.concatenate(idx), np.concatenate(weights)


def _existing(file: Path) -> list[Path]:
    """Return the file, or those that the ranks of one job wrote in its place, by ascending rank."""
    if file.exists():
        return [file]
    pattern = re.compile(re.escape(file.stem) + r"\.rank(\d+)" + re.escape(file.suffix))
    siblings = file.parent.iterdir() if file.parent.is_dir() else ()
    ranks = sorted(int(found[1]) for path in siblings if (found := pattern.fullmatch(path.name)))
    if not ranks:
        raise FileNotFoundError(f"there is no routing trace {file}, and no {rank_path(file, '*').name} beside it")
    return [rank_path(file, rank) for rank in ranks]


def check_sizes(num_experts: int, num_topk: int) -> None:
    """Raise ValueError for sizes that no model has."""
    if not 1 <= num_experts <= _MAX_EXPERTS or num_topk < 1:
        raise ValueError(
            f"num_experts must be in [1, {_MAX_EXPERTS}] and num_topk at least 1, got {num_experts} and {num_topk}"
        )


def check_shape(what: str, array: NDArray[Any], shape: Sequence[int | None]) -> None:
    """Raise ValueError unless ``array`` has ``shape``; None in it stands for any size."""
    if array.ndim != len(shape) or any(
        size not in (None, found) for size, found in zip(shape, array.shape, strict=True)
    ):
        wanted = ", ".join("T" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} must have shape [{wanted}], got {list(array.shape)}")


def check_range(what: str, idx: NDArray[Any], num_experts: int) -> None:
    """Raise ValueError, with the place, for an expert of ``idx`` [T, K] outside [-1, E)."""
    if idx.size and (idx.min() < -1 or idx.max() >= num_experts):
        token, column = (int(at) for at in np.argwhere((idx < -1) | (idx >= num_experts))[0])
        raise ValueError(
            f"{what} names expert {int(idx[token, column])} at token {token}, column {column}; experts are 0 to "
            f"{num_experts - 1}, and -1 is none"
        )
