"""The exams of kernel sets, transports and engines, the oracle, rank processes: for our tests and anybody's."""

from anyep.testing.engine_exam import EngineExamError, check_engine
from anyep.testing.kernel_exam import KernelExamError, check_kernels
from anyep.testing.kernel_exam_device import check_device_kernels
from anyep.testing.kernel_memory import DeviceMemory
from anyep.testing.transport_exam import check_transport
from anyep.testing.transport_steps import TransportExamError

__all__ = [
    "DeviceMemory",
    "EngineExamError",
    "KernelExamError",
    "TransportExamError",
    "check_device_kernels",
    "check_engine",
    "check_kernels",
    "check_transport",
]
