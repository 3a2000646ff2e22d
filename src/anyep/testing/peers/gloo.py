"""gloo's ``all_to_all_single``, used as Megatron-core's alltoall token dispatcher does.

One copy a (token, expert) pair: permute by expert, exchange counts, ``all_to_all_single``, sort by local expert; on the
way back unsort, ``all_to_all_single``, and unpermute: weigh and sum over k at the token's origin.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from anyep.testing.peers.base import Batch, exclusive_sum, sum_rows


class GlooMegatron:
    """Two row buffers, each written before the other is read again, so that nothing is mapped inside the timing."""

    name = "gloo"
    layout = "expert"
    weighs = True

    def __init__(self, group: dist.ProcessGroup, batch: Batch, *, max_rows: int) -> None:
        """``max_rows``: the most rows this rank sends or receives."""
        self._group = group
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._batch = batch
        hidden = batch.x.shape[1]
        # gloo moves no 16-bit integers; 4-byte words are its widest integers for any even number of channels
        if hidden % 2:
            raise ValueError(f"the gloo comparison needs an even hidden size, got {hidden}")
        self._first = torch.zeros(max_rows, hidden, dtype=torch.bfloat16)
        self._second = torch.zeros(max_rows, hidden, dtype=torch.bfloat16)
        self._out = batch.out
        self._counts_RRL = torch.zeros(0)
        self._order = torch.zeros(0)

    def dispatch(self) -> torch.Tensor:
        experts = self._batch.topk_idx.flatten()
        self._exchange_counts(torch.bincount(experts, minlength=self._batch.num_experts))
        self._order = experts.argsort(stable=True)
        sent, received = self._rows_sent(), self._rows_received()
        permuted = self._first[: sum(sent)]
        torch.index_select(self._batch.x, 0, self._order // self._batch.topk_idx.shape[1], out=permuted)
        arrived = self._second[: sum(received)]
        self._all_to_all(arrived, permuted, received, sent)
        return _reorder(arrived, self._chunks(), self._first)

    def received_routing(self) -> None:
        """None: a row serves exactly the expert in whose group it lies."""

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        sent, received = self._rows_sent(), self._rows_received()
        unsorted = _reorder(y, self._chunks().T, self._second)
        returned = self._first[: sum(sent)]
        self._all_to_all(returned, unsorted, sent, received)
        self._unpermute(returned)
        return self._out

    def close(self) -> None:
        del self._first, self._second

    def _exchange_counts(self, counts_E: torch.Tensor) -> None:
        gathered = torch.empty(self._size * len(counts_E), dtype=torch.int64)
        dist.all_gather(list(gathered.view(self._size, -1).unbind()), counts_E, group=self._group)
        self._counts_RRL = gathered.view(self._size, self._size, -1)

    def _rows_sent(self) -> list[int]:
        return self._counts_RRL[self._rank].sum(dim=1).tolist()

    def _rows_received(self) -> list[int]:
        return self._chunks().sum(dim=1).tolist()

    def _chunks(self) -> torch.Tensor:
        """Rows from each source for each local expert, in the order in which they arrive."""
        return self._counts_RRL[:, self._rank]

    def _all_to_all(self, out: torch.Tensor, rows: torch.Tensor, received: list[int], sent: list[int]) -> None:
        words = out.view(torch.int32), rows.view(torch.int32)
        dist.all_to_all_single(*words, received, sent, group=self._group)

    def _unpermute(self, returned: torch.Tensor) -> None:
        num_tokens, num_topk = self._batch.topk_idx.shape
        row_of_pair = torch.empty_like(self._order)
        row_of_pair[self._order] = torch.arange(len(self._order))
        # the router's probabilities are of the activations' dtype, as Megatron's are unless told otherwise
        weights = self._batch.topk_weights.flatten().to(returned.dtype)
        begin = torch.arange(num_tokens + 1) * num_topk
        sum_rows(returned, row_of_pair, begin, weights, self._out)


def _reorder(rows: torch.Tensor, chunks_AB: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Copy chunks that lie in the order (a, b) into the order (b, a)."""
    first_AB = exclusive_sum(chunks_AB.flatten())[:-1].view(chunks_AB.shape)
    out = into[: len(rows)]
    starts, sizes = first_AB.T.flatten().tolist(), chunks_AB.T.flatten().tolist()
    pieces = [rows[start : start + size] for start, size in zip(starts, sizes, strict=True) if size]
    if pieces:
        torch.cat(pieces, out=out)
    return out
