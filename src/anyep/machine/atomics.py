"""Atomic words and sleeping on them, as compiled loops see them. Addresses are int64; words are aligned.

Orders are named in each function; *seq-cst* ones take part in one total order, which wake-ups rely on.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_IS_LINUX = platform.system() == "Linux"
_FUTEX_NUMBER = {"x86_64": 202, "aarch64": 98}.get(platform.machine().lower(), 0) if _IS_LINUX else 0
"""System call number; 0 where waits are short sleeps instead."""
HAS_FUTEX = _FUTEX_NUMBER != 0
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1  # without the PRIVATE flag: the word lies in memory of several processes
_NANOSECONDS = 1_000_000_000
_CLOCK_MONOTONIC = 1 if _IS_LINUX else 6
_FALLBACK_SLEEP_US = 200
_EVERYBODY = 0x7FFFFFFF


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I64.as_pointer())


def _call(builder: Any, name: str, result: ir.Type, arguments: list[Any]) -> Any:
    """Call a function of the C library."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _seconds_and_rest(builder: Any, nanoseconds: Any) -> Any:
    """Return the address (int64) of a timespec on the stack."""
    spec = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
    unit = ir.Constant(_I64, _NANOSECONDS)
    zero, one = ir.Constant(_I32, 0), ir.Constant(_I32, 1)
    builder.store(builder.sdiv(nanoseconds, unit), builder.gep(spec, [zero, zero]))
    builder.store(builder.srem(nanoseconds, unit), builder.gep(spec, [zero, one]))
    return builder.ptrtoint(spec, _I64)


@intrinsic  # type: ignore[untyped-decorator]
def load_acquire(typingctx: Any, address: Any) -> Any:
    """Return the int64 at ``address``; what its writer did before a release is visible afterwards."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(builder, args[0]), ordering="acquire", align=8)

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def load_ordered(typingctx: Any, address: Any) -> Any:
    """Return the int64 at ``address``, seq-cst."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(builder, args[0]), ordering="seq_cst", align=8)

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64 after everything before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _word(builder, args[0]), ordering="release", align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _read_modify_write(operation: str) -> Callable[..., Any]:
    @intrinsic  # type: ignore[untyped-decorator]
    def modify(typingctx: Any, address: Any, value: Any) -> Any:
        """Change the int64 at ``address``, seq-cst; return what it was."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _word(builder, args[0]), args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return modify  # type: ignore[no-any-return]


fetch_add = _read_modify_write("add")
fetch_min = _read_modify_write("min")
exchange = _read_modify_write("xchg")


@intrinsic  # type: ignore[untyped-decorator]
def pause(typingctx: Any) -> Any:
    """Tell the processor that this is a spin loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine().lower() in ("x86_64", "amd64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def give_way(typingctx: Any) -> Any:
    """Let another thread of this core run (sched_yield)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "sched_yield", _I32, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def now_ns(typingctx: Any) -> Any:
    """Return the monotonic clock in nanoseconds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        spec = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        _call(builder, "clock_gettime", _I32, [ir.Constant(_I32, _CLOCK_MONOTONIC), spec])
        zero, one = ir.Constant(_I32, 0), ir.Constant(_I32, 1)
        seconds = builder.load(builder.gep(spec, [zero, zero]))
        rest = builder.load(builder.gep(spec, [zero, one]))
        return builder.add(builder.mul(seconds, ir.Constant(_I64, _NANOSECONDS)), rest)

    return types.int64(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def sleep_while_equal(typingctx: Any, address: Any, expected: Any, nanoseconds: Any) -> Any:
    """Sleep until woken, if the low 32 bits at ``address`` are those of ``expected``; at most ``nanoseconds``.

    May return early for no reason. Without futexes it is a sleep of 0.2 ms.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, expected, nanoseconds = args
        if not HAS_FUTEX:
            _call(builder, "usleep", _I32, [ir.Constant(_I32, _FALLBACK_SLEEP_US)])
            return context.get_dummy_value()
        timeout = _seconds_and_rest(builder, nanoseconds)
        low = builder.zext(builder.trunc(expected, _I32), _I64)
        zero = ir.Constant(_I64, 0)
        operation = ir.Constant(_I64, _FUTEX_WAIT)
        _call(
            builder, "syscall", _I64, [ir.Constant(_I64, _FUTEX_NUMBER), address, operation, low, timeout, zero, zero]
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def wake_sleepers(typingctx: Any, address: Any) -> Any:
    """Wake everybody who sleeps on the word at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if HAS_FUTEX:
            zero = ir.Constant(_I64, 0)
            operation, all_of_them = ir.Constant(_I64, _FUTEX_WAKE), ir.Constant(_I64, _EVERYBODY)
            number = ir.Constant(_I64, _FUTEX_NUMBER)
            _call(builder, "syscall", _I64, [number, args[0], operation, all_of_them, zero, zero, zero])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
