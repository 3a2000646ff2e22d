"""DeepEP's interface (V1 ``Buffer``, V2 ``ElasticBuffer``) on AnyEP: ``anyep compat-path`` puts it on a program's path.

Differences are listed in docs/compatibility.md. There is no ``HybridEPBuffer``, for which clients probe.
"""

from anyep.compat.deep_ep.events import EventHandle, EventOverlap
from anyep.version import __version__

__all__ = ["EventHandle", "EventOverlap", "__version__"]
