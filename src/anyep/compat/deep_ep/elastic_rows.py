"""Where the rows of an exchange stand in a caller's batch, and the memory of such batches.

The exchange keeps the order (source rank, token). DeepEP groups rows by the source's *scale-up* rank, which is another
order where several hosts take part; an expanded batch has a row for each (token, local expert). Rows that nobody sent
are defined: index -1, everything else 0.

Legend: N rows of the exchange, K top-k, L local experts, S scale-up ranks, G packs of scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.compat.deep_ep.elastic_sizes import align
from anyep.compat.deep_ep.ep_handle import EPHandle
from anyep.kernels.spec import KernelSet

TMA_WORDS = 4
"""Columns of scales begin at multiples of 16 bytes where a tensor memory accelerator shall read them."""


def places_of(rows_R: NDArray[np.int32], num_scaleup: int) -> torch.Tensor:
    """Return int64 [N]: row n of the exchange is row ``places[n]`` of a batch that is grouped by scale-up rank.

    ``rows_R``: rows from each source rank.
    """
    source_N = np.repeat(np.arange(len(rows_R)), rows_R)
    return _inverse(np.argsort(source_N % num_scaleup, kind="stable"))


def places_from_handle(handle: EPHandle, num_ranks: int) -> torch.Tensor | None:
    """Return the same from a handle's metadata: tokens' numbers at large ascend in the order of the exchange."""
    source: Any = handle.source
    if handle.untouched and source.context.keeps_order:
        return None
    if handle.psum_num_recv_tokens_per_scaleup_rank.shape[0] == num_ranks:
        return None
    metadata = handle.recv_src_metadata[: handle.num_valid_tokens]
    numbers_N = metadata[:, 0].numpy()
    if (numbers_N[1:] >= numbers_N[:-1]).all():
        return None
    return torch.from_numpy(np.argsort(numbers_N, kind="stable"))


def _inverse(order_N: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> torch.Tensor:
    places_N = np.empty_like(order_N)
    places_N[order_N] = np.arange(len(order_N))
    return torch.from_numpy(places_N)


def rows_without_gaps(counts_L: Sequence[int], alignment: int) -> torch.Tensor:
    """Return int64 [sum of counts]: the rows of an expanded batch that are no padding."""
    starts, begin = [], 0
    for count in counts_L:
        starts.append(np.arange(begin, begin + count))
        begin += align(count, alignment)
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *starts]))


def fill_rows(batch: torch.Tensor, rows: torch.Tensor, places: torch.Tensor | None, fill: int = 0) -> None:
    """Copy ``rows`` to their places, or to the batch's beginning; the rest of it becomes ``fill``."""
    num_rows = rows.shape[0]
    if places is None:
        batch[:num_rows] = rows
    else:
        batch[places] = rows
    if num_rows < batch.shape[0]:
        batch[num_rows:] = fill


def empty_scales(
    rows: int, num_packs: int, dtype: torch.dtype, *, tma: bool, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return zeros [rows, G]: row-major, or with strides (1, rows rounded up to 4)."""
    if not tma:
        return torch.zeros((rows, num_packs), dtype=dtype, device=device)
    return torch.zeros((num_packs, align(rows, TMA_WORDS)), dtype=dtype, device=device).t()[:rows]


def scatter_rows(
    kernels: KernelSet,
    rows: torch.Tensor,
    served: torch.Tensor,
    batch: torch.Tensor,
    ends_L: Sequence[int],
    alignment: int,
) -> None:
    """Give each row of ``rows`` [N, H] the places in ``batch`` [rows, H] that ``served`` int32 [N, K] names.

    ``ends_L``: where each expert's rows end; up to the next multiple of ``alignment``, and behind the last, are zeros.
    """
    table = torch.tensor([batch.data_ptr()], dtype=torch.int64, device="cpu")
    ranks = served.clamp(max=0)  # 0 where a row is named, -1 where none is
    row_bytes = rows.shape[1] * rows.itemsize
    addresses = (ranks.data_ptr(), served.data_ptr(), table.data_ptr())
    kernels.scatter(rows.data_ptr(), row_bytes, 0, rows.shape[0], served.shape[1], *addresses)
    kernels.fence()
    for end in ends_L:
        if end % alignment:
            batch[end : align(end, alignment)] = 0
    batch[align(ends_L[-1], alignment) if ends_L else 0 :] = 0
