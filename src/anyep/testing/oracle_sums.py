"""What combine must give back, slow and obvious: rows one by one, in the order of addition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from anyep.layout.hosts import HostMap
from anyep.numerics.rounding import round_to
from anyep.testing.oracle import Exchange, RowSource


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
