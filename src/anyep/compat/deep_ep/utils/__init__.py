"""Where older programs look for events, and other people's scripts for numerical helpers."""

from anyep.compat.deep_ep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
