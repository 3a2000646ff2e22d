"""The cache of compiled code: what it survives, and what it refuses. Each case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from anyep.errors import Unavailable
from anyep.kernels.registry import load
from anyep.kernels.spec import KernelSet
from anyep.machine import compiler

LOAD = """
from anyep.machine import compiler
with compiler.compiling():
    from anyep.kernels.cpu import rows
from numba.core.dispatcher import Dispatcher
functions = [one for one in vars(rows).values() if isinstance(one, Dispatcher) and one.overloads]
ours = [one for one in functions if type(one._cache).__name__ == "_Store"]
print(sum(sum(one._cache_hits.values()) for one in ours), sum(sum(one._cache_misses.values()) for one in ours))
import torch
source, target = torch.arange(4096, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
rows.copy(source.data_ptr(), target.data_ptr(), 4096)
rows.fence()
assert torch.equal(source, target)
"""


def _start(code, cache, **environment):
    unset = ("ANYEP_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
    base = {name: value for name, value in os.environ.items() if name not in unset}
    if cache is not None:
        base["ANYEP_CACHE_DIR"] = str(cache)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**base, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert not err
    hits, misses = (int(word) for word in out.split())
    return hits, misses


def _run(code, cache, **environment):
    return _finish(_start(code, cache, **environment))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache directory after a first process, which compiled everything."""
    cache = tmp_path_factory.mktemp("cache")
    hits, misses = _run(LOAD, cache)
    assert (hits, misses) == (0, 4)
    return cache


def _files(cache):
    return sorted(cache.rglob("*.code"))


def test_a_second_process_compiles_nothing(filled):
    assert _run(LOAD, filled) == (4, 0)


def test_two_processes_at_once_compile_once(tmp_path):
    processes = [_start(LOAD, tmp_path) for _ in range(2)]
    results = [_finish(process) for process in processes]
    assert sum(hits for hits, _ in results) == 4
    assert sum(misses for _, misses in results) == 4
    assert len(_files(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_file_is_compiled_again(filled, damage):
    victim = _files(filled)[0]
    whole = victim.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    victim.write_bytes({"empty": b"", "cut": whole[:middle], "flipped": flipped}[damage])
    assert _run(LOAD, filled) == (3, 1)
    assert _run(LOAD, filled) == (4, 0)


def test_another_processor_does_not_take_this_ones_code(filled):
    assert _run(LOAD, filled, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == (0, 4)
    assert _run(LOAD, filled) == (4, 0)


def test_without_a_home_the_temporary_directory_serves_and_is_private(tmp_path):
    code = (
        "import os\n"
        "def nobody(path): return path\n"
        "os.path.expanduser = nobody\n"
        "from anyep.machine import compiler\n"
        "path = compiler.cache_directory().parent\n"
        f"assert str(path.parent) == {str(tmp_path)!r}, path\n"
        "print(int(path.stat().st_mode & 0o777 == 0o700), 0)\n"
    )
    assert _run(code, None, TMPDIR=str(tmp_path)) == (1, 0)


@pytest.fixture
def candidates(monkeypatch):
    """Let a test name the candidate directories."""
    compiler.cache_directory.cache_clear()
    yield lambda *paths: monkeypatch.setattr("anyep.config.cache_directories", lambda: list(paths))
    compiler.cache_directory.cache_clear()


def test_a_place_that_cannot_be_written_is_named_with_its_reason(tmp_path, candidates):
    (tmp_path / "file").write_text("")
    candidates(tmp_path / "file" / "below", tmp_path / "file")
    with pytest.raises(Unavailable, match=r"below \(Not a directory\), .*file \(File exists\); set ANYEP_CACHE_DIR"):
        compiler.cache_directory()


def test_the_first_place_that_can_be_written_serves(tmp_path, candidates):
    (tmp_path / "file").write_text("")
    candidates(tmp_path / "file", tmp_path / "good")
    assert compiler.cache_directory().parent == tmp_path / "good"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners here")
def test_a_directory_of_somebody_else_is_refused(tmp_path, candidates, monkeypatch):
    candidates(tmp_path)
    me = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: me + 1)
    if me == 0:
        os.chown(tmp_path, 12345, -1)
    with pytest.raises(Unavailable, match=r"it belongs to user \d+, and this is user \d+"):
        compiler.cache_directory()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no modes here")
def test_a_directory_where_everybody_writes_is_refused(tmp_path, candidates):
    tmp_path.chmod(0o777)
    candidates(tmp_path)
    with pytest.raises(Unavailable, match="everybody may write there, mode 777"):
        compiler.cache_directory()
    tmp_path.chmod(0o1777)
    assert compiler.cache_directory().parent == tmp_path


def test_a_full_disk_is_told(filled, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    monkeypatch.setattr(compiler, "cache_directory", lambda: tmp_path)
    with pytest.raises(Unavailable, match=r"cannot be kept in .*: No space left on device; make room there"):
        compiler.compiled("void()")(lambda: None)


def test_without_a_compiler_there_are_no_cpu_kernels(monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    with pytest.raises(Unavailable, match="NUMBA_DISABLE_JIT is set"):
        load("cpu")


def test_a_wrong_call_is_an_error_and_no_compilation():
    kernels = load("cpu")
    with pytest.raises(TypeError):
        kernels.copy("here", "there", 1)
    functions = [getattr(kernels, name) for name in dir(KernelSet) if not name.startswith("_")]
    assert len(functions) == 18
    for function in functions:
        assert len(function.signatures) == 1
        assert function.targetoptions["nogil"]
