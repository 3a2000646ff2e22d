"""A device whose streams run as late as they may, in seeded orders: who forgets an event, or a word, is found out."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch

from anyep.exchange.device.devices import Event, Stream
from anyep.exchange.device.fetches import Fetch
from anyep.kernels.reference_memory import read
from anyep.kernels.spec_device import DeviceKernels
from anyep.testing.pretend_device import NAP_S, PretendDevice
from anyep.transport.base import Words

_FOREVER = 1 << 60


class _LazyLaunch:
    """Something on a stream; it may begin when ``ready`` says so."""

    def __init__(self, act: Callable[[], object], ready: Callable[[], bool] = lambda: True, looks: int = 1) -> None:
        self.act = act
        self.ready = ready
        self.looks = looks
        """how often nothing may happen before it begins all the same"""


class _LazyStream:
    """Launches that wait until somebody needs them, and how many of them are done."""

    def __init__(self) -> None:
        self.launches: list[_LazyLaunch] = []
        self.num_done = 0
        self.is_running = False

    @property
    def next(self) -> _LazyLaunch | None:
        return self.launches[self.num_done] if self.num_done < len(self.launches) else None


class _LazyEvent(NamedTuple):
    stream: _LazyStream
    position: int

    def is_over(self) -> bool:
        return self.stream.num_done >= self.position


class LazyDevice(PretendDevice):
    """Runs launches as late as it may, streams in an order that a seed decides: who forgets an event is found out.

    A thread's own stream catches up when it follows an event: from then on its tensors may be looked at.
    """

    def __init__(self, seed: int, kernels: DeviceKernels | None = None) -> None:
        super().__init__(kernels)
        self._inner = self.kernels
        self.kernels = cast("DeviceKernels", _Launches(self))
        self._chance = random.Random(seed)
        self._streams: list[_LazyStream] = []
        self._local = threading.local()
        self._turn = threading.Lock()

    def new_stream(self) -> Stream:
        with self._turn:
            self._streams.append(_LazyStream())
            return self._streams[-1]

    def current_stream(self) -> Stream:
        if not hasattr(self._local, "own"):
            self._local.own = self._local.current = self.new_stream()
        return self._local.current

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self._local.current = stream
        try:
            yield
        finally:
            self._local.current = before

    def launch_kernel(self, name: str, numbers: tuple[int, ...]) -> None:
        if name == "meet":  # its words are out while it waits
            peers, words, ranks, epoch, limit, *errors = numbers
            self.launch_kernel("signal", (peers, ranks, epoch, 0))
            self.launch_kernel("wait", (words, ranks, epoch, limit, 0, *errors))
            return
        kernel = getattr(self._inner, name)
        if name != "wait":
            self._launch(_LazyLaunch(lambda: kernel(*numbers)))
            return
        words_addr, num_ranks, epoch_addr, limit, *_ = numbers

        def ready() -> bool:
            epoch = int(read(epoch_addr, torch.int64, 1))
            return all(word >> 32 >= epoch for word in read(words_addr, torch.int64, num_ranks).tolist())

        self._launch(_LazyLaunch(lambda: kernel(*numbers), ready, limit))

    def _launch(self, launch: _LazyLaunch) -> None:
        self._append(self.current_stream(), launch)

    def _append(self, stream: _LazyStream, launch: _LazyLaunch) -> None:
        graph = self._graph
        if graph is None:
            stream.launches.append(launch)
        else:
            graph.launches.append((stream, launch))

    @property
    def _graph(self) -> LazyGraph | None:
        graph: LazyGraph | None = getattr(self._local, "graph", None)
        return graph

    @contextmanager
    def recording(self) -> Iterator[LazyGraph]:
        """Note what this thread launches meanwhile, instead of launching it. The caller keeps what is allocated."""
        graph = self._local.graph = LazyGraph(self)
        try:
            yield graph
        finally:
            self._local.graph = None

    def capturing(self) -> bool:
        return self._graph is not None or super().capturing()

    def mark(self, stream: Stream) -> Event:
        return _LazyEvent(stream, len(stream.launches))

    def follow(self, stream: Stream, event: Event) -> None:
        if self._graph is not None:
            return  # a graph's launches follow one another as they were recorded
        self._append(stream, _LazyLaunch(lambda: None, event.is_over, _FOREVER))
        if stream is getattr(self._local, "own", None):
            self.run(self.mark(stream))

    def follow_plainly(self, stream: _LazyStream, event: _LazyEvent | None) -> None:
        """Follow an event, without looking after the caller."""
        if event is not None and event.stream is not stream:
            stream.launches.append(_LazyLaunch(lambda: None, event.is_over, _FOREVER))

    def fetch(self, words: torch.Tensor) -> Fetch:
        if self._graph is not None:
            raise RuntimeError("words are on their way to the host, which a graph cannot wait for")
        held: list[Words] = []
        self._launch(_LazyLaunch(lambda: held.append(words.numpy().copy())))
        return _LazyFetch(self, self.mark(self.current_stream()), held)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        def act() -> None:
            with torch.inference_mode():  # whatever the mode of the thread that comes to it
                target.copy_(source)

        self._launch(_LazyLaunch(act))

    def wait(self, event: Event) -> None:
        self.run(event)

    def run(self, event: Event) -> None:
        """Run launches, of any streams, until all that comes before an event is done."""
        while not event.is_over():
            streams = list(self._streams)
            if not any(self._step(stream) for stream in self._chance.sample(streams, len(streams))):
                time.sleep(NAP_S)

    def _step(self, stream: _LazyStream) -> bool:
        """Run the next launch of a stream, unless it must wait or one is running; say whether."""
        with self._turn:
            launch = stream.next
            if launch is None or stream.is_running:
                return False
            if not launch.ready():
                launch.looks -= 1
                if launch.looks > 0:
                    return False
            stream.is_running = True
        try:
            launch.act()
        finally:
            with self._turn:
                stream.num_done += 1
                stream.is_running = False
        return True


class LazyGraph:
    """Launches of one thread, to be launched again. Events between streams become their order in the thread."""

    def __init__(self, device: LazyDevice) -> None:
        self._device = device
        self.launches: list[tuple[_LazyStream, _LazyLaunch]] = []

    def replay(self) -> None:
        """Launch all again, one behind the other, and wait for the last."""
        before: _LazyEvent | None = None
        for stream, launch in self.launches:
            self._device.follow_plainly(stream, before)
            stream.launches.append(_LazyLaunch(launch.act, launch.ready, _FOREVER))
            before = self._device.mark(stream)
        if before is not None:
            self._device.run(before)


class _LazyFetch:
    def __init__(self, device: LazyDevice, event: Event, held: list[Words]) -> None:
        self._device = device
        self._event = event
        self._held = held

    def done(self) -> bool:
        return bool(self._held)

    def wait(self) -> Words:
        self._device.run(self._event)
        return self._held[0]


class _Launches:
    """Kernels that a lazy device launches."""

    def __init__(self, device: LazyDevice) -> None:
        self._device = device

    name = "lazy"

    def __getattr__(self, name: str) -> Any:
        return lambda *numbers: self._device.launch_kernel(name, numbers)
