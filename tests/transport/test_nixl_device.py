"""What the attempt to send from a device's memory tells: of host memory by NIXL itself, else by programs that pretend.

What a GPU's memory would do only a machine with one and NIXL shows: ``anyep doctor``.
"""

from __future__ import annotations

import sys

import pytest

from anyep.transport.nixl_device import try_device
from tests.engines import skip_without

LOGGED = (
    "E1130 09:00:08.757902 4557 ucx_utils.cpp:674] nixlUcxContext x6: VRAM memory is detected as host by UCX. UCX is "
    "likely not configured with CUDA/ROCm support.\n"
    "E1130 09:00:08.757956 4557 nixl_agent.cpp:483] registerMem: registration failed\n"
)


def tried(program):
    return try_device("cuda:3", [sys.executable, "-c", f"import sys; {program}"])


def test_a_device_that_works():
    told = tried('print(\'NIXL INFO\'); print(\'{"kinds": ["DRAM_SEG", "VRAM_SEG"], "error": null}\')')
    assert told == (True, "cuda:3 was registered, sent from and received into; UCX names DRAM_SEG, VRAM_SEG")


def test_the_reason_is_the_one_that_nixl_logs_first():
    told = tried(f'sys.stderr.write({LOGGED!r}); print(\'{{"kinds": ["DRAM_SEG"], "error": "NIXL_ERR_BACKEND"}}\')')
    assert not told.possible
    assert told.text.startswith("cuda:3: NIXL_ERR_BACKEND: VRAM memory is detected as host by UCX. UCX is likely not")
    assert told.text.endswith("support.; UCX names DRAM_SEG")


@pytest.mark.parametrize(
    ("program", "text"),
    [
        (f"sys.stderr.write({LOGGED!r}); sys.exit(3)", "ended with code 3: VRAM memory is detected as host"),
        ("sys.stderr.write('Traceback\\nno such thing'); sys.exit(1)", "ended with code 1: no such thing"),
        ("import os; os.kill(os.getpid(), 9)", "ended with code -9: it said nothing"),
        ("print('NIXL INFO'); print('3')", "ended with code 0: it said nothing"),
    ],
)
def test_an_attempt_that_ends_otherwise_is_told(program, text):
    told = tried(program)
    assert not told.possible
    assert f"the attempt on cuda:3 {text}" in told.text


def test_a_program_that_does_not_start_is_told():
    assert "could not be tried on cuda:3: " in try_device("cuda:3", ["/nonexistent"]).text


def test_host_memory_goes_the_same_way():
    """All but the device: what is registered, written and compared."""
    skip_without("nixl")
    told = try_device("cpu")
    assert told.possible, told.text
    assert told.text.startswith("cpu was registered, sent from and received into; UCX names DRAM_SEG")


def test_a_device_that_is_not_there_is_told():
    skip_without("nixl")
    told = try_device("meta")
    assert not told.possible
    assert "meta" in told.text
