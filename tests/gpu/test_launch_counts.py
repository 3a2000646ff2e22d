"""How many kernels a call launches: on the host each costs microseconds, and in a graph each follows the one before."""

from __future__ import annotations

import pytest

from tests.gpu.programs import needs_triton, run_program

COUNTED = ["find_entries", "number_entries", "settle", "send"]
CONCURRENT = ["find_entries", "number_entries", "send", "tick", "signal", "wait", "settle", "expand"]
WANTED = {
    "compact": [*COUNTED, "fill_gaps"],
    "expert": [*COUNTED, "fill_gaps"],
    "expert, many entries": ["find_entries", "number_entries", "settle", "place", "send", "fill_gaps"],
    "padded": ["find_entries", "number_entries", "send", "settle", "expand", "transpose_scales"],
    "compact, cached": ["announce", "connect", "send", "fill_gaps"],
    "expert, cached": ["announce", "connect", "send", "fill_gaps"],
    "padded, cached": ["announce", "send", "connect", "expand", "transpose_scales"],
    "padded, no slots": [*COUNTED, "transpose_scales"],
    "padded, no slots, cached": ["announce", "connect", "send", "transpose_scales"],
    "compact, combine": ["announce", "connect", "reduce"],
    "expert, combine": ["announce", "connect", "reduce"],
    "padded, combine": ["announce", "connect", "reduce"],
    "concurrent": [*CONCURRENT, "meet"],
    "concurrent, combine": ["announce", "tick", "signal", "wait", "connect", "reduce", "meet"],
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return run_program("counted", cache=tmp_path_factory.mktemp("cache"), interpreted=True)


@needs_triton
@pytest.mark.parametrize("call", WANTED)
def test_a_call_launches_these_kernels_and_no_more(counted, call):
    assert counted[call] == WANTED[call]


@needs_triton
def test_no_kernel_is_compiled_after_a_buffer_was_made_for_its_sizes(counted):
    assert counted["loaded later"] == []
