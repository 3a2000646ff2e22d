"""Rank processes of this host for tests and benchmarks: they start in milliseconds and never outlive their parent.

A fork server imports torch, numba and the compiled kernels once; each rank is a fork of it. (A fresh interpreter a rank
takes seconds of a core each.) It keeps the environment variables of the moment it was first used.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from anyep.transport.liveness import follows_from_peer
from anyep.transport.rendezvous import StoreRendezvous

_PRELOAD = ["anyep.testing.nursery"]
_GRACE_S = 15.0
_EXIT_S = 5.0
_LOOPBACK = "127.0.0.1"


class RankFailed(RuntimeError):
    """A rank raised, died or did not end in time; ``outcomes`` has all ranks, the text the one at fault."""

    def __init__(self, message: str, outcomes: Sequence[Outcome]) -> None:
        super().__init__(message)
        self.outcomes = tuple(outcomes)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank ended: with a ``value``, with an ``error`` (its type's name, text and traceback), or by a signal.

    ``how``: "returned", "raised", "died" (without a word; ``exit_code`` is -N for signal N) or "stuck" (ended by us).
    ``follows``: the error is, or came from, another rank's.
    """

    rank: int
    how: str
    value: Any = None
    error: str = ""
    text: str = ""
    trace: str = ""
    follows: bool = False
    exit_code: int | None = None

    @property
    def is_root(self) -> bool:
        """Whether something went wrong that no other rank is to blame for."""
        return self.how in ("raised", "died") and not self.follows

    def tell(self) -> str:
        if self.how == "raised":
            return f"rank {self.rank} raised {self.error}: {self.text}\n{self.trace}"
        if self.how == "died":
            return f"rank {self.rank} died with exit code {self.exit_code}"
        return f"rank {self.rank} {self.how}"


def run_processes(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call ``function(group, rank, *args)`` in ``num_ranks`` processes; return the results in rank order.

    ``function`` must be importable by its name, and what it takes and returns must pickle. ``group`` serves as any
    group does. Raises RankFailed with the traceback of the rank at fault; all ranks have ended when this returns.
    """
    with RankProcesses(num_ranks, function, *args) as ranks:
        return ranks.results(timeout_s)


class RankProcesses:
    """The same in steps, for tests that hurt ranks. A context manager: leaving it ends every rank::

    with RankProcesses(2, work) as ranks:
        os.kill(ranks.pids[1], signal.SIGKILL)
        outcomes = ranks.outcomes(timeout_s=10.0)
    """

    def __init__(
        self, num_ranks: int, function: Callable[..., Any], *args: Any, enter: Callable[[int], None] | None = None
    ) -> None:
        """``enter(rank)``: called first on every rank, as soon as it can reach the group's store; must pickle."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not exported for types

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        task = pickle.dumps((function, args, enter))  # plain bytes: torch would otherwise pass tensors by descriptor
        self._store = TCPStore(_LOOPBACK, 0, None, True, wait_for_workers=False)
        self._outcomes: dict[int, Outcome] = {}
        self._order: list[int] = []
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        try:
            for rank in range(num_ranks):
                self._start(context, rank, num_ranks, task)
        except BaseException:
            self.close()
            raise

    def _start(self, context: Any, rank: int, num_ranks: int, task: bytes) -> None:
        ours, theirs = context.Pipe(duplex=False)
        self._pipes.append(ours)
        with theirs:
            process = context.Process(
                target=_rank_main, args=(task, rank, num_ranks, self._store.port, theirs), daemon=True
            )
            process.start()
        self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """The ranks' process ids."""
        return [process.pid for process in self._processes]

    def outcomes(self, timeout_s: float) -> list[Outcome]:
        """Wait for all ranks; return how each ended. Ranks that have not ended by then are, and count as stuck.

        After a rank fails by itself the others have 15 s left to notice.
        """
        deadline = time.monotonic() + timeout_s
        while len(self._outcomes) < len(self._processes) and time.monotonic() < deadline:
            self._collect(deadline - time.monotonic())
            if any(outcome.is_root for outcome in self._outcomes.values()):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        for rank in range(len(self._processes)):
            if rank not in self._outcomes:
                self._note(Outcome(rank=rank, how="stuck"))
        self._end()
        return [self._outcomes[rank] for rank in range(len(self._processes))]

    def results(self, timeout_s: float) -> list[Any]:
        """Wait for all ranks; return their results, or raise RankFailed for the first that is at fault."""
        outcomes = self.outcomes(timeout_s)
        failed = [self._outcomes[rank] for rank in self._order if self._outcomes[rank].how != "returned"]
        if failed:
            guilty = next((outcome for outcome in failed if not outcome.follows), failed[0])
            text = guilty.tell() + (f" after {timeout_s:g} s" if guilty.how == "stuck" else "")
            raise RankFailed(text, outcomes)
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        """End every rank that still runs. Idempotent."""
        self._end()
        for pipe in self._pipes:
            pipe.close()

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _note(self, outcome: Outcome) -> None:
        self._outcomes[outcome.rank] = outcome
        self._order.append(outcome.rank)

    def _collect(self, timeout_s: float) -> None:
        """Take what the next ranks report; a pipe that ends without a report is a death."""
        silent = [pipe for rank, pipe in enumerate(self._pipes) if rank not in self._outcomes]
        ready = wait(silent, max(0.0, timeout_s))
        for rank, pipe in enumerate(self._pipes):
            if pipe not in ready:
                continue
            try:
                self._note(pickle.loads(pipe.recv_bytes()))
            except (EOFError, OSError):
                self._processes[rank].join(_EXIT_S)
                self._note(Outcome(rank=rank, how="died", exit_code=self._processes[rank].exitcode))

    def _end(self) -> None:
        """Let ranks that have reported exit by themselves; kill the others."""
        for rank, process in enumerate(self._processes):
            if rank in self._outcomes and self._outcomes[rank].how != "stuck":
                process.join(_EXIT_S)
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()


def _die_with_reader(pipe: Connection) -> None:
    """End this process when whoever started it has ended, however that happened.

    (The kernel's parent-death signal is of no use: the parent is the fork server, and that lives as long as its ranks.)
    """
    watch = select.poll()
    watch.register(pipe.fileno(), 0)  # an error is reported unasked: nobody can read this pipe any more

    def wait_for_the_end() -> None:
        watch.poll()
        os._exit(1)

    threading.Thread(target=wait_for_the_end, name="anyep-lifeline", daemon=True).start()


def _rank_main(task: bytes, rank: int, num_ranks: int, port: int, pipe: Connection) -> None:
    _die_with_reader(pipe)
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not exported for types

    torch.set_num_threads(1)  # as torchrun does: ranks share the cores
    try:
        function, args, enter = pickle.loads(task)
        store = TCPStore(_LOOPBACK, port, None, False)
        if enter is not None:
            enter(rank)
        group = StoreRendezvous(store, rank, num_ranks)
        report = pickle.dumps(Outcome(rank=rank, how="returned", value=function(group, rank, *args)))
    except BaseException as error:
        report = pickle.dumps(
            Outcome(
                rank=rank,
                how="raised",
                error=type(error).__name__,
                text=str(error),
                trace=traceback.format_exc(),
                follows=follows_from_peer(error),
            )
        )
    pipe.send_bytes(report)
