"""What a kernel set is: loops over rows that know addresses and sizes, and no groups.

Legend: T tokens, H hidden, K top-k, E experts, R ranks, W entries a token, G scale groups (ceil(H / 128)).

Every argument is an integer (an enumeration as ``int(element)``: Numba looks 10 us at an IntEnum). ``*_addr`` is the
address of a dense row-major array; its dtype and shape stand beside it. A *peer table* is an int64 [R] array of
addresses, one a rank: where that rank's array begins as seen from here. 0 in a table means that nothing may be written
there (no entry points to that rank).

*Entries* say where a token's rows lie: ``entry_rank`` and ``entry_row`` are int32 [T, W]; entry ``j`` of token
``t`` is row ``entry_row[t, j]`` of rank ``entry_rank[t, j]``, and rank -1 means no row.

- *compact* (W = min(K, R)): one entry a distinct destination rank, ascending, packed to the front.
- *expert* (W = K): entry ``j`` belongs to top-k column ``j``; -1 where the column names no expert.

Rows of bytes may lie anywhere; arrays of numbers are aligned to their number. A NaN that arithmetic makes is the
canonical one of its type: 0x7fc0 (bf16), 0x7e00 (fp16), 0x7fc00000 (fp32), 0x7f (FP8). What is moved keeps its bits.

Kernels trust their arguments: whoever calls them has checked shapes and ranges, except where a function says that it
checks. They write the rows that are named and nothing else. The examples in the docstrings stand in tests/kernels too.
"""

from __future__ import annotations

from typing import Protocol

from anyep.numerics.formats import Element, ScaleFormat

__all__ = ["Element", "KernelSet", "ScaleFormat"]


class KernelSet(Protocol):
    """The loops every device brings. ``anyep.testing.check_kernels`` is the exam."""

    name: str

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
        entry_addr: int,
        num_tokens: int,
        width: int,
        topk_idx_addr: int,
        idx_bytes: int,
        by_expert: int,
        start_addr: int,
    ) -> None:
        """Turn slots into rows in place: row = slot + start of its bin.

        ``entry`` int32 [T, W] holds slots and then rows. ``start`` int32 [R] (compact: bin = entry_rank) or [E]
        (``by_expert``: bin = topk_idx[t, j]). Entries of rank -1 stay -1.

        >>> # compact, entry_rank=[[0, 1], [0, -1], [1, -1]], entry=[[0, 0], [1, -1], [1, -1]], start=[10, 20]
        >>> # entry=[[10, 20], [11, -1], [21, -1]]
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
        >>> # rank 0: [[1, 2, 3]]  rank 1: [[4, 5, 6], [1, 2, 3]]
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
    ) -> None:
        """Write each row's [K] expert indices and weights beside it at its destination.

        A row keeps its K columns. In a column that the row serves stands the expert's index at its rank
        (``expert_local`` int32 [E]) and its weight; in all others -1 and 0. A compact row serves every column whose
        expert lives at its rank, an expert row only its own column ``j``. Indices keep ``idx_bytes``; weights are fp32
        [T, K]; ``topk_weights_addr`` 0 (none given) writes no weights and does not read ``peer_weights``.

        >>> # topk_idx=[[0, 3]], weights=[[0.5, 0.25]], expert_rank=[0, 0, 1, 1], expert_local=[0, 1, 0, 1],
        >>> # entry_rank=[[0, 1]], entry_row=[[0, 0]]: rank 0: idx=[[0, -1]] weights=[[0.5, 0]]
        >>> # rank 1: idx=[[-1, 1]] weights=[[0, 0.25]]
        """
        ...

    def quantise_scatter(
        self,
        x_addr: int,
        element: int,
        hidden: int,
        scale_format: int,
        first_token: int,
        last_token: int,
        width: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_q_addr: int,
        peer_scales_addr: int,
    ) -> None:
        """Quantise row t of ``x`` [T, H] to FP8 E4M3 and write bytes and scales to every place its entries name.

        Per 128 channels (the last group may be shorter): amax = max(|x|, 1e-4); FP32: q = rne(x * (448 / amax)),
        scale = amax / 448, both divisions true and in fp32; the power-of-two formats: scale = 2 ** ceil(log2(amax /
        448)), q = rne(x / scale). q saturates at +-448. A group that holds NaN or Inf decodes to non-finite values,
        never to plausible ones: NaN anywhere makes amax NaN, so every q is 0x7f and the scale is NaN (0x7fc00000;
        UE8M0: 0xff). Inf makes the scale Inf (UE8M0: 0xff), Inf itself 0x7f, and each finite q a zero of its sign.

        >>> # x=[[1, -2, 896]]: FP32 q=[[0x30, 0xb8, 0x7e]] (0.5, -1, 448), scales=[[2.0]]; UE8M0: the same q, [[0x80]]
        """
        ...

    def dequantise(
        self,
        q_addr: int,
        scales_addr: int,
        scale_format: int,
        num_rows: int,
        hidden: int,
        out_addr: int,
        element: int,
    ) -> None:
        """Decode FP8 E4M3 rows: out = round(fp32(q) * scale), ``out`` [rows, H] of ``element``.

        A UE8M0 byte b is 2 ** (b - 127), 0xff is NaN.

        >>> # q=[[0x38, 0xc0, 0x7e]] (1, -2, 448), scales=[[0.5]]: out=[[0.5, -1, 224]]
        """
        ...

    def reduce(
        self,
        element: int,
        hidden: int,
        first_token: int,
        last_token: int,
        width: int,
        by_rank: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_addr: int,
        bias0_addr: int,
        bias1_addr: int,
        out_addr: int,
    ) -> None:
        """out[t] = round(bias0[t] + bias1[t] + sum of the rows that its entries name), for t in [first, last).

        Rows, biases and ``out`` are [., H] of ``element``; a bias address of 0 means none. The sum is fp32: it starts
        from the biases (bias0 + bias1; from the first row where there is no bias; 0 where there is neither) and adds
        the rows one by one, in ascending rank and then column order (``by_rank`` 1) or in column order (0); it rounds
        once, to nearest even.

        >>> # bf16, entry_rank=[[0, 1]], entry_row=[[1, 0]], rank 0: [[9, 9], [1, 2]], rank 1: [[0.5, 2 ** -8]]
        >>> # bias0=[[10, 0]]: out=[[11.5, 2]] (2 + 2 ** -8 rounds to 2)
        """
        ...

    def reduce_weights(
        self,
        num_topk: int,
        first_token: int,
        last_token: int,
        width: int,
        by_rank: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_addr: int,
        out_addr: int,
    ) -> None:
        """out[t, k] = fp32 sum over the rows that t's entries name, in the order of :meth:`reduce`; fp32 [T, K].

        >>> # entry_rank=[[0, 1]], entry_row=[[0, 0]], rank 0: [[0.5, 0]], rank 1: [[0, 0.25]]: out=[[0.5, 0.25]]
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
