"""Several hosts on one machine: rank processes in network namespaces, joined by links that can be slow, or be cut.

::

    def work(group, rank): ...                                # as for testing/processes.py

    run_on_hosts([2, 2], work, link_mbit=1000)                # four ranks on two hosts

    with Hosts(2) as hosts, hosts.start([1, 1], work) as ranks:
        hosts.cut(1)
        outcomes = ranks.outcomes(timeout_s=10.0)

Each host has one interface, ``eth0``, on a switch that is a namespace too: nothing outside of these namespaces is
touched, and no traffic leaves them. Needs Linux, root, and ``ip`` and ``tc`` of iproute2; elsewhere
:func:`check_hosts` says why not. What hosts of a cluster do not share is still shared: memory, files, process ids.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from anyep.errors import Unavailable
from anyep.machine import processes
from anyep.testing.processes import RankProcesses

INTERFACE = "eth0"
_PREFIX = "anyep"
_NAMESPACES = Path("/run/netns")
_SWITCH = "switch"
_COMMAND_S = 20.0
_BURST = "256kb"
"""What a link may send at once: as much as the largest packets that the kernel makes before it cuts them."""
_QUEUE_BYTES = 8 << 20
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class LinkBytes:
    """What an interface has carried so far, with all headers."""

    sent: int
    received: int


def check_hosts() -> None:
    """Raise Unavailable, with the reason, where hosts cannot be played."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"network namespaces need {' and '.join(missing)}: install iproute2")
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")


def interface_bytes(interface: str = INTERFACE) -> LinkBytes:
    """Return what an interface of the calling thread's own host has carried."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            columns = numbers.split()
            return LinkBytes(received=int(columns[0]), sent=int(columns[8]))
    raise ValueError(f"this host has no interface {interface!r}")


def run_on_hosts(
    ranks_per_host: Sequence[int],
    function: Callable[..., Any],
    *args: Any,
    link_mbit: float | None = None,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Call ``function(group, rank, *args)`` in rank processes on as many hosts; return the results in rank order.

    Ranks are numbered host by host. ``link_mbit``: bandwidth of each host's link, both ways. Raises Unavailable where
    hosts cannot be played, RankFailed as ``run_processes`` does; nothing is left behind.
    """
    with (
        Hosts(len(ranks_per_host), link_mbit=link_mbit) as hosts,
        hosts.start(ranks_per_host, function, *args) as ranks,
    ):
        return ranks.results(timeout_s)


class Hosts:
    """Hosts that know each other by ``addresses``. A context manager: leaving it removes them."""

    def __init__(self, num_hosts: int, *, link_mbit: float | None = None) -> None:
        if not 1 <= num_hosts <= 250:
            raise ValueError(f"num_hosts must be from 1 to 250, got {num_hosts}")
        check_hosts()
        _reap()
        stem = f"{_PREFIX}-{os.getpid()}-{processes.start_time(os.getpid())}-{next(_numbers)}"
        self.addresses = [f"10.77.0.{host + 1}" for host in range(num_hosts)]
        self._switch = f"{stem}-{_SWITCH}"
        self._hosts = [f"{stem}-host{host}" for host in range(num_hosts)]
        self._remover: subprocess.Popen[bytes] | None = _start_remover([*self._hosts, self._switch])
        try:
            self._make(link_mbit)
        except BaseException:
            self.close()
            raise

    def start(self, ranks_per_host: Sequence[int], function: Callable[..., Any], *args: Any) -> RankProcesses:
        """Start ``function(group, rank, *args)`` in as many ranks on each host."""
        if len(ranks_per_host) > len(self._hosts) or min(ranks_per_host, default=0) < 0:
            raise ValueError(f"there are {len(self._hosts)} hosts, and ranks_per_host is {list(ranks_per_host)}")
        homes = tuple(self._hosts[host] for host, count in enumerate(ranks_per_host) for _ in range(count))
        return RankProcesses(len(homes), function, *args, enter=_Enter(homes=homes))

    def cut(self, host: int) -> None:
        """Pull the cable: what is sent from now on is lost, and nobody is told."""
        self._ip_in(self._switch, f"link set p{host} down")

    def mend(self, host: int) -> None:
        """Plug it in again."""
        self._ip_in(self._switch, f"link set p{host} up")

    def carried(self, host: int) -> LinkBytes:
        """Return what a host's interface has carried so far."""
        told = json.loads(_call(["ip", "-n", self._hosts[host], "-s", "-j", "link", "show", "dev", INTERFACE]))
        counters = told[0]["stats64"]
        return LinkBytes(sent=counters["tx"]["bytes"], received=counters["rx"]["bytes"])

    def close(self) -> None:
        """Remove all hosts. Idempotent; a rank that still runs keeps a network that leads nowhere."""
        remover, self._remover = self._remover, None
        if remover is not None:
            assert remover.stdin is not None
            remover.stdin.close()
            remover.wait(_COMMAND_S)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _make(self, link_mbit: float | None) -> None:
        for name in (self._switch, *self._hosts):
            _call(["ip", "netns", "add", name])
        self._ip_in(self._switch, "link add bridge type bridge", "link set bridge up")
        for host, name in enumerate(self._hosts):
            self._ip_in(
                self._switch,
                f"link add p{host} type veth peer name {INTERFACE} netns {name}",
                f"link set p{host} master bridge up",
            )
            address = f"addr add {self.addresses[host]}/24 dev {INTERFACE}"
            self._ip_in(name, address, "link set lo up", f"link set {INTERFACE} up")
            if link_mbit is not None:
                _shape(name, INTERFACE, link_mbit)
                _shape(self._switch, f"p{host}", link_mbit)

    def _ip_in(self, namespace: str, *commands: str) -> None:
        _call(["ip", "-n", namespace, "-batch", "-"], "\n".join(commands))


@dataclass(frozen=True, kw_only=True)
class _Enter:
    """What a rank process does first: move to its host. Connections that it has already stay where they are."""

    homes: tuple[str, ...]

    def __call__(self, rank: int) -> None:
        os.environ["ANYEP_HOST_ID"] = self.homes[rank]
        with open(_NAMESPACES / self.homes[rank]) as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), _NEW_NETWORK):
                number = ctypes.get_errno()
                raise Unavailable(f"rank {rank} cannot enter {self.homes[rank]}: {os.strerror(number)}")


def _shape(namespace: str, interface: str, mbit: float) -> None:
    rate = f"{round(mbit * 1e6)}bit"
    tbf = ["root", "tbf", "rate", rate, "burst", _BURST, "limit", str(_QUEUE_BYTES)]
    _call(["tc", "-n", namespace, "qdisc", "add", "dev", interface, *tbf])


def _call(command: Sequence[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode:
        raise Unavailable(f"hosts cannot be played here: {' '.join(command)} {text!r}: {done.stderr.strip()}")
    return done.stdout


def _start_remover(names: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a shell that removes namespaces when its input ends: when we close it, and when we end in whatever way."""
    script = 'read _; for name; do [ -e "$0/$name" ] && ip netns delete "$name"; done 2>/dev/null; exit 0'
    return subprocess.Popen(
        ["sh", "-c", script, str(_NAMESPACES), *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us
    )


def _reap() -> None:
    """Remove what is left of processes that have ended together with their remover."""
    for path in _NAMESPACES.glob(f"{_PREFIX}-*-*-*-*"):
        _, pid, started, *_ = path.name.split("-")
        if pid.isdecimal() and processes.start_time(int(pid)) != started:
            with suppress(Unavailable):  # another process is removing it
                _call(["ip", "netns", "delete", path.name])
