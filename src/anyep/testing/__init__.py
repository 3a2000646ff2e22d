"""The exams that every kernel set and transport must pass, the oracle, rank processes: for our tests and anybody's."""

from anyep.testing.kernel_exam import KernelExamError, check_kernels
from anyep.testing.transport_exam import check_transport
from anyep.testing.transport_steps import TransportExamError

__all__ = ["KernelExamError", "TransportExamError", "check_kernels", "check_transport"]
