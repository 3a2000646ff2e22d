"""Opens a comparison for a workload: which there are, what they need, how their rows are judged."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyep.cli.bench.plan import Workload
from anyep.cli.bench.stage import Side
from anyep.errors import Unavailable
from anyep.testing.oracle import Exchange
from anyep.testing.peers.base import Batch, Peer

GLOO, GLOO_RANKS = "gloo", "gloo-ranks"
"""gloo with a copy for every (token, expert), and with one for every (token, rank)."""


def open_peer(
    name: str, communicator: Any, side: Side, workload: Workload, exchange: Exchange
) -> tuple[Peer, Exchange]:
    """Return a peer of our rank, with its memory touched, and the exchange in its layout. Collective."""
    rank = side.ep.rank
    routing = exchange.routing[rank]
    assert routing.topk_weights is not None
    batch = Batch(
        x=side.x,
        topk_idx=routing.topk_idx,
        topk_weights=routing.topk_weights,
        num_experts=workload.experts,
        out=side.out,
    )
    sent = sum(int((arrivals.source == rank).sum()) for arrivals in exchange.arrivals)
    received = exchange.arrivals[rank].num_rows
    if name in (GLOO, GLOO_RANKS):
        import torch.distributed as dist

        world = dist.group.WORLD
        assert world is not None
        if name == GLOO_RANKS:
            from anyep.testing.peers.gloo_ranks import GlooRanks

            return GlooRanks(world, batch, max_sent=sent, max_received=received), exchange
        from anyep.testing.peers.gloo import GlooMegatron

        by_expert = replace(exchange, layout="expert")
        most = max(by_expert.arrivals[rank].num_rows, workload.tokens * workload.topk)
        return GlooMegatron(world, batch, max_rows=most), by_expert
    from anyep.testing.peers.mpich import MpichAlltoallv

    return MpichAlltoallv(communicator, batch, max_sent=sent, max_received=received), exchange


def find_mpiexec() -> Path:
    """Return MPICH's launcher. Unavailable, with what to install, where it or mpi4py is missing."""
    if importlib.util.find_spec("mpi4py") is None:
        raise Unavailable(
            "the MPICH comparison needs mpi4py, which is not installed: install the extra anyep[bench], "
            "or leave mpich out of --compare"
        )
    beside = shutil.which("mpiexec", path=f"{sysconfig.get_path('scripts')}:{Path(sys.executable).parent}")
    found = beside or shutil.which("mpiexec")
    if found is None:
        raise Unavailable(
            "the MPICH comparison needs mpiexec, which is not on the path: install the extra anyep[bench], "
            "or leave mpich out of --compare"
        )
    return Path(found)
