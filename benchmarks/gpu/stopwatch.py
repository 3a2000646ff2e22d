"""How long a device works, what it is, and graphs of its work."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TypeVar

import torch

Act = Callable[[], object]
T = TypeVar("T")

SETTLING = 3
"""Calls before a graph is recorded: what is made on first use is made then."""


class GpuStopwatch:
    """Times by events on the current stream of a CUDA device."""

    has_streams = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def us(self, act: Act) -> float:
        """Return how long the device worked on what ``act`` launches; a host that is too slow counts too."""
        torch.cuda.synchronize()
        self._begin.record()
        result = act()
        self._end.record()
        self._end.synchronize()
        del result
        return self._begin.elapsed_time(self._end) * 1e3

    def host_us(self, act: Act) -> float:
        """Return how long the host was busy launching."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = act()
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
        del result
        return spent * 1e6

    def settle(self) -> None:
        """Wait until the device has done all."""
        torch.cuda.synchronize()

    def graph(self, act: Act) -> tuple[Act, object]:
        """Record ``act`` and return what replays it, and its result, which a replay fills again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(SETTLING):
                act()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = act()
        return graph.replay, result

    def halves(self, begin: Act, end: Callable[[], T]) -> tuple[Act, Act, T]:
        """Record what begins something and what ends it, as two graphs; they are replayed in turns."""
        for _ in range(SETTLING):
            begin()
            end()
        torch.cuda.synchronize()
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            begin()
        with torch.cuda.graph(second):
            result = end()
        return first.replay, second.replay, result

    def facts(self) -> dict[str, object]:
        """Return what measured: the device, its driver, and versions."""
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            **_versions(),
        }


class HostStopwatch:
    """Stands for a GPU where a test plays one: times of nothing, graphs that call again."""

    device = torch.device("cpu")

    has_streams = False

    def settle(self) -> None:
        """Nothing to wait for."""

    def us(self, act: Act) -> float:
        begin = time.perf_counter()
        act()
        return (time.perf_counter() - begin) * 1e6

    host_us = us

    def graph(self, act: Act) -> tuple[Act, object]:
        return act, act()

    def halves(self, begin: Act, end: Callable[[], T]) -> tuple[Act, Act, T]:
        """Replay nothing: an operation that was begun is ended once."""
        begin()
        return lambda: None, lambda: None, end()

    def facts(self) -> dict[str, object]:
        return {"gpu": "none: a test", **_versions()}


def _driver() -> str:
    """Return the driver's version, or "unknown" where it is written down nowhere."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().strip()
    except OSError:
        return "unknown"


def _versions() -> dict[str, object]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "numba": version("numba")} | {
        "python": platform.python_version()
    }
