"""Vectors of 32 lanes as Numba values, and lane functions: arithmetic written once, for every processor.

A lane function is a Python function over :class:`Lanes` that runs once, at compile time, and leaves its operations in
the compiled loop. 32 lanes are one 64-byte line of 16-bit numbers; LLVM splits them into what the processor has (two
AVX-512, four AVX2, eight NEON registers of fp32). Auto-vectorisation is not relied on: nothing here depends on
whether a loop's bounds or aliases could be proven.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import register_model

from anyep.machine.intrinsics import LINE, instruction, mark_nontemporal

LANES = 32


class VectorType(types.Type):  # type: ignore[misc]  # Numba has no types
    """A Numba type: 32 lanes of one LLVM number."""

    def __init__(self, name: str, lane: ir.Type, lane_bytes: int) -> None:
        self.lane = lane
        self.lane_bytes = lane_bytes
        self.ir = ir.VectorType(lane, LANES)
        super().__init__(name=f"anyep_{name}x{LANES}")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]  # Numba has no types
    def __init__(self, manager: Any, vector: VectorType) -> None:
        super().__init__(manager, vector, vector.ir)


I8 = VectorType("i8", ir.IntType(8), 1)
I16 = VectorType("i16", ir.IntType(16), 2)
I32 = VectorType("i32", ir.IntType(32), 4)
F32 = VectorType("f32", ir.FloatType(), 4)


class Lanes:
    """A vector while its function is being compiled: operators leave LLVM instructions.

    Integers are compared and widened as unsigned numbers; a NaN is neither more nor less than anything. A Python
    number beside an operator stands in every lane.
    """

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    def _constant(self, number: int | float) -> Any:
        kind = self.value.type
        return ir.Constant(kind, [number] * kind.count)

    def _apply(self, operation: Callable[..., Any], other: Lanes | int | float) -> Lanes:
        value = other.value if isinstance(other, Lanes) else self._constant(other)
        return Lanes(self.builder, operation(self.value, value))

    @property
    def _is_float(self) -> bool:
        return isinstance(self.value.type.element, ir.FloatType)

    def __add__(self, other: Lanes | int | float) -> Lanes:
        return self._apply(self.builder.fadd if self._is_float else self.builder.add, other)

    def __sub__(self, other: Lanes | int | float) -> Lanes:
        return self._apply(self.builder.fsub if self._is_float else self.builder.sub, other)

    def __mul__(self, other: Lanes | int | float) -> Lanes:
        return self._apply(self.builder.fmul if self._is_float else self.builder.mul, other)

    def __and__(self, other: Lanes | int) -> Lanes:
        return self._apply(self.builder.and_, other)

    def __or__(self, other: Lanes | int) -> Lanes:
        return self._apply(self.builder.or_, other)

    def __lshift__(self, other: Lanes | int) -> Lanes:
        return self._apply(self.builder.shl, other)

    def __rshift__(self, other: int) -> Lanes:
        return self._apply(self.builder.lshr, other)

    def __gt__(self, other: Lanes | int | float) -> Lanes:
        compare = self.builder.fcmp_ordered if self._is_float else self.builder.icmp_unsigned
        return self._apply(lambda a, b: compare(">", a, b), other)

    def __lt__(self, other: Lanes | int | float) -> Lanes:
        compare = self.builder.fcmp_ordered if self._is_float else self.builder.icmp_unsigned
        return self._apply(lambda a, b: compare("<", a, b), other)

    def is_nan(self) -> Lanes:
        return self._apply(lambda a, b: self.builder.fcmp_unordered("uno", a, b), self)

    def choose(self, yes: Lanes | int, no: Lanes) -> Lanes:
        """Where this comparison holds ``yes``, else ``no``."""
        chosen = yes.value if isinstance(yes, Lanes) else no._constant(yes)
        return Lanes(self.builder, self.builder.select(self.value, chosen, no.value))

    def at_least(self, other: Lanes | int) -> Lanes:
        """The larger of two unsigned integers."""
        least = other if isinstance(other, Lanes) else Lanes(self.builder, self._constant(other))
        return (self > least).choose(self, least)

    def at_most(self, other: Lanes | int) -> Lanes:
        """The smaller of two unsigned integers."""
        most = other if isinstance(other, Lanes) else Lanes(self.builder, self._constant(other))
        return (self < most).choose(self, most)

    def _as(self, lane: ir.Type, count: int) -> Lanes:
        return Lanes(self.builder, self.builder.bitcast(self.value, ir.VectorType(lane, count)))

    def bits(self) -> Lanes:
        """fp32 as the integers that hold the same bits."""
        return self._as(I32.lane, self.value.type.count)

    def as_float(self) -> Lanes:
        """32-bit integers as the fp32 numbers that hold the same bits."""
        return self._as(F32.lane, self.value.type.count)

    def pairs(self) -> Lanes:
        """16-bit lanes, two neighbours in each 32-bit lane: half as many."""
        return self._as(I32.lane, self.value.type.count // 2)

    def unpaired(self) -> Lanes:
        """What :meth:`pairs` was made from."""
        return self._as(I16.lane, self.value.type.count * 2)

    def first_half(self) -> Lanes:
        """Half of the lanes; of a number that is broadcast it costs nothing."""
        first = [ir.IntType(32)(lane) for lane in range(self.value.type.count // 2)]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(first)), first)
        return Lanes(self.builder, self.builder.shuffle_vector(self.value, self.value, mask))

    def as_number(self) -> Lanes:
        """32-bit integers, signed, as fp32 numbers of the same value."""
        return Lanes(self.builder, self.builder.sitofp(self.value, F32.ir))

    def widen(self) -> Lanes:
        return Lanes(self.builder, self.builder.zext(self.value, I32.ir))

    def narrow(self, kind: VectorType) -> Lanes:
        """Keep the low bits."""
        return Lanes(self.builder, self.builder.trunc(self.value, kind.ir))


def lane_function(result: VectorType, *arguments: VectorType) -> Callable[[Callable[..., Lanes]], Callable[..., Any]]:
    """Decorate a function over :class:`Lanes`: compiled code may call it with vectors of these types."""

    def decorate(function: Callable[..., Lanes]) -> Callable[..., Any]:
        @instruction(result, *arguments)
        def emit(builder: Any, *values: Any) -> Any:
            return function(*(Lanes(builder, value) for value in values)).value

        return emit

    return decorate


def vector_loader(kind: VectorType) -> Callable[..., Any]:
    """Make ``load(address)``: 32 lanes, any alignment."""

    @instruction(kind, types.int64)
    def load(builder: Any, address: Any) -> Any:
        return builder.load(builder.inttoptr(address, kind.ir.as_pointer()), align=1)

    return load


def vector_part_loader(kind: VectorType) -> Callable[..., Any]:
    """Make ``load(address, count)``: lanes below ``count`` from memory, the others 0."""

    @instruction(kind, types.int64, types.int64)
    def load(builder: Any, address: Any, count: Any) -> Any:
        staging = cgutils.alloca_once(builder, kind.ir)
        builder.store(ir.Constant(kind.ir, None), staging)
        source = builder.inttoptr(address, cgutils.voidptr_t)
        _copy_lanes(builder, builder.bitcast(staging, cgutils.voidptr_t), source, count, kind)
        return builder.load(staging)

    return load


def vector_storer(kind: VectorType, *, nontemporal: bool = False) -> Callable[..., Any]:
    """Make ``store(address, vector)``; a non-temporal one needs an address that is a multiple of 64."""

    @instruction(types.void, types.int64, kind)
    def store(builder: Any, address: Any, vector: Any) -> None:
        pointer = builder.inttoptr(address, kind.ir.as_pointer())
        stored = builder.store(vector, pointer, align=LINE if nontemporal else 1)
        if nontemporal:
            mark_nontemporal(builder, stored)

    return store


def vector_part_storer(kind: VectorType) -> Callable[..., Any]:
    """Make ``store(address, vector, count)``: only lanes below ``count`` are written."""

    @instruction(types.void, types.int64, kind, types.int64)
    def store(builder: Any, address: Any, vector: Any, count: Any) -> None:
        staging = cgutils.alloca_once_value(builder, vector)
        target = builder.inttoptr(address, cgutils.voidptr_t)
        _copy_lanes(builder, target, builder.bitcast(staging, cgutils.voidptr_t), count, kind)

    return store


def _copy_lanes(builder: Any, destination: Any, source: Any, count: Any, kind: VectorType) -> None:
    num_bytes = builder.mul(count, ir.Constant(ir.IntType(64), kind.lane_bytes))
    cgutils.raw_memcpy(builder, destination, source, num_bytes, 1)


@instruction(F32, types.float32)
def broadcast(builder: Any, number: Any) -> Any:
    """Return the number in every lane."""
    undefined = ir.Constant(F32.ir, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(I32.ir, None))


@instruction(I32, types.int64)
def broadcast_i32(builder: Any, number: Any) -> Any:
    """Return the low 32 bits of an integer in every lane; as a shift it costs no more than a constant."""
    undefined = ir.Constant(I32.ir, ir.Undefined)
    first = builder.insert_element(undefined, builder.trunc(number, I32.lane), ir.Constant(I32.lane, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(I32.ir, None))


def _across_lanes(operation: str) -> Callable[..., Any]:
    @instruction(types.int64, I32)
    def reduce(builder: Any, vector: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [I32.ir])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{operation}.v{LANES}i32")
        return builder.sext(builder.call(function, [vector]), ir.IntType(64))

    return reduce


largest = _across_lanes("smax")
"""``largest(vector)``: the largest lane of non-negative integers."""
smallest = _across_lanes("smin")
