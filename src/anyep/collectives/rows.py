"""A table whose rows lie on all ranks, and a fetch that reads rows where they lie, without their owners' doing.

Legend: R ranks, n rows a rank, row number g = rank * n + i.

Writing: (1) every rank tells shape, dtype and where its rows will lie (*open*); when all have, nobody reads any more.
(2) Each rank copies its own rows into its own memory and says so (*done*). From then on until the next write memory
does not change, so that a fetch is a loop of copies from every rank's memory and exchanges no word at all: it also
works after the owners have closed or died.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch

from anyep.collectives.station import Station, Wiring, place_words
from anyep.collectives.tensors import DESCRIPTION_WORDS, bytes_of, check_out, dense, describe, read_description
from anyep.errors import CapacityError
from anyep.exchange.arguments import shape_text
from anyep.exchange.event import Pending
from anyep.machine.addresses import address_of
from anyep.transport.base import Block, Lane, Words

_OPEN = Lane(index=0, name="open", words=3 + DESCRIPTION_WORDS)
"""Whether the rank lacks memory, segment and offset of its rows, their description."""
_DONE = Lane(index=1, name="done", words=1)
_RING = 2
"""One write is under way at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """What was written: rows a rank, a row's shape and dtype, and where every rank's rows lie here, int64 [R]."""

    rows_per_rank: int
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    bases_R: Words

    @property
    def row_bytes(self) -> int:
        return bytes_of(self.row_shape, self.dtype)


