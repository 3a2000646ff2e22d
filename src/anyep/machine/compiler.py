"""Compiles Numba functions once per machine into a cache of checked files that is keyed by their sources.

Numba's own cache looks at one file's date: after an edit in another module it serves stale machine code, and it
believes whatever bytes it finds. Here a file's name holds a digest of every source that its code can come from, and
the file a checksum. Eight ranks that compile at once take 20 to 40 s; one that compiles while seven wait takes 8 to 10.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from filelock import FileLock, Timeout
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from anyep import config
from anyep.errors import Unavailable
from anyep.version import __version__

_F = TypeVar("_F", bound=Callable[..., Any])
_BELOW_ALL = ("layout", "machine", "numerics")
"""Packages whose functions and constants compiled code of every package may hold."""
_CHECKSUM_BYTES = 32
_LOCK_TIMEOUT_S = 300.0
"""Longer than the slowest machine compiles everything."""


@cache
def cache_directory() -> Path:
    """Return the writable directory of compiled code.

    ``ANYEP_CACHE_DIR``, else ``$XDG_CACHE_HOME/anyep``, else ``~/.cache/anyep``, else a directory of this
    user in the system's temporary folder, whichever can be written first. Code that is loaded is run, so a directory
    in which somebody else could put some is refused. Raises Unavailable with every candidate's reason.
    """
    refused = []
    for base in config.cache_directories():
        directory = base / f"{__version__}-python{sys.version_info[0]}.{sys.version_info[1]}-numba{numba.__version__}"
        try:
            for path in (base, directory):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_owner(path)
            with tempfile.TemporaryFile(dir=directory):
                return directory
        except OSError as error:
            refused.append(f"{base} ({error.strerror})")
    raise Unavailable(
        f"compiled code needs a directory that only this user can write, and this cannot be: {', '.join(refused)}; "
        "set ANYEP_CACHE_DIR to one that can"
    )


def _check_owner(directory: Path) -> None:
    """Raise PermissionError where another user could put files or directories of his own in our way."""
    if not hasattr(os, "getuid"):
        return
    found = directory.lstat()
    if found.st_uid not in (os.getuid(), 0):
        raise PermissionError(0, f"it belongs to user {found.st_uid}, and this is user {os.getuid()}")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(0, f"everybody may write there, mode {stat.S_IMODE(found.st_mode):o}")


@cache
def _sources_digest(package: str) -> str:
    """Return a digest of the sources from which code of ``anyep.<package>`` is made."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256(sys.version.encode())
    for name in sorted({*_BELOW_ALL, package}):
        for source in sorted((root / name).rglob("*.py")):
            digest.update(str(source.relative_to(root)).encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()


class _Store:
    """Numba's cache of one function with one signature: a file for each kind of processor and state of the sources."""

    def __init__(self, function: Callable[..., Any], signature: str, codegen: Any) -> None:
        module, name = function.__module__, function.__qualname__
        package = module.split(".")[1] if module.count(".") else module
        parts = (module, name, signature, _sources_digest(package), codegen.magic_tuple())
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        self._path = cache_directory() / f"{module}.{name}-{digest}.code"

    def exists(self) -> bool:
        return self._path.exists()

    def load_overload(self, signature: object, target_context: Any) -> CompileResult | None:
        """Return the compiled function, or None: not there, or damaged."""
        target_context.refresh()
        try:
            content = self._path.read_bytes()
        except OSError:
            return None
        checksum, payload = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        if hashlib.sha256(payload).digest() != checksum:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, signature: object, compiled_function: CompileResult) -> None:
        """Write the file in one step, so that a reader sees all of it or none."""
        payload = dumps(compiled_function._reduce())
        unfinished = self._path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        try:
            unfinished.write_bytes(hashlib.sha256(payload).digest() + payload)
            os.replace(unfinished, self._path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise Unavailable(
                f"compiled code cannot be kept in {self._path.parent}: {error.strerror}; make room there, or set "
                "ANYEP_CACHE_DIR to another directory"
            ) from error


@contextmanager
def compiling() -> Iterator[None]:
    """Surround the import of modules with compiled functions: Unavailable says where nothing can compile."""
    if numba.config.DISABLE_JIT:
        raise Unavailable("NUMBA_DISABLE_JIT is set, and AnyEP's loops over memory only run compiled; unset it")
    cache_directory()
    yield


def cached_functions() -> list[str]:
    """Return the names of the compiled functions that this machine keeps for any state of the sources."""
    return sorted({path.name.rpartition("-")[0] for path in cache_directory().glob("*.code")})


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function: load it from the cache, or compile it now for ``signature``. It runs without the GIL.

    A call with other types is a TypeError, never a compilation. NumPy's error model: a division by zero gives Inf or
    NaN, no Python exception. No fast-math: results are the same bits everywhere. Modules with such functions are
    imported inside :func:`compiling`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        dispatcher: Any = _jit(function)
        store = _Store(function, signature, dispatcher.targetctx.codegen())
        dispatcher._cache = store
        if store.exists():
            dispatcher.compile(signature)
        else:
            with _one_compiles():
                dispatcher.compile(signature)
        dispatcher.disable_compile()
        made: Callable[..., Any] = dispatcher
        return made

    return decorate


def inlined(function: _F) -> _F:
    """Decorate a function that compiled functions call: it is compiled with them, and LLVM inlines it."""
    made: _F = _jit(function)
    return made


_jit: Any = numba.njit(nogil=True, error_model="numpy")


@contextmanager
def _one_compiles() -> Iterator[None]:
    """Let one process of this machine compile and the others wait; they find its file afterwards."""
    path = cache_directory() / "lock"
    try:
        with FileLock(path, timeout=_LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise Unavailable(
            f"another process has held {path} for {_LOCK_TIMEOUT_S:.0f} s without finishing its compilation; end it, "
            "or set ANYEP_CACHE_DIR to another directory"
        ) from error
