"""The version, alone in a module, so that the compiler's cache key needs nothing else."""

__version__ = "0.1.0"
