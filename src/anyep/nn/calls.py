"""Dispatch and combine with gradients, as a caller sees them.

Legend: T tokens of this rank, H hidden, K top-k, N received rows, L local experts, G scale groups (ceil(H / 128)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch

from anyep.buffer import Buffer
from anyep.exchange.arguments import check_choice, dtype_text
from anyep.exchange.handle import Combined
from anyep.nn import replay, travel
from anyep.nn.pair import BufferPair, as_pair
from anyep.nn.travel import Departure, Way

LAYOUTS = ("expert", "compact")
_HOLDS = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}
"""dtypes whose every value a gradient's dtype has too"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A received batch of N rows, through which gradients find their way back."""

    x: torch.Tensor
    """[N, H] in the wire's dtype; bfloat16 for fp8, dequantised, as if quantising were the identity"""
    topk_idx: torch.Tensor
    """[N, K] local expert, or -1 in a column that this row does not serve"""
    topk_weights: torch.Tensor | None
    """[N, K] fp32, 0 where topk_idx is -1; None if none were sent"""
    counts: list[int]
    """[L] rows of each local expert, without padding"""
    quantised: tuple[torch.Tensor, torch.Tensor] | None
    """fp8 only: the rows as they came, (float8_e4m3fn [N, H], scales [N, G]); no gradient passes through them"""
    way: Way
    """for :func:`combine`, and for :func:`dispatch` the same way again"""

    @property
    def layout(self) -> str:
        """``"compact"`` or ``"expert"``: that of the dispatch."""
        return self.way.handle.layout

    @property
    def group_sizes(self) -> list[int]:
        """[L] rows of each local expert's group in the expert layout, with the padding of ``expert_alignment``."""
        step = self.way.pair.forward.options.expert_alignment
        return [-(-count // step) * step for count in self.counts]

    def row_weights(self) -> torch.Tensor:
        """Return the weight of each row of the expert layout, fp32 [N]: the one that is not 0. ValueError otherwise."""
        if self.topk_weights is None or self.layout != "expert":
            raise ValueError(
                "rows have a weight each in layout='expert' with topk_weights; this batch was dispatched with "
                f"layout={self.layout!r} {'without' if self.topk_weights is None else 'with'} topk_weights"
            )
        return self.topk_weights.sum(dim=1)


def dispatch(
    ep: Buffer | BufferPair,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    *,
    way: Way | None = None,
    layout: str = "expert",
    reduce: str | None = None,
) -> Batch:
    """Send each token to the ranks that own its experts; gradients of rows and weights come back as their sums.

    ``x`` [T, H] in the wire's dtype (for fp8 bfloat16, float16 or float32), ``topk_idx`` [T, K] int32 or int64, -1 for
    none, ``topk_weights`` fp32 [T, K]: as :meth:`anyep.Buffer.dispatch`, but for strides, which may be any. ``way`` of
    an earlier batch sends along it, without layout and counts; ``topk_idx`` must be what it was dispatched with.

    ``reduce`` is how combine, and the gradient of dispatch, sum a token's rows: in top-k order (``"expert"``, the
    default of the expert layout, the same bits for every number of ranks) or by rank (``"rank"``).

    Collective, and in grad mode its backward is too: every rank then has to go backward through the batch. Raises what
    :meth:`anyep.Buffer.dispatch` does; in backward PeerLost or PeerTimeout where a rank does not come, and ClosedError
    after the buffer was closed.
    """
    pair = as_pair(ep)
    for name, tensor in (("x", x), ("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        _check_is_tensor(name, tensor, optional=name == "topk_weights")
    check_choice("layout", layout, LAYOUTS)
    how = check_choice("reduce", reduce or ("expert" if layout == "expert" else "rank"), ("rank", "expert"))
    if how == "expert" and layout == "compact":
        raise ValueError("reduce='expert' needs layout='expert', which has a row for each (token, expert)")
    if way is not None:
        _check_way(pair, way, topk_idx, layout)
    known = replay.next_way(pair, topk_idx, layout) if way is None else way
    handle = None if known is None else known.handle
    departure = Departure(pair=pair, topk_idx=topk_idx, handle=handle, layout=layout, reduce=how)
    rows, row_weights, arrival = travel.send(x, topk_weights, departure)
    if known is None:
        replay.remember(arrival.way)
    else:
        arrival.way.gradient_handle = known.gradient_handle
    return Batch(
        x=rows,
        topk_idx=arrival.topk_idx,
        topk_weights=row_weights,
        counts=arrival.counts,
        quantised=arrival.quantised,
        way=arrival.way,
    )


@overload
def combine(y: torch.Tensor, batch: Batch, *, topk_weights: None = None) -> torch.Tensor: ...


@overload
def combine(y: torch.Tensor, batch: Batch, *, topk_weights: torch.Tensor) -> Combined: ...


def combine(y: torch.Tensor, batch: Batch, *, topk_weights: torch.Tensor | None = None) -> torch.Tensor | Combined:
    """Bring the experts' outputs back and sum them; the gradient of each sum goes to all of its rows.

    ``y`` [N, H], rows as in ``batch``, any strides; in a dtype whose gradients the pair's gradient wire can hold.
    ``topk_weights`` fp32 [N, K] travel back beside them where a row serves their column; then the result is a Combined.
    Several combines may follow one dispatch. Collective, in backward too, as :func:`dispatch`.

    Raises TypeError for a dtype with which gradients would lose bits, and what :meth:`anyep.Buffer.combine` does.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"batch must be what anyep.nn.dispatch returned, got {type(batch).__name__}")
    _check_is_tensor("y", y)
    _check_is_tensor("topk_weights", topk_weights, optional=True)
    way = batch.way
    if torch.is_grad_enabled():
        _check_dtype(way.pair, y)
    sums, weights = travel.gather(y, topk_weights, way, tie=batch.x)
    return sums if weights is None else Combined(x=sums, topk_weights=weights)


def _check_is_tensor(name: str, value: object, *, optional: bool = False) -> None:
    """Raise TypeError for what has no strides to be made dense; the buffer looks at the rest."""
    if not isinstance(value, torch.Tensor) and not (optional and value is None):
        raise TypeError(f"{name} must be a torch.Tensor{' or None' if optional else ''}, got {type(value).__name__}")


def _check_dtype(pair: BufferPair, y: torch.Tensor) -> None:
    fits = _HOLDS[pair.gradient_dtype]
    if y.dtype not in fits:
        raise TypeError(
            f"y must be {dtype_text(*fits)}, got {dtype_text(y.dtype)}: its gradient would travel as "
            f"{dtype_text(pair.gradient_dtype)} and lose bits. Cast y, or open the pair with gradient_wire='fp32'"
        )


def _check_way(pair: BufferPair, way: Way, topk_idx: torch.Tensor, layout: str) -> None:
    if way.pair.forward is not pair.forward or way.pair.gradients is not pair.gradients:
        raise ValueError("way was made by another pair of buffers; pass the way of a batch of this one")
    if way.handle.layout != layout:
        raise ValueError(f"way's layout is {way.handle.layout!r}, but layout={layout!r} was asked for")
    if not way.leads(topk_idx):
        raise ValueError("topk_idx is not what way was dispatched with; leave way out to send tokens elsewhere")
