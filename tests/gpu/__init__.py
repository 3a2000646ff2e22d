"""The GPU's kernels without a GPU: interpreted for what they mean, compiled for what becomes of them.

Triton decides when it is imported which of the two a process does, so each is a process of its own.
"""
