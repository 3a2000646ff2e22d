"""What a device works out by itself before rows move: who gets what, where it goes, and where peers' memory lies.

Legend: kernels/spec.py; boards, messages and the names in capitals: kernels/spec_device.py.
"""

from __future__ import annotations

from typing import Protocol


class PlaceKernels(Protocol):
    """The part of :class:`~anyep.kernels.spec_device.DeviceKernels` that decides."""

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
        compact_rank_addr: int,
        compact_slot_addr: int,
    ) -> None:
        """Copy what the caller may change, and do the first half of ``route``: entries without numbers.

        ``kept_idx`` [T, K] becomes ``topk_idx``, with :data:`BAD` for an index outside [-1, E), which is routed like
        -1; ``kept_weights`` fp32 [T, K] becomes ``topk_weights``, unless it is 0. Writes ``entry_rank`` and, beside
        rank -1, slot -1. ``by_expert`` may come with ``compact``, int32 [T, min(K, R)] each: the entries that the
        compact layout would have, besides; else 0.

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
        compact_rank_addr: int,
        compact_slot_addr: int,
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
        the first BAD, or NO_FAULT. With ``compact`` entries ``rank_rows`` counts those.

        >>> # the same: entry_slot=[[0, 0], [1, -1]] rank_rows=[2, 1] expert_rows=[2, 0, 0, 1] verdict=2
        >>> # topk_idx=[[0, 3], [1, 0]], by_expert: entry_slot=[[0, 0], [0, 1]] rank_rows=[3, 1]; with compact
        >>> # entries [[0, 1], [0, -1]]: compact_slot=[[0, 0], [1, -1]] rank_rows=[2, 1]
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
        source_rows_addr: int,
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
          ``source_count`` [L, R]: where each source's rows begin in each block, and how many; unless it is 0,
          ``source_rows`` [R]: what each source says of this rank in ``rank_rows``. Not touched otherwise.

        ``tables`` and ``summary``: as ``connect`` says, and a batch is refused for more reasons. In this order: a
        rank's verdict (BAD_EXPERT); an expert with more than ``block_rows`` rows, unless that is 0 (BLOCK_TOO_SMALL); a
        batch of more than ``static_rows`` rows, unless that is -1 (STATIC_TOO_SMALL), or of more than its rank has room
        for (LANDING_TOO_SMALL). With ``static_rows`` every batch has so many rows, and the last gap takes what is not
        filled here; all of a refused batch. Where it is refused all other gaps are empty (0, 0): they may lie behind
        the batch; and if it ``withdraws``, all of ``counts`` and ``source_rows`` becomes 0 and all of ``entry_rank``
        -1, for callers that do not look at the summary: what follows then neither reads nor writes rows that nobody
        sent.

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
