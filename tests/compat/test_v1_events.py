"""Events where there is CUDA, for which a list of steps stands: recorded at once, awaited by the current stream."""

from __future__ import annotations

import pytest
import torch

from anyep.compat import deep_ep


class Recorded:
    """What is done to events and streams, in order."""

    def __init__(self):
        self.steps = []
        self.stream = "first"

    def is_available(self):
        return True

    def current_stream(self):
        recorded, name = self, self.stream

        class Stream:
            def wait_event(self, event):
                recorded.steps.append(("wait", name, event.number))

        stream = Stream()
        stream.name = name
        return stream

    def Event(self):  # noqa: N802 - torch's name
        recorded = self

        class Event:
            number = len([step for step in recorded.steps if step[0] == "record"])

            def record(self, stream):
                recorded.steps.append(("record", stream.name, self.number))

        return Event()


@pytest.fixture
def cuda(monkeypatch):
    recorded = Recorded()
    for name in ("is_available", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(recorded, name))
    return recorded


def test_an_event_marks_the_stream_that_is_current_when_it_is_made(cuda):
    event = deep_ep.EventHandle()
    assert cuda.steps == [("record", "first", 0)]
    cuda.stream = "second"
    event.current_stream_wait()
    event.current_stream_wait()
    assert cuda.steps[1:] == [("wait", "second", 0)] * 2


def test_a_wait_finishes_a_call_before_the_stream_waits(cuda):
    event = deep_ep.EventOverlap(deep_ep.EventHandle.of(lambda: cuda.steps.append("second half")))
    with event:
        assert "second half" not in cuda.steps
    assert cuda.steps == [("record", "first", 0), "second half", ("wait", "first", 0)]


def test_captures_are_of_the_kind_that_each_version_returns(cuda):
    assert isinstance(deep_ep.Buffer.capture(), deep_ep.EventOverlap)
    assert isinstance(deep_ep.ElasticBuffer.capture(), deep_ep.EventHandle)
    assert [step[0] for step in cuda.steps] == ["record", "record"]


def test_an_event_of_nothing_is_left_alone_by_its_block():
    with deep_ep.EventOverlap() as event:
        assert event.event is None
