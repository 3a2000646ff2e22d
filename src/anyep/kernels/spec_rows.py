"""The half of a kernel set that moves: routes, and rows as bytes. Conventions and legend: kernels/spec.py."""

from __future__ import annotations

from typing import Protocol


class RowKernels(Protocol):
    """Loops that decide where rows go and bring them there, bit by bit as they are."""

    def route(
        self,
        topk_idx_addr: int,
        idx_bytes: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        num_ranks: int,
        expert_rank_addr: int,
        by_expert: int,
        entry_rank_addr: int,
        entry_slot_addr: int,
        rank_rows_addr: int,
        expert_rows_addr: int,
        scratch_addr: int,
    ) -> int:
        """Decide who gets what; return -1, or the flat index of the first expert outside [-1, E).

        ``topk_idx`` int32 or int64 [T, K] (``idx_bytes`` 4 or 8; -1 is none); ``expert_rank`` int32 [E]: who owns it.
        Writes ``entry_rank`` int32 [T, W], ``entry_slot`` int32 [T, W] (-1 beside rank -1), ``rank_rows`` int32 [R]
        (rows that go to each rank) and ``expert_rows`` int32 [E] ((token, column) pairs of each expert; a
        duplicate counts twice). A slot is the entry's position among this rank's rows, in token order, then column
        order, for the same destination rank (compact) or for the same expert (``by_expert`` 1).
        ``scratch`` is int32 [R + E] with any content. Time is O(T K + R + E).

        >>> # T=3, K=2, E=4, R=2, expert_rank=[0, 0, 1, 1], topk_idx=[[0, 3], [1, 0], [-1, 2]], compact
        >>> # entry_rank=[[0, 1], [0, -1], [1, -1]]  entry_slot=[[0, 0], [1, -1], [1, -1]]
        >>> # rank_rows=[2, 2]  expert_rows=[2, 1, 1, 1]
        >>> # by_expert: entry_rank=[[0, 1], [0, 0], [-1, 1]]  entry_slot=[[0, 0], [0, 1], [-1, 0]]  rank_rows=[3, 2]
        """
        ...

    def place(
        self,
        entry_rank_addr: int,
        entry_slot_addr: int,
        num_tokens: int,
        width: int,
        topk_idx_addr: int,
        idx_bytes: int,
        by_expert: int,
        start_addr: int,
        entry_row_addr: int,
    ) -> None:
        """Write the row of every entry: its slot + start of its bin, -1 beside rank -1; slots serve other starts later.

        ``entry_slot`` and ``entry_row`` are int32 [T, W]; ``start`` int32 [R] (compact: bin = entry_rank) or [E]
        (``by_expert``: bin = topk_idx[t, j]).

        >>> # compact, entry_rank=[[0, 1], [0, -1], [1, -1]], entry_slot=[[0, 0], [1, -1], [1, -1]], start=[10, 20]
        >>> # entry_row=[[10, 20], [11, -1], [21, -1]]
        """
        ...

    def scatter(
        self,
        x_addr: int,
        row_bytes: int,
        first_token: int,
        last_token: int,
        width: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_addr: int,
    ) -> None:
        """Copy row t of ``x`` (``row_bytes`` a row) to every place its entries name, for t in [first, last).

        ``peer`` is the peer table of the destination arrays, which have rows of ``row_bytes`` too.

        >>> # x=[[1, 2, 3], [4, 5, 6]] (bytes), entry_rank=[[0, 1], [1, -1]], entry_row=[[0, 1], [0, -1]]
        >>> # rank 0: [[1, 2, 3]]  rank 1: [[4, 5, 6], [1, 2, 3]]; with 0 for rank 0: rank 1 the same, nothing else
        """
        ...

    def scatter_routing(
        self,
        topk_idx_addr: int,
        idx_bytes: int,
        topk_weights_addr: int,
        first_token: int,
        last_token: int,
        num_topk: int,
        width: int,
        by_expert: int,
        expert_rank_addr: int,
        expert_local_addr: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_idx_addr: int,
        peer_weights_addr: int,
        peer_token_addr: int,
    ) -> None:
        """Write each row's [K] expert indices and weights, and its token's number, beside it at its destination.

        A row keeps its K columns. In a column that the row serves stands the expert's index at its rank
        (``expert_local`` int32 [E]) and its weight; in all others -1 and 0. A compact row serves every column whose
        expert lives at its rank, an expert row only its own column ``j``. Indices keep ``idx_bytes``; weights are fp32
        [T, K]. ``peer_token`` is the peer table of int32 [rows]: t of each row. What is not wanted is not written:
        indices with ``peer_idx_addr`` 0, weights with ``topk_weights_addr`` 0 (``peer_weights`` is not read then),
        tokens with ``peer_token_addr`` 0. The tables in use have their zeros at the same ranks.

        >>> # topk_idx=[[0, 3]], weights=[[0.5, 0.25]], expert_rank=[0, 0, 1, 1], expert_local=[0, 1, 0, 1],
        >>> # entry_rank=[[0, 1]], entry_row=[[0, 0]]: rank 0: idx=[[0, -1]] weights=[[0.5, 0]] token=[0]
        >>> # rank 1: idx=[[-1, 1]] weights=[[0, 0.25]] token=[0]
        """
        ...

    def unpack(
        self,
        row_bytes: int,
        num_sources: int,
        rows_addr: int,
        start_addr: int,
        packed_addr: int,
        base_addr: int,
    ) -> None:
        """Copy what each source packed to its place: rows [0, rows[s]) at packed[s] become rows start[s], ... of base.

        ``rows`` and ``start`` are int32 [S], ``packed`` int64 [S]: addresses, 0 to skip a source.

        >>> # row_bytes=2, rows=[1, 2], start=[3, 0], source 0: [[1, 2]], source 1: [[3, 4], [5, 6]]
        >>> # base: [[3, 4], [5, 6], [., .], [1, 2]]
        """
        ...

    def pack(
        self,
        row_bytes: int,
        num_peers: int,
        num_bins: int,
        rows_addr: int,
        start_addr: int,
        base_addr: int,
        packed_addr: int,
    ) -> None:
        """Put each peer's bins one behind the other: packed[p] receives the rows of bin 0, then of bin 1, ...

        Bin b of peer p is rows [start[p, b], start[p, b] + rows[p, b]) at base; ``rows`` and ``start`` are int32
        [P, B], ``packed`` int64 [P]: addresses, 0 to skip a peer. With one bin the inverse of :meth:`unpack`.

        >>> # row_bytes=2, base: [[1, 2], [3, 4], [5, 6], [7, 8]], rows=[[1, 2], [1, 0]], start=[[3, 0], [2, 0]]
        >>> # peer 0: [[7, 8], [1, 2], [3, 4]]  peer 1: [[5, 6]]
        """
        ...

    def expand(
        self,
        x_bytes: int,
        scale_bytes: int,
        num_topk: int,
        idx_bytes: int,
        num_sources: int,
        num_local: int,
        rows_addr: int,
        start_addr: int,
        scratch_addr: int,
        x_addr: int,
        scales_addr: int,
        idx_addr: int,
        weights_addr: int,
        token_addr: int,
        out_x_addr: int,
        out_scales_addr: int,
        out_idx_addr: int,
        out_weights_addr: int,
        out_token_addr: int,
    ) -> None:
        """Give every (row, column) of compact rows a row of its own in its expert's bin.

        Source s has ``rows[s]`` compact rows (``rows`` int32 [S]). Tables int64 [S] say where they lie: ``x`` of
        ``x_bytes`` a row, ``scales`` of ``scale_bytes``, ``idx`` [n, K] of ``idx_bytes`` (experts of this rank,
        0 to L - 1, or -1), ``weights`` fp32 [n, K], ``token`` int32 [n]. A 0 in ``x`` skips the source.

        Column k of a row, in row order and then column order, that names expert l makes one row: the next of source
        s and expert l, which begin at ``start[s, l]`` (int32 [S, L]). It gets the row's x, scales and token, and in
        the [K] columns -1 and 0 except l and the weight in column k. An output address of 0 is not written, and what
        it would be made of is not read: ``scales_addr``, ``weights_addr`` and ``token_addr`` may be 0 then too.
        ``scratch`` is int32 [L] with any content.

        >>> # x_bytes=1, scale_bytes=0, K=2, S=1, L=2, rows=[2], start=[[0, 2]]
        >>> # source 0: x=[[7], [8]], idx=[[0, 1], [-1, 0]], weights=[[0.5, 0.25], [0, 1]], token=[4, 6]
        >>> # x=[[7], [8], [7]] idx=[[0, -1], [-1, 0], [-1, 1]] weights=[[0.5, 0], [0, 1], [0, 0.25]] token=[4, 6, 4]
        """
        ...

    def transpose_scales(
        self,
        num_blocks: int,
        block_rows: int,
        columns: int,
        counts_addr: int,
        source_addr: int,
        destination_addr: int,
    ) -> None:
        """Turn the rows of each block into columns: destination[b][c][r] = source[b][r][c] for r < counts[b].

        4-byte words: ``source`` [B, block_rows, columns], ``destination`` [B, columns, block_rows]; ``counts``
        int32 [B]. Grouped matrix products want scales this way round.

        >>> # block_rows=3, columns=2, counts=[2], source=[[[1, 2], [3, 4], [., .]]]
        >>> # destination=[[[1, 3, .], [2, 4, .]]]
        """
        ...

    def gather(
        self,
        row_bytes: int,
        num_rows: int,
        index_addr: int,
        idx_bytes: int,
        rows_per_rank: int,
        num_ranks: int,
        peer_addr: int,
        out_addr: int,
    ) -> int:
        """Fetch rows by their number among those of all ranks; return -1, or the first position with a wrong number.

        Rank r holds rows [r n, (r + 1) n) of n = ``rows_per_rank`` at peer[r]: out[i] becomes row index[i] % n of
        rank index[i] // n. ``index`` int32 or int64 [num_rows] (``idx_bytes`` 4 or 8). A number outside [0, R n) is
        wrong, and then nothing is written.

        >>> # row_bytes=2, n=2, rank 0: [[1, 2], [3, 4]], rank 1: [[5, 6], [7, 8]], index=[3, 0, 3]
        >>> # out=[[7, 8], [1, 2], [7, 8]]; index=[0, 4, -1]: returns 1
        """
        ...

    def copy(self, source_addr: int, destination_addr: int, num_bytes: int) -> None:
        """Copy bytes past the caches (they will be read by another rank, not here)."""
        ...

    def fill_rows(
        self, base_addr: int, row_bytes: int, num_gaps: int, gap_begin_addr: int, gap_end_addr: int, byte: int
    ) -> None:
        """Fill rows [begin, end) of every gap (int32 [num_gaps] each) with one byte: 0 for zeros, 0xff for index -1.

        >>> # row_bytes=2, gap_begin=[1], gap_end=[3], byte=0xff: rows [[7, 7], [255, 255], [255, 255], [7, 7]]
        """
        ...

    def fence(self) -> None:
        """Make every store of this thread visible before the stores that follow (non-temporal stores too)."""
        ...
