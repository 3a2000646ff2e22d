"""What all tests share."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # ranks are threads here: R teams of torch threads on few cores are 50 times slower than none
