"""What went wrong on the device in calls that did not wait for it, in graphs too; said by a later call of that rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyep.errors import CapacityError, PeerTimeout
from anyep.exchange.device.devices import Device, Stream
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


def limits_of(
    *, num_topk: int, num_experts: int, num_ranks: int, max_tokens: int, static_rows: int | None, timeout_s: float
) -> Limits:
    """Return the limits of batches of up to ``max_tokens`` a rank."""
    return Limits(
        num_topk=num_topk,
        num_experts=num_experts,
        static_rows=-1 if static_rows is None else static_rows,
        block_rows=num_ranks * max_tokens,
        timeout_s=timeout_s,
    )


class Faults:
    """Words in pinned memory of the host that kernels fill, and only where something went wrong.

    A summary, when they refuse a batch; and for each rank that did not come to an operation's end, an error word. The
    host looks at them without asking the device, so that a call in which all goes well launches nothing for them.
    """

    def __init__(self, device: Device, stream: Stream, limits: Limits, num_ranks: int) -> None:
        self._device = device
        self._stream = stream
        self.limits = limits
        """those of the batch that may have broken them last; of several kinds of batches the last one's are told"""
        num_words = SUMMARY_WORDS + num_ranks
        self.memory = device.pinned(8 * num_words).view(torch.int64)
        self._clear()
        self._words: Words = self.memory.numpy()
        self._quiet = bytes(8 * num_words)
        self.addr = self.memory.data_ptr()
        self.late_addr = self.addr + 8 * SUMMARY_WORDS
        """int64 [R]: ``epoch << 32 | the epoch that a silent rank has reached``"""

    def _clear(self) -> None:
        """Write zeros by a copy of the exchange's stream, and wait for it.

        What it copies to, torch's allocator hands out again only when that stream has come to where memory was freed.
        """
        zeros = torch.zeros(len(self.memory), dtype=torch.int64, device=self._device.where)
        self._device.follow(self._stream, self._device.mark(self._device.current_stream()))
        with self._device.on(self._stream):
            self._device.copy(zeros, self.memory)
        self._device.wait(self._device.mark(self._stream))

    def look(self) -> None:
        """Raise what an earlier call met, if that is known by now; waits for nothing where all is well. Once for each.

        But not of a silent rank: :meth:`check_silence` does, where the buffer ends by it.
        """
        if self._words.tobytes() != self._quiet and not self._device.capturing():
            words = self._told()
            if _silence(words, self.limits) is None:
                self._raise(words)

    def check_silence(self) -> None:
        """Raise PeerTimeout if a rank was found silent, and that is known by now."""
        if self._words.tobytes() != self._quiet and not self._device.capturing():
            silence = _silence(self._told(), self.limits)
            if silence is not None:
                raise silence

    def settle(self) -> None:
        """Wait for all that was launched, and raise what it met."""
        words = self._told()
        silence = _silence(words, self.limits)
        if silence is not None:
            raise silence
        self._raise(words)

    def _told(self) -> Words:
        """Return the words when all that was launched is done: what is seen before may be a part of what went wrong."""
        self._device.wait(self._device.mark(self._stream))
        words: Words = self._words.copy()
        return words

    def _raise(self, words: Words) -> None:
        error = refusal("an earlier dispatch", words[:SUMMARY_WORDS], self.limits)
        if error is not None:
            self._clear()
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
