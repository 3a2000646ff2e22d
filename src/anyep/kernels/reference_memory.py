"""Memory as the oracle sees it: read by copy and written by copy, entries as triples, peers by rank."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from math import prod

import torch

IDX_DTYPES = {4: torch.int32, 8: torch.int64}


def read(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a copy of the dense array of ``shape`` at ``address``, which need not be aligned."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(ctypes.string_at(address, num_bytes)), dtype=dtype).view(shape)


def put(address: int, numbers: list[int]) -> None:
    """Copy int32 to an address."""
    write(address, torch.tensor(numbers, dtype=torch.int32))


def write(address: int, values: torch.Tensor) -> None:
    """Put the bytes of ``values``, row-major, at ``address``."""
    dense = values.contiguous()
    if dense.nbytes:
        ctypes.memmove(address, dense.data_ptr(), dense.nbytes)


def entries(
    first_token: int, last_token: int, width: int, entry_rank_addr: int, entry_row_addr: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield for each token of [first, last) its (rank, row, column) triples in column order, without rank -1."""
    skip = 4 * first_token * width
    ranks = read(entry_rank_addr + skip, torch.int32, last_token - first_token, width).tolist()
    rows = read(entry_row_addr + skip, torch.int32, last_token - first_token, width).tolist()
    for rank_W, row_W in zip(ranks, rows, strict=True):
        yield [(rank, row, j) for j, (rank, row) in enumerate(zip(rank_W, row_W, strict=True)) if rank >= 0]


def peer(table_addr: int, rank: int) -> int:
    return int(read(table_addr + 8 * rank, torch.int64, 1))


def write_row(table_addr: int, rank: int, row: int, values: torch.Tensor) -> None:
    """Put ``values`` at row ``row`` of that rank's array; nowhere without a table, or where it says 0."""
    base = peer(table_addr, rank) if table_addr else 0
    if base:
        write(base + row * values.nbytes, values)
