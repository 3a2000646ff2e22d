"""Counts that stay on the device: how the calls become grids. Legend: kernels/spec_device.py."""

from __future__ import annotations

from anyep.kernels.gpu import boards, settling
from anyep.kernels.gpu.grids import NUMBER_BLOCK, SMALL, Launches, power_of_two

_COUNTS = 256
_EXPERTS = 256
"""Experts that a program looks at in one go."""


class SettleLaunches(Launches):
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
        self._launch(
            settling.settle,
            (num_ranks + num_experts,),
            *(board_addr, message_bytes, rank, num_ranks, num_experts, num_local, expert_rank_addr, expert_local_addr),
            *(alignment, block_rows, send_start_addr, dense_start_addr, recv_rows_addr, recv_start_addr),
            *(counts_addr, block_start_addr, filled_rows_addr, expert_total_addr, gap_begin_addr, gap_end_addr),
            threads=SMALL,
            BY_EXPERT=by_expert,
            EXPERTS=_EXPERTS,
        )

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
        self._launch(
            boards.connect,
            (1,),
            *(board_addr, message_bytes, rank, num_ranks, base_addr, filled_rows_addr, static_rows),
            *(expert_total_addr, num_experts, block_rows, tables_addr, summary_addr, fault_addr),
            *(num_gaps, gap_begin_addr, gap_end_addr),
            threads=SMALL,
            RANKS=power_of_two(num_ranks, 8),
            EXPERTS=_EXPERTS,
        )

    def withdraw(
        self, summary_addr: int, entry_rank_addr: int, num_entries: int, counts_addr: int, num_local: int
    ) -> None:
        self._launch(
            boards.withdraw,
            (-(-max(num_entries, num_local) // NUMBER_BLOCK),),
            *(summary_addr, entry_rank_addr, num_entries, counts_addr, num_local),
            BLOCK=NUMBER_BLOCK,
        )
