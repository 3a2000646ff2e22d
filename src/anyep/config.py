"""Environment variables: read here, validated here, never written.

Arguments come before the environment: a variable only fills in what a call leaves open.

========================  ==================================================================
``ANYEP_CACHE_DIR``       directory for compiled kernels
``ANYEP_HOST_ID``         this host's identity; ranks with the same one share memory
``ANYEP_RANKS_PER_HOST``  act as if a host had so many ranks (one machine plays a cluster)
``EP_NUM_TOPK_IDX_BITS``  DeepEP's own: 8, 16, 32 or 64 bits an expert index (``TOPK_IDX_BITS``)
========================  ==================================================================
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_directories() -> list[Path]:
    """Return the directories in which compiled kernels may be kept, best first."""
    explicit = os.environ.get("ANYEP_CACHE_DIR")
    if explicit:
        return [Path(explicit)]
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    candidates = []
    if os.environ.get("XDG_CACHE_HOME"):
        candidates.append(Path(os.environ["XDG_CACHE_HOME"]) / "anyep")
    home = Path(os.path.expanduser("~"))
    if home.is_absolute():
        candidates.append(home / ".cache" / "anyep")
    candidates.append(Path(tempfile.gettempdir()) / f"anyep-{user}")
    return candidates


def host_id() -> str | None:
    """Return the host identity given by the user, if any."""
    return os.environ.get("ANYEP_HOST_ID") or None


def ranks_per_host() -> int | None:
    """Return how many consecutive ranks shall count as one host, if the user said so. ValueError for no such number."""
    given = os.environ.get("ANYEP_RANKS_PER_HOST")
    if not given:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"ANYEP_RANKS_PER_HOST must be a whole number from 1 on, got {given!r}")
    return int(given)


def topk_idx_bits() -> int:
    """Return how wide expert indices of the DeepEP interface are; ValueError for widths that there are not."""
    given = os.environ.get("EP_NUM_TOPK_IDX_BITS") or os.environ.get("TOPK_IDX_BITS") or "64"
    if given not in ("8", "16", "32", "64"):
        raise ValueError(f"EP_NUM_TOPK_IDX_BITS must be 8, 16, 32 or 64, got {given!r}")
    return int(given)


def nvshmem_qp_depth() -> int:
    """Return the queue depth that a DeepEP program asked its network library for; nothing here has such queues."""
    given = os.environ.get("NVSHMEM_QP_DEPTH") or "1024"
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"NVSHMEM_QP_DEPTH must be a whole number from 1 on, got {given!r}")
    return int(given)
