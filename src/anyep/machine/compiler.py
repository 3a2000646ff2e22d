"""Compiles Numba functions once per machine, under one lock, into a cache keyed by their sources.

Numba's own cache looks at one file's date: after an edit in another module it serves stale machine
code. Here the cache directory's name is a digest of every source that compiled code can come from.
Eight ranks that compile at once take 20 to 40 s; one compiles and seven load takes 8 to 10 s.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numba
from filelock import FileLock
from numba.core import caching

from anyep import config
from anyep.version import __version__

_F = TypeVar("_F", bound=Callable[..., Any])
_COMPILED_PACKAGES = ("machine", "kernels", "transport")


@lru_cache(maxsize=1)
def cache_directory() -> Path:
    """Return the writable directory of compiled code for exactly these sources.

    ``ANYEP_CACHE_DIR``, else ``$XDG_CACHE_HOME/anyep``, else ``~/.cache/anyep``, else a directory of this
    user in the system's temporary folder, whichever can be written first.
    """
    candidates = config.cache_directories()
    for base in candidates:
        directory = base / _sources_digest()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                return directory
        except OSError:
            continue
    raise OSError(
        "compiled kernels need a writable directory and none of these is: "
        f"{', '.join(map(str, candidates))}; set ANYEP_CACHE_DIR to one that is"
    )


@lru_cache(maxsize=1)
def _sources_digest() -> str:
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(f"{__version__} {numba.__version__} {sys.version}".encode())
    for name in _COMPILED_PACKAGES:
        for source in sorted((package / name).rglob("*.py")):
            digest.update(str(source.relative_to(package)).encode())
            digest.update(source.read_bytes())
    return f"{__version__}-py{sys.version_info[0]}{sys.version_info[1]}-{digest.hexdigest()[:12]}"


class _DirectoryLocator:
    """Numba's cache locator for one fixed directory (the interface of numba.core.caching)."""

    def __init__(self, py_func: Callable[..., object], py_file: str) -> None:
        self._name = Path(py_file).stem
        self._line = py_func.__code__.co_firstlineno

    def ensure_cache_path(self) -> None:
        Path(self.get_cache_path()).mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(cache_directory())

    def get_source_stamp(self) -> str:
        return _sources_digest()

    def get_disambiguator(self) -> str:
        return f"{self._name}-{self._line}"

    @classmethod
    def from_function(cls, py_func: Callable[..., object], py_file: str) -> _DirectoryLocator:
        return cls(py_func, py_file)


class _CacheImpl(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes: ClassVar = [_DirectoryLocator]


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _CacheImpl


@contextmanager
def compiling() -> Iterator[None]:
    """Hold the machine-wide lock while functions compile or load from the cache."""
    with FileLock(os.fspath(cache_directory() / "lock")):
        yield


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function: compile it now for ``signature``, without the GIL, or load it from the cache.

    Callers import the decorated module inside :func:`compiling`. NumPy's error model: a division by zero gives
    Inf or NaN, never a Python exception. No fast-math: results are the same bits everywhere.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
        dispatcher._cache = _Cache(dispatcher.py_func)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher  # type: ignore[no-any-return]

    return decorate


def inlined(function: _F) -> _F:
    """Decorate a function that compiled functions call: it is compiled with them, and LLVM inlines it."""
    made: _F = numba.njit(nogil=True, error_model="numpy")(function)
    return made
