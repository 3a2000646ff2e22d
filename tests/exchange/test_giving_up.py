"""A rank that gives up in the middle of a combine may write over rows that a slow peer still reads: no such sums."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

from anyep import Buffer
from anyep.exchange.combine import Combine
from anyep.testing.processes import run_processes


def _slow_reader() -> None:
    find_rows: Any = Combine._find_rows

    def late(self: Combine, *args: Any) -> None:
        find_rows(self, *args)
        time.sleep(1.0)

    Combine._find_rows = late  # type: ignore[method-assign]


def _owner_gives_up(group: Any, rank: int, how: str) -> str:
    """Rank 0 reads rank 1's rows late; rank 1 gives up meanwhile, and writes over them."""
    if rank == 0:
        _slow_reader()
    try:
        with Buffer(
            group, hidden=64, num_experts=2, num_topk=1, max_tokens_per_rank=64, wire="fp32", eager_bytes=0
        ) as ep:
            received = ep.dispatch(torch.ones(64, 64), torch.full((64, 1), 1 if rank == 0 else -1))
            y = ep.empty_output(received.handle)
            y.copy_(received.x)
            if rank == 1 and how == "Ctrl-C":
                threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            if rank == 1 and how == "raises":
                pending = ep.combine(y, received.handle, wait=False)
                time.sleep(0.3)
                raise RuntimeError(pending)
            return str(ep.combine(y, received.handle).unique().tolist())
    except BaseException as error:
        if rank == 1:
            y.fill_(777.0)
            time.sleep(1.5)
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("how", ["Ctrl-C", "raises"])
def test_sums_of_rows_that_their_owner_gave_up_are_an_error(how: str) -> None:
    reader, _ = run_processes(2, _owner_gives_up, how, timeout_s=30.0)
    assert reader.startswith("PeerLost: "), reader
    assert "rank 1" in reader
    assert "ended with an error" in reader
