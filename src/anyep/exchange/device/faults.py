"""What went wrong on the device in calls that did not wait for it; said by a later call of the same rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyep.errors import CapacityError
from anyep.exchange.device.devices import Device, Fetch, Stream
from anyep.kernels.spec_device import BAD_EXPERT, BLOCK_TOO_SMALL, SETTLED, STATIC_TOO_SMALL, SUMMARY_WORDS
from anyep.transport.base import Words


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a batch of a buffer must fit; -1 for no fixed number of rows."""

    num_topk: int
    num_experts: int
    static_rows: int
    block_rows: int


class Faults:
    """A summary on the device that kernels fill when they refuse a batch, and copies of it on their way to the host."""

    def __init__(self, device: Device, stream: Stream, limits: Limits) -> None:
        self._device = device
        self._stream = stream
        self.limits = limits
        self._words = torch.zeros(SUMMARY_WORDS, dtype=torch.int64, device=device.where)
        self._coming: Fetch | None = None
        self.addr = self._words.data_ptr()

    def ask(self) -> None:
        """Begin to bring the words over, behind what was launched on this thread's stream. Not in a graph."""
        if not self._device.capturing() and (self._coming is None or self._coming.done()):
            self._coming = self._device.fetch(self._words)

    def look(self) -> None:
        """Raise what an earlier call met, if that is known by now; waits for nothing. Once for each."""
        if self._coming is None or self._device.capturing():  # an event must not be asked while a graph is recorded
            return
        if self._coming.done():
            self._raise(self._coming.wait())

    def settle(self) -> None:
        """Wait for all that was launched, and raise what it met."""
        with self._device.on(self._stream):
            words = self._device.fetch(self._words).wait()
        self._raise(words)

    def _raise(self, words: Words) -> None:
        self._coming = None
        if words[0] == SETTLED:
            return
        with self._device.on(self._stream):
            self._words.zero_()
        error = refusal("an earlier dispatch", words, self.limits)
        assert error is not None, "only refusals are noted"
        raise error


def refusal(step: str, summary: Words, limits: Limits) -> Exception | None:
    """Return the error of a summary of connect; None where there is none, or only memory is missing."""
    code, _, guilty, verdict = summary.tolist()
    if code == BAD_EXPERT:
        token, column = divmod(verdict, limits.num_topk)
        return ValueError(
            f"{step}: rank {guilty}: topk_idx[{token}, {column}] names no expert; experts are 0 to "
            f"{limits.num_experts - 1}, and -1 means none; no rank has received anything"
        )
    if code == STATIC_TOO_SMALL:
        return CapacityError(
            f"{step}: static_rows={limits.static_rows} is too small for what a rank would receive; raise "
            "static_rows or send fewer tokens; no rank has received anything"
        )
    if code == BLOCK_TOO_SMALL:
        return CapacityError(
            f"{step}: an expert would receive more than R * max_tokens_per_rank = {limits.block_rows} rows, which a "
            "block of the padded layout holds: topk_idx names one expert twice for a token; name each once, or use "
            "layout='expert'; no rank has received anything"
        )
    return None
