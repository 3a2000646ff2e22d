"""Which rows a token's sum takes where some of its ranks live on other hosts."""

from __future__ import annotations

import numpy as np
import pytest

from anyep.exchange.setup import load_books
from anyep.machine.addresses import address_of


def folded(
    entries: list[tuple[int, int]], host_R: list[int], *, own_host: int = 0, each: int = 0, by_order: int = 0
) -> list:
    """Return the terms of one token."""
    ranks, rows = (np.array(column, np.int32) for column in zip(*entries, strict=True))
    first_M = np.array([host_R.index(host) for host in range(max(host_R) + 1)], np.int32)
    here_M = (np.arange(len(first_M)) == own_host).astype(np.int32)
    hosts, terms = np.array(host_R, np.int32), np.full((3, len(entries)), 99, np.int32)
    read, written = (address_of(ranks), address_of(rows)), (address_of(one) for one in terms)
    load_books().fold(
        1,
        len(entries),
        *read,
        hosts,
        first_M,
        here_M.astype(np.int32),
        each,
        by_order,
        np.zeros_like(first_M),
        *written,
    )
    return [(int(rank), int(row)) if rank >= 0 else None for rank, row in zip(*terms[1:], strict=True)]


def test_the_example_of_its_docstring():
    entries, host_R = [(0, 5), (2, 1), (3, 7)], [0, 0, 1, 1]
    assert folded(entries, host_R) == [(0, 5), (5, 0), None]
    assert folded(entries, host_R, each=1) == [(0, 5), (5, 0), (5, 1)]


@pytest.mark.parametrize("entries", [[(2, 5), (3, 7), (1, 4)], [(1, 4), (2, 5), (3, 7)], [(2, 5), (3, 7), (-1, 0)]])
def test_a_hosts_sum_stands_where_its_first_rank_would(entries):
    """Hosts whose ranks take turns; whichever of a host's ranks a token's columns name first, or at all."""
    assert [term for term in folded(entries, [0, 1, 0, 1]) if term] == [(5, 0), (2, 5)]


@pytest.mark.parametrize(
    ("entries", "order"),
    [
        ([(2, 5), (0, 1), (3, 7), (1, 2)], [5, 4]),
        ([(2, 5), (0, 1), (1, 2), (3, 7)], [4, 5]),
        ([(4, 0), (0, 1), (2, 3), (-1, 0)], [6, 4, 5]),
    ],
)
def test_in_the_order_of_entries_a_host_stands_where_its_last_one_does(entries, order):
    host_R = [0, 0, 1, 1, 2, 2]
    ranks = len(host_R)
    terms = [term for term in folded(entries, host_R, own_host=-1, by_order=1) if term]
    assert terms == [(ranks + host - 4, 0) for host in order]
