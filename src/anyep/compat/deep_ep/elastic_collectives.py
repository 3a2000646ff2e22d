"""What ``ElasticBuffer`` offers beside dispatch and combine: Engram, pipeline send and receive, gather sessions.

Each feature makes the object of :mod:`anyep.collectives` that it needs when it is first configured, collectively, as
upstream's own calls are; the sizes given to the constructor are only compared with, never committed.
"""

from __future__ import annotations

from anyep.compat.deep_ep.elastic_agrs import GatherCalls
from anyep.compat.deep_ep.elastic_engram import EngramCalls
from anyep.compat.deep_ep.elastic_pp import PipelineCalls
from anyep.compat.deep_ep.elastic_refusals import RefusedCall

__all__ = ["ElasticCollectives", "RefusedCall"]


class ElasticCollectives(EngramCalls, PipelineCalls, GatherCalls):
    """The collective calls of ``ElasticBuffer``, which inherits them.

    The heir sets ``group``, ``rank_idx``, ``num_ranks``, ``num_bytes`` and ``num_cpu_bytes`` (as the caller gave them)
    and ``timeout_s`` before the first of these calls, and calls :meth:`close_collectives` when it is destroyed.
    Nothing else is needed, and there is no ``__init__``. Tensors on a CUDA device are staged through CPU memory.
    """

    def close_collectives(self) -> None:
        """End what these calls have made. Idempotent, waits for nobody."""
        for name in ("_engram", "_pp", "_agrs"):
            made = getattr(self, name)
            setattr(self, name, None)
            if made is not None:
                made.close()
        self._agrs_session = None
