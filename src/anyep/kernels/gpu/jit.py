"""How a kernel is declared: its numbers are integers of a fixed width, of which the compiler knows nothing more.

Device functions have no types that mypy could check: the modules that hold them say so in their first lines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton


def kernel(function: Callable[..., None]) -> Any:
    """Compile ``function`` once for each set of constants, whatever its numbers are.

    Triton would compile anew for 1, for multiples of 16 and for numbers of more than 32 bits, in the middle of a call.
    """
    parameters = inspect.signature(function).parameters
    numbers = [name for name, one in parameters.items() if "constexpr" not in str(one.annotation)]
    made = triton.jit(function, do_not_specialize=numbers)
    made.registers_on = None
    return made


def kernel_of_registers(most: int, *, on: str = "sm_") -> Callable[[Callable[..., None]], Any]:
    """Do the same for a kernel that may take ``most`` registers a thread on targets whose names begin with ``on``.

    Left alone, ptxas spills 8 or 16 bytes where that lets one more program run at a time, and does so with one version
    and target and not with another. Told of a limit it spills nothing that fits.
    """

    def declare(function: Callable[..., None]) -> Any:
        made = kernel(function)
        made.registers_on = on, most
        return made

    return declare
