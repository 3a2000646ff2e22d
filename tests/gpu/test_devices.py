"""How a device is found, and what it is told of multiprocessors and time. Torch is played: there is no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import anyep
from anyep.errors import Unavailable
from anyep.exchange.device.devices import CudaDevice, find_device
from anyep.testing.pretend_device import PretendDevice, pretended

SIZES = {"hidden": 8, "num_experts": 4, "num_topk": 2, "max_tokens_per_rank": 6}


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the kernels, on a machine with two GPUs of 132 multiprocessors, the second of them current."""
    noted = []

    def load_gpu(where, num_sms, sizes, **_):
        noted.append((str(where), num_sms, sizes))
        return SimpleNamespace(tape=None)

    monkeypatch.setattr("anyep.kernels.gpu.loading.load_gpu", load_gpu)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    return noted


@pytest.mark.parametrize(
    ("name", "num_sms", "at_once", "expected"),
    [
        ("cuda", None, 1, ("cuda:1", None)),
        ("cuda:0", None, 1, ("cuda:0", None)),
        ("cuda", None, 8, ("cuda:1", 16)),
        ("cuda", None, 200, ("cuda:1", 1)),
        ("cuda", 24, 8, ("cuda:1", 24)),
        ("cuda", 24, 1, ("cuda:1", 24)),
    ],
)
def test_ranks_that_move_rows_at_a_time_share_the_multiprocessors(asked, name, num_sms, at_once, expected):
    device = find_device(name, num_sms, at_once, (8, 2, 4))
    assert asked == [(*expected, (8, 2, 4))]
    assert (str(device.where), device.num_sms) == expected


def test_a_device_that_is_not_there_is_named(asked):
    with pytest.raises(Unavailable, match="device 'cuda:2' does not exist: this process sees 2 devices"):
        find_device("cuda:2")


class Event:
    """20 ms from one to the next."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        """At once."""

    def synchronize(self):
        """Nothing to wait for."""

    def elapsed_time(self, end):
        return 20.0


def test_a_wait_looks_as_often_as_fits_into_its_time(monkeypatch):
    waits = []
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.device", lambda where: torch.no_grad())
    kernels = SimpleNamespace(tape=None, wait=lambda *numbers: waits.append(numbers[3]))
    device = CudaDevice(torch.device("cpu"), kernels)
    assert device.looks_in(2.5) == 2_500_000  # 20000 of them took 20 ms
    assert device.looks_in(0) == 1
    assert waits == [1, 20_000]  # once, and once before it to be loaded


@pytest.mark.parametrize(
    ("given", "found", "told"),
    [
        ({}, None, "all, a program a token  (one rank moves rows on a device at a time)"),
        (
            {"concurrent": True},
            66,
            "66 for each kernel that moves rows  (ranks of a device move rows at a time: an equal",
        ),
        ({"num_sms": 9}, 9, "9 for each kernel that moves rows  (num_sms was given)"),
    ],
)
def test_explain_says_on_how_many_multiprocessors_rows_are_moved(given, found, told):
    device = PretendDevice()
    device.num_sms = found

    def rank_main(member):
        with anyep.Buffer(member, **SIZES, device="cuda", **given) as ep:
            return str(ep.explain())

    with pretended(device):
        assert all(told in text for text in anyep.local_group(2).run(rank_main))
