"""What went wrong on the device in calls that did not wait for it; said by a later call of the same rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyep.errors import CapacityError, PeerTimeout
from anyep.exchange.device.devices import Device, Fetch, Stream
from anyep.kernels.spec_device import BAD_EXPERT, BLOCK_TOO_SMALL, STATIC_TOO_SMALL, SUMMARY_WORDS
from anyep.transport.base import Words

_EPOCH_BITS = 32
_EPOCH_MASK = (1 << _EPOCH_BITS) - 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a batch of a buffer must fit; -1 for no fixed number of rows."""

    num_topk: int
    num_experts: int
    static_rows: int
    block_rows: int
    timeout_s: float


class Faults:
    """Words on the device that kernels fill, and copies of them on their way to the host.

    A summary, when they refuse a batch; and for each rank that did not come to an operation's end, an error word.
    """

    def __init__(self, device: Device, stream: Stream, limits: Limits, num_ranks: int) -> None:
        self._device = device
        self._stream = stream
        self.limits = limits
        self.words = torch.zeros(SUMMARY_WORDS + num_ranks, dtype=torch.int64, device=device.where)
        self._coming: Fetch | None = None
        self.addr = self.words.data_ptr()
        self.late_addr = self.addr + 8 * SUMMARY_WORDS
        """int64 [R]: ``epoch << 32 | the epoch that a silent rank has reached``"""

    def ask(self, limits: Limits | None = None) -> None:
        """Begin to bring the words over, behind what the exchange has launched. Not in a graph.

        ``limits``: those of the batch that may have broken them; of several kinds of batches the last one's are told.
        """
        self.limits = self.limits if limits is None else limits
        if not self._device.capturing() and (self._coming is None or self._coming.done()):
            with self._device.on(self._stream):
                self._coming = self._device.fetch(self.words)

    def look(self) -> None:
        """Raise what an earlier call met, if that is known by now; waits for nothing. Once for each.

        But not of a silent rank: :meth:`check_silence` does, where the buffer ends by it.
        """
        words = self._known()
        if words is None:
            return
        if not words.any():
            self._coming = None
        elif _silence(words, self.limits) is None:
            self._raise(words)

    def check_silence(self) -> None:
        """Raise PeerTimeout if a rank was found silent, and that is known by now."""
        words = self._known()
        silence = None if words is None else _silence(words, self.limits)
        if silence is not None:
            raise silence

    def _known(self) -> Words | None:
        if self._coming is None or self._device.capturing():  # an event must not be asked while a graph is recorded
            return None
        return self._coming.wait() if self._coming.done() else None

    def settle(self) -> None:
        """Wait for all that was launched, and raise what it met."""
        with self._device.on(self._stream):
            words = self._device.fetch(self.words).wait()
        silence = _silence(words, self.limits)
        if silence is not None:
            raise silence
        self._raise(words)

    def _raise(self, words: Words) -> None:
        self._coming = None
        error = refusal("an earlier dispatch", words[:SUMMARY_WORDS], self.limits)
        if error is not None:
            with self._device.on(self._stream):
                self.words.zero_()
            raise error


def _silence(words: Words, limits: Limits) -> PeerTimeout | None:
    """Return the error of ranks that were waited for in vain, None where there are none."""
    late = {rank: int(word) for rank, word in enumerate(words[SUMMARY_WORDS:].tolist()) if word}
    if words[0] == BAD_EXPERT and words[3] >> _EPOCH_BITS:
        late[int(words[2])] = int(words[3])
    return silent("an earlier call", late, limits) if late else None


def silent(step: str, late: dict[int, int], limits: Limits) -> PeerTimeout:
    """Return the error of ranks whose words did not come; ``late``: their error words."""
    told = ", ".join(
        f"rank {rank}, which was waited for in operation {word >> _EPOCH_BITS} on the device and had come to "
        f"{word & _EPOCH_MASK}"
        for rank, word in sorted(late.items())
    )
    text = (
        f"{step}: the device waited longer than timeout_s={limits.timeout_s:g} for {told}. Its stream may be busy "
        "with other work: look what was launched on it before; raise timeout_s if it only needs longer"
    )
    return PeerTimeout(text, ranks=sorted(late), step=step)


def refusal(step: str, summary: Words, limits: Limits) -> Exception | None:
    """Return the error of a summary of connect; None where there is none, or only memory is missing."""
    code, _, guilty, verdict = summary.tolist()
    if code == BAD_EXPERT and verdict >> _EPOCH_BITS:
        return silent(step, {guilty: verdict}, limits)
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
