"""What asking for the GPU's kernels gets: what is missing, or what the device can do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from anyep.errors import Unavailable
from anyep.exchange.device.devices import find_device
from anyep.kernels.gpu.target import Fp8, target_of
from anyep.kernels.registry import load
from tests.gpu.programs import needs_triton, run_program


@pytest.fixture(params=[("device='cuda' needs", "device='cpu' works"), ("kernels='gpu' need", "kernels='cpu' work")])
def asked(request):
    """What asks for the kernels, and what is said of it: what it lacks begins with the one and ends with the other."""
    how = find_device if "device" in request.param[0] else load
    return lambda: how("cuda" if how is find_device else "gpu"), request.param


def test_without_triton_the_extra_is_named(monkeypatch, asked):
    ask, (first, last) = asked
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("anyep.kernels.gpu.loading.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=rf"^{first} Triton: pip install 'anyep\[gpu\]'; {last} on every machine$"):
        ask()


@pytest.mark.parametrize(
    ("cuda", "hip", "why"),
    [
        (None, None, "was built for no GPU: install a build of torch for this machine's GPU"),
        (
            "12.8",
            None,
            r"\(for CUDA 12.8\) finds no GPU: see that nvidia-smi shows one, that CUDA_VISIBLE_DEVICES does",
        ),
        (None, "6.4", r"\(for ROCm 6.4\) finds no GPU: see that rocm-smi shows one, that HIP_VISIBLE_DEVICES does not"),
    ],
)
def test_without_a_gpu_it_is_said_why_and_what_works(monkeypatch, asked, cuda, hip, why):
    ask, (first, last) = asked
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.version.hip", hip)
    with pytest.raises(Unavailable, match=f"^{first} a GPU, and torch {torch.__version__.replace('+', '.')} .*{why}"):
        ask()
    with pytest.raises(Unavailable, match=f"; {last} on every machine$"):
        ask()


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
