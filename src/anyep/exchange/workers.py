"""Loops over tokens, split between the threads of one rank."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from anyep.kernels.spec import KernelSet

_COPY_UNIT_BYTES = 1 << 16
_GRAIN_BYTES = 1 << 16
"""Handing work to a thread takes as long as moving this much."""


class Workers:
    """Splits a loop over tokens between threads; each token's result is the same whatever the split."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="anyep-rows") if num_threads > 1 else None

    def over(self, num_tokens: int, token_bytes: int, loop: Callable[[int, int], None]) -> None:
        """Call ``loop(first, last)`` over ranges that cover [0, num_tokens), none much smaller than a grain."""
        num_parts = min(self.num_threads, num_tokens, num_tokens * token_bytes // _GRAIN_BYTES)
        if self._pool is None or num_parts < 2:
            loop(0, num_tokens)
            return
        edges = [num_tokens * i // num_parts for i in range(num_parts + 1)]
        for future in [self._pool.submit(loop, a, b) for a, b in pairwise(edges)]:
            future.result()

    def copy(self, kernels: KernelSet, source_addr: int, destination_addr: int, num_bytes: int) -> None:
        """Copy bytes into the arena, in parallel where there are threads for it."""
        num_pages = -(-num_bytes // _COPY_UNIT_BYTES)

        def pages(first: int, last: int) -> None:
            begin, end = first * _COPY_UNIT_BYTES, min(last * _COPY_UNIT_BYTES, num_bytes)
            kernels.copy(source_addr + begin, destination_addr + begin, end - begin)
            kernels.fence()

        self.over(num_pages, _COPY_UNIT_BYTES, pages)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
