"""Counts that stay on the device: how the calls become grids. Legend: kernels/spec_device.py."""

from __future__ import annotations

from anyep.kernels.gpu import boards, settling
from anyep.kernels.gpu.grids import SMALL, power_of_two
from anyep.kernels.gpu.routing_launches import RoutingLaunches

_COUNTS = 256
_EXPERTS = 256
"""Experts that a program looks at in one go."""
_BLOCK = 512
"""Entries that a program looks at in one go."""
_FEW_ENTRIES = 4096
"""So many entries are placed by the programs that settle their bins, each of which looks at all; more by a launch."""


class SettleLaunches(RoutingLaunches):
    """:class:`~anyep.kernels.spec_device.DeviceKernels`; its docstrings are the spec's."""

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
        places = (place0, place1, place2, place3, place4)
        self._launch(
            boards.announce,
            (num_ranks,),
            *(peer_message_addr, capacity, *places, verdict_addr, counts_addr, num_counts),
            threads=SMALL,
            COUNTS=_COUNTS,
        )

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
        entries = num_tokens * width
        fits = entries <= _FEW_ENTRIES
        self._launch(
            settling.settle,
            (num_ranks + num_experts + 1,),
            *(board_addr, message_bytes, rank, num_ranks, num_experts, num_local, expert_rank_addr, expert_local_addr),
            *(alignment, block_rows, static_rows, withdraws, base_addr, tables_addr, summary_addr, fault_addr),
            *(send_start_addr, dense_start_addr, recv_rows_addr, recv_start_addr, counts_addr, block_start_addr),
            *(filled_rows_addr, gap_begin_addr, gap_end_addr, source_begin_addr, source_count_addr, source_rows_addr),
            *(entries if fits else 0, topk_idx_addr, entry_rank_addr, entry_slot_addr, entry_row_addr),
            BY_EXPERT=by_expert,
            IDX_BYTES=idx_bytes if by_expert else 8,
            RANKS=power_of_two(num_ranks, 8),
            EXPERTS=_EXPERTS,
            BLOCK=_BLOCK,
        )
        if not fits:
            self._place_entries(
                *(entry_rank_addr, entry_slot_addr, entries, topk_idx_addr, idx_bytes, by_expert),
                *(send_start_addr, entry_row_addr, summary_addr if withdraws else 0),
            )

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
        self._launch(
            boards.connect,
            (1,),
            *(board_addr, message_bytes, num_ranks, base_addr, num_rows, tables_addr, summary_addr, fault_addr),
            *(entry_rank_addr, num_entries),
            threads=SMALL,
            RANKS=power_of_two(num_ranks, 8),
            BLOCK=_BLOCK,
        )