class RowStore(Station):
    """Rows of all ranks by one number: an embedding that is too large for one rank, a cache of remote entries.

    >>> from anyep import local_group
    >>> def rank_main(member):
    ...     with RowStore(member) as store:
    ...         store.write(torch.tensor([[0.0], [1.0]]) + 10 * store.rank)
    ...         return store.fetch(torch.tensor([3, 0, 1])).tolist()
    >>> local_group(2).run(rank_main)
    [[[11.0], [0.0], [1.0]], [[11.0], [0.0], [1.0]]]
    """

    label = "row store"

    def __init__(
        self, group: object, *, timeout_s: float = 30.0, transport: str = "auto", kernels: str = "cpu"
    ) -> None:
        self._background: ThreadPoolExecutor | None = None
        self._under_way: list[Future[torch.Tensor]] = []
        self._block: Block | None = None
        self._table: _Table | None = None
        self._writes = 0

        def plan(num_ranks: int) -> Wiring:
            return Wiring(lanes=(_OPEN, _DONE), ring=_RING, heap_bytes=0, equal={})

        super().__init__(group, plan, timeout_s=timeout_s, transport=transport, kernels=kernels)

    def write(self, rows: torch.Tensor) -> None:
        """Store this rank's rows [n, ...], of the same shape and dtype on every rank, in place of earlier ones.

        Collective: returns when every rank's rows are there. Raises TypeError and ValueError for this rank's argument
        (nothing was sent: call again); ValueError on every rank where shapes or dtypes differ and CapacityError on
        every rank where one lacks memory (the earlier rows stay); PeerLost and PeerTimeout, which end the store.
        """
        self._check_open()
        plain = dense("rows", rows)
        if plain.dim() < 1:
            raise ValueError("rows must be [n, ...], got a number without dimensions")
        self._finish_fetches()
        block, refusal = self._make_room(plain.nbytes)
        self._writes += 1
        told_RW = self._announce(plain, block)
        if refusal is not None:
            raise refusal
        self._check_told(plain, told_RW)
        assert block is not None
        with self._unbroken():
            self._kernels.copy(plain.data_ptr(), block.address, plain.nbytes)
            self._swap(_DONE, self._writes, np.zeros(1, np.int64), f"write {self._writes}: rows")
            bases = [self._address(rank, *told_RW[rank, 1:3].tolist()) for rank in range(self.num_ranks)]
        self._block = block
        shape = tuple(plain.shape)
        bases_R = np.array(bases, np.int64)
        self._table = _Table(rows_per_rank=shape[0], row_shape=shape[1:], dtype=plain.dtype, bases_R=bases_R)

    @overload
    def fetch(
        self, indices: torch.Tensor, *, out: torch.Tensor | None = None, wait: Literal[True] = True
    ) -> torch.Tensor: ...

    @overload
    def fetch(
        self, indices: torch.Tensor, *, out: torch.Tensor | None = None, wait: Literal[False]
    ) -> Pending[torch.Tensor]: ...

    def fetch(
        self, indices: torch.Tensor, *, out: torch.Tensor | None = None, wait: bool = True
    ) -> torch.Tensor | Pending[torch.Tensor]:
        """Return the rows with these numbers: [..., *row] for ``indices`` [...] int32 or int64, duplicates allowed.

        No rank but this one takes part. ``wait=False`` copies in a background thread; neither ``indices`` nor
        ``out`` may be touched until ``Pending.wait()``. Raises TypeError and ValueError for arguments, among them a
        number outside [0, R n) (from ``wait()`` if that is asked for); ClosedError.
        """
        self._check_open()
        table = self._table
        if table is None:
            raise ValueError("nothing was written to this row store yet: every rank has to call write first")
        plain = dense("indices", indices)
        if plain.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices must be int32 or int64, got {plain.dtype}")
        shape = (*plain.shape, *table.row_shape)
        into = (
            torch.empty(shape, dtype=table.dtype, device="cpu") if out is None else check_out(out, shape, table.dtype)
        )
        result = into if out is None else out
        if wait:
            self._copy_rows(table, plain, into)
            return result
        return self._start(lambda: self._copy_rows(table, plain, into), result)

    def _copy_rows(self, table: _Table, indices: torch.Tensor, into: torch.Tensor) -> None:
        wrong = self._kernels.gather(
            table.row_bytes,
            indices.numel(),
            indices.data_ptr(),
            indices.itemsize,
            table.rows_per_rank,
            self.num_ranks,
            address_of(table.bases_R),
            into.data_ptr(),
        )
        self._kernels.fence()  # the rows went past the caches, and another thread may read them next
        if wrong >= 0:
            where = shape_text([int(i) for i in np.unravel_index(wrong, indices.shape)])
            raise ValueError(
                f"indices{where} is {int(indices.flatten()[wrong])}, and this row store has rows 0 to "
                f"{self.num_ranks * table.rows_per_rank - 1} ({table.rows_per_rank} of each of {self.num_ranks} ranks)"
            )

    def _start(self, act: Callable[[], None], result: torch.Tensor) -> Pending[torch.Tensor]:
        def run() -> torch.Tensor:
            act()
            return result

        if self._background is None:
            self._background = ThreadPoolExecutor(1, thread_name_prefix="anyep-fetch")
        future = self._background.submit(run)
        self._under_way = [one for one in self._under_way if not one.done()] + [future]
        return Pending("fetch", future.done, future.result)

    def _finish_fetches(self) -> None:
        """Peers may write over what background fetches still read as soon as this rank announces a write."""
        for future in self._under_way:
            future.exception()
        self._under_way.clear()

    def _make_room(self, num_bytes: int) -> tuple[Block | None, CapacityError | None]:
        """Return the block that there is, or one of the right size: peers may still read the old one."""
        if self._block is not None and self._block.num_bytes == num_bytes:
            return self._block, None
        try:
            return self._transport.allocate(num_bytes), None
        except CapacityError as error:
            return None, error

    def _announce(self, rows: torch.Tensor, block: Block | None) -> Words:
        where = [1, 0, 0] if block is None else [0, *place_words(block)]
        words_N = np.concatenate([np.array(where, np.int64), describe(rows.shape, rows.dtype)])
        with self._unbroken():
            told_RW: Words = self._swap(_OPEN, self._writes, words_N, f"write {self._writes}: open").copy()
        return told_RW

    def _check_told(self, rows: torch.Tensor, told_RW: Words) -> None:
        """Every rank has the same words, and so raises the same error. Here no memory was changed yet."""
        poor = np.flatnonzero(told_RW[:, 0]).tolist()
        if poor:
            raise CapacityError(
                f"rank {poor[0]} has no memory for rows of {rows.nbytes} bytes; the rows before this write stay"
            )
        for rank in range(self.num_ranks):
            shape, dtype = read_description(told_RW[rank, 3:])
            if (shape, dtype) != (tuple(rows.shape), rows.dtype):
                raise ValueError(
                    f"rows must be the same on every rank, got {shape_text(rows.shape)} of {rows.dtype} on rank "
                    f"{self.rank}, {shape_text(shape)} of {dtype} on rank {rank}"
                )

    def _join(self) -> None:
        """Let this rank's fetches end: other ranks can go on fetching, also from here."""
        if self._background is not None:
            self._background.shutdown(wait=True)
