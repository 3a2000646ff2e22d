"""gloo's ``all_to_all_single`` with one copy a destination rank: what a careful engineer writes for it.

Pack with ``index_select``, exchange counts, ``all_to_all_single`` of routing and of BF16 rows; on the way back
``all_to_all_single`` into the place where the rows were packed, and a sum in fp32, in ascending order of the
destination rank. (``mpich.py`` is the same exchange in MPI's words.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from anyep.testing.peers.base import Batch, exclusive_sum, sum_rows


class GlooRanks:
    """Packed and received rows in two buffers, moved as 4-byte words: gloo moves no 16-bit integers."""

    name = "gloo-ranks"
    layout = "compact"
    weighs = False

    def __init__(self, group: dist.ProcessGroup, batch: Batch, *, max_sent: int, max_received: int) -> None:
        """``max_sent``, ``max_received``: the most rows this rank sends and receives."""
        hidden, self._num_topk = batch.x.shape[1], batch.topk_idx.shape[1]
        if hidden % 2:
            raise ValueError(f"the gloo comparison needs an even hidden size, got {hidden}")
        self._group = group
        self._size = dist.get_world_size(group)
        self._batch = batch
        self._packed = torch.zeros(max_sent, hidden, dtype=torch.bfloat16)
        self._received = torch.zeros(max_received, hidden, dtype=torch.bfloat16)
        self._packed_routing = torch.zeros(max_sent, 2 * self._num_topk, dtype=torch.int32)
        self._received_routing = torch.zeros(max_received, 2 * self._num_topk, dtype=torch.int32)
        self._goes_TR = torch.zeros(0, dtype=torch.bool)
        self._sent: list[int] = []
        self._arrived: list[int] = []

    def dispatch(self) -> torch.Tensor:
        owner_TK = self._batch.topk_idx // self._num_local
        goes = torch.zeros(len(owner_TK), self._size, dtype=torch.bool)
        self._goes_TR = goes.scatter_(1, owner_TK, True)
        sent_R = self._goes_TR.sum(dim=0)
        arrived_R = torch.empty_like(sent_R)
        dist.all_to_all_single(arrived_R, sent_R, group=self._group)
        self._sent, self._arrived = sent_R.tolist(), arrived_R.tolist()
        self._pack(owner_TK)
        num_sent, num_arrived = sum(self._sent), sum(self._arrived)
        routing, rows = self._received_routing[:num_arrived], self._received[:num_arrived]
        self._move(routing, self._packed_routing[:num_sent], self._arrived, self._sent)
        self._move(rows, self._packed[:num_sent], self._arrived, self._sent)
        return rows

    def received_routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        routing = self._received_routing[: sum(self._arrived)]
        return routing[:, : self._num_topk], routing[:, self._num_topk :].view(torch.float32)

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        returned = self._packed[: sum(self._sent)]
        self._move(returned, y, self._sent, self._arrived)
        goes_RT = self._goes_TR.T
        position_TR = goes_RT.flatten().cumsum(0).view(goes_RT.shape).T - 1
        row_of_entry = position_TR[self._goes_TR]
        sum_rows(returned, row_of_entry, exclusive_sum(self._goes_TR.sum(dim=1)), None, self._batch.out)
        return self._batch.out

    def close(self) -> None:
        del self._packed, self._received

    @property
    def _num_local(self) -> int:
        return self._batch.num_experts // self._size

    def _pack(self, owner_TK: torch.Tensor) -> None:
        """Pack rows by destination rank, then token; beside each its local experts and weights, else -1 and 0."""
        rank, token = self._goes_TR.T.nonzero(as_tuple=True)
        num_sent = len(token)
        torch.index_select(self._batch.x, 0, token, out=self._packed[:num_sent])
        serves = owner_TK[token] == rank[:, None]
        local = self._batch.topk_idx[token] % self._num_local
        routing = self._packed_routing[:num_sent]
        routing[:, : self._num_topk] = torch.where(serves, local, -1)
        weights = torch.where(serves, self._batch.topk_weights[token], 0.0)
        routing[:, self._num_topk :] = weights.view(torch.int32)

    def _move(self, out: torch.Tensor, rows: torch.Tensor, received: list[int], sent: list[int]) -> None:
        dist.all_to_all_single(out.view(torch.int32), rows.view(torch.int32), received, sent, group=self._group)
