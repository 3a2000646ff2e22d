"""What all tests share."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

torch.set_num_threads(1)  # ranks are threads here: R teams of torch threads on few cores are 50 times slower than none


@pytest.fixture
def stack():
    """A class of context stacks: each rank opens its own."""
    return ExitStack
