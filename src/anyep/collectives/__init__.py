"""Beside dispatch and combine, over the same transports: rows fetched by number, a ring of neighbours, all-gathers."""

from anyep.collectives.gathering import Gatherer, GatherSession, gathered_bytes
from anyep.collectives.ring import Ring
from anyep.collectives.rows import RowStore

__all__ = ["GatherSession", "Gatherer", "Ring", "RowStore", "gathered_bytes"]
