"""Sums in two stages, as where hosts are far apart: ranks of one group first, rounded, and then the groups.

One stage rounds once and is as exact; two are what other libraries do between hosts, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch

from anyep.exchange.endpoint import Endpoint
from anyep.exchange.receive import fresh
from anyep.exchange.returning import Returning
from anyep.exchange.wire import ELEMENTS


def sum_by_groups(end: Endpoint, back: Returning, rows_table_addr: int, entry_row_addr: int) -> None:
    """Write the sums to ``back.out``: bias, then the groups' partial sums in ascending order, in fp32.

    A partial sum is that of ``reduce`` over ``group`` consecutive ranks, rounded to the rows' dtype. A group that
    has no row of a token adds nothing, not even a zero. Takes memory for a [T, H] a group.
    """
    plan, group = back.handle.send, back.way.group
    num_tokens, num_groups = plan.num_tokens, -(-end.num_ranks // group)
    element, entries = int(ELEMENTS[back.y.dtype]), plan.entry_ranks()
    partials = fresh((num_groups, num_tokens, end.hidden), back.y.dtype)
    tables_G = partials.data_ptr() + back.way.row_bytes * num_tokens * np.arange(num_groups, dtype=np.int64)
    served_TG = np.full((num_tokens, num_groups), -1, np.int32)
    for number in range(num_groups):
        inside = (entries >= number * group) & (entries < (number + 1) * group)
        served_TG[inside.any(axis=1), number] = number
        ranks = torch.from_numpy(np.where(inside, entries, np.int32(-1)))
        end.kernels.reduce(
            *(element, end.hidden, 0, num_tokens, plan.width, 1, ranks.data_ptr(), entry_row_addr, rows_table_addr),
            *(0, 0, 0, int(tables_G[number])),
        )
    rows_TG = np.repeat(np.arange(num_tokens, dtype=np.int32), num_groups)
    served, rows, tables = (torch.from_numpy(array) for array in (served_TG, rows_TG, tables_G))
    bias0, bias1 = [*(one.data_ptr() for one in back.bias), 0, 0][:2]
    end.kernels.reduce(
        *(element, end.hidden, 0, num_tokens, num_groups, 1, served.data_ptr(), rows.data_ptr(), tables.data_ptr()),
        *(0, bias0, bias1, back.out.data_ptr()),
    )
    end.kernels.fence()
