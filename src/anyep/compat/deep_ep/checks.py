"""The two ways in which DeepEP refuses a call, so that callers who catch them keep working.

What its Python asserts is an AssertionError here too, what its C++ host code asserts a RuntimeError. The texts are
ours: they say what was expected and what came.
"""

from __future__ import annotations

import torch


def host_assert(condition: bool, text: str) -> None:
    """Raise RuntimeError, as upstream's host checks do."""
    if not condition:
        raise RuntimeError(f"Assertion exception: {text}")


def check_torch_deterministic() -> None:
    """AssertionError where torch would overwrite freshly allocated tensors with NaN (as upstream, on every call)."""
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not (fills and torch.are_deterministic_algorithms_enabled()), (
        "torch's deterministic algorithms fill uninitialised memory; "
        "set torch.utils.deterministic.fill_uninitialized_memory = False"
    )
