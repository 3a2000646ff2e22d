"""The CUDA driver's own launch, in one compiled loop over all kernels of a recording (kernels/tapes.py).

Triton's launcher takes 4 to 7 us of Python for each kernel; here a whole recording takes one call. What is handed over
is what Triton hands over (3.6 to 3.9): the numbers of the kernel's signature, in order, and behind them the addresses
of scratch memory that none of these kernels has.

A tape is int64: a head of functions of the driver, the device's context and the number of launches; for each of them
its function, grid, threads, bytes of shared memory, how many parameters, and a pair (added, base) for each of these.
"""

from __future__ import annotations

import ctypes
import re
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from anyep.kernels.tapes import Number
from anyep.machine.addresses import address_of
from anyep.machine.compiler import compiled
from anyep.machine.intrinsics import instruction, load_i64, stack_block, store_i64

_LAUNCH, _CURRENT, _PUSH, _POP, _CONTEXT, _COUNT, _HEAD = range(7)
_LAUNCH_WORDS = 7
_MOST_NUMBERS = 64
_I32, _I64 = ir.IntType(32), ir.IntType(64)


class Launched(NamedTuple):
    """A launch as the driver takes it."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    numbers: tuple[Number, ...]


def _called(builder: Any, function: Any, kinds: Sequence[ir.IntType], values: Sequence[Any]) -> Any:
    """Emit a call of a C function of integers and pointers, and return its int as int64."""
    narrowed = [
        builder.trunc(value, kind) if kind.width < 64 else value for kind, value in zip(kinds, values, strict=True)
    ]
    pointer = builder.inttoptr(function, ir.FunctionType(_I32, list(kinds)).as_pointer())
    return builder.sext(builder.call(pointer, narrowed), _I64)


@instruction(types.int64, types.int64, types.int64)
def call_with_one(builder: Any, function: Any, value: Any) -> Any:
    """Call a C function of one pointer."""
    return _called(builder, function, [_I64], [value])


@instruction(types.int64, *[types.int64] * 9)
def call_launch(
    builder: Any,
    function: Any,
    kernel: Any,
    grid_x: Any,
    grid_y: Any,
    grid_z: Any,
    threads: Any,
    shared_bytes: Any,
    stream: Any,
    parameters: Any,
) -> Any:
    """Call ``cuLaunchKernel``: blocks have one dimension, and there is nothing extra."""
    one, nothing = ir.Constant(_I64, 1), ir.Constant(_I64, 0)
    values = (kernel, grid_x, grid_y, grid_z, threads, one, one, shared_bytes, stream, parameters, nothing)
    kinds = (_I64, *[_I32] * 7, _I64, _I64, _I64)
    return _called(builder, function, kinds, values)


_numbers_block = stack_block(8 * _MOST_NUMBERS)
_pointers_block = stack_block(8 * _MOST_NUMBERS)
_context_block = stack_block(8)


@compiled("int64(int64, int64, int64)")
def play(tape_addr: int, bases_addr: int, stream: int) -> Any:
    """Launch everything; return the driver's first error, 0 for none.

    The context of the tape's device is made the current one for as long as it takes: a thread that has not touched a
    device yet has none, and one that works on several may have another.
    """
    context = _context_block()
    error = call_with_one(load_i64(tape_addr, _CURRENT), context)
    is_current = load_i64(context, 0) == load_i64(tape_addr, _CONTEXT)
    if error == 0 and not is_current:
        error = call_with_one(load_i64(tape_addr, _PUSH), load_i64(tape_addr, _CONTEXT))
    if error != 0:
        return error
    numbers, pointers = _numbers_block(), _pointers_block()
    launch, left = load_i64(tape_addr, _LAUNCH), load_i64(tape_addr, _COUNT)
    here = tape_addr + 8 * _HEAD
    while left > 0 and error == 0:
        count = load_i64(here, _LAUNCH_WORDS - 1)
        for i in range(count):
            number, origin = load_i64(here, _LAUNCH_WORDS + 2 * i), load_i64(here, _LAUNCH_WORDS + 2 * i + 1)
            if origin:
                number += load_i64(bases_addr, origin - 1)
            store_i64(numbers, i, number)
            store_i64(pointers, i, numbers + 8 * i)
        error = call_launch(
            launch,
            load_i64(here, 0),
            load_i64(here, 1),
            load_i64(here, 2),
            load_i64(here, 3),
            load_i64(here, 4),
            load_i64(here, 5),
            stream,
            pointers,
        )
        here += 8 * (_LAUNCH_WORDS + 2 * count)
        left -= 1
    if not is_current:
        call_with_one(load_i64(tape_addr, _POP), context)
    return error


class Driver:
    """The driver's functions, and the context in which torch and Triton work on a device: its primary one.

    It is not asked which is the current one, as the thread that makes this may have none.
    """

    def __init__(self, ordinal: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.check(self._library.cuDeviceGet(ctypes.byref(device), ordinal))
        self.check(self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        names = ("cuLaunchKernel", "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2")
        functions = [ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value for name in names]
        self._head = [*functions, context.value]

    def check(self, error: int) -> None:
        """Raise RuntimeError with the driver's words for ``error``, unless that is 0."""
        if error:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(error, ctypes.byref(text))
            raise RuntimeError(
                f"CUDA driver: {(text.value or b'unknown error').decode()} ({error}). It may be that of an earlier "
                "kernel of this process: CUDA_LAUNCH_BLOCKING=1 raises where it happens"
            )

    def tape(self, launches: Sequence[Launched]) -> Tape:
        """Write launches down."""
        words: list[int | None] = [*self._head, len(launches)]
        for function, grid, threads, shared_bytes, numbers in launches:
            assert len(numbers) <= _MOST_NUMBERS, "kernels have fewer numbers"
            words += [function, *grid, threads, shared_bytes, len(numbers)]
            words += [word for number in numbers for word in number]
        return Tape(self, np.array(words, np.int64))


class Tape:
    """A recording that the driver plays."""

    def __init__(self, driver: Driver, words: Any) -> None:
        self._driver = driver
        self._words = words
        self._addr = address_of(words)

    def __call__(self, bases: Sequence[int], stream: int) -> None:
        """Launch all on ``stream``. Raises RuntimeError with what the driver says; runs without the GIL."""
        values = bases if isinstance(bases, array) else array("q", bases)
        error = play(self._addr, values.buffer_info()[0], stream)
        if error:
            self._driver.check(error)


def hidden_parameters(ptx: str, num_numbers: int) -> int:
    """Return how many parameters Triton has added to a kernel's own; all are addresses of memory that it may want.

    >>> hidden_parameters(".visible .entry copy(\\n.param .u64 copy_param_0,\\n.param .u64 .ptr copy_param_1\\n)", 1)
    1
    """
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    assert entry is not None, "compiled kernels have an entry"
    return entry[1].count(".param") - num_numbers
