"""Measures exchanges of CUDA tensors between virtual ranks of one GPU: correctness first, then times, in one run.

python -m benchmarks.gpu [--json FILE] [--rounds N]; needs torch, triton and numba, no network and nothing installed.
"""
