"""A device without a device: host memory, and any kernel set that knows it. For tests of what runs on devices."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch

from anyep.exchange.device import devices
from anyep.exchange.device.devices import Event, Stream, Tape
from anyep.exchange.device.fetches import Fetch
from anyep.kernels.gpu.target import SM_90
from anyep.kernels.reference_device import ReferenceDeviceKernels
from anyep.kernels.spec_device import DeviceKernels
from anyep.kernels.tapes import Act, play_again, recorded
from anyep.transport.base import Words

NAP_S = 0.0005
"""A look of a wait that finds nothing."""


class _Here:
    """Words that are on the host already."""

    def __init__(self, words: torch.Tensor) -> None:
        self._words: Words = words.numpy().copy()

    def done(self) -> bool:
        return True

    def wait(self) -> Words:
        return self._words


class PretendDevice:
    """Runs every launch at once, in the order of the calls, as one stream would."""

    def __init__(self, kernels: DeviceKernels | None = None, *, free_bytes: int = 1 << 40) -> None:
        self.where = torch.device("cpu")
        self.num_sms: int | None = None
        inner = ReferenceDeviceKernels() if kernels is None else kernels
        self.kernels = cast("DeviceKernels", _OneByOne(inner))
        self.captures = False
        """whether the current stream is said to record a graph"""
        self._free_bytes = free_bytes
        self.target = SM_90

    def new_stream(self) -> Stream:
        return object()

    def current_stream(self) -> Stream:
        return None

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return nullcontext()

    def tape(self, act: Act) -> Tape:
        return recorded(act)

    def play(self, tape: Tape, bases: Sequence[int], stream: Stream) -> None:
        with self.on(stream):
            play_again(self.kernels, tape, bases)

    def mark(self, stream: Stream) -> Event:
        return None

    def follow(self, stream: Stream, event: Event) -> None:
        """Nothing to do: what was launched is done."""

    def lend(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Nothing to do."""

    def expect_fetches(self, num_words: int, count: int) -> None:
        """Nothing to do."""

    def fetch(self, words: torch.Tensor) -> Fetch:
        return _Here(words)

    def capturing(self) -> bool:
        return self.captures

    def free_bytes(self) -> int:
        return self._free_bytes

    def looks_in(self, seconds: float) -> int:
        return max(1, int(seconds / NAP_S))

    def check_fp8(self) -> None:
        self.target.check_fp8()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device="cpu")

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def wait(self, event: Event) -> None:
        """Nothing to do: what was launched is done."""


class _OneByOne:
    """Kernels that one thread at a time launches: interpreters are not made for several.

    A caller's default device (``torch.device("meta")``) is nothing that a kernel knows, so nor do these.
    """

    def __init__(self, kernels: DeviceKernels) -> None:
        self._kernels = kernels
        self._launching = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        what = getattr(self._kernels, name)
        if not callable(what):
            return what

        def launch(*numbers: int) -> Any:
            with self._launching, torch.device("cpu"):
                return what(*numbers)

        return launch


@contextmanager
def pretended(device: devices.Device) -> Iterator[devices.Device]:
    """Let buffers that are made with ``device="cuda"`` meanwhile find ``device``."""
    original = devices.find_device
    devices.find_device = lambda name, num_sms=None, at_once=1, sizes=(8, 8, 8): device
    try:
        yield device
    finally:
        devices.find_device = original
