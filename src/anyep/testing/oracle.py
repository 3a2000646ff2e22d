"""The whole exchange in one process, slow and obvious: what every rank must receive, and what it must get back.

Legend: T tokens of a rank, H hidden, K top-k, E experts, R ranks, N received rows.

Nothing here is shared with the code it judges, but for rounding and FP8 (:mod:`anyep.numerics`), which have their own
tests. Rows are asked for by number (:data:`RowSource`), so that large exchanges can be judged piece by piece.

>>> exchange = Exchange(
...     routing=[Routing(topk_idx=torch.tensor([[0, 3], [1, 0], [-1, 2]])), Routing(topk_idx=torch.tensor([[3, 3]]))],
...     expert_rank=[0, 0, 1, 1],
... )
>>> there = exchange.arrivals[1]
>>> there.source.tolist(), there.token.tolist(), there.topk_idx.tolist(), there.counts
([0, 0, 1], [0, 2, 0], [[-1, 1], [-1, 0], [1, 1]], [1, 3])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from anyep.layout.hosts import HostMap
from anyep.numerics.formats import ScaleFormat
from anyep.numerics.fp8 import quantise_fp8
from anyep.numerics.rounding import round_to

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
RowSource = Callable[[int, torch.Tensor], Rows]
"""(rank, row numbers int64 [n]) -> rows [n, H]; or for FP8 that is quantised already: (rows, scales)."""

SCALE_FORMATS = {"fp32": ScaleFormat.FP32, "pow2": ScaleFormat.POWER_OF_TWO, "ue8m0": ScaleFormat.UE8M0}

PADDING = -1
"""Source and token of a row that nobody sent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """One rank's choice of experts."""

    topk_idx: torch.Tensor
    """[T, K], -1 is none"""
    topk_weights: torch.Tensor | None = None
    """[T, K] fp32"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrivals:
    """The rows that one rank receives, padding included."""

    source: torch.Tensor
    """[N] int64, the rank that sent it"""
    token: torch.Tensor
    """[N] int64, its number there"""
    column: torch.Tensor
    """[N] int64, the top-k column that the row serves; -1 in the compact layout, where it serves several"""
    topk_idx: torch.Tensor
    """[N, K] local expert, or -1; dtype of the input"""
    topk_weights: torch.Tensor | None
    """[N, K] fp32, 0 beside -1"""
    counts: list[int]
    """(token, column) pairs of each local expert"""

    @property
    def num_rows(self) -> int:
        return len(self.source)


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """Every rank's routing, and where the experts live."""

    routing: Sequence[Routing]
    expert_rank: Sequence[int]
    """[E], the rank that owns each expert; a rank numbers its own from 0 in ascending order"""
    layout: str = "compact"
    expert_alignment: int = 1
    static_rows: int | None = None
    block_rows: int = 0
    """padded layout: rows of each expert's block"""

    @property
    def num_ranks(self) -> int:
        return len(self.routing)

    @cached_property
    def arrivals(self) -> list[Arrivals]:
        """What each rank receives. ValueError if a rank needs more than ``static_rows``."""
        receive = {"compact": self._compact, "expert": self._by_expert, "padded": self._by_expert}[self.layout]
        return [self._with_tail(receive(rank)) for rank in range(self.num_ranks)]

    def local_experts(self, rank: int) -> list[int]:
        """Return the experts of ``rank``; the position in the list is the local index."""
        return [expert for expert, owner in enumerate(self.expert_rank) if owner == rank]

    def _compact(self, rank: int) -> Arrivals:
        """Each token once, in the order (source rank, source token)."""
        mine = torch.tensor(self.local_experts(rank), dtype=torch.int64)
        pieces = []
        for source, routing in enumerate(self.routing):
            serves_TK = torch.isin(routing.topk_idx.long(), mine)
            token = serves_TK.any(dim=1).nonzero().flatten()
            column = torch.full_like(token, -1)
            pieces.append(self._piece(rank, source, token, column, serves_TK[token]))
        return self._joined(rank, pieces)

    def _by_expert(self, rank: int) -> Arrivals:
        """One row for each (token, column), grouped by expert and padded, in the order (source rank, token, column)."""
        pieces = []
        for expert in self.local_experts(rank):
            num_rows = 0
            for source, routing in enumerate(self.routing):
                token, column = (routing.topk_idx == expert).nonzero(as_tuple=True)
                serves_NK = torch.zeros(len(token), routing.topk_idx.shape[1], dtype=torch.bool)
                serves_NK[torch.arange(len(token)), column] = True
                pieces.append(self._piece(rank, source, token, column, serves_NK))
                num_rows += len(token)
            pieces.append(self._padding(-num_rows % (self.block_rows or self.expert_alignment)))
            if self.block_rows and not num_rows:
                pieces.append(self._padding(self.block_rows))
        return self._joined(rank, pieces)

    def _piece(
        self, rank: int, source: int, token: torch.Tensor, column: torch.Tensor, serves_NK: torch.Tensor
    ) -> Arrivals:
        routing = self.routing[source]
        local_E = torch.full((len(self.expert_rank) + 1,), -1)
        local_E[self.local_experts(rank)] = torch.arange(len(self.local_experts(rank)))
        idx = routing.topk_idx[token].long()
        local = torch.where(serves_NK, local_E[idx], -1).to(routing.topk_idx.dtype)
        weights = None
        if routing.topk_weights is not None:
            weights = torch.where(serves_NK, routing.topk_weights[token], 0.0)
        return Arrivals(
            source=torch.full_like(token, source),
            token=token,
            column=column,
            topk_idx=local,
            topk_weights=weights,
            counts=[],
        )

    def _padding(self, num_rows: int) -> Arrivals:
        like = self.routing[0]
        nobody = torch.full((num_rows,), PADDING, dtype=torch.int64)
        num_topk = like.topk_idx.shape[1]
        return Arrivals(
            source=nobody,
            token=nobody,
            column=nobody,
            topk_idx=torch.full((num_rows, num_topk), -1, dtype=like.topk_idx.dtype),
            topk_weights=None if like.topk_weights is None else torch.zeros(num_rows, num_topk),
            counts=[],
        )

    def _joined(self, rank: int, pieces: list[Arrivals]) -> Arrivals:
        pieces = [self._padding(0), *pieces]
        weights = [piece.topk_weights for piece in pieces if piece.topk_weights is not None]
        return Arrivals(
            source=torch.cat([piece.source for piece in pieces]),
            token=torch.cat([piece.token for piece in pieces]),
            column=torch.cat([piece.column for piece in pieces]),
            topk_idx=torch.cat([piece.topk_idx for piece in pieces]),
            topk_weights=torch.cat(weights) if weights else None,
            counts=[
                sum(int((routing.topk_idx == expert).sum()) for routing in self.routing)
                for expert in self.local_experts(rank)
            ],
        )

    def _with_tail(self, arrivals: Arrivals) -> Arrivals:
        if self.static_rows is None:
            return arrivals
        if arrivals.num_rows > self.static_rows:
            raise ValueError(f"{arrivals.num_rows} rows arrive and static_rows is {self.static_rows}")
        tail = self._padding(self.static_rows - arrivals.num_rows)
        return replace(self._joined(0, [arrivals, tail]), counts=arrivals.counts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """Rows of one destination rank that are added to tokens of their source."""

    destination: int
    column: int
    """the top-k column that they serve; -1 in the compact layout"""
    token: torch.Tensor
    """[n] int64, each at most once"""
    row: torch.Tensor
    """[n] int64, where they lie at the destination"""

    def of_tokens(self, first: int, last: int) -> Term:
        """Return the part that belongs to tokens [first, last)."""
        inside = (self.token >= first) & (self.token < last)
        return Term(destination=self.destination, column=self.column, token=self.token[inside], row=self.row[inside])


def expected_rows(arrivals: Arrivals, sent: RowSource, *, wire: str, scales: str = "fp32", rows: slice) -> Rows:
    """Return what must lie in rows ``rows`` of a received batch: x, or for the wire ``"fp8"`` (x, scales).

    ``sent`` gives the rows that a rank sent; it must know at least one row. Padding is zeros.
    """
    source, token = arrivals.source[rows], arrivals.token[rows]
    template = _on_wire(sent(0, torch.zeros(0, dtype=torch.int64)), wire, scales)
    out = tuple(torch.zeros(len(source), part.shape[1], dtype=part.dtype) for part in template)
    for rank in range(int(source.max()) + 1 if len(source) else 0):
        here = (source == rank).nonzero().flatten()
        for target, part in zip(out, _on_wire(sent(rank, token[here]), wire, scales), strict=True):
            as_bytes(target)[here] = as_bytes(part)
    return out[0] if len(out) == 1 else (out[0], out[1])


def _on_wire(rows: Rows, wire: str, scales: str) -> tuple[torch.Tensor, ...]:
    if isinstance(rows, tuple):
        return rows
    if wire != "fp8":
        return (rows,)
    return quantise_fp8(rows, SCALE_FORMATS[scales])


def expected_sum(
    exchange: Exchange,
    rank: int,
    outputs: RowSource,
    *,
    dtype: torch.dtype,
    reduce: str = "rank",
    bias: Sequence[torch.Tensor] = (),
    factors: torch.Tensor | None = None,
    tokens: slice = slice(None),
    hosts: HostMap | None = None,
) -> torch.Tensor:
    """Return what combine must give ``rank`` for ``tokens``: biases, then rows one by one in fp32, rounded once.

    ``outputs`` gives rows of a rank's expert output [N, H] (or of anything else that lies beside them). The order is by
    rank and then top-k column (``reduce="rank"``), or by column (``"expert"``). ``factors`` fp32 [T, K]: each row is
    multiplied by its token's number of its column, and that product rounded to fp32, before it is added. ``hosts``:
    with ``reduce="rank"`` a token's rows of another host become one row there, rounded, which is added in their place.
    """
    first, last, _ = tokens.indices(len(exchange.routing[rank].topk_idx))
    like = outputs(0, torch.zeros(0, dtype=torch.int64))
    assert isinstance(like, torch.Tensor)
    sums = _Sums(last - first, like.shape[1])
    for addend in bias:
        sums.add(torch.arange(last - first), addend[first:last].float())

    def add_to(target: _Sums, of: Iterable[Term]) -> None:
        for term in (one.of_tokens(first, last) for one in of):
            rows = outputs(term.destination, term.row)
            assert isinstance(rows, torch.Tensor)
            addends = rows.float()
            if factors is not None:
                addends = addends * factors[term.token, term.column][:, None]
            target.add(term.token - first, addends)

    for summed, of_host in _by_host(exchange, rank, hosts, reduce=reduce):
        if not summed:
            add_to(sums, of_host)
            continue
        partial = _Sums(last - first, like.shape[1])
        add_to(partial, of_host)
        there = partial.begun.nonzero().flatten()
        sums.add(there, round_to(partial.total[there], dtype).float())
    return round_to(torch.where(sums.begun[:, None], sums.total, 0.0), dtype)


class _Sums:
    """Rows that are added up in fp32, one by one."""

    def __init__(self, num_tokens: int, width: int) -> None:
        # -0.0 is the neutral element of addition: a sum that begins with it is its first term, bit for bit
        self.total = torch.full((num_tokens, width), -0.0)
        self.begun = torch.zeros(num_tokens, dtype=torch.bool)

    def add(self, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        self.total.index_add_(0, tokens, rows)
        self.begun[tokens] = True


def _by_host(
    exchange: Exchange, rank: int, hosts: HostMap | None, *, reduce: str
) -> Iterator[tuple[bool, Iterable[Term]]]:
    """Yield terms in the order of addition, and whether they travel as one rounded row a token.

    Another host's row stands where its first rank would. In the padded layout rows cross one by one: a neighbour's by
    rank, then each other host's by column.
    """
    if hosts is None or hosts.num_hosts == 1 or reduce == "expert":
        yield False, terms(exchange, rank, reduce=reduce)
        return
    own = int(hosts.host_R[rank])
    if exchange.layout != "padded":
        every = list(terms(exchange, rank, reduce=reduce))
        for destination, host in enumerate(hosts.host_R.tolist()):
            if host == own:
                yield False, (t for t in every if t.destination == destination)
            elif destination == hosts.members[host][0]:
                yield True, (t for t in every if hosts.host_R[t.destination] == host)
        return
    yield False, (t for t in terms(exchange, rank, reduce="rank") if t.destination in hosts.members[own])
    for host, members in enumerate(hosts.members):
        if host != own:
            yield False, (t for t in terms(exchange, rank, reduce="expert") if t.destination in members)


def terms(exchange: Exchange, rank: int, *, reduce: str = "rank") -> Iterator[Term]:
    """Yield what combine adds for ``rank``, in the order of addition; no token stands twice in one term."""
    num_topk = exchange.routing[rank].topk_idx.shape[1]
    columns = [-1] if exchange.layout == "compact" else list(range(num_topk))
    ranks = range(exchange.num_ranks)
    by_rank = [(destination, column) for destination in ranks for column in columns]
    by_column = [(destination, column) for column in columns for destination in ranks]
    for destination, column in by_rank if reduce == "rank" else by_column:
        there = exchange.arrivals[destination]
        row = ((there.source == rank) & (there.column == column)).nonzero().flatten()
        yield Term(destination=destination, column=column, token=there.token[row], row=row)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a 2-D tensor's bytes, uint8 [rows, row bytes]: the view in which equal means bit for bit."""
    return tensor.view(torch.uint8)
