"""What DeepEP looks for and compiles at import. Nothing here needs it; programs that ask get an answer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from anyep.errors import Unavailable

_CUDA_DIRECTORY = "/usr/local/cuda"


def find_cuda_home() -> str:
    """Return the directory of the CUDA toolkit: ``CUDA_HOME``, ``CUDA_PATH``, where ``nvcc`` is, or the usual place.

    Raises Unavailable, with the places, where there is none.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        given = os.environ.get(variable)
        if given:
            return given
    compiler = shutil.which("nvcc")
    if compiler is not None:
        return str(Path(compiler).resolve().parents[1])
    if Path(_CUDA_DIRECTORY).is_dir():
        return _CUDA_DIRECTORY
    raise Unavailable(
        "there is no CUDA toolkit: CUDA_HOME and CUDA_PATH are not set, nvcc is not on PATH, and "
        f"{_CUDA_DIRECTORY} does not exist; no call of this interface needs one"
    )


def check_nccl_so() -> None:
    """Return: no call uses NCCL, so that no version of it is wrong."""


def init_jit(*arguments: object) -> None:
    """Return: kernels are compiled once a machine, when a buffer first needs them, whatever ``arguments`` say."""
