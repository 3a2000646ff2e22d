"""Atomics for compiled loops: words at addresses with an order, and sleeping on them.

Addresses are int64 and aligned to the word. What an acquire or a release is for is said in ``transport/signals.py``,
where alone they are used; elsewhere only counters are added to. *Ordered* means sequentially consistent.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from anyep.machine.intrinsics import instruction

_MACHINE = platform.machine().lower()
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_FUTEX_NUMBER = _FUTEX_NUMBERS.get(_MACHINE, 0)
_FUTEX_WAKE, _FUTEX_WAIT_BITSET = 1, 9  # without FUTEX_PRIVATE_FLAG: the word may lie in memory of several processes
_NANOSECONDS = 1_000_000_000
_EVERYBODY, _EVERY_BIT = 0x7FFFFFFF, 0xFFFFFFFF

HAS_FUTEX = sys.platform == "linux" and _FUTEX_NUMBER > 0
"""Whether a thread can sleep on a word here; elsewhere waits are short naps."""

_address = types.int64


def _pointer(builder: Any, address: Any, word: ir.IntType) -> Any:
    return builder.inttoptr(address, word.as_pointer())


def _constant(value: int) -> Any:
    return ir.Constant(_I64, value)


def _loader(word: ir.IntType, ordering: str) -> Callable[..., Any]:
    @instruction(types.int64, _address)
    def load(builder: Any, address: Any) -> Any:
        """Return the signed word at the address."""
        loaded = builder.load_atomic(_pointer(builder, address, word), ordering, word.width // 8)
        return builder.sext(loaded, _I64) if word.width < 64 else loaded

    return load


load_acquire_i64 = _loader(_I64, "acquire")
load_ordered_i64 = _loader(_I64, "seq_cst")
load_ordered_i32 = _loader(_I32, "seq_cst")


@instruction(types.void, _address, types.int64)
def store_release_i64(builder: Any, address: Any, value: Any) -> None:
    """Write a word after everything this thread wrote before (ordinary stores; a fence covers non-temporal ones)."""
    builder.store_atomic(value, _pointer(builder, address, _I64), "release", 8)


@instruction(types.int64, _address, types.int64)
def add_ordered_i32(builder: Any, address: Any, value: Any) -> Any:
    """Add to a 32-bit word; return what it was, signed."""
    before = builder.atomic_rmw("add", _pointer(builder, address, _I32), builder.trunc(value, _I32), "seq_cst")
    return builder.sext(before, _I64)


@instruction(types.void, _address, types.int64)
def add_i64(builder: Any, address: Any, value: Any) -> None:
    """Add to a word that other threads add to; says nothing about other words."""
    builder.atomic_rmw("add", _pointer(builder, address, _I64), value, "monotonic")


@instruction(types.int64, _address, types.int64, types.int64)
def exchange_if_i64(builder: Any, address: Any, expected: Any, value: Any) -> Any:
    """Write ``value`` if the word is ``expected``, ordered; return what it was."""
    pair = builder.cmpxchg(_pointer(builder, address, _I64), expected, value, "seq_cst", "seq_cst")
    return builder.extract_value(pair, 0)


@instruction(types.void)
def pause(builder: Any) -> None:
    """Tell the processor that this loop spins."""
    if _MACHINE in ("x86_64", "amd64"):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
    elif _MACHINE in ("aarch64", "arm64"):
        kind = ir.FunctionType(ir.VoidType(), [_I32])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint")
        builder.call(hint, [ir.Constant(_I32, 1)])  # yield


@instruction(types.void)
def give_way(builder: Any) -> None:
    """Let another thread run on this core."""
    kind = ir.FunctionType(_I32, [])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])


def _futex(builder: Any, address: Any, operation: int, value: Any, timeout: Any) -> Any:
    kind = ir.FunctionType(_I64, [_I64], var_arg=True)
    system_call = cgutils.get_or_insert_function(builder.module, kind, "syscall")
    arguments = [address, _constant(operation), value, timeout, _constant(0), _constant(_EVERY_BIT)]
    return builder.call(system_call, [_constant(_FUTEX_NUMBER), *arguments])


@instruction(types.int64, _address, types.int64, types.int64)
def futex_wait(builder: Any, address: Any, expected: Any, deadline_ns: Any) -> Any:
    """Sleep while the 32-bit word is ``expected``, until woken or until ``deadline_ns`` of the monotonic clock.

    Return 0 when woken; -1 when the word was another, time is up, or a signal handler must run.
    Where there is no futex it returns -1 at once.
    """
    if not HAS_FUTEX:
        return _constant(-1)
    timespec = cgutils.alloca_once(builder, _I64, size=2)
    builder.store(builder.sdiv(deadline_ns, _constant(_NANOSECONDS)), timespec)
    builder.store(builder.srem(deadline_ns, _constant(_NANOSECONDS)), builder.gep(timespec, [_constant(1)]))
    low = builder.and_(expected, _constant(_EVERY_BIT))
    return _futex(builder, address, _FUTEX_WAIT_BITSET, low, builder.ptrtoint(timespec, _I64))


@instruction(types.int64, _address)
def futex_wake(builder: Any, address: Any) -> Any:
    """Wake every thread that sleeps on the word; return how many slept."""
    if not HAS_FUTEX:
        return _constant(0)
    return _futex(builder, address, _FUTEX_WAKE, _constant(_EVERYBODY), _constant(0))
