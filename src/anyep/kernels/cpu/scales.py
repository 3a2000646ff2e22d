"""How many groups a row has, and how many bytes their scales take."""

from __future__ import annotations

from anyep.kernels.spec import ScaleFormat
from anyep.machine.compiler import inlined
from anyep.numerics.formats import CHANNELS_PER_SCALE

FP32_SCALES = int(ScaleFormat.FP32)
UE8M0 = int(ScaleFormat.UE8M0)


@inlined
def groups_of(hidden: int) -> int:
    return (hidden + CHANNELS_PER_SCALE - 1) // CHANNELS_PER_SCALE


@inlined
def row_bytes_of(scale_format: int, hidden: int) -> int:
    num_groups = groups_of(hidden)
    return (num_groups + 3) // 4 * 4 if scale_format == UE8M0 else 4 * num_groups
