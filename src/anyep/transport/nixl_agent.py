"""NIXL as this package sees it: one agent a rank, which writes into windows of the others and sends them notes.

NIXL moves bytes with UCX: InfiniBand, RoCE and EFA where they are, TCP anywhere. Its own progress thread spins and is
left off, so nothing moves, not even a note, unless one of the methods here is called on both sides.
"""

from __future__ import annotations

import base64
import importlib
import logging
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from anyep import config
from anyep.errors import Unavailable
from anyep.transport.engine import Bytes
from anyep.transport.interfaces import Interface, addresses, choose_interface
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.together import together

_MODULES = ("nixl_cu12", "nixl")
"""``nixl`` alone pulls in the builds for two CUDA versions; no CUDA is needed here."""
_HOST_MEMORY = "DRAM"
HOW_TO_REACH = (
    "Check that both are up and reach each other, over TCP at any port, and that UCX takes the network that they share "
    "(interface=, or UCX_NET_DEVICES)"
)
"""What to do when ranks do not reach each other."""
_RDMA_DEVICES = Path("/sys/class/infiniband")
_ONE_AT_A_TIME = threading.Lock()


def load_nixl() -> ModuleType:
    """Import NIXL's Python interface. Raises Unavailable, naming the extra, where it is not installed."""
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(f"{name}._api")
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise Unavailable(
        f"NIXL is not installed ({'; '.join(reasons)}): pip install 'anyep[nixl]', or use the engine 'gloo'"
    )


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Another rank: its agent's name, where this rank's part of its windows begins, and where it runs."""

    agent: str
    window: int
    where: str


class NixlAgent:
    """Made by all ranks, collectively. Not to be used by two threads at once.

    ``window_bytes``: of registered memory for what each other rank sends to this one, and as much for what is sent to
    it. All of it is registered once: registrations of the callers' memory would overlap each other, and NIXL (1.5.1)
    then frees some of its own twice. ``interface``: a network device
    by UCX's name for it; None: UCX chooses. Raises Unavailable on all ranks where one fails.
    """

    def __init__(self, rendezvous: Rendezvous, *, window_bytes: int, interface: str | None) -> None:
        self._rank = rendezvous.rank
        self._window_bytes = window_bytes
        self.options: dict[str, str] = {}
        self.kinds: list[str] = []
        """of memory that the backend names, whether or not it can register them (nixl_device.py tries)"""
        self._memory = np.empty((2, rendezvous.size, window_bytes), np.uint8)
        """[in or out, other rank, byte]"""
        nonce = together(rendezvous, lambda: secrets.token_hex(8) if load_nixl() else "", what="load NIXL")[0]
        name = f"anyep-{nonce}-{self._rank}"
        told = together(rendezvous, lambda: self._open(name, interface), what="open NIXL")
        self._ranks = {other["agent"]: rank for rank, other in enumerate(told)}
        self.remotes = [
            Remote(agent=e["agent"], window=e["address"] + self._rank * window_bytes, where=e["where"]) for e in told
        ]
        together(rendezvous, lambda: self._meet(told), what="load the other ranks' NIXL metadata")

    def notify(self, rank: int, note: bytes) -> None:
        self._agent.send_notif(self.remotes[rank].agent, note)

    def notes(self) -> Iterator[tuple[int, bytes]]:
        """Return what has come; let NIXL work."""
        for name, notes in self._agent.get_new_notifs().items():
            for note in notes:
                yield self._ranks[name], note

    def window(self, rank: int) -> Bytes:
        """The memory into which ``rank`` writes."""
        window: Bytes = self._memory[0, rank]
        return window

    def outbox(self, rank: int) -> Bytes:
        """The memory from which our window at ``rank`` is written."""
        outbox: Bytes = self._memory[1, rank]
        return outbox

    def write(self, rank: int, offset: int, num_bytes: int, note: bytes) -> Any:
        """Begin to write a part of our outbox to the same part of our window at ``rank``; ``note`` follows it."""
        remote, begin = self.remotes[rank], self.outbox(rank).ctypes.data + offset
        here = self._agent.get_xfer_descs([(begin, num_bytes, 0)], _HOST_MEMORY)
        there = self._agent.get_xfer_descs([(remote.window + offset, num_bytes, 0)], _HOST_MEMORY)
        handle = self._agent.initialize_xfer("WRITE", here, there, remote.agent, note)
        if self._agent.transfer(handle) == "ERR":
            raise RuntimeError(f"NIXL could not begin a write of {num_bytes} bytes")
        return handle

    def is_written(self, handle: Any) -> bool:
        """Return whether a write is done; its handle is gone then. Lets NIXL work, and its note leave."""
        state = self._agent.check_xfer_state(handle)
        if state == "PROC":
            return False
        self._agent.release_xfer_handle(handle)
        if state == "ERR":
            raise RuntimeError("NIXL could not finish a write")
        return True

    def close(self) -> None:
        self._agent.deregister_memory(self._windows)
        del self._agent, self._windows

    def _open(self, name: str, interface: str | None) -> dict[str, Any]:
        nixl = load_nixl()
        self.options = _options(interface)
        own = choose_interface(None)
        try:
            with _quiet(nixl):
                settings = nixl.nixl_agent_config(enable_prog_thread=False, backends=[])
                self._agent: Any = nixl.nixl_agent(name, settings)
                self._agent.create_backend("UCX", self.options)
                self.kinds = list(self._agent.get_backend_mem_types("UCX"))
            block = (self._memory.ctypes.data, self._memory.nbytes, 0, "")
            self._windows = self._agent.register_memory([block], _HOST_MEMORY)
        except Exception as error:  # its errors have no common kind
            raise Unavailable(f"NIXL does not work here with {self.options}: {error}") from error
        return {
            "agent": name,
            "address": self._memory.ctypes.data,
            "metadata": base64.b64encode(self._agent.get_agent_metadata()).decode(),
            "where": _where(own),
        }

    def _meet(self, told: Sequence[dict[str, Any]]) -> None:
        for rank, other in enumerate(told):
            if rank == self._rank:
                continue
            try:
                self._agent.add_remote_agent(base64.b64decode(other["metadata"]))
            except Exception as error:  # its errors have no common kind
                raise Unavailable(
                    f"NIXL finds no way to rank {rank} ({other['where']}) from {told[self._rank]['where']} with "
                    f"{self.options}: {error}. {HOW_TO_REACH}"
                ) from error


def _options(interface: str | None) -> dict[str, str]:
    """UCX's settings. Where one machine plays several hosts it must not take ways that hosts do not have.

    NIXL's own ``ucx_devices`` has no effect (1.5.1), and its ``device_list`` fits RDMA alone.
    """
    settings = []
    if config.host_id() is not None or config.ranks_per_host() is not None:
        settings.append("TLS=tcp")
    if interface is not None:
        _check_device(interface)
        settings.append(f"NET_DEVICES={interface}")
    return {"engine_config": ",".join(settings)} if settings else {}


def _check_device(interface: str) -> None:
    """Raise Unavailable for a device that does not exist: UCX would take another one."""
    known = [*addresses(), *sorted(path.name for path in _RDMA_DEVICES.glob("*"))]
    if interface.partition(":")[0] not in known:
        raise Unavailable(
            f"network device {interface!r} (asked for) does not exist here or is down; one of those that can be used: "
            f"{', '.join(known)} (several: set UCX_NET_DEVICES)"
        )


def _where(own: Interface) -> str:
    return f"host {socket.gethostname()}, {own.name} ({own.address})"


@contextmanager
def _quiet(nixl: ModuleType) -> Iterator[None]:
    """Keep NIXL from announcing each agent, whatever its level is. One thread at a time: all have one logger."""
    logger: logging.Logger = nixl.logger
    with _ONE_AT_A_TIME:
        level = logger.level
        logger.setLevel(max(level, logging.WARNING))
        try:
            yield
        finally:
            logger.setLevel(level)
