"""What this machine is and has, read from where Linux tells it; elsewhere what Python knows."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from anyep.machine import room
from anyep.version import __version__

_CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return the cores this process may run on, by affinity and by cgroup quota (rounded up)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return cores if quota is None else max(1, min(cores, -int(-quota // 1)))


def _cpu_quota() -> float | None:
    both = _read(_own_cgroup("cpu") / "cpu.max") or _read(_CGROUPS / "cpu.max")
    if both:
        quota, period = both.split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = (_read(_CGROUPS / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota_us and period_us and int(quota_us) > 0:
        return int(quota_us) / int(period_us)
    return None


def cpu_model() -> str:
    """Return the processor's name."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def total_memory_bytes() -> int | None:
    """Return the machine's memory; None where it is unknown."""
    return _meminfo().get("MemTotal")


def available_memory_bytes() -> int | None:
    """Return what can be allocated now without swapping, in this machine and its cgroups; None where it is unknown."""
    return room.available_bytes()


def free_memory_bytes() -> int | None:
    """Return what the machine itself could give, whatever cgroups allow; None where it is unknown."""
    return _meminfo().get("MemAvailable")


def _own_cgroup(controller: str) -> Path:
    """Return this process's directory for a controller: version 2's one tree, or version 1's tree of that name."""
    unified = _CGROUPS
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return _CGROUPS / controller / path.lstrip("/")
        if not names:
            unified = _CGROUPS / path.lstrip("/")
    return unified


def _meminfo() -> dict[str, int]:
    facts = {}
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        facts[name] = int(value.split()[0]) * 1024
    return facts


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def package_version(name: str) -> str | None:
    """Return an installed distribution's version, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe_machine() -> dict[str, object]:
    """Return the facts that stand beside a measurement."""
    total_bytes = total_memory_bytes()
    packages = {name: package_version(name) for name in ("torch", "numba", "numpy", "mpi4py", "mpich")}
    return {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_gib": None if total_bytes is None else round(total_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": sys.version.split()[0],
        "anyep": __version__,
        **{name: found for name, found in packages.items() if found is not None},
    }
