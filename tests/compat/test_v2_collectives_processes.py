"""The collective calls between rank processes that met through torch.distributed, as in users' programs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from anyep.testing.processes import run_processes
from tests.compat.elastic_host import Host


class TorchMember:
    """What :class:`Host` reads of a member."""

    def __init__(self, group):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)


def all_calls(group, rank):
    store = dist.PrefixStore("torch", group._store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=group.size)
    world = dist.group.WORLD
    host = Host(TorchMember(world))
    host.group = world
    told = []
    host.engram_write(torch.full((4, 8), float(rank), dtype=torch.bfloat16))
    told.append(host.engram_fetch(torch.tensor([[0, 4], [11, 8]], dtype=torch.int32))()[0][:, ::8].tolist())
    host.pp_set_config(64, 2)
    host.pp_send(torch.full((8,), float(rank)), (rank + 1) % 3)
    there = torch.empty(8)
    host.pp_recv(there, (rank - 1) % 3)
    told.append(float(there[0]))
    host.agrs_set_config(host.get_agrs_num_max_session_bytes(world, (5,), torch.float32), 1)
    with host.agrs_new_session():
        out, handle = host.all_gather(torch.full((5,), float(rank)))
        handle()
        told.append(out[:, 4].tolist())
    host.close_collectives()
    dist.destroy_process_group()
    return told


def test_every_call_on_a_process_group():
    for rank, told in enumerate(run_processes(3, all_calls)):
        assert told == [[[0.0, 1.0], [2.0, 2.0]], float((rank - 1) % 3), [0.0, 1.0, 2.0]]
