"""Memory as compiled loops see it: numbers at addresses, copies past the caches, the fence that ends them.

Addresses and indices are int64. Nothing is checked and nothing needs to be aligned unless a line says so.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64
"""Bytes of a cache line, the unit of a non-temporal store."""

_IS_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LINE_OF_WORDS = ir.VectorType(_I64, LINE // 8)


def element_pointer(builder: Any, base: Any, index: Any, element: ir.Type) -> Any:
    """Return the address of number ``index`` of an array: the base is cast once, so that loops stay analysable."""
    return builder.gep(builder.inttoptr(base, element.as_pointer()), [index])


def mark_nontemporal(builder: Any, store: Any) -> None:
    """Let a store bypass the caches; :func:`fence` orders it. Processors without such stores make an ordinary one."""
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))


def _loader(element: ir.IntType, result: types.Integer) -> Callable[..., Any]:
    @intrinsic  # type: ignore[untyped-decorator]
    def load(typingctx: Any, base: Any, index: Any) -> Any:
        """Return the signed integer at base[index]."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loaded = builder.load(element_pointer(builder, *args, element), align=1)
            return builder.sext(loaded, _I64) if element.width < 64 else loaded

        return result(types.int64, types.int64), codegen

    return load  # type: ignore[no-any-return]


def _storer(element: ir.IntType) -> Callable[..., Any]:
    @intrinsic  # type: ignore[untyped-decorator]
    def store(typingctx: Any, base: Any, index: Any, value: Any) -> Any:
        """Write the low bits of ``value`` to base[index]."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            base, index, value = args
            narrow = builder.trunc(value, element) if element.width < 64 else value
            builder.store(narrow, element_pointer(builder, base, index, element), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return store  # type: ignore[no-any-return]


load_i8, store_i8 = _loader(_I8, types.int64), _storer(_I8)
load_i32, store_i32 = _loader(_I32, types.int64), _storer(_I32)
load_i64, store_i64 = _loader(_I64, types.int64), _storer(_I64)


@intrinsic  # type: ignore[untyped-decorator]
def copy_bytes(typingctx: Any, destination: Any, source: Any, num_bytes: Any) -> Any:
    """Copy through the caches (memcpy)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        destination, source, num_bytes = args
        pointers = [builder.inttoptr(address, cgutils.voidptr_t) for address in (destination, source)]
        cgutils.raw_memcpy(builder, *pointers, num_bytes, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def fill_bytes(typingctx: Any, destination: Any, num_bytes: Any, byte: Any) -> Any:
    """Write the low 8 bits of ``byte`` to every byte (memset)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        destination, num_bytes, byte = args
        pointer = builder.inttoptr(destination, cgutils.voidptr_t)
        cgutils.memset(builder, pointer, num_bytes, builder.trunc(byte, _I8))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def stream_line(typingctx: Any, destination: Any, source: Any, index: Any) -> Any:
    """Copy line ``index`` past the caches; ``destination`` must be a multiple of 64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        destination, source, index = args
        line = builder.load(element_pointer(builder, source, index, _LINE_OF_WORDS), align=1)
        target = element_pointer(builder, destination, index, _LINE_OF_WORDS)
        mark_nontemporal(builder, builder.store(line, target, align=LINE))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the line at ``address``; any address is allowed."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        hints = [ir.Constant(_I32, hint) for hint in (0, 3, 1)]  # read, keep in all levels, data
        function = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t])
        builder.call(function, [pointer, *hints])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store_fence(typingctx: Any) -> Any:
    """Order all earlier stores of this thread, non-temporal ones too, before all later ones.

    x86 keeps ordinary stores in order, but not non-temporal ones: without the sfence, readers saw millions of
    stale words in 200,000 rounds. Elsewhere a release fence covers both kinds.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _IS_X86:
            sfence = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, sfence, "llvm.x86.sse.sfence"), [])
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def count_trailing_zeros(typingctx: Any, value: Any) -> Any:
    """Return the position of the lowest set bit of a non-zero int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bits_as_float(typingctx: Any, bits: Any) -> Any:
    """Return the fp32 number whose bits are the low 32 of an int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], _I32), ir.FloatType())

    return types.float32(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def float_as_bits(typingctx: Any, number: Any) -> Any:
    """Return the 32 bits of an fp32 number as a non-negative int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], _I32), _I64)

    return types.int64(types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def stack_memory(typingctx: Any, num_bytes: Any) -> Any:
    """Return the address of ``num_bytes`` (a literal) of this call's stack, 64-byte aligned, with any content."""
    if not isinstance(num_bytes, types.IntegerLiteral):
        return None
    size = num_bytes.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(_I8, size))
        memory.align = LINE
        return builder.ptrtoint(memory, _I64)

    return types.int64(num_bytes), codegen
