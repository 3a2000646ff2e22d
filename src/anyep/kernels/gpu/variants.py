"""One call for each compiled form that a set has, so that all can be compiled ahead and looked at.

Numbers make no forms, only constants do: index width, element, scale format, and the powers of two above K, W, R and L,
from 8 on. A buffer has those of its own sizes made; those of a variant with a larger top-k compile on their first use.
"""

from __future__ import annotations

from typing import NamedTuple

from anyep.kernels.gpu.kernels import GpuKernels
from anyep.kernels.gpu.target import Fp8
from anyep.kernels.spec import Element, ScaleFormat

_SOMEWHERE = 1 << 40
"""An address; nothing is launched with it."""
_HIDDEN = 7168
_FEW_CHANNELS = 128
_TOKENS = 128
_EXPERTS = 256


class Sizes(NamedTuple):
    """Sizes of a buffer that make forms: K, R, L. Up to 8 they all make the same."""

    num_topk: int = 8
    num_ranks: int = 8
    num_local: int = 8

    def widths(self) -> set[int]:
        """Return how many entries a token has: a row for each column, or for each rank."""
        return {self.num_topk, min(self.num_topk, self.num_ranks)}


SMALL_SIZES = Sizes()


def call_every_variant(kernels: GpuKernels, sizes: Sizes = SMALL_SIZES) -> None:
    """Call every function in all its forms for these sizes; ``kernels`` must not launch."""
    _move(kernels, sizes)
    _route(kernels, sizes)
    _settle(kernels, sizes)
    for width in sorted(sizes.widths()):
        _send(kernels, sizes, width)
        _sum(kernels, sizes, width)
    kernels.tick(_SOMEWHERE, _SOMEWHERE)
    kernels.signal(_SOMEWHERE, 8, _SOMEWHERE, _SOMEWHERE)
    kernels.wait(_SOMEWHERE, 8, _SOMEWHERE, 1000, _SOMEWHERE, _SOMEWHERE, 8)
    kernels.meet(_SOMEWHERE, _SOMEWHERE, 8, _SOMEWHERE, 1000, _SOMEWHERE, 8)
    if kernels.target.fp8 is not Fp8.NONE:
        for width in sorted(sizes.widths()):
            _convert(kernels, width)


def _move(kernels: GpuKernels, sizes: Sizes) -> None:
    a = _SOMEWHERE
    for width in sorted(sizes.widths()):
        kernels.scatter(a, 2 * _HIDDEN, 0, _TOKENS, width, a, a, a)
    kernels.unpack(2 * _HIDDEN, 8, a, a, a, a)
    kernels.pack(2 * _HIDDEN, 8, sizes.num_local, a, a, a, a)
    kernels.copy(a, a, 1 << 20)
    kernels.fill_rows(a, 2 * _HIDDEN, 8, a, a, 0)
    kernels.transpose_scales(8, 1024, 56, a, a, a)
    for idx_bytes in (4, 8):
        kernels.check_numbers(a, idx_bytes, _TOKENS, 1 << 20, a)
        kernels.begin_gather(2 * _HIDDEN, _TOKENS, a, idx_bytes, 1 << 17, a, a)


def _route(kernels: GpuKernels, sizes: Sizes) -> None:
    a, topk, ranks = _SOMEWHERE, sizes.num_topk, sizes.num_ranks
    for idx_bytes in (4, 8):
        for by_expert, compact in ((0, 0), (1, 0), (1, a)):
            kernels.begin_route(
                *(a, idx_bytes, _TOKENS, topk, _EXPERTS, ranks, a, by_expert, a, a, a, a, a, compact, compact)
            )
            kernels.announce_counts(
                *(a, idx_bytes, _TOKENS, topk, _EXPERTS, ranks, by_expert, a, a, compact, compact),
                *(a, a, a, a, 1, a, a, a, a, a),
            )
            kernels.place(a, a, _TOKENS, topk, a, idx_bytes, by_expert, a, a)
            for width in sorted(sizes.widths()):
                kernels.scatter_routing(a, idx_bytes, a, 0, _TOKENS, topk, width, by_expert, a, a, a, a, a, a, a)
        kernels.expand(2 * _HIDDEN, 224, topk, idx_bytes, 8, 32, a, a, a, a, a, a, a, a, a, a, a, a, a)


def _settle(kernels: GpuKernels, sizes: Sizes) -> None:
    a, ranks = _SOMEWHERE, sizes.num_ranks
    kernels.announce(8, a, 1, a, a, a, a, a, a, a, 264)
    kernels.connect(a, 1120, ranks, a, 1, a, a, a, a, 1024)
    settled = (a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a)
    for idx_bytes in (4, 8):
        for by_expert in (0, 1):
            kernels.settle(
                *(a, 1120, 0, ranks, _EXPERTS, 32, a, a, by_expert, 1, 0, -1, 1, *settled),
                *(_TOKENS, sizes.num_topk, a, idx_bytes, a, a, a),
            )


def _send(kernels: GpuKernels, sizes: Sizes, width: int) -> None:
    a = _SOMEWHERE
    kernels.fill_gaps(32, a, a, a, 1, a, 1, a, 1, a, 1, a, 1)
    for idx_bytes in (4, 8):
        routing = (a, idx_bytes, a, sizes.num_topk, 1, a, a, a, a, a)
        kernels.send(a, 0, 2 * _HIDDEN, -1, _TOKENS, width, a, a, a, 0, *routing)
        if kernels.target.fp8 is not Fp8.NONE:
            for element in Element:
                for form in ScaleFormat:
                    kernels.send(a, int(element), _HIDDEN, int(form), _TOKENS, width, a, a, a, a, *routing)


def _sum(kernels: GpuKernels, sizes: Sizes, width: int) -> None:
    a = _SOMEWHERE
    for element in Element:
        for hidden in (_HIDDEN, _FEW_CHANNELS):
            kernels.reduce(int(element), hidden, 0, _TOKENS, width, 1, a, a, a, a, a, a, a)
    kernels.reduce_weights(sizes.num_topk, 0, _TOKENS, width, 1, a, a, a, a)
    kernels.logfmt_encode(a, _HIDDEN, sizes.num_local, a, a, a)
    kernels.reduce_logfmt(_HIDDEN, 0, _TOKENS, width, 0, a, a, a, a, a, a, a)


def _convert(kernels: GpuKernels, width: int) -> None:
    a = _SOMEWHERE
    for element in Element:
        for form in ScaleFormat:
            kernels.quantise_scatter(a, int(element), _HIDDEN, int(form), 0, _TOKENS, width, a, a, a, a)
            kernels.dequantise(a, a, int(form), _TOKENS, _HIDDEN, a, int(element))
