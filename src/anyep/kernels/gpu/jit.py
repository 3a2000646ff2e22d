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
    return triton.jit(function, do_not_specialize=numbers)
