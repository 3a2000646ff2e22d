"""Where tensors live: one object that knows a device, its streams, its kernels, and the way to the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any, NamedTuple, Protocol, cast

import torch

from anyep.errors import CapacityError, Unavailable
from anyep.exchange.device.fetches import Fetch, PinnedFetch, Pins
from anyep.kernels.gpu.target import target_of
from anyep.kernels.spec_device import DeviceKernels
from anyep.kernels.tapes import Act, TapedKernels

Stream = Any
Event = Any
Tape = Any
"""What a device makes of a recording; only that device plays it (:meth:`Device.play`)."""

_MEASURED_LOOKS = 20_000


class Wanted(NamedTuple):
    """A tensor that is to be made."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Rooms = tuple[torch.Tensor | None, ...]
"""Tensors with any content; None where none was wanted."""


class Device(Protocol):
    """One device and what can be done with it. Ranks that are threads share it; else each has its own."""

    where: torch.device
    kernels: DeviceKernels
    num_sms: int | None
    """on how many multiprocessors a kernel that moves rows may be; None: on all"""

    def new_stream(self) -> Stream:
        """Return a stream that is nobody's else."""
        ...

    def current_stream(self) -> Stream:
        """Return the stream on which this thread's work is launched at present."""
        ...

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Let kernels that this thread launches meanwhile go to ``stream``."""
        ...

    def tape(self, act: Act) -> Tape:
        """Record what ``act`` launches (kernels/tapes.py); nothing runs."""
        ...

    def play(self, tape: Tape, bases: Sequence[int], stream: Stream) -> None:
        """Launch on ``stream`` what was recorded, its numbers counted from ``bases``."""
        ...

    def mark(self, stream: Stream) -> Event:
        """Return an event: all that was launched on ``stream`` up to now."""
        ...

    def follow(self, stream: Stream, event: Event) -> None:
        """Let what is launched on ``stream`` from now on begin after ``event``."""
        ...

    def lend(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Tell the allocator that ``stream`` uses a tensor of another stream."""
        ...

    def expect_fetches(self, num_words: int, count: int) -> None:
        """Have room for ``count`` more fetches of up to ``num_words`` at a time: none has to wait for memory."""
        ...

    def fetch(self, words: torch.Tensor) -> Fetch:
        """Bring int64 words to the host, after what was launched before on this thread's stream."""
        ...

    def capturing(self) -> bool:
        """Return whether this thread's stream records a graph instead of running."""
        ...

    def free_bytes(self) -> int:
        """Return how much memory is not taken."""
        ...

    def looks_in(self, seconds: float) -> int:
        """Return how often a wait looks in that time."""
        ...

    def check_fp8(self) -> None:
        """Raise Unavailable where kernels cannot convert to FP8."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 [num_bytes] of host memory that copies reach by themselves; CapacityError without memory."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Launch a copy between pinned memory and the device on this thread's stream."""
        ...

    def wait(self, event: Event) -> None:
        """Wait on the host, without the GIL, for all that an event stands for."""
        ...


