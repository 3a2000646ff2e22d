"""The arithmetic of a combine: every token's rows, read where they lie, summed once in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from anyep.exchange.groups import sum_by_groups
from anyep.exchange.wire import ELEMENTS

if TYPE_CHECKING:
    from anyep.exchange.combine_across import Entries
    from anyep.exchange.endpoint import Endpoint
    from anyep.exchange.returning import Returning


class _Sums(NamedTuple):
    """Addresses of a combine's inputs and outputs; 0 for what there is none of."""

    entries: tuple[int, int, int, int]
    """width, by rank or not, where ranks and rows of the entries lie"""
    rows_table: int
    weights_table: int
    factors_addr: int
    bias0_addr: int
    bias1_addr: int
    out_addr: int
    weights_addr: int


def add_tokens(end: Endpoint, back: Returning, entries: Entries, tables: Sequence[int], begin: int, last: int) -> None:
    """Sum the rows of tokens [begin, last) that ``entries`` name, in the peer tables of rows and of weights."""
    plan = back.handle.send
    weights = back.weights_out
    sums = _Sums(
        (plan.width, entries.by_rank, entries.rank_addr, entries.row_addr),
        tables[0],
        tables[1],
        0 if back.factors is None else back.factors.data_ptr(),
        back.bias[0].data_ptr() if back.bias else 0,
        back.bias[1].data_ptr() if len(back.bias) > 1 else 0,
        back.out.data_ptr(),
        0 if weights is None else weights.data_ptr(),
    )
    if back.way.group and end.across is None:
        sum_by_groups(end, back, tables[0], entries.row_addr)
        if sums.weights_addr:
            _add_weights(end, begin, last, sums)
    elif end.workers.num_threads == 1:
        _add_part(end, back, begin, last, sums)
    else:
        token_bytes = back.way.row_bytes * plan.width
        end.workers.over(last - begin, token_bytes, lambda a, b: _add_part(end, back, begin + a, begin + b, sums))


def _add_part(end: Endpoint, back: Returning, first: int, last: int, sums: _Sums) -> None:
    rest = (sums.rows_table, sums.factors_addr, sums.bias0_addr, sums.bias1_addr, sums.out_addr)
    if back.way.wire == "none":
        end.kernels.reduce(int(ELEMENTS[back.y.dtype]), end.hidden, first, last, *sums.entries, *rest)
    else:
        end.kernels.reduce_logfmt(end.hidden, first, last, *sums.entries, *rest)
    if sums.weights_addr:
        _add_weights(end, first, last, sums)
    end.kernels.fence()  # nobody else reads the sums, but the caller may hand them to another thread


def _add_weights(end: Endpoint, first: int, last: int, sums: _Sums) -> None:
    num_topk, table, out_addr = end.num_topk, sums.weights_table, sums.weights_addr
    end.kernels.reduce_weights(num_topk, first, last, *sums.entries, table, out_addr)
