"""How kernels come onto a device: Triton's own compiler, loader and launcher, above a driver that only notes."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from anyep.errors import Unavailable
from anyep.kernels.gpu.target import SM_90
from tests.gpu.programs import needs_triton, run_program

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler: cc")
PROGRAMS = 4 * 132
"""Programs that fill a device of 132 multiprocessors."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """What stands for the driver: a folder that Triton and the loader are told of."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("driver_stub.c")
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    (folder / "libcuda.so").symlink_to(library)
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


@needs_triton
@needs_compiler
@pytest.mark.parametrize("how", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_a_launch_hands_the_driver_grid_threads_stream_and_numbers(driver, how, tmp_path):
    told = {"ANYEP_TEST_LAUNCHES": str(tmp_path / "launches")}
    found = run_program("launched", how, cache=tmp_path, also=driver | told, timeout=900)
    copy, again, pack, fill = found["launched"]
    assert copy == f"copy 3 1 1 128 77 {1 << 40} {3 << 40} 5000 3"
    assert again == copy
    assert pack == f"pack 8 32 {PROGRAMS // 256} 128 77 4096 32 1 2"
    assert fill == f"fill_rows 3 {PROGRAMS // 3} 1 128 77 {2**62} 7168 -5 6"
    for stream, played in ((5, found["played"][:2]), (77, found["played"][2:])):
        assert played == [
            f"copy 3 1 1 128 {stream} {5 << 40} {(1 << 40) + 64} 5000 3",
            f"fill_rows 3 {PROGRAMS // 3} 1 128 {stream} {1 << 40} 7168 -5 6",
        ]
    assert [error.partition(". ")[0] for error in found["errors"]] == ["CUDA driver: an error (700)"]
    assert found["differ"] == []


@pytest.mark.parametrize(
    ("captures", "words"),
    [
        (False, "could not bring kernel copy onto sm_90: RuntimeError: Failed to find C"),
        (
            True,
            "a graph is being captured, and kernel copy is not on the device yet: make this call once outside of it",
        ),
    ],
)
@needs_triton
def test_what_triton_cannot_bring_onto_a_device_is_unavailable_with_its_reason(monkeypatch, captures, words):
    from anyep.kernels.gpu.launch import OnStream

    def warmup(*numbers, **options):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("torch.cuda.device", nullcontext)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: captures)
    kernel = Mock(__name__="copy", warmup=warmup, registers_on=None)
    launch = OnStream(torch.device("cuda", 0), SM_90)
    with pytest.raises(Unavailable, match=words):
        launch.prepare(kernel, (1,), (), {}, 128)
