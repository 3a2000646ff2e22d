"""Memory as compiled loops see it: numbers at addresses, copies past the caches, the fence that ends them.

Addresses and indices are int64. Nothing is checked, and nothing needs to be aligned unless a line says so.
"""

from __future__ import annotations

import inspect
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
_POINTER = cgutils.voidptr_t
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_address = types.int64


def instruction(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``emit(builder, *values)``, which writes LLVM IR: compiled code calls it with these types.

    ``emit`` returns the LLVM value of ``result``, or None for ``types.void``.
    """

    def decorate(emit: Callable[..., Any]) -> Callable[..., Any]:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if value is None else value

        def typing(typingctx: Any, *args: Any) -> Any:
            return result(*arguments), codegen

        typing.__name__ = emit.__name__
        typing.__doc__ = emit.__doc__
        parameters = [inspect.Parameter("typingctx", _POSITIONAL)]
        parameters += [inspect.Parameter(f"value{i}", _POSITIONAL) for i in range(len(arguments))]
        typing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Numba wants a fixed number
        made: Callable[..., Any] = intrinsic(typing)
        return made

    return decorate


def element_pointer(builder: Any, base: Any, index: Any, element: ir.Type) -> Any:
    """Return the LLVM pointer to number ``index`` of an array; the base is cast once, so that loops stay analysable."""
    return builder.gep(builder.inttoptr(base, element.as_pointer()), [index])


def mark_nontemporal(builder: Any, store: Any) -> None:
    """Let a store bypass the caches, where the processor can; :func:`store_fence` orders it."""
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))


def _loader(element: ir.IntType) -> Callable[..., Any]:
    @instruction(types.int64, _address, types.int64)
    def load(builder: Any, base: Any, index: Any) -> Any:
        """Return the signed integer at base[index]."""
        loaded = builder.load(element_pointer(builder, base, index, element), align=1)
        return builder.sext(loaded, _I64) if element.width < 64 else loaded

    return load


def _storer(element: ir.IntType) -> Callable[..., Any]:
    @instruction(types.void, _address, types.int64, types.int64)
    def store(builder: Any, base: Any, index: Any, value: Any) -> None:
        """Write the low bits of ``value`` to base[index]."""
        narrow = builder.trunc(value, element) if element.width < 64 else value
        builder.store(narrow, element_pointer(builder, base, index, element), align=1)

    return store


load_i8, store_i8 = _loader(_I8), _storer(_I8)
load_i32, store_i32 = _loader(_I32), _storer(_I32)
load_i64, store_i64 = _loader(_I64), _storer(_I64)


@instruction(types.CPointer(types.int64), _address)
def words_at(builder: Any, address: Any) -> Any:
    """Return the pointer from which ``numba.carray`` makes an array of int64."""
    return builder.inttoptr(address, _I64.as_pointer())


@instruction(types.void, _address, _address, types.int64)
def copy_bytes(builder: Any, destination: Any, source: Any, num_bytes: Any) -> None:
    """Copy through the caches (memcpy)."""
    pointers = [builder.inttoptr(address, _POINTER) for address in (destination, source)]
    cgutils.raw_memcpy(builder, *pointers, num_bytes, 1)


@instruction(types.void, _address, types.int64, types.int64)
def fill_bytes(builder: Any, destination: Any, num_bytes: Any, byte: Any) -> None:
    """Write the low 8 bits of ``byte`` to every byte (memset)."""
    cgutils.memset(builder, builder.inttoptr(destination, _POINTER), num_bytes, builder.trunc(byte, _I8))


@instruction(types.void, _address, _address, types.int64)
def stream_line(builder: Any, destination: Any, source: Any, index: Any) -> None:
    """Copy line ``index`` past the caches; ``destination`` must be a multiple of 64."""
    line = builder.load(element_pointer(builder, source, index, _LINE_OF_WORDS), align=1)
    target = element_pointer(builder, destination, index, _LINE_OF_WORDS)
    mark_nontemporal(builder, builder.store(line, target, align=LINE))


@instruction(types.void, _address)
def prefetch(builder: Any, address: Any) -> None:
    """Ask for the line at ``address``; any address is allowed."""
    kind = ir.FunctionType(ir.VoidType(), [_POINTER, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    read, all_levels, data = (ir.Constant(_I32, hint) for hint in (0, 3, 1))
    builder.call(function, [builder.inttoptr(address, _POINTER), read, all_levels, data])


@instruction(types.void)
def store_fence(builder: Any) -> None:
    """Order all earlier stores of this thread, non-temporal ones too, before all later ones.

    x86 keeps ordinary stores in order, but not non-temporal ones: without the sfence, readers saw millions of
    stale words in 200,000 rounds. Elsewhere a release fence covers both kinds.
    """
    if _IS_X86:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.sfence"), [])
    builder.fence("release")


@instruction(types.int64, types.int64)
def count_trailing_zeros(builder: Any, value: Any) -> Any:
    """Return the position of the lowest set bit of a number that is not 0."""
    return builder.cttz(value, ir.Constant(ir.IntType(1), 1))


@instruction(types.float32, types.int64)
def bits_as_float(builder: Any, bits: Any) -> Any:
    """Return the fp32 number whose bits are the low 32."""
    return builder.bitcast(builder.trunc(bits, _I32), ir.FloatType())


@instruction(types.int64, types.float32)
def float_as_bits(builder: Any, number: Any) -> Any:
    """Return the 32 bits of an fp32 number, as a number that is not negative."""
    return builder.zext(builder.bitcast(number, _I32), _I64)


def stack_block(num_bytes: int) -> Callable[..., Any]:
    """Make ``block()``: the address of that many bytes of the caller's stack, a multiple of 64, with any content."""

    @instruction(_address)
    def block(builder: Any) -> Any:
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(_I8, num_bytes))
        memory.align = LINE
        return builder.ptrtoint(memory, _I64)

    return block


@instruction(_address, types.int64)
def allocate(builder: Any, num_bytes: Any) -> Any:
    """Return the address of that many bytes from the C heap, with any content; :func:`release` frees them.

    Not a NumPy array: Numba frees an array after its last use, and the use of its address is none.
    """
    kind = ir.FunctionType(_POINTER, [_I64])
    block = builder.call(cgutils.get_or_insert_function(builder.module, kind, "malloc"), [num_bytes])
    return builder.ptrtoint(block, _I64)


@instruction(types.void, _address)
def release(builder: Any, address: Any) -> None:
    """Free what :func:`allocate` returned."""
    kind = ir.FunctionType(ir.VoidType(), [_POINTER])
    function = cgutils.get_or_insert_function(builder.module, kind, "free")
    builder.call(function, [builder.inttoptr(address, _POINTER)])
