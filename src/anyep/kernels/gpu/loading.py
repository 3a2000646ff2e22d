"""The GPU set of a device, or the reason why there is none. Needs no Triton until there is a device."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from anyep.errors import Unavailable
from anyep.kernels.gpu.target import target_of
from anyep.kernels.tapes import TapedKernels

_OTHERS = "kernels='cpu' works on every machine"


def load_gpu(
    device: torch.device | None = None, num_sms: int | None = None, sizes: tuple[int, int, int] = (8, 8, 8)
) -> TapedKernels:
    """Return the kernels of ``device`` (torch's current one), compiled, on ``num_sms`` of its multiprocessors (all).

    ``sizes`` (K, R, L): those for which no kernel is to be compiled later, beside all that are smaller than 8.

    Raises Unavailable with what is missing.
    """
    if find_spec("triton") is None:
        raise Unavailable(f"kernels='gpu' need Triton: pip install 'anyep[gpu]'; {_OTHERS}")
    if not torch.cuda.is_available():
        raise Unavailable(
            f"kernels='gpu' need a GPU and a torch that drives it, and torch {torch.__version__} finds none: "
            f"pip install 'anyep[gpu]' on a machine that has one; {_OTHERS}"
        )
    import triton

    if triton.knobs.runtime.interpret:
        raise Unavailable(
            "TRITON_INTERPRET is set, so that Triton would run kernels in Python with other roundings: unset it; "
            "anyep.testing.interpreter is what tests use"
        )
    from anyep.kernels.gpu.kernels import GpuKernels
    from anyep.kernels.gpu.launch import OnStream
    from anyep.kernels.gpu.variants import SMALL_SIZES, Sizes, call_every_variant

    where = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    target = target_of(where)
    launch = OnStream(where, target)
    for each in (SMALL_SIZES, Sizes(*sizes)):
        call_every_variant(GpuKernels(where, target, launch.prepare, num_sms), each)
    launch.tape(())  # what plays recordings is compiled, too, before anybody waits for it
    return GpuKernels(where, target, launch, num_sms)
