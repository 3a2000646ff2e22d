"""What a set brings beside its loops over rows where counts lie in a device's memory: places are worked out there.

Legend: kernels/spec.py. A *board* is what all ranks announced to this one in an operation: R messages, by rank,
``message_bytes`` apart. A message is

- int64 [HEAD_WORDS]: how many rows fit where it offers memory; :data:`NUM_PLACES` places, each an offset from what the
  reader's table of bases says of that rank, or -1 for nothing; and the verdict of its route (NO_FAULT: all is well);
- int32 [R + E]: how many tokens it sends each rank, and how many (token, column) pairs each expert.

Every rank reads the same numbers and comes to the same places, as in ``exchange/settle.py``, which is the same on a
host. Nothing here waits, so that all of it may be captured in a graph.
"""

from __future__ import annotations

from typing import Protocol

from anyep.kernels.spec import KernelSet

NO_FAULT = 2**63 - 1
"""The verdict where every expert is one."""
BAD = -2
"""What an index that names no expert is kept as."""
NUM_PLACES = 5
"""Arrays of a row: x, scales, topk_idx, topk_weights, source token. Combine uses two: rows, weights."""
CAPACITY, FIRST_PLACE, FAULT = 0, 1, 1 + NUM_PLACES
HEAD_WORDS = 2 + NUM_PLACES
"""Words of a message before its counts."""
SETTLED, STATIC_TOO_SMALL, BLOCK_TOO_SMALL, LANDING_TOO_SMALL, BAD_EXPERT = range(5)
"""What connect finds, the numbers of ``exchange/ledger.py`` and one more: a rank's topk_idx names no expert."""
SUMMARY_WORDS = 4
"""What connect found; rows of this rank's batch; the first rank at fault, and its verdict."""


def message_bytes(num_ranks: int, num_experts: int) -> int:
    """Return how far messages of a board are apart: a multiple of 8.

    >>> message_bytes(2, 3)
    80
    """
    return 8 * HEAD_WORDS + (4 * (num_ranks + num_experts) + 7) // 8 * 8


