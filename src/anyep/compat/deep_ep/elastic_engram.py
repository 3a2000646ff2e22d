"""Engram under DeepEP's names: a table on all ranks, fetched by number (anyep.collectives.rows)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from anyep.collectives.rows import RowStore
from anyep.compat.deep_ep.elastic_refusals import VECTOR_BYTES, RefusedCall, refused_as_upstream, require
from anyep.compat.deep_ep.elastic_sizes import BUFFER_ALIGNMENT, align

_SF_ALIGNMENT = 4
"""Rows to which a column of scale factors is padded: 16 bytes of 4-byte words."""


class EngramCalls:
    """The heir sets these before the first call, and closes what ``_engram`` is."""

    group: Any
    num_ranks: int
    num_bytes: int
    num_cpu_bytes: int
    timeout_s: float

    _engram: RowStore | None = None
    _engram_hidden = 0
    _engram_sf: torch.Tensor | None = None

    def engram_write(self, storage: torch.Tensor, sf: torch.Tensor | None = None) -> None:
        """Store this rank's entries [n, H] (n equal on all ranks); collective, with barriers before and after.

        Entry i of rank r has the number r * n + i. ``storage`` bfloat16, or float8_e4m3fn together with ``sf`` [R * n,
        packs] of 4-byte words, the scale factors of all ranks' entries.
        """
        require(storage.dim() == 2 and storage.is_contiguous(), "storage must be contiguous [entries, hidden]")
        wanted = torch.bfloat16 if sf is None else torch.float8_e4m3fn
        require(storage.dtype == wanted, f"storage must be {wanted} {'without' if sf is None else 'with'} sf")
        require(
            storage.nbytes <= self.num_cpu_bytes,
            f"storage has {storage.nbytes} bytes, and the buffer was made with num_cpu_bytes={self.num_cpu_bytes}",
        )
        if sf is not None:
            require(
                sf.dim() == 2 and sf.size(0) == self.num_ranks * storage.size(0) and sf.element_size() == 4,
                f"sf must be [{self.num_ranks * storage.size(0)}, packs] of 4-byte words, a row for each entry",
            )
        if self._engram is None:
            self._engram = RowStore(self.group, timeout_s=self.timeout_s)
            weakref.finalize(self, self._engram.close)
        self._engram.write(storage.cpu())
        self._engram_hidden = storage.size(1)
        self._engram_sf = None if sf is None else sf.detach().cpu().clone(memory_format=torch.contiguous_format)

    def engram_fetch(
        self, indices: torch.Tensor, num_qps: int = 0, use_tma_aligned_col_major_sf: bool = False
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """Begin to fetch entries by number; the returned call waits, and returns (data [T, e * H], sf or None).

        ``indices`` int32 [T, e]. ``sf`` is [T, e * packs], row-major, or with ``use_tma_aligned_col_major_sf`` with
        strides (1, T rounded up to 4). Results are fresh tensors. ``num_qps`` has no meaning here.
        """
        store, sf = self._engram, self._engram_sf
        if store is None:
            raise RefusedCall("Assertion exception: nothing was stored yet: call engram_write on every rank first")
        require(
            indices.dim() == 2 and indices.dtype == torch.int32 and indices.is_contiguous(),
            f"indices must be contiguous int32 [tokens, entries], got {indices.dtype} {list(indices.shape)}",
        )
        hidden, itemsize = self._engram_hidden, 2 if sf is None else 1
        require(
            indices.numel() * hidden * itemsize <= self.num_bytes,
            f"the fetch takes {indices.numel() * hidden * itemsize} bytes, and the buffer has {self.num_bytes}",
        )
        tokens, entries = indices.shape
        own = indices.cpu().clone()  # upstream reads them in stream order: the caller may change them meanwhile
        pending = store.fetch(own, wait=False)
        results: list[tuple[torch.Tensor, torch.Tensor | None]] = []

        def wait() -> tuple[torch.Tensor, torch.Tensor | None]:
            if not results:
                with refused_as_upstream():
                    data = pending.wait().view(tokens, entries * hidden).to(indices.device)
                scales = None if sf is None else _pick_sf(sf, own, use_tma_aligned_col_major_sf).to(indices.device)
                results.append((data, scales))
            return results[0]

        return wait

    @staticmethod
    def get_engram_storage_size_hint(
        num_entries: int, hidden: int, num_max_tokens_per_rank: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[int, int]:
        """Return (bytes for what is fetched, bytes for what is stored), in whole 2 MiB."""
        row_bytes = align(hidden * dtype.itemsize, VECTOR_BYTES)
        fetched, stored = row_bytes * num_max_tokens_per_rank, row_bytes * num_entries
        return align(fetched, BUFFER_ALIGNMENT), align(stored, BUFFER_ALIGNMENT)


def _pick_sf(sf: torch.Tensor, indices: torch.Tensor, column_major: bool) -> torch.Tensor:
    """Return the scale factors of the entries fetched, [T, e * packs]."""
    tokens, entries = indices.shape
    words = sf.view(torch.int32)[indices.flatten().long()].view(tokens, entries * sf.size(1))
    if column_major:
        columns = torch.empty(words.size(1), align(tokens, _SF_ALIGNMENT), dtype=torch.int32, device="cpu")
        words = columns[:, :tokens].copy_(words.T).T
    return words.view(sf.dtype)
