"""The half of the GPU set that computes: how the spec's calls become grids. Legend: kernels/spec.py."""

from __future__ import annotations

from anyep.kernels.gpu import decode, encode, logfmt_rows, logfmt_sums, sums
from anyep.kernels.gpu.grids import parts, power_of_two
from anyep.kernels.gpu.row_launches import RowLaunches
from anyep.kernels.gpu.target import Fp8
from anyep.kernels.spec import Element
from anyep.numerics.formats import CHANNELS_PER_SCALE

GROUPS = 8
"""Groups that a program converts: 16 numbers for each of its 64 threads, which are 16 bytes of FP8."""
CONVERTING = 64
_BLOCK = 1024
"""Channels that a program sums: 16 bytes of BF16 for each of its 128 threads."""
_SUMMING = 128
_FEW = 128
"""Channels that a program sums where there are few, as in rows of weights."""
_LOGFMT_GROUPS = 4
_ENCODING, _DECODING = 128, 64


def pieces_of(hidden: int, groups: int) -> int:
    return parts(hidden, groups * CHANNELS_PER_SCALE)


class NumberLaunches(RowLaunches):
    """:class:`~anyep.kernels.spec_numbers.NumberKernels`; its docstrings are the spec's."""

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
        """As the spec says. Raises Unavailable where the device has no FP8."""
        self.target.check_fp8()
        pieces = pieces_of(hidden, GROUPS)
        step = self._step(last_token - first_token, pieces)
        self._launch(
            encode.quantise_scatter,
            (step, pieces),
            *(
                x_addr,
                hidden,
                first_token,
                last_token,
                step,
                width,
                entry_rank_addr,
                entry_row_addr,
                peer_q_addr,
                peer_scales_addr,
            ),
            threads=CONVERTING,
            ELEMENT=element,
            SCALES=scale_format,
            NATIVE=self.target.fp8 is Fp8.NATIVE,
            PLACES=power_of_two(width, 8),
            BOUNDED=self._is_bounded,
            GROUPS=GROUPS,
        )

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
        """As the spec says. Raises Unavailable where the device has no FP8."""
        self.target.check_fp8()
        self._launch(
            decode.dequantise,
            (num_rows, pieces_of(hidden, GROUPS)),
            *(q_addr, scales_addr, hidden, out_addr),
            threads=CONVERTING,
            ELEMENT=element,
            SCALES=scale_format,
            NATIVE=self.target.fp8 is Fp8.NATIVE,
            GROUPS=GROUPS,
        )

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
        weights_addr: int,
        bias0_addr: int,
        bias1_addr: int,
        out_addr: int,
    ) -> None:
        block, threads = (_FEW, CONVERTING) if hidden <= _FEW else (_BLOCK, _SUMMING)
        pieces = parts(hidden, block)
        step = self._step(last_token - first_token, pieces)
        self._launch(
            sums.reduce,
            (step, pieces),
            *(hidden, first_token, last_token, step, width, by_rank, entry_rank_addr, entry_row_addr, peer_addr),
            *(weights_addr, bias0_addr, bias1_addr, out_addr),
            threads=threads,
            ELEMENT=element,
            PLACES=power_of_two(width, 8),
            BLOCK=block,
        )

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
        where = (entry_rank_addr, entry_row_addr, peer_addr, 0, 0, 0, out_addr)
        self.reduce(int(Element.FP32), num_topk, first_token, last_token, width, by_rank, *where)

    def logfmt_encode(
        self, x_addr: int, hidden: int, num_bins: int, rows_addr: int, start_addr: int, wire_addr: int
    ) -> None:
        step = self._share(num_bins)
        self._launch(
            logfmt_rows.logfmt_encode,
            (num_bins, step),
            *(x_addr, hidden, num_bins, rows_addr, start_addr, wire_addr, step),
            threads=_ENCODING,
            BINS=power_of_two(num_bins, 8),
            GROUPS=GROUPS,
        )

    def reduce_logfmt(
        self,
        hidden: int,
        first_token: int,
        last_token: int,
        width: int,
        by_rank: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_addr: int,
        weights_addr: int,
        bias0_addr: int,
        bias1_addr: int,
        out_addr: int,
    ) -> None:
        pieces = pieces_of(hidden, _LOGFMT_GROUPS)
        step = self._step(last_token - first_token, pieces)
        self._launch(
            logfmt_sums.reduce_logfmt,
            (step, pieces),
            *(hidden, first_token, last_token, step, width, by_rank, entry_rank_addr, entry_row_addr, peer_addr),
            *(weights_addr, bias0_addr, bias1_addr, out_addr),
            threads=_DECODING,
            PLACES=power_of_two(width, 8),
            BOUNDED=self._is_bounded,
            GROUPS=_LOGFMT_GROUPS,
        )
