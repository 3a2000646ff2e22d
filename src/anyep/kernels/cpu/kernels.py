"""The set itself: importing this module compiles or loads every kernel, so import it through the registry."""

from __future__ import annotations

from anyep.kernels.cpu import (
    decode,
    encode,
    expansion,
    gathering,
    logfmt_rows,
    logfmt_sums,
    packing,
    routing,
    rows,
    sums,
    transposition,
)


class CpuKernels:
    """A :class:`~anyep.kernels.spec.KernelSet`: Numba on one thread, without the GIL."""

    name = "cpu"

    route = staticmethod(routing.route)
    place = staticmethod(routing.place)
    scatter = staticmethod(rows.scatter)
    scatter_routing = staticmethod(routing.scatter_routing)
    quantise_scatter = staticmethod(encode.quantise_scatter)
    dequantise = staticmethod(decode.dequantise)
    reduce = staticmethod(sums.reduce)
    reduce_weights = staticmethod(sums.reduce_weights)
    unpack = staticmethod(packing.unpack)
    pack = staticmethod(packing.pack)
    expand = staticmethod(expansion.expand)
    transpose_scales = staticmethod(transposition.transpose_scales)
    logfmt_encode = staticmethod(logfmt_rows.logfmt_encode)
    reduce_logfmt = staticmethod(logfmt_sums.reduce_logfmt)
    gather = staticmethod(gathering.gather)
    copy = staticmethod(rows.copy)
    fill_rows = staticmethod(rows.fill_rows)
    fence = staticmethod(rows.fence)
