"""MPI's ``Alltoallv`` with one copy a destination rank: what a careful engineer writes for it.

Pack with ``index_select``, exchange counts, ``Alltoallv`` of routing and of BF16 rows; on the way back ``Alltoallv``
into the place where the rows were packed, and a sum in fp32, in ascending order of the destination rank.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anyep.testing.peers.base import Batch, exclusive_sum, sum_rows

if TYPE_CHECKING:
    from mpi4py import MPI


def mpi_world() -> MPI.Comm:
    """Join the ranks that mpiexec has started, and leave no name of theirs in /dev/shm.

    MPICH removes its segment's name in MPI_Finalize, which a killed rank never reaches; here all ranks have mapped it.
    """
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    world.Barrier()
    if world.Get_rank() == 0:
        for name in set(re.findall(r"/dev/shm/mpich_shm_\w+", Path("/proc/self/maps").read_text())):
            Path(name).unlink(missing_ok=True)
    return world


class MpichAlltoallv:
    """Packed and received rows in two buffers; datatypes of whole rows, so that counts are counts of rows."""

    name = "mpich"
    layout = "compact"
    weighs = False

    def __init__(self, comm: MPI.Comm, batch: Batch, *, max_sent: int, max_received: int) -> None:
        """``max_sent``, ``max_received``: the most rows this rank sends and receives."""
        from mpi4py import MPI

        self._comm = comm
        self._batch = batch
        hidden, self._num_topk = batch.x.shape[1], batch.topk_idx.shape[1]
        self._packed = torch.zeros(max_sent, hidden, dtype=torch.bfloat16)
        self._received = torch.zeros(max_received, hidden, dtype=torch.bfloat16)
        self._packed_routing = torch.zeros(max_sent, 2 * self._num_topk, dtype=torch.int32)
        self._received_routing = torch.zeros(max_received, 2 * self._num_topk, dtype=torch.int32)
        self._out = batch.out
        self._row = MPI.BYTE.Create_contiguous(2 * hidden).Commit()
        self._routing_row = MPI.BYTE.Create_contiguous(8 * self._num_topk).Commit()
        self._goes_TR = torch.zeros(0, dtype=torch.bool)
        self._sent: tuple[list[int], list[int]] = ([], [])
        self._arrived: tuple[list[int], list[int]] = ([], [])

    def dispatch(self) -> torch.Tensor:
        size = self._comm.Get_size()
        owner_TK = self._batch.topk_idx // (self._batch.num_experts // size)
        goes = torch.zeros(len(owner_TK), size, dtype=torch.bool)
        self._goes_TR = goes.scatter_(1, owner_TK, True)
        sent_R = self._goes_TR.sum(dim=0)
        arrived_R = torch.empty_like(sent_R)
        self._comm.Alltoall(sent_R.numpy(), arrived_R.numpy())
        self._sent, self._arrived = _counts(sent_R), _counts(arrived_R)
        num_sent = self._pack(owner_TK)
        rows = self._received[: int(arrived_R.sum())]
        routing = self._received_routing[: len(rows)]
        self._move(self._packed_routing[:num_sent], self._sent, routing, self._arrived, self._routing_row)
        self._move(self._packed[:num_sent], self._sent, rows, self._arrived, self._row)
        return rows

    def received_routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        routing = self._received_routing[: sum(self._arrived[0])]
        return routing[:, : self._num_topk], routing[:, self._num_topk :].view(torch.float32)

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        returned = self._packed[: sum(self._sent[0])]
        self._move(y, self._arrived, returned, self._sent, self._row)
        position_TR = self._goes_TR.T.flatten().cumsum(0).view(self._goes_TR.T.shape).T - 1
        row_of_entry = position_TR[self._goes_TR]
        sum_rows(returned, row_of_entry, exclusive_sum(self._goes_TR.sum(dim=1)), None, self._out)
        return self._out

    def close(self) -> None:
        self._row.Free()
        self._routing_row.Free()

    def _pack(self, owner_TK: torch.Tensor) -> int:
        """Pack rows by destination rank, then token; beside each its local experts and weights, else -1 and 0."""
        rank, token = self._goes_TR.T.nonzero(as_tuple=True)
        num_sent = len(token)
        torch.index_select(self._batch.x, 0, token, out=self._packed[:num_sent])
        serves = owner_TK[token] == rank[:, None]
        local = self._batch.topk_idx[token] % (self._batch.num_experts // self._comm.Get_size())
        routing = self._packed_routing[:num_sent]
        routing[:, : self._num_topk] = torch.where(serves, local, -1)
        weights = torch.where(serves, self._batch.topk_weights[token], 0.0)
        routing[:, self._num_topk :] = weights.view(torch.int32)
        return num_sent

    def _move(
        self,
        source: torch.Tensor,
        sent: tuple[list[int], list[int]],
        target: torch.Tensor,
        arrived: tuple[list[int], list[int]],
        row: Any,
    ) -> None:
        self._comm.Alltoallv([_bytes(source), sent, row], [_bytes(target), arrived, row])


def _counts(rows_R: torch.Tensor) -> tuple[list[int], list[int]]:
    return rows_R.tolist(), exclusive_sum(rows_R)[:-1].tolist()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()
