"""The same work in torch's operations, as well as they do it: what is compared with, and checked against.

Which row goes where is worked out before, outside of the timing: in that torch's formulation is favoured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.work import Inputs, Work


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """What one rank sends one other: tokens ``token``, columns ``column``, become rows ``row`` there; [n] each."""

    source: int
    token: torch.Tensor
    column: torch.Tensor
    row: torch.Tensor


def pieces_of(work: Work, inputs: Inputs) -> list[list[Piece]]:
    """Return each rank's pieces in the order of its batch."""
    return [_pieces_of_rank(work, inputs, rank) for rank in range(work.ranks)]


def _pieces_of_rank(work: Work, inputs: Inputs, rank: int) -> list[Piece]:
    local = work.experts // work.ranks
    pieces, filled = [], torch.zeros(local, dtype=torch.int64, device=inputs.x[0].device)
    begin = 0
    for source, idx in enumerate(inputs.topk_idx):
        here = (idx >= rank * local) & (idx < (rank + 1) * local)
        if work.layout == "compact":
            token = here.any(dim=1).nonzero().flatten()
            row = begin + torch.arange(len(token), device=idx.device)
            column = torch.zeros_like(token)
            begin += len(token)
        else:
            token, column = here.nonzero(as_tuple=True)
            expert = idx[token, column] - rank * local
            one_hot = torch.nn.functional.one_hot(expert, local)
            row = (
                expert * work.ranks * work.tokens
                + filled[expert]
                + (one_hot.cumsum(0) - 1)[torch.arange(len(expert), device=idx.device), expert]
            )
            filled = filled + one_hot.sum(dim=0)
        pieces.append(Piece(source=source, token=token, column=column, row=row))
    return pieces


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP8 E4M3 as bytes [T, H] and fp32 scales [T, H / 128], by true divisions."""
    groups = x.float().view(x.shape[0], -1, 128)
    amax = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-4)
    q = (groups * (torch.full_like(amax, 448.0) / amax)).to(torch.float8_e4m3fn)
    return q.view(torch.uint8).view(x.shape), (amax / torch.full_like(amax, 448.0)).squeeze(2)


def dispatch(inputs: Inputs, pieces: list[list[Piece]], out: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Fill every rank's bytes [N, H] and scales [N, G]."""
    quantised = [quantise(x) for x in inputs.x]
    for own, (q_out, scales_out) in zip(pieces, out, strict=True):
        for piece in own:
            q, scales = quantised[piece.source]
            q_out.index_copy_(0, piece.row, q.index_select(0, piece.token))
            scales_out.index_copy_(0, piece.row, scales.index_select(0, piece.token))


def combine(
    work: Work, inputs: Inputs, pieces: list[list[Piece]], outputs: list[torch.Tensor], *, by_column: bool
) -> list[torch.Tensor]:
    """Return every rank's sums, BF16 [T, H]: in the order of ranks, or weighted in that of columns."""
    sums = []
    for rank in range(work.ranks):
        total = torch.full((work.tokens, work.hidden), -0.0, device=inputs.x[0].device)
        mine = [(owner[rank], y) for owner, y in zip(pieces, outputs, strict=True)]
        if not by_column:
            for piece, y in mine:
                total.index_add_(0, piece.token, y.index_select(0, piece.row).float())
        else:
            _add_by_column(work, inputs.topk_weights[rank], mine, total)
        sums.append(total.bfloat16())
    return sums


def _add_by_column(
    work: Work, weights: torch.Tensor, mine: list[tuple[Piece, torch.Tensor]], total: torch.Tensor
) -> None:
    rows = torch.empty(work.topk, work.tokens, work.hidden, dtype=torch.bfloat16, device=total.device)
    for piece, y in mine:
        rows[piece.column, piece.token] = y.view(-1, work.hidden).index_select(0, piece.row)
    for column in range(work.topk):
        total += rows[column].float() * weights[:, column, None]