class DeviceKernels(KernelSet, Protocol):
    """A kernel set whose caller does not wait for it. ``anyep.testing.check_device_kernels`` is the exam."""

    def begin_route(
        self,
        topk_idx_addr: int,
        idx_bytes: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        num_ranks: int,
        expert_rank_addr: int,
        by_expert: int,
        topk_weights_addr: int,
        kept_idx_addr: int,
        kept_weights_addr: int,
        entry_rank_addr: int,
        entry_slot_addr: int,
    ) -> None:
        """Copy what the caller may change, and do the first half of ``route``: entries without numbers.

        ``kept_idx`` [T, K] becomes ``topk_idx``, with :data:`BAD` for an index outside [-1, E), which is routed like
        -1; ``kept_weights`` fp32 [T, K] becomes ``topk_weights``, unless it is 0. Writes ``entry_rank`` and, beside
        rank -1, slot -1.

        >>> # E=4, R=2, expert_rank=[0, 0, 1, 1], topk_idx=[[0, 3], [4, 0]], compact
        >>> # kept_idx=[[0, 3], [-2, 0]] entry_rank=[[0, 1], [0, -1]] entry_slot=[[., .], [., -1]]
        """
        ...

    def announce_counts(
        self,
        kept_idx_addr: int,
        idx_bytes: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        num_ranks: int,
        by_expert: int,
        entry_rank_addr: int,
        entry_slot_addr: int,
        rank_rows_addr: int,
        expert_rows_addr: int,
        verdict_addr: int,
        peer_message_addr: int,
        capacity: int,
        place0: int,
        place1: int,
        place2: int,
        place3: int,
        place4: int,
    ) -> None:
        """The other half of ``route``, and ``announce`` what comes of it, unless ``peer_message`` is 0.

        Writes all other slots, ``rank_rows`` [R] and ``expert_rows`` [E]; int64 ``verdict`` becomes the flat index of
        the first BAD, or NO_FAULT.

        >>> # the same: entry_slot=[[0, 0], [1, -1]] rank_rows=[2, 1] expert_rows=[2, 0, 0, 1] verdict=2
        """
        ...

    def announce(
        self,
        num_ranks: int,
        peer_message_addr: int,
        capacity: int,
        place0: int,
        place1: int,
        place2: int,
        place3: int,
        place4: int,
        verdict_addr: int,
        counts_addr: int,
        num_counts: int,
    ) -> None:
        """Write this rank's message to every rank's board.

        ``peer_message`` is a peer table: where this rank's message begins at each rank, 0 to skip one. ``verdict``
        int64 [1] is read, 0 for NO_FAULT; ``counts`` int32 [num_counts].

        >>> # R=1, capacity=8, places=[64, -1, -1, -1, -1], no verdict, counts=[3, 5]
        >>> # message: int64 [8, 64, -1, -1, -1, -1, NO_FAULT], int32 [3, 5]
        """
        ...

    def settle(
        self,
        board_addr: int,
        message_bytes: int,
        rank: int,
        num_ranks: int,
        num_experts: int,
        num_local: int,
        expert_rank_addr: int,
        expert_local_addr: int,
        by_expert: int,
        alignment: int,
        block_rows: int,
        static_rows: int,
        withdraws: int,
        base_addr: int,
        tables_addr: int,
        summary_addr: int,
        fault_addr: int,
        send_start_addr: int,
        dense_start_addr: int,
        recv_rows_addr: int,
        recv_start_addr: int,
        counts_addr: int,
        block_start_addr: int,
        filled_rows_addr: int,
        gap_begin_addr: int,
        gap_end_addr: int,
        source_begin_addr: int,
        source_count_addr: int,
        num_tokens: int,
        width: int,
        topk_idx_addr: int,
        idx_bytes: int,
        entry_rank_addr: int,
        entry_slot_addr: int,
        entry_row_addr: int,
    ) -> None:
        """Work out places from what all ranks announced, as ``exchange/ledger.py``; and peer tables, unless refused.

        Bins B of a sender and C of a source at its receiver: R and 1 in the compact layout, E and L ``by_expert``.
        int32:

        - ``send_start`` [B]: the first of this rank's rows in each bin. ``recv_rows`` and ``recv_start`` [R, C]: rows
          from each source in each bin here, and where they begin. ``entry_row`` [T, W]: as ``place`` says.
        - ``filled_rows`` [R]: rows of each rank's batch. By expert an expert's rows are padded to ``alignment``, or to
          ``block_rows`` unless that is 0; experts of a rank lie in ascending order.
        - ``counts`` [L]: rows of an expert here, without padding.
        - By expert only: ``block_start`` [L], where experts begin; ``gap_begin`` and ``gap_end`` [L + 1], the padding
          of each, empty where there is none and where ``block_rows`` is given; with ``block_rows`` ``dense_start`` [E],
          ``send_start`` if blocks lay one behind the other without padding; and unless ``source_begin`` is 0, that and
          ``source_count`` [L, R]: where each source's rows begin in each block, and how many. Not touched otherwise.

        ``tables`` and ``summary``: as ``connect`` says, and a batch is refused for more reasons. In this order: a
        rank's verdict (BAD_EXPERT); an expert with more than ``block_rows`` rows, unless that is 0 (BLOCK_TOO_SMALL); a
        batch of more than ``static_rows`` rows, unless that is -1 (STATIC_TOO_SMALL), or of more than its rank has room
        for (LANDING_TOO_SMALL). With ``static_rows`` every batch has so many rows, and the last gap takes what is not
        filled here; all of a refused batch. Where it is refused all other gaps are empty (0, 0): they may lie behind
        the batch; and if it ``withdraws``, all of ``counts`` becomes 0 and all of ``entry_rank`` -1, for callers that
        do not look at the summary: what follows then neither reads nor writes rows that nobody sent.

        >>> # R=2, E=2, L=1, rank=0, expert_rank=[0, 1], by_expert, alignment=4, block_rows=0, static_rows=-1
        >>> # counts of rank 0: [2, 1 | 2, 1], of rank 1: [1, 0 | 1, 0]; topk_idx=[[0], [1], [0]], entry_slot=[0, 0, 1]
        >>> # send_start=[0, 0] recv_rows=[[2], [1]] recv_start=[[0], [2]] counts=[3] block_start=[0] filled_rows=[4, 4]
        >>> # gap_begin=[3, .] gap_end=[4, .] entry_row=[0, 0, 1]
        >>> # base=[1000, 2000], capacity=[8, 8], places=[[64, -1, -1, -1, -1], [0, -1, -1, -1, -1]]
        >>> # tables=[[1064, 2000], [0, 0], ...] summary=[SETTLED, 4, 2, NO_FAULT] (2: of R ranks none is at fault)
        """
        ...

    def connect(
        self,
        board_addr: int,
        message_bytes: int,
        num_ranks: int,
        base_addr: int,
        num_rows: int,
        tables_addr: int,
        summary_addr: int,
        fault_addr: int,
        entry_rank_addr: int,
        num_entries: int,
    ) -> None:
        """Turn announced places into peer tables, unless a rank is at fault.

        ``base`` int64 [R]: what places of a rank are counted from. ``tables`` int64 [NUM_PLACES, R] becomes base +
        place, 0 for nothing, and all 0 where a rank's verdict says no (BAD_EXPERT), so that kernels which read them
        write nothing. ``summary`` int64 [SUMMARY_WORDS] says why, with ``num_rows`` for the rows of the batch; int64
        ``fault`` [SUMMARY_WORDS] becomes the same if there is anything to say and ``fault_addr`` is not 0. Then all of
        ``entry_rank`` int32 [num_entries] becomes -1, too, so that what sums them reads nothing.

        >>> # R=2, base=[1000, 2000], num_rows=3, places=[[64, -1, -1, -1, -1], [0, -1, -1, -1, -1]]
        >>> # tables=[[1064, 2000], [0, 0], ...] summary=[SETTLED, 3, 2, NO_FAULT]
        """
        ...

    def fill_gaps(
        self,
        num_gaps: int,
        gap_begin_addr: int,
        gap_end_addr: int,
        base0: int,
        bytes0: int,
        base1: int,
        bytes1: int,
        base2: int,
        bytes2: int,
        base3: int,
        bytes3: int,
        base4: int,
        bytes4: int,
    ) -> None:
        """``fill_rows`` for the five parts of a row: 0xff in part 2, the indices, and 0 in all others; base 0 for none.

        >>> # num_gaps=1, gaps [1, 2): row 1 of each part
        """
        ...

    def send(
        self,
        x_addr: int,
        element: int,
        hidden: int,
        scale_format: int,
        num_tokens: int,
        width: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_x_addr: int,
        peer_scales_addr: int,
        topk_idx_addr: int,
        idx_bytes: int,
        topk_weights_addr: int,
        num_topk: int,
        by_expert: int,
        expert_rank_addr: int,
        expert_local_addr: int,
        peer_idx_addr: int,
        peer_weights_addr: int,
        peer_token_addr: int,
    ) -> None:
        """Rows and their routing at once: ``quantise_scatter``, or ``scatter`` of rows as they are, and the other.

        ``scale_format`` -1: rows of ``hidden`` bytes are written as they are; ``element`` and ``peer_scales`` are not
        used. Else numbers ``element`` [T, hidden] are quantised. Then ``scatter_routing``; a table of 0: not wanted.
        """
        ...

    def tick(self, clock_addr: int, epoch_addr: int) -> None:
        """Add 1 to int64 ``clock`` [1], and let int64 ``epoch`` [1] be what it is now: below 2 ** 31.

        >>> # clock=[6]: clock=[7] epoch=[7]
        """
        ...

    def signal(self, peer_word_addr: int, num_ranks: int, epoch_addr: int, counts_addr: int) -> None:
        """Publish all that was launched before: write ``epoch << 32 | counts[r]`` to the word of every rank.

        ``epoch`` is int64 [1], ``peer_word`` a peer table, 0 to skip a rank, ``counts`` int32 [R], or 0 for none.
        kernels/gpu/flags.py has the memory order.

        >>> # epoch=[3], counts=[5, 7], peer_word=[a, 0]: word at a: (3 << 32) + 5
        """
        ...

    def wait(
        self,
        words_addr: int,
        num_ranks: int,
        epoch_addr: int,
        limit: int,
        counts_addr: int,
        errors_addr: int,
        error_bytes: int,
    ) -> None:
        """Let what is launched after this wait until every sender's word has reached ``epoch``.

        ``epoch`` is int64 [1], ``words`` int64 [R]; their counts go to int32 [R] ``counts`` (0: nowhere). Where a word
        has not come after ``limit`` looks, the int64 that is r * ``error_bytes`` behind ``errors`` takes ``epoch << 32
        | the epoch that the word holds``, and the count is not written. Errors of words that did come are not touched.

        >>> # epoch=[3], limit=2, error_bytes=8, words=[(3 << 32) + 5, (1 << 32) + 9]
        >>> # counts=[5, .] errors=[., (3 << 32) + 1]
        """
        ...

    def meet(
        self,
        peer_word_addr: int,
        words_addr: int,
        num_ranks: int,
        epoch_addr: int,
        limit: int,
        errors_addr: int,
        error_bytes: int,
    ) -> None:
        """``signal`` and then ``wait``, without counts, in one launch."""
        ...
