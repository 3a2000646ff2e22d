"""From fp32 to a storage type, once, to nearest even; every NaN that arithmetic makes has one bit pattern.

Processors differ in the sign and payload of the NaN they return, and torch differs between its scalar and its
vector loops. Bits can only be compared where they are defined, so results hold the canonical quiet NaN:
0x7fc0 (bf16), 0x7e00 (fp16), 0x7fc00000 (fp32).
"""

from __future__ import annotations

import torch

_CANONICAL_NAN = {
    torch.bfloat16: (torch.int16, 0x7FC0),
    torch.float16: (torch.int16, 0x7E00),
    torch.float32: (torch.int32, 0x7FC00000),
}


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return fp32 ``x`` rounded to bf16, fp16 or fp32: nearest even, overflow to Inf, NaN canonical.

    >>> round_to(torch.tensor([1.00390625]), torch.bfloat16).item()  # half way between 1 and 1.0078125
    1.0
    """
    bits, nan = _CANONICAL_NAN[dtype]
    rounded = x.to(dtype).view(bits)
    return torch.where(torch.isnan(x), torch.full_like(rounded, nan), rounded).view(dtype)
