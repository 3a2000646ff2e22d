"""Every kernel of the GPU set means what the oracle says, bit for bit, in Triton's interpreter."""

from __future__ import annotations

import pytest

from anyep.errors import Unavailable
from anyep.testing.interpreter import interpreted_kernels
from anyep.testing.kernel_exam import FUNCTIONS
from anyep.testing.kernel_exam_device import DEVICE_FUNCTIONS
from tests.gpu.programs import needs_triton, run_program

pytestmark = needs_triton

ALL = (*FUNCTIONS, *DEVICE_FUNCTIONS, "examples")
CONVERSIONS = ("quantise_scatter", "dequantise")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return run_program("interpreted", "8", "0", "native", *ALL, cache=cache, interpreted=True)


@pytest.mark.parametrize("function", ALL)
def test_a_function_writes_the_bits_of_the_oracle(verdicts, function):
    assert verdicts[function] == ""


def test_fp8_by_arithmetic_has_the_same_bits(tmp_path):
    found = run_program("interpreted", "12", "1", "arithmetic", *CONVERSIONS, cache=tmp_path, interpreted=True)
    assert found == dict.fromkeys(CONVERSIONS, "")


def test_few_programs_that_take_turns_have_the_same_bits(tmp_path):
    functions = ("scatter", "scatter_routing", "quantise_scatter", "reduce", "reduce_logfmt")
    found = run_program("interpreted", "3", "4", "bounded", *functions, cache=tmp_path, interpreted=True)
    assert found == dict.fromkeys(functions, "")


@pytest.mark.slow
@pytest.mark.parametrize("fp8", ["native", "arithmetic"])
@pytest.mark.parametrize("seed", ["2", "3"])
def test_all_numbers_and_many_cases(fp8, seed, tmp_path):
    every = ("all", *DEVICE_FUNCTIONS)
    found = run_program("interpreted", "60", seed, fp8, *every, cache=tmp_path, interpreted=True, timeout=1500)
    assert found == dict.fromkeys(every, "")


def test_a_process_that_compiles_does_not_interpret():
    with pytest.raises(Unavailable, match="start one with TRITON_INTERPRET=1"):
        interpreted_kernels()
