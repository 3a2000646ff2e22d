"""What a device can do, as far as kernels differ by it. Needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from anyep.errors import Unavailable

_NATIVE_FP8_FROM = (8, 9)
"""The compute capability from which NVIDIA devices convert to E4M3."""
PROGRAMS_A_UNIT = 4


class Fp8(Enum):
    """How a device converts FP8 E4M3."""

    NONE = "none"
    NATIVE = "native"
    ARITHMETIC = "arithmetic"
    """On bits: CDNA 3 converts to E4M3 with another bias and one zero."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """An architecture, and how many programs fill the device."""

    name: str
    warp_size: int
    fp8: Fp8
    programs: int

    def check_fp8(self) -> None:
        """Raise Unavailable where there is no FP8."""
        if self.fp8 is Fp8.NONE:
            raise Unavailable(
                f"the GPU kernels convert to FP8 on NVIDIA sm_89 and later and on AMD gfx942, and this is {self.name}; "
                "use wire='bf16'"
            )


SM_80 = Target(name="sm_80", warp_size=32, fp8=Fp8.NONE, programs=432)
SM_90 = Target(name="sm_90", warp_size=32, fp8=Fp8.NATIVE, programs=528)
SM_100 = Target(name="sm_100", warp_size=32, fp8=Fp8.NATIVE, programs=592)
GFX942 = Target(name="gfx942", warp_size=64, fp8=Fp8.ARITHMETIC, programs=1216)


def target_of(device: torch.device) -> Target:
    """Return what a CUDA or HIP device can do."""
    properties = torch.cuda.get_device_properties(device)
    programs = PROGRAMS_A_UNIT * properties.multi_processor_count
    if torch.version.hip is not None:
        name = properties.gcnArchName.partition(":")[0]
        fp8 = Fp8.ARITHMETIC if name == GFX942.name else Fp8.NONE
        return Target(name=name, warp_size=64, fp8=fp8, programs=programs)
    capability = (properties.major, properties.minor)
    fp8 = Fp8.NATIVE if capability >= _NATIVE_FP8_FROM else Fp8.NONE
    return Target(name=f"sm_{capability[0]}{capability[1]}", warp_size=32, fp8=fp8, programs=programs)
