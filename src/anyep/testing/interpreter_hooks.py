"""Where the interpreter of Triton touches memory, and how an interleaving of ranks gets in between."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anyep.testing.interleaving import Interleaving


class Hooks:
    """While entered, loads, stores and atomics of interpreted kernels pass through an interleaving."""

    def __init__(self, interleaving: Interleaving) -> None:
        from triton.runtime import interpreter

        from anyep.testing.interpreter import language_kept

        self._interleaving = interleaving
        self._interpreter = interpreter
        self._builder = interpreter.interpreter_builder
        self._kept = language_kept()

    def __enter__(self) -> Hooks:
        self._kept.__enter__()
        builder = self._builder
        self._load, self._store = builder.create_masked_load, builder.create_masked_store
        self._rmw, self._cas = builder.create_atomic_rmw, builder.create_atomic_cas
        builder.create_masked_load, builder.create_masked_store = self._loaded, self._stored
        builder.create_atomic_rmw, builder.create_atomic_cas = self._exchanged, self._compared
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"):
            delattr(self._builder, name)
        self._kept.__exit__(kind, error, trace)

    def grid(self) -> Any:
        """Return which program of which grid runs now."""
        return self._builder.grid_idx, self._builder.grid_dim

    def set_grid(self, grid: Any) -> None:
        self._builder.grid_idx, self._builder.grid_dim = grid

    def _loaded(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        result = self._load(pointers, mask, *rest)
        inside = np.broadcast_to(mask.data, pointers.data.shape)
        values = np.ascontiguousarray(result.data[inside])
        self._interleaving.load(pointers.data[inside], values)
        result.data[inside] = values
        return result

    def _stored(self, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        inside = np.broadcast_to(mask.data, pointers.data.shape)
        values = np.ascontiguousarray(np.broadcast_to(value.data, pointers.data.shape)[inside])
        if not self._interleaving.store(pointers.data[inside], values):
            self._store(pointers, value, mask, *rest)

    def _exchanged(self, operation: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        return self._atomic(pointer, sem, lambda: self._rmw(operation, pointer, value, mask, sem, scope))

    def _compared(self, pointer: Any, expected: Any, value: Any, sem: Any, scope: Any) -> Any:
        return self._atomic(pointer, sem, lambda: self._cas(pointer, expected, value, sem, scope))

    def _atomic(self, pointer: Any, sem: Any, act: Any) -> Any:
        """Do a scalar atomic as one step."""
        orders = self._interpreter._ir.MEM_SEMANTIC
        acquires = sem in (orders.ACQUIRE, orders.ACQUIRE_RELEASE)
        releases = sem in (orders.RELEASE, orders.ACQUIRE_RELEASE)
        self._interleaving.before_atomic(releases=releases)
        result = act()
        dtype = result.data.dtype
        after = np.ctypeslib.as_array((np.ctypeslib.as_ctypes_type(dtype) * 1).from_address(int(pointer.data.flat[0])))
        before = int(result.data.flat[0])
        self._interleaving.after_atomic(int(pointer.data.flat[0]), before, int(after[0]), acquires=acquires)
        return result
