"""The kernel set for CUDA and HIP devices, in stock Triton: what a program of the grid does, and how it is launched."""
