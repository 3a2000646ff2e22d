"""The set itself: one object a device. Importing this module needs Triton, so import it through the registry."""

from __future__ import annotations

from anyep.kernels.gpu.number_launches import NumberLaunches


class GpuKernels(NumberLaunches):
    """A :class:`~anyep.kernels.spec.KernelSet` on device memory; addresses are device addresses, tables lie there too.

    Calls launch and return; ``route`` alone waits, as it returns what the device found (``begin_route`` does not).
    They launch on the stream that is torch's current one for the device, in the order of the calls.
    """

    name = "gpu"
