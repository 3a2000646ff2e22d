"""The kernel set for processors: Numba, compiled once per machine and loaded from then on."""
