"""The half of a kernel set that computes: formats and sums. Conventions and legend: kernels/spec.py."""

from __future__ import annotations

from typing import Protocol


class NumberKernels(Protocol):
    """Loops that read numbers and round them; what they define bit by bit, numerics/ defines."""

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
        weights_addr: int,
        bias0_addr: int,
        bias1_addr: int,
        out_addr: int,
    ) -> None:
        """out[t] = round(bias0[t] + bias1[t] + sum of the rows that its entries name), for t in [first, last).

        Rows, biases and ``out`` are [., H] of ``element``; a bias address of 0 means none. The sum is fp32: it starts
        from the biases (bias0 + bias1; from the first row where there is no bias; 0 where there is neither) and adds
        the rows one by one, in ascending rank and then column order (``by_rank`` 1) or in column order (0); it rounds
        once, to nearest even. ``weights`` fp32 [T, W] (0: none) has a factor for each entry's row: the product is
        rounded to fp32 before it is added. Biases have no factor.

        >>> # bf16, entry_rank=[[0, 1]], entry_row=[[1, 0]], rank 0: [[9, 9], [1, 2]], rank 1: [[0.5, 2 ** -8]]
        >>> # bias0=[[10, 0]]: out=[[11.5, 2]] (2 + 2 ** -8 rounds to 2)
        >>> # the same with weights=[[0.5, 4]]: out=[[12.5, 1.015625]]
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

    def logfmt_encode(
        self, x_addr: int, hidden: int, num_bins: int, rows_addr: int, start_addr: int, wire_addr: int
    ) -> None:
        """Encode the BF16 rows of all bins as LogFMT-10, one wire row behind the other.

        Bin b is rows [start[b], start[b] + rows[b]) of ``x`` [., H]; ``rows`` and ``start`` are int32 [B]. A wire row
        has the bytes of :func:`~anyep.numerics.logfmt.logfmt_row_bytes`, and begins at a multiple of 4; bytes that no
        group uses are not written.

        >>> # H=2, rows=[1], start=[1], x=[[9, 9], [0.5, -0.25]]: one coded group, amax 0x3f00, amin 0x3e80
        >>> # wire: word 0 is 0x3e803f00; bytes from 64 on: 255, 1, 0, ...; from 192 on: 0b01, 0b10, 0, ...; 160 in all
        """
        ...

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
        """Like :meth:`reduce` for BF16, but the rows are wire rows of :meth:`logfmt_encode`.

        They are decoded to fp32 and not rounded before they are multiplied and added. Biases and ``out`` are BF16.

        >>> # the wire row of logfmt_encode's example at rank 0, entry_rank=[[0]], entry_row=[[0]], weights=[[2]],
        >>> # bias0=[[1, 1]]: out=[[2, 0.5]]
        """
        ...
