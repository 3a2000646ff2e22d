"""Imported by the fork server of ``testing/processes.py`` and by nobody else: loads now what every rank needs.

A rank that cannot load something finds that out itself and can report it; here it is passed over.
"""

from __future__ import annotations

from contextlib import suppress

import torch  # noqa: F401  (loaded for the forks)

import anyep  # noqa: F401  (loaded for the forks)

with suppress(Exception):
    from anyep.kernels.registry import load
    from anyep.transport import shm  # noqa: F401  (loaded for the forks)
    from anyep.transport.together import load_signals

    load_signals()
    load("cpu")
