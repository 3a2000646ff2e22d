"""What a program has set in torch is its own affair."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import torch
torch.set_default_device("meta")
torch.set_default_dtype(torch.float64)
from anyep.kernels.registry import load
assert load("cpu").name == "cpu"
"""


def test_kernels_load_whatever_the_default_device_is():
    subprocess.run([sys.executable, "-c", PROGRAM], env=dict(os.environ), check=True, timeout=250)
