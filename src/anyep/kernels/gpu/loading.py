"""The GPU set of a device, or the reason why there is none. Needs no Triton until there is a device."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from anyep.errors import Unavailable
from anyep.kernels.gpu.target import target_of
from anyep.kernels.tapes import TapedKernels

_ASKED, _INSTEAD = "kernels='gpu' need", "kernels='cpu' work on every machine"


def load_gpu(
    device: torch.device | None = None,
    num_sms: int | None = None,
    sizes: tuple[int, int, int] = (8, 8, 8),
    *,
    asked: str = _ASKED,
    instead: str = _INSTEAD,
) -> TapedKernels:
    """Return the kernels of ``device`` (torch's current one), compiled, on ``num_sms`` of its multiprocessors (all).

    ``sizes`` (K, R, L): those for which no kernel is to be compiled later, beside all that are smaller than 8.

    Raises Unavailable with what is missing for what was ``asked``, and what works ``instead``.
    """
    if not torch.cuda.is_available():
        raise Unavailable(f"{asked} a GPU, and {why_no_gpu()}; {instead}")
    if find_spec("triton") is None:
        raise Unavailable(f"{asked} Triton: pip install 'anyep[gpu]'; {instead}")
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


def why_no_gpu() -> str:
    """Return why torch finds no GPU, and what can be done about it."""
    runtime = torch.version.cuda or torch.version.hip
    if runtime is None:
        return f"torch {torch.__version__} was built for no GPU: install a build of torch for this machine's GPU"
    tool, hides = (
        ("nvidia-smi", "CUDA_VISIBLE_DEVICES") if torch.version.hip is None else ("rocm-smi", "HIP_VISIBLE_DEVICES")
    )
    built_for = f"{'CUDA' if torch.version.hip is None else 'ROCm'} {runtime}"
    return (
        f"torch {torch.__version__} (for {built_for}) finds no GPU: see "
        f"that {tool} shows one, that {hides} does not hide it, and that the driver is new enough for this torch"
    )
