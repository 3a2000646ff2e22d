"""What all tests share."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")  # a loaded machine is no error: tests never judge by the clock

torch.set_num_threads(1)  # ranks are threads here: R teams of torch threads on few cores are 50 times slower than none
