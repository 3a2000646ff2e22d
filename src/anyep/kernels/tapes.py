"""Launches that are recorded once and played often, each time on other memory.

What a call launches depends on its shapes; from one call to the next only some addresses differ. A recording therefore
holds numbers that are *counted from a base*: kernels are called with :func:`counted_from` in place of an address, and
when the recording is played each such number becomes the base's value plus what was added to it.

>>> split(counted_from(2) + 64)
(64, 3)
>>> split(64), split(-1)
((64, 0), (-1, 0))
>>> placed((64, 3), [0, 0, 1000]), placed((64, 0), [0, 0, 1000])
(1064, 64)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from anyep.kernels.spec_device import DeviceKernels

_SHIFT = 52
"""Addresses, and what is added to a base, are below 2 ** 52."""
_MOST_BASES = 64

Act = Callable[[DeviceKernels], None]
"""Calls kernels whose numbers are counted from bases."""
Number = tuple[int, int]
"""What is added, and to which base: 0 for none, else its index and 1."""


class Play(Protocol):
    """A recording; ``bases`` are the values of its bases, ``stream`` is the device's own name of one."""

    def __call__(self, bases: Sequence[int], stream: int) -> None: ...


class TapedKernels(DeviceKernels, Protocol):
    """Kernels that know how to play a list of their launches."""

    def tape(self, act: Act) -> Play:
        """Record what ``act`` launches, and launch nothing."""
        ...


class Call(NamedTuple):
    """One call of a kernel set."""

    name: str
    numbers: tuple[Number, ...]


def counted_from(base: int) -> int:
    """Return what stands for the value of a base in a recording."""
    assert 0 <= base < _MOST_BASES, "a recording has few bases"
    return (base + 1) << _SHIFT


def split(number: int) -> Number:
    """Return what is added to which base."""
    if number < 1 << _SHIFT:
        return number, 0
    origin = number >> _SHIFT
    assert origin <= _MOST_BASES, "a number of a recording is small, or counted from a base"
    return number - (origin << _SHIFT), origin


def placed(number: Number, bases: Sequence[int]) -> int:
    """Return the number with its base."""
    added, origin = number
    return added + bases[origin - 1] if origin else added


def recorded(act: Act) -> list[Call]:
    """Return what ``act`` calls, for kernel sets that are played by calling them again."""
    recorder: Any = _Recorder()
    act(recorder)
    calls: list[Call] = recorder.calls
    return calls


def play_again(kernels: DeviceKernels, calls: Sequence[Call], bases: Sequence[int]) -> None:
    """Call ``kernels`` as it was recorded."""
    for name, numbers in calls:
        getattr(kernels, name)(*(placed(number, bases) for number in numbers))


class _Recorder:
    """Notes the calls of a kernel set."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *numbers: self.calls.append(Call(name, tuple(split(int(number)) for number in numbers)))
