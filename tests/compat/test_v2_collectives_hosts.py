"""What V2 offers beside dispatch and combine, where ranks play to live on several hosts."""

from __future__ import annotations

import torch

import anyep
from anyep.compat import deep_ep

RANKS = 4


def test_rows_tensors_and_sessions_reach_ranks_of_other_hosts(monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")

    def rank_main(member):
        buffer = deep_ep.ElasticBuffer(member, num_bytes=2 << 20, num_cpu_bytes=2 << 20, explicitly_destroy=True)
        rank, mine = buffer.rank_idx, torch.full((3, 8), float(buffer.rank_idx)).bfloat16()
        assert (buffer.num_scaleout_ranks, buffer.num_scaleup_ranks) == (2, 2)
        buffer.engram_write(mine)
        fetched, _ = buffer.engram_fetch(torch.tensor([[0, 11]], dtype=torch.int32))()
        assert fetched.view(2, 8).tolist() == [[0.0] * 8, [3.0] * 8]
        buffer.pp_set_config(64, 2)
        buffer.pp_send(torch.full((16,), float(rank)), (rank + 1) % RANKS)
        before = torch.empty(16)
        buffer.pp_recv(before, (rank - 1) % RANKS)
        assert before.tolist() == [float((rank - 1) % RANKS)] * 16
        buffer.agrs_set_config(4096, 4)
        with buffer.agrs_new_session():
            gathered, wait = buffer.all_gather(torch.full((4,), float(rank)))
            wait()
            assert gathered[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
        buffer.destroy()

    anyep.local_group(RANKS).run(rank_main)