class CudaDevice:
    """A CUDA or HIP device. ``kernels`` are loaded for it."""

    def __init__(self, where: torch.device, kernels: TapedKernels, num_sms: int | None = None) -> None:
        self.where = where
        self.num_sms = num_sms
        self.kernels: DeviceKernels = kernels
        self.tape = kernels.tape
        self._us_a_look: float | None = None
        self._preparing = threading.Lock()
        self._pins = Pins()

    def new_stream(self) -> Stream:
        """Of high priority: torch hands out 32 streams of a priority in turns, and callers' have the usual one."""
        return torch.cuda.Stream(self.where, priority=-1)  # type: ignore[no-untyped-call]  # torch's

    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self.where)

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return cast("AbstractContextManager[object]", torch.cuda.stream(stream))

    def play(self, tape: Tape, bases: Sequence[int], stream: Stream) -> None:
        tape(bases, stream.cuda_stream)

    def mark(self, stream: Stream) -> Event:
        return stream.record_event()

    def follow(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    def lend(self, tensor: torch.Tensor, stream: Stream) -> None:
        tensor.record_stream(stream)

    def expect_fetches(self, num_words: int, count: int) -> None:
        with torch.cuda.device(self.where):
            self._pins.expect(num_words, count)

    def fetch(self, words: torch.Tensor) -> Fetch:
        with torch.cuda.device(self.where):
            return PinnedFetch(words, self._pins)

    def capturing(self) -> bool:
        if torch.cuda.current_device() == self.where.index:  # every call asks: entering a device takes a microsecond
            return bool(torch.cuda.is_current_stream_capturing())
        with torch.cuda.device(self.where):
            return bool(torch.cuda.is_current_stream_capturing())

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.where)
        held = torch.cuda.memory_reserved(self.where) - torch.cuda.memory_allocated(self.where)
        return int(free) + int(held)

    def looks_in(self, seconds: float) -> int:
        """Measure how long looks take on this device, once; ranks that are threads ask at the same time."""
        with self._preparing:
            us_a_look = self._us_a_look = self._us_a_look or self._measured_us()
        return max(1, int(seconds * 1e6 / us_a_look))

    def _measured_us(self) -> float:
        words = torch.tensor([0, 0, 1], dtype=torch.int64, device=self.where)
        never, error, epoch = (words.data_ptr() + 8 * place for place in range(3))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        with torch.cuda.device(self.where):
            self.kernels.wait(never, 1, epoch, 1, 0, error, 8)
            begin.record()
            self.kernels.wait(never, 1, epoch, _MEASURED_LOOKS, 0, error, 8)
            end.record()
            end.synchronize()
        return float(max(1e-3, begin.elapsed_time(end) * 1e3 / _MEASURED_LOOKS))

    def check_fp8(self) -> None:
        target_of(self.where).check_fp8()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        try:
            with torch.cuda.device(self.where):
                return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise CapacityError(f"the host cannot pin {num_bytes / 2**20:.1f} MiB: {error}; see ulimit -l") from error

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def wait(self, event: Event) -> None:
        event.synchronize()


def cuda_device(name: str) -> torch.device:
    """Return the CUDA device of that name, which need not be there; ValueError for another kind of device."""
    try:
        where = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be 'cuda', 'cuda:0' and the like, or None, got {name!r}") from None
    if where.type != "cuda":
        raise ValueError(f"device must be a CUDA device, or None for CPU tensors, got {name!r}")
    return where


def find_device(
    name: str, num_sms: int | None = None, at_once: int = 1, sizes: tuple[int, int, int] = (8, 8, 8)
) -> Device:
    """Return the CUDA device of that name, ready, for ``at_once`` ranks that move rows at a time.

    ``num_sms``: for each of them; None: an equal share, and no bound for one. ``sizes``: K, R and L of the buffer; its
    kernels are loaded. ValueError for another kind of device, Unavailable where there is none.
    """
    where = cuda_device(name)
    from anyep.kernels.gpu.loading import load_gpu

    if torch.cuda.is_available():
        number = torch.cuda.current_device() if where.index is None else where.index
        if number >= torch.cuda.device_count():
            raise Unavailable(f"device {name!r} does not exist: this process sees {torch.cuda.device_count()} devices")
        where = torch.device("cuda", number)
        if num_sms is None and at_once > 1:
            num_sms = max(1, torch.cuda.get_device_properties(where).multi_processor_count // at_once)
    wish = {"asked": f"device={name!r} needs", "instead": "device='cpu' works on every machine"}
    return CudaDevice(where, load_gpu(where, num_sms, sizes, **wish), num_sms)


def allocate(device: Device, shape: Sequence[int], dtype: torch.dtype, account: Callable[[], object]) -> torch.Tensor:
    """Return a tensor with any content, on this thread's stream; CapacityError with ``account()`` without memory."""
    try:
        return torch.empty(shape, dtype=dtype, device=device.where)
    except torch.OutOfMemoryError as error:
        needed = prod(shape) * dtype.itemsize
        raise CapacityError(
            f"{device.where} has {device.free_bytes() / 2**30:.3f} GiB free, too little for {needed / 2**30:.3f} GiB; "
            f"release received tensors, or make a smaller buffer. This one: {account()}"
        ) from error


def allocate_all(device: Device, wanted: Sequence[Wanted | None], account: Callable[[], object]) -> Rooms:
    """Return tensors with any content; CapacityError as :func:`allocate`. Every call of a buffer comes here."""
    where, empty = device.where, torch.empty
    try:
        return tuple([None if one is None else empty(one.shape, dtype=one.dtype, device=where) for one in wanted])
    except torch.OutOfMemoryError:  # asked for again one by one, for the error of the first that has no room
        return tuple([None if one is None else allocate(device, *one, account) for one in wanted])
