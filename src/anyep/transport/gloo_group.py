"""A gloo process group of our own, on a chosen interface: no other group and no environment variable is touched."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.errors import Unavailable
from anyep.transport.interfaces import Interface, choose_interface
from anyep.transport.rendezvous import Rendezvous
from anyep.transport.together import together

FOR_EVER = timedelta(days=3650)
"""A wait that times out closes the connections to all ranks: it happens only when that is wanted."""
_AT_ONCE = timedelta(milliseconds=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class GlooGroup:
    process_group: Any
    """torch.distributed.ProcessGroupGloo, or None for a single rank"""
    store: Any
    interface: Interface

    def hang_up(self, rank: int, unused_tag: int) -> None:
        """Close the connection to a rank, and so end all waits for it; nothing else does."""
        with suppress(RuntimeError):  # the time-out that is wanted, or a connection that is gone already
            self.process_group.recv([torch.empty(1, dtype=torch.uint8)], rank, unused_tag).wait(_AT_ONCE)

    def close(self) -> None:
        if self.process_group is not None:
            self.process_group.shutdown()


def tensor_of(memory: NDArray[np.uint8]) -> torch.Tensor:
    """The same bytes for torch. It warns of read-only memory, which gloo only reads: that is passed by its address."""
    if memory.flags.writeable:
        return torch.from_numpy(memory)
    borrowed = (ctypes.c_uint8 * memory.size).from_address(memory.ctypes.data)
    return torch.frombuffer(borrowed, dtype=torch.uint8)


def open_gloo(rendezvous: Rendezvous, interface: str | None, timeout_s: float) -> GlooGroup:
    """Connect all ranks with each other. Collective.

    Rank 0 starts a store on its interface and tells all where; each looks whether it can reach that; then gloo connects
    every pair. Raises Unavailable on all ranks, naming host, interface and port, where one of these fails.
    """
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s}")
    started: list[Any] = []

    def announce() -> dict[str, Any]:
        own = choose_interface(interface)
        port = 0
        if rendezvous.rank == 0:
            started.append(_start_store(own, timeout_s))
            port = started[0].port
        return {"host": socket.gethostname(), "interface": own.name, "address": own.address, "port": port}

    told = together(rendezvous, announce, what="prepare its network")
    own = choose_interface(interface)
    together(rendezvous, lambda: _reach(told[0], own, timeout_s), what="reach rank 0")

    def connect() -> None:
        if rendezvous.rank:
            started.append(_join_store(told[0], timeout_s))
        if rendezvous.size > 1:
            started.append(_connect(started[0], rendezvous, own, told, timeout_s))

    together(rendezvous, connect, what="connect to the other ranks")
    return GlooGroup(process_group=started[1] if rendezvous.size > 1 else None, store=started[0], interface=own)


def _start_store(own: Interface, timeout_s: float) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(own.address, 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise Unavailable(
            f"no port could be opened on {own.name} ({own.address}): {why}. The system chooses among those of "
            "net.ipv4.ip_local_port_range: widen that, or close what listens there"
        ) from error


def _reach(root: dict[str, Any], own: Interface, timeout_s: float) -> None:
    try:
        socket.create_connection((root["address"], root["port"]), timeout_s).close()
    except OSError as error:
        raise Unavailable(
            f"host {root['host']} cannot be reached at {root['address']} port {root['port']} (its interface "
            f"{root['interface']}) from {own.name} ({own.address}): {error}. Check that both interfaces are up and in "
            "networks that reach each other, and that no firewall keeps TCP ports closed; choose others with "
            "interface= or GLOO_SOCKET_IFNAME"
        ) from error


def _join_store(root: dict[str, Any], timeout_s: float) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(root["address"], root["port"], None, False, timedelta(seconds=timeout_s))


def _connect(
    store: Any, rendezvous: Rendezvous, own: Interface, told: Sequence[dict[str, Any]], timeout_s: float
) -> Any:
    import torch.distributed as dist

    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=own.name)]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1  # for collectives, of which there are none
    try:
        group = gloo(store, rendezvous.rank, rendezvous.size, options)
    except RuntimeError as error:
        where = "; ".join(f"rank {n}: {e['host']}, {e['interface']} ({e['address']})" for n, e in enumerate(told))
        raise Unavailable(
            f"gloo could not connect all ranks within {timeout_s:g} s: {error}. They listen on ports that the system "
            f"chooses: {where}. Check that every rank's address can be reached from every other, at any TCP port"
        ) from error
    group.set_timeout(FOR_EVER)
    return group
