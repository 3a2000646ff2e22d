"""Words on their way from a device to the host, through pinned memory that is taken when a buffer is made.

To pin memory waits until the whole device has nothing to do. With ranks on streams of their own that may never be: a
kernel waits for what the thread that pins would launch next. Torch's own cache of pinned memory does not save one from
that: torch empties it when a graph is captured, and finds nothing in it as long as some other copy is not over.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch

from anyep.transport.base import Words


class Fetch(Protocol):
    """Words on their way from the device to the host."""

    def done(self) -> bool:
        """Return whether :meth:`wait` would return at once."""
        ...

    def wait(self) -> Words:
        """Return them, once they are here; waits without the GIL."""
        ...


class Pins:
    """Blocks of pinned memory that come back when what they brought has been read."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._free: list[torch.Tensor] = []
        self._num_words = self._num_blocks = 0

    def expect(self, num_words: int, count: int) -> None:
        """Have ``count`` more blocks, and all of at least ``num_words``."""
        with self._turn:
            self._num_words = max(self._num_words, num_words)
            self._num_blocks += count
            large = [block for block in self._free if len(block) >= num_words]
            missing = self._num_blocks - len(large)
            self._free = [*large, *(self._pinned(self._num_words) for _ in range(missing))]

    def take(self, num_words: int) -> torch.Tensor:
        """Return a block of at least ``num_words``; pins one where none is free."""
        with self._turn:
            for place, block in enumerate(self._free):
                if len(block) >= num_words:
                    return self._free.pop(place)
            return self._pinned(max(num_words, self._num_words))

    def give(self, block: torch.Tensor) -> None:
        """Take a block back to which nothing is copied any more."""
        with self._turn:
            if len(block) >= self._num_words and len(self._free) < self._num_blocks:
                self._free.append(block)

    def _pinned(self, num_words: int) -> torch.Tensor:
        with torch.inference_mode(False):  # else it could not be written outside of it
            return torch.empty(num_words, dtype=torch.int64, device="cpu", pin_memory=True)


class PinnedFetch:
    """Words of a CUDA device, behind what was launched before on this thread's stream.

    A block whose words nobody waits for is torch's again, which knows the stream that copies to it.
    """

    def __init__(self, words: torch.Tensor, pins: Pins) -> None:
        self._pins = pins
        self._num_words = len(words)
        self._block: torch.Tensor | None = pins.take(len(words))
        self._came: Words | None = None
        self._reading = threading.Lock()
        self._block[: len(words)].copy_(words, non_blocking=True)
        self._here = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        self._here.record()

    def done(self) -> bool:
        return bool(self._here.query())  # type: ignore[no-untyped-call]  # torch's

    def wait(self) -> Words:
        self._here.synchronize()
        with self._reading:
            if self._came is None:
                assert self._block is not None, "its words have not been read"
                self._came = self._block[: self._num_words].numpy().copy()
                self._pins.give(self._block)
                self._block = None
            return self._came
