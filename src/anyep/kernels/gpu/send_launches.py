"""What a dispatch sends, in one launch: how the calls become grids. Legend: kernels/spec_device.py."""

from __future__ import annotations

from anyep.kernels.gpu import sending
from anyep.kernels.gpu.grids import NUM_THREADS, PIECE, Launches, parts, power_of_two
from anyep.kernels.gpu.number_launches import CONVERTING, GROUPS, pieces_of
from anyep.kernels.gpu.target import Fp8


class SendLaunches(Launches):
    """:class:`~anyep.kernels.spec_device.DeviceKernels`; its docstrings are the spec's."""

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
        plain = scale_format < 0
        if not plain:
            self.target.check_fp8()
        pieces = parts(hidden, PIECE) if plain else pieces_of(hidden, GROUPS)
        step = self._step(num_tokens, pieces + 1)
        self._launch(
            sending.send,
            (step, pieces + 1),
            *(x_addr, hidden, num_tokens, step, width, entry_rank_addr, entry_row_addr, peer_x_addr, peer_scales_addr),
            *(topk_idx_addr, topk_weights_addr, num_topk, by_expert, expert_rank_addr, expert_local_addr),
            *(peer_idx_addr, peer_weights_addr, peer_token_addr),
            threads=NUM_THREADS if plain else CONVERTING,
            ELEMENT=0 if plain else element,
            SCALES=scale_format,
            NATIVE=self.target.fp8 is Fp8.NATIVE,
            IDX_BYTES=idx_bytes,
            COLUMNS=power_of_two(num_topk, 8),
            PLACES=power_of_two(width, 8),
            BOUNDED=self._is_bounded,
            PIECE=PIECE if plain else GROUPS,
        )

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
        step = self._share(5 * num_gaps)
        arrays = (base0, bytes0, base1, bytes1, base2, bytes2, base3, bytes3, base4, bytes4)
        self._launch(sending.fill_gaps, (num_gaps, step, 5), gap_begin_addr, gap_end_addr, *arrays, step, PIECE=PIECE)
