"""A process that runs the kernels in Triton's interpreter: ``rounds seed native|arithmetic|bounded function...``.

Prints one JSON object: for each function what went wrong, "" for nothing. The function "examples" is the worked
examples of the spec's docstrings; "all" stands for all of the exam, with every number of 16 bits.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings

import pytest

from anyep.testing.interpreter import interpreted_kernels
from anyep.testing.kernel_exam import FUNCTIONS, check_kernels
from anyep.testing.kernel_exam_device import DEVICE_FUNCTIONS, check_device_kernels


def _examine(kernels, rounds, seed, function):
    if function == "examples":
        arguments = [
            "tests/kernels/test_examples.py",
            "tests/kernels/test_device_examples.py",
            "-k",
            "gpu",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
        ]
        return "" if pytest.main(arguments) == 0 else "the examples fail: see above"
    try:
        if function in DEVICE_FUNCTIONS:
            check_device_kernels(kernels, seed=seed, rounds=rounds, only=[function])
            return ""
        every = function == "all"
        check_kernels(kernels, seed=seed, rounds=rounds, only=FUNCTIONS if every else [function], all_inputs=every)
    except Exception:
        return traceback.format_exc()
    return ""


def main(rounds, seed, fp8, *functions):
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's about Inf and NaN, which the kernels mean
    kernels = interpreted_kernels(native_fp8=fp8 != "arithmetic", num_sms=1 if fp8 == "bounded" else None)
    print(json.dumps({function: _examine(kernels, int(rounds), int(seed), function) for function in functions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
