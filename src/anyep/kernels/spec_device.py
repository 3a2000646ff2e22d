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
        entry_rank_addr: int,
        entry_slot_addr: int,
        rank_rows_addr: int,
        expert_rows_addr: int,
        verdict_addr: int,
    ) -> None:
        """``route`` without an answer: int64 ``verdict`` takes the minimum of itself and the first bad flat index.

        Whoever calls sets it to NO_FAULT before. A bad index is routed like -1.
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
        send_start_addr: int,
        dense_start_addr: int,
        recv_rows_addr: int,
        recv_start_addr: int,
        counts_addr: int,
        block_start_addr: int,
        filled_rows_addr: int,
        expert_total_addr: int,
        gap_begin_addr: int,
        gap_end_addr: int,
    ) -> None:
        """Work out places from what all ranks announced (the fields of ``exchange/ledger.py``). All int32.

        Bins B of a sender and C of a source at its receiver: R and 1 in the compact layout, E and L ``by_expert``.

        - ``send_start`` [B]: the first of this rank's rows in each bin. ``recv_rows`` and ``recv_start`` [R, C]: rows
          from each source in each bin here, and where they begin.
        - ``filled_rows`` [R]: rows of each rank's batch. By expert an expert's rows are padded to ``alignment``, or to
          ``block_rows`` unless that is 0; experts of a rank lie in ascending order.
        - ``counts`` [L], ``expert_total`` [E]: rows of an expert, without padding.
        - By expert only: ``block_start`` [L], where experts begin; ``gap_begin`` and ``gap_end`` [L], the padding of
          each, empty where there is none and where ``block_rows`` is given; and with ``block_rows``
          ``dense_start`` [E], ``send_start`` if blocks lay one behind the other without padding. Not touched otherwise.

        >>> # R=2, E=2, L=1, rank=0, expert_rank=[0, 1], by_expert, alignment=4, block_rows=0
        >>> # counts of rank 0: [2, 1 | 2, 1], of rank 1: [1, 0 | 1, 0]
        >>> # send_start=[0, 0] recv_rows=[[2], [1]] recv_start=[[0], [2]] counts=[3] block_start=[0] filled_rows=[4, 4]
        >>> # expert_total=[3, 1] gap_begin=[3] gap_end=[4]
        """
        ...

    def connect(
        self,
        board_addr: int,
        message_bytes: int,
        rank: int,
        num_ranks: int,
        base_addr: int,
        filled_rows_addr: int,
        static_rows: int,
        expert_total_addr: int,
        num_experts: int,
        block_rows: int,
        tables_addr: int,
        summary_addr: int,
        fault_addr: int,
        num_gaps: int,
        gap_begin_addr: int,
        gap_end_addr: int,
    ) -> None:
        """Turn announced places into peer tables, unless a batch is refused.

        ``base`` int64 [R]: what places of a rank are counted from. ``tables`` int64 [NUM_PLACES, R] becomes base +
        place, 0 for nothing, and all 0 where the batch is refused, so that kernels which read them write nothing.
        ``summary`` int64 [SUMMARY_WORDS] says why; int64 ``fault`` [SUMMARY_WORDS] becomes the same if there is
        anything to say and ``fault_addr`` is not 0.

        Refused, in this order: a rank's verdict (BAD_EXPERT); an expert with more than ``block_rows`` rows, unless that
        is 0 (BLOCK_TOO_SMALL); a batch of more than ``static_rows`` rows, unless that is -1 (STATIC_TOO_SMALL), or of
        more than its rank has room for (LANDING_TOO_SMALL). Where it is refused, the first ``num_gaps`` of int32
        ``gap_begin`` and ``gap_end`` become empty (0, 0): they may lie behind the batch. With ``static_rows`` every
        batch has so many rows, and the gap behind those takes what is not filled here; all of a refused batch.
        ``filled_rows_addr`` 0: nothing is counted, so only a verdict is looked at; the batch is then said to have
        ``static_rows`` rows.

        >>> # R=2, rank=0, base=[1000, 2000], filled_rows=[3, 1], static_rows=-1, block_rows=0, capacity=[8, 8],
        >>> # places=[[64, -1, -1, -1, -1], [0, -1, -1, -1, -1]]
        >>> # tables=[[1064, 2000], [0, 0], ...] summary=[SETTLED, 3, 2, NO_FAULT] (2: of R ranks none is at fault)
        """
        ...

    def withdraw(
        self, summary_addr: int, entry_rank_addr: int, num_entries: int, counts_addr: int, num_local: int
    ) -> None:
        """Where ``summary`` says that a batch was refused, take back what was told of it.

        All of ``entry_rank`` int32 [num_entries] becomes -1, all of ``counts`` int32 [num_local] 0: for callers that do
        not look at the summary themselves, so that what follows neither reads nor writes rows that nobody sent.

        >>> # summary=[STATIC_TOO_SMALL, ., ., .], entry_rank=[0, 1], counts=[3]: entry_rank=[-1, -1], counts=[0]
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
