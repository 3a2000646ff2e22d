"""Words that come to the host: through memory that was pinned before, whatever torch keeps of its own."""

from __future__ import annotations

import pytest
import torch

from anyep.exchange.device import fetches
from anyep.exchange.device.fetches import PinnedFetch, Pins


class Event:
    """Over at once."""

    def record(self):
        """Nothing was launched."""

    def query(self):
        return True

    def synchronize(self):
        """Nothing to wait for."""


@pytest.fixture
def pinned(monkeypatch):
    """The sizes of what was pinned."""
    sizes = []

    def pin(pins, num_words):
        sizes.append(num_words)
        return torch.full((num_words,), -1, dtype=torch.int64)

    monkeypatch.setattr(Pins, "_pinned", pin)
    monkeypatch.setattr(fetches.torch.cuda, "Event", Event)
    return sizes


def test_nothing_is_pinned_after_what_was_expected(pinned):
    pins = Pins()
    for _ in range(2):  # two ranks
        pins.expect(8, 3)
    assert pinned == [8] * 6
    for turn in range(5):
        on_their_way = [PinnedFetch(torch.arange(n) + turn, pins) for n in (8, 1, 3, 8, 2, 5)]
        came = [fetch.wait().tolist() for fetch in on_their_way]
        assert came == [[turn + i for i in range(n)] for n in (8, 1, 3, 8, 2, 5)]
    assert pinned == [8] * 6


def test_words_that_came_stay_when_others_come_through_the_same_memory(pinned):
    pins = Pins()
    pins.expect(2, 1)
    first = PinnedFetch(torch.tensor([1, 2]), pins)
    assert first.done()
    kept = first.wait()
    assert PinnedFetch(torch.tensor([3, 4]), pins).wait().tolist() == [3, 4]
    assert kept.tolist() == first.wait().tolist() == [1, 2]
    assert pinned == [2]


def test_memory_to_which_words_may_still_be_copied_is_not_given_to_others(pinned):
    pins = Pins()
    pins.expect(2, 1)
    PinnedFetch(torch.tensor([5, 6]), pins)  # nobody waits for it
    first = PinnedFetch(torch.tensor([1, 2]), pins)
    assert pinned == [2, 2]
    assert first.wait().tolist() == [1, 2]
    assert PinnedFetch(torch.tensor([3, 4]), pins).wait().tolist() == [3, 4]
    assert pinned == [2, 2]


def test_a_buffer_with_longer_words_has_memory_for_them(pinned):
    pins = Pins()
    pins.expect(2, 1)
    pins.expect(5, 1)
    assert pinned == [2, 5, 5]
    assert PinnedFetch(torch.arange(5), pins).wait().tolist() == [0, 1, 2, 3, 4]
    assert pinned == [2, 5, 5]
