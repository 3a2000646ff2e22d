"""One call for each compiled form that a set has, so that all can be compiled ahead and looked at.

Numbers make no forms, only constants do: index width, element, scale format, and the powers of two above K, W and B.
Top-k and widths above 8 compile on their first use.
"""

from __future__ import annotations

from anyep.kernels.gpu.kernels import GpuKernels
from anyep.kernels.gpu.target import Fp8
from anyep.kernels.spec import Element, ScaleFormat

_SOMEWHERE = 1 << 40
"""An address; nothing is launched with it."""
_HIDDEN = 7168
_TOKENS = 128
_TOPK = 8


def call_every_variant(kernels: GpuKernels) -> None:
    """Call every function in all its forms; ``kernels`` must not launch."""
    _move(kernels)
    _route(kernels)
    _settle(kernels)
    _send(kernels)
    _sum(kernels)
    kernels.tick(_SOMEWHERE, _SOMEWHERE)
    kernels.signal(_SOMEWHERE, 8, _SOMEWHERE, _SOMEWHERE)
    kernels.wait(_SOMEWHERE, 8, _SOMEWHERE, 1000, _SOMEWHERE, _SOMEWHERE, 8)
    kernels.meet(_SOMEWHERE, _SOMEWHERE, 8, _SOMEWHERE, 1000, _SOMEWHERE, 8)
    if kernels.target.fp8 is not Fp8.NONE:
        _convert(kernels)


def _move(kernels: GpuKernels) -> None:
    a = _SOMEWHERE
    kernels.scatter(a, 2 * _HIDDEN, 0, _TOKENS, _TOPK, a, a, a)
    kernels.unpack(2 * _HIDDEN, 8, a, a, a, a)
    kernels.pack(2 * _HIDDEN, 8, 8, a, a, a, a)
    kernels.copy(a, a, 1 << 20)
    kernels.fill_rows(a, 2 * _HIDDEN, 8, a, a, 0)
    kernels.transpose_scales(8, 1024, 56, a, a, a)
    for idx_bytes in (4, 8):
        kernels.check_numbers(a, idx_bytes, _TOKENS, 1 << 20, a)
        kernels.begin_gather(2 * _HIDDEN, _TOKENS, a, idx_bytes, 1 << 17, a, a)


def _route(kernels: GpuKernels) -> None:
    a = _SOMEWHERE
    for idx_bytes in (4, 8):
        for by_expert, compact in ((0, 0), (1, 0), (1, a)):
            kernels.begin_route(a, idx_bytes, _TOKENS, _TOPK, 256, 8, a, by_expert, a, a, a, a, a, compact, compact)
            kernels.announce_counts(
                *(a, idx_bytes, _TOKENS, _TOPK, 256, 8, by_expert, a, a, compact, compact),
                *(a, a, a, a, 1, a, a, a, a, a),
            )
            kernels.place(a, a, _TOKENS, _TOPK, a, idx_bytes, by_expert, a, a)
            kernels.scatter_routing(a, idx_bytes, a, 0, _TOKENS, _TOPK, _TOPK, by_expert, a, a, a, a, a, a, a)
        kernels.expand(2 * _HIDDEN, 224, _TOPK, idx_bytes, 8, 32, a, a, a, a, a, a, a, a, a, a, a, a, a)


def _settle(kernels: GpuKernels) -> None:
    a = _SOMEWHERE
    kernels.announce(8, a, 1, a, a, a, a, a, a, a, 264)
    kernels.connect(a, 1120, 8, a, 1, a, a, a, a, 1024)
    settled = (a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a)
    for idx_bytes in (4, 8):
        for by_expert in (0, 1):
            kernels.settle(
                *(a, 1120, 0, 8, 256, 32, a, a, by_expert, 1, 0, -1, 1, *settled),
                *(_TOKENS, _TOPK, a, idx_bytes, a, a, a),
            )


def _send(kernels: GpuKernels) -> None:
    a = _SOMEWHERE
    kernels.fill_gaps(32, a, a, a, 1, a, 1, a, 1, a, 1, a, 1)
    for idx_bytes in (4, 8):
        routing = (a, idx_bytes, a, _TOPK, 1, a, a, a, a, a)
        kernels.send(a, 0, 2 * _HIDDEN, -1, _TOKENS, _TOPK, a, a, a, 0, *routing)
        if kernels.target.fp8 is not Fp8.NONE:
            for element in Element:
                for form in ScaleFormat:
                    kernels.send(a, int(element), _HIDDEN, int(form), _TOKENS, _TOPK, a, a, a, a, *routing)


def _sum(kernels: GpuKernels) -> None:
    a = _SOMEWHERE
    for element in Element:
        kernels.reduce(int(element), _HIDDEN, 0, _TOKENS, _TOPK, 1, a, a, a, a, a, a, a)
    kernels.reduce_weights(_TOPK, 0, _TOKENS, _TOPK, 1, a, a, a, a)
    kernels.logfmt_encode(a, _HIDDEN, 8, a, a, a)
    kernels.reduce_logfmt(_HIDDEN, 0, _TOKENS, _TOPK, 0, a, a, a, a, a, a, a)


def _convert(kernels: GpuKernels) -> None:
    a = _SOMEWHERE
    for element in Element:
        for form in ScaleFormat:
            kernels.quantise_scatter(a, int(element), _HIDDEN, int(form), 0, _TOKENS, _TOPK, a, a, a, a)
            kernels.dequantise(a, a, int(form), _TOKENS, _HIDDEN, a, int(element))
