"""What every call of a V2 rank needs: who it is, the buffers below, kernels and compiled loops."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

from anyep.compat.deep_ep.native import Natives
from anyep.compat.deep_ep.notebook import Notebook
from anyep.kernels.registry import load
from anyep.kernels.spec import KernelSet


class ElasticContext(NamedTuple):
    """One rank, and how it orders what it receives."""

    natives: Natives
    number: int
    """the rank's"""
    num_ranks: int
    num_scaleup: int
    """groups of the row order: all ranks, unless several hosts take part"""
    keeps_order: bool
    """whether the rows of a batch stand as the exchange brings them: sorted so, or on one host"""
    several_sums: bool
    """whether a rank and a host round sums of their own"""
    kernels: KernelSet
    loops: ModuleType
    notebook: Notebook


@cache
def elastic_loops() -> ModuleType:
    """Import the compiled loops, which lie where ``import deep_ep`` does not come; they compile once a machine."""
    from anyep.machine.compiler import compiling

    with compiling():
        from anyep.compat import elastic_loops
    return elastic_loops


def kernels() -> KernelSet:
    """Return the kernels with which a rank lays out rows that it has already."""
    return load("cpu")
