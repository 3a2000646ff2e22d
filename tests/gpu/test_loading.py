"""What asking for the GPU's kernels gets: what is missing, or what the device can do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from anyep.errors import Unavailable
from anyep.kernels.gpu.target import Fp8, target_of
from anyep.kernels.registry import load
from tests.gpu.programs import needs_triton, run_program


def test_without_triton_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("anyep.kernels.gpu.loading.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"need Triton: pip install 'anyep\[gpu\]'; kernels='cpu' works"):
        load("gpu")


def test_without_a_gpu_that_is_said(monkeypatch):
    monkeypatch.setattr("anyep.kernels.gpu.loading.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Unavailable, match=r"need a GPU and a torch that drives it.*finds none.*anyep\[gpu\]"):
        load("gpu")


@needs_triton
def test_a_process_that_interprets_does_not_load_them_for_use(tmp_path):
    told = run_program("refused", cache=tmp_path, interpreted=True)
    assert told.startswith("TRITON_INTERPRET is set")


@needs_triton
def test_a_kernel_is_compiled_once_whatever_its_numbers_are(tmp_path):
    found = run_program("specialised", cache=tmp_path)
    assert found == {"forms": 1, "types": {"i64": 4, "constexpr": 1}}


@pytest.mark.parametrize(
    ("capability", "fp8"), [((8, 0), Fp8.NONE), ((8, 9), Fp8.NATIVE), ((9, 0), Fp8.NATIVE), ((10, 0), Fp8.NATIVE)]
)
def test_nvidia_devices_by_capability(monkeypatch, capability, fp8):
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("torch.version.hip", None)
    target = target_of(torch.device("cuda", 0))
    assert (target.name, target.warp_size, target.fp8) == (f"sm_{capability[0]}{capability[1]}", 32, fp8)
    assert target.programs == 4 * 132


@pytest.mark.parametrize(("name", "fp8"), [("gfx942:sramecc+:xnack-", Fp8.ARITHMETIC), ("gfx90a", Fp8.NONE)])
def test_amd_devices_by_name(monkeypatch, name, fp8):
    properties = SimpleNamespace(gcnArchName=name, multi_processor_count=304)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("torch.version.hip", "6.4")
    target = target_of(torch.device("cuda", 0))
    assert (target.name, target.warp_size, target.fp8) == (name.partition(":")[0], 64, fp8)
