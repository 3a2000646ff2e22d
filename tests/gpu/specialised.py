"""A process that prepares one kernel for numbers of several kinds, on a driver that only says what device it has."""

from __future__ import annotations

import json
from collections import Counter

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from anyep.kernels.gpu.launch import options_of
from anyep.kernels.gpu.rows import copy
from anyep.kernels.gpu.target import SM_90


class _Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main():
    driver.set_active(_Driver())
    for number in (1, 7, 16, 2**40):
        compiled = copy.warmup(number, number, number, number, grid=(1,), PIECE=2048, **options_of(copy, SM_90, 128))
    forms, *_ = copy.device_caches[0]
    print(json.dumps({"forms": len(forms), "types": dict(Counter(compiled.src.signature.values()))}))


if __name__ == "__main__":
    main()
