"""The exam: both sets pass, and a set with one fault of each kind does not."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from anyep.kernels.reference import ReferenceKernels
from anyep.kernels.registry import NAMES, load
from anyep.testing.kernel_exam import KernelExamError, check_kernels
from anyep.testing.kernel_memory import DeviceMemory
from tests.kernels.sets import load_or_skip


@pytest.mark.parametrize("name", NAMES)
def test_every_set_passes(name):
    kernels, rounds = load_or_skip(name), {"cpu": 60, "gpu": 20}.get(name, 5)
    check_kernels(kernels, rounds=rounds, memory=DeviceMemory("cuda") if name == "gpu" else None)


def test_a_set_is_examined_in_other_memory_alike():
    check_kernels(load("cpu"), rounds=10, memory=DeviceMemory("cpu"))


def test_a_fault_in_other_memory_is_found():
    with pytest.raises(KernelExamError, match=r"faulty\.copy\(.*a guard byte"):
        check_kernels(_WritesOneByteTooMany(), rounds=40, only=["copy"], memory=DeviceMemory("cpu"))


def test_only_some_functions_are_examined():
    check_kernels(_MissesARow(), rounds=40, only=["copy", "place"])
    with pytest.raises(KernelExamError, match=r"faulty\.scatter\("):
        check_kernels(_MissesARow(), rounds=40, only=["copy", "scatter"])


def test_an_unknown_function_is_told_the_functions():
    with pytest.raises(ValueError, match=r"route, place, .*; got 'rout'"):
        check_kernels(load("reference"), only=["rout"])


PLAIN = """
from anyep.kernels.registry import load
from anyep.testing.kernel_exam import check_kernels
check_kernels(load("cpu"), rounds=20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("features", ["", "+avx,+avx2"])
def test_the_cpu_set_passes_when_compiled_for_older_processors(features, tmp_path):
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": features,
        "ANYEP_CACHE_DIR": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", PLAIN], env=environment, check=True, timeout=250)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_the_cpu_set_passes_at_length(seed):
    check_kernels(load("cpu"), seed=seed, rounds=1000)


def test_an_unknown_name_is_told_the_names():
    with pytest.raises(ValueError, match="kernels must be one of cpu, gpu, reference, got 'tpu'"):
        load("tpu")


class _Faulty(ReferenceKernels):
    name = "faulty"


class _MissesARow(_Faulty):
    def scatter(self, x, row_bytes, first, last, *rest):
        super().scatter(x, row_bytes, first, max(first, last - 1), *rest)


class _WritesOneByteTooMany(_Faulty):
    def copy(self, source, destination, num_bytes):
        super().copy(source, destination, num_bytes)
        after = ctypes.c_uint8.from_address(destination + num_bytes)
        after.value ^= 0xFF


class _TouchesItsInput(_Faulty):
    def dequantise(self, q, *rest):
        super().dequantise(q, *rest)
        if rest[2] * rest[3]:
            ctypes.c_uint8.from_address(q).value ^= 1


class _IgnoresTheOrder(_Faulty):
    def reduce(self, element, hidden, first, last, width, by_rank, *rest):
        super().reduce(element, hidden, first, last, width, 0, *rest)


class _ForgetsTheSecondBias(_Faulty):
    def reduce(self, *arguments):
        super().reduce(*arguments[:-2], 0, arguments[-1])


class _ForgetsTheWeights(_Faulty):
    def reduce(self, *arguments):
        super().reduce(*arguments[:-4], 0, *arguments[-3:])


class _AcceptsAnyExpert(_Faulty):
    def route(self, *arguments):
        super().route(*arguments)
        return -1


class _CountsFromTheWrongBin(_Faulty):
    def place(self, entry_rank, slot, T, W, idx, idx_bytes, by_expert, *rest):
        super().place(entry_rank, slot, T, W, idx, idx_bytes, 0, *rest)


class _PlacesOverItsSlots(_Faulty):
    def place(self, entry_rank, slot, *rest):
        super().place(entry_rank, slot, *rest[:-1], slot)


class _LeavesWeightsBesideMinusOne(_Faulty):
    def scatter_routing(self, *arguments):
        by_expert = 7
        super().scatter_routing(*arguments[:by_expert], 0, *arguments[by_expert + 1 :])


class _ForgetsTheTokens(_Faulty):
    def scatter_routing(self, *arguments):
        super().scatter_routing(*arguments[:-1], 0)


class _UnpacksOneSource(_Faulty):
    def unpack(self, row_bytes, num_sources, rows, start, packed, base):
        super().unpack(row_bytes, min(num_sources, 1), rows, start, packed, base)


class _PacksOneBin(_Faulty):
    def pack(self, row_bytes, num_peers, num_bins, *rest):
        super().pack(row_bytes, num_peers, 1, *rest)


class _ExpandsOneSource(_Faulty):
    def expand(self, *arguments):
        num_sources = 4
        super().expand(*arguments[:num_sources], min(arguments[num_sources], 1), *arguments[num_sources + 1 :])


class _TransposesWholeBlocks(_Faulty):
    def transpose_scales(self, num_blocks, block_rows, columns, counts, source, there):
        everything = (ctypes.c_int32 * num_blocks)(*[block_rows] * num_blocks)
        super().transpose_scales(num_blocks, block_rows, columns, ctypes.addressof(everything), source, there)


class _GathersFromTheFirstRank(_Faulty):
    def gather(self, row_bytes, num_rows, index, idx_bytes, rows_per_rank, num_ranks, peers, out):
        first = (ctypes.c_int64 * num_ranks)(*[ctypes.c_int64.from_address(peers).value] * num_ranks)
        rest = (index, idx_bytes, rows_per_rank, num_ranks, ctypes.addressof(first), out)
        return super().gather(row_bytes, num_rows, *rest)


class _EncodesOneBin(_Faulty):
    def logfmt_encode(self, x, hidden, num_bins, *rest):
        super().logfmt_encode(x, hidden, min(num_bins, 1), *rest)


class _ForgetsTheLogfmtWeights(_Faulty):
    def reduce_logfmt(self, *arguments):
        super().reduce_logfmt(*arguments[:-4], 0, *arguments[-3:])


class _FillsWithZeroOnly(_Faulty):
    def fill_rows(self, *arguments):
        super().fill_rows(*arguments[:-1], 0)


class _KnowsOneScaleFormat(_Faulty):
    def quantise_scatter(self, x, element, hidden, scale_format, *rest):
        super().quantise_scatter(x, element, hidden, min(scale_format, 1), *rest)


class _SumsTooManyWeights(_Faulty):
    def reduce_weights(self, num_topk, first, last, *rest):
        super().reduce_weights(num_topk, 0, last, *rest)


@pytest.mark.parametrize("faulty", _Faulty.__subclasses__(), ids=lambda kind: kind.__name__)
def test_a_fault_is_found_and_named(faulty):
    overridden = next(name for name in vars(faulty) if not name.startswith("__"))
    with pytest.raises(KernelExamError, match=rf"faulty\.{overridden}\("):
        check_kernels(faulty(), rounds=40)
