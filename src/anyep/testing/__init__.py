"""The exams that every kernel set and transport must pass, the oracle, rank processes: for our tests and anybody's."""

from anyep.testing.kernel_exam import KernelExamError, check_kernels

__all__ = ["KernelExamError", "check_kernels"]
