"""Which of this machine's network interfaces an engine talks through."""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass

from anyep.errors import Unavailable

LOOPBACK = "lo"
_GET_ADDRESS, _GET_FLAGS = 0x8915, 0x8913  # SIOCGIFADDR, SIOCGIFFLAGS of Linux
_IS_UP = 1
_FAR_AWAY = ("192.0.2.1", 9)
"""An address that is nobody's (RFC 5737): asking for the way there sends nothing."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """``reason``: why this one."""

    name: str
    address: str
    reason: str


def addresses() -> dict[str, str]:
    """Return the IPv4 address of every interface that is up and has one, by name."""
    if not sys.platform.startswith("linux"):
        return {}
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                flags = struct.unpack("H", fcntl.ioctl(asking, _GET_FLAGS, request)[16:18])[0]
                answer = fcntl.ioctl(asking, _GET_ADDRESS, request)
            except OSError:  # it has no address
                continue
            if flags & _IS_UP:
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def choose_interface(asked: str | None = None) -> Interface:
    """Return the interface ``asked`` for, else that of GLOO_SOCKET_IFNAME, else that of the way out, else any.

    Raises Unavailable, with those that exist, where there is none of this name.
    """
    known = addresses()
    variable = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0].strip()
    if asked:
        return _named(asked, known, "asked for")
    if variable:
        return _named(variable, known, "named by GLOO_SOCKET_IFNAME")
    way_out = _way_out()
    for name, address in known.items():
        if address == way_out:
            return Interface(name=name, address=address, reason="it has the default route")
    others = [name for name in known if name != LOOPBACK]
    if others:
        return Interface(name=others[0], address=known[others[0]], reason="there is no default route; the first one")
    return _named(LOOPBACK, known, "there is no other")


def _named(name: str, known: dict[str, str], reason: str) -> Interface:
    if name not in known:
        listed = ", ".join(f"{other} ({address})" for other, address in known.items()) or "none"
        raise Unavailable(
            f"network interface {name!r} ({reason}) does not exist here, is down, or has no IPv4 address; "
            f"those that can be used: {listed}"
        )
    return Interface(name=name, address=known[name], reason=reason)


def _way_out() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_FAR_AWAY)
        except OSError:
            return None
        return str(probe.getsockname()[0])
