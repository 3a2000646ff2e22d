"""docs/frameworks.md: its program runs, what it says is imported is there, and calls in the ways it tells are right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import anyep
from anyep.cli.main import cli
from anyep.compat.deep_ep import Buffer, Config, ElasticBuffer
from anyep.compat.deep_ep.utils import EventHandle, EventOverlap
from tests.compat.v1_oracle import make_inputs

PAGE = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text()
RANKS, E, H, TMAX = 2, 8, 128, 16
TOKENS = [TMAX, 5]
GIVEN = make_inputs(TOKENS, hidden=H, topk=3, experts=E)
WHOLE = [torch.randint(-4, 5, (tokens, H)).bfloat16() for tokens in TOKENS]
"""Rows of whole numbers, whose sums are exact."""


def times(mine):
    """How many ranks each token goes to, and how many experts it has, [T, 1] each."""
    idx = mine.topk_idx
    ranks = torch.stack([((idx >= 0) & (idx // (E // RANKS) == rank)).any(1) for rank in range(RANKS)]).sum(0)
    return ranks.unsqueeze(1), (idx >= 0).sum(1, keepdim=True)


def on_ranks(rank_main):
    assert anyep.local_group(RANKS).run(lambda member: rank_main(member, member.rank) or True) == [True] * RANKS


def test_the_pages_program_runs_and_balances():
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found = {}
    exec(program, found)
    (before, _), (after, even) = (
        found["busiest"](*way) for way in (found["ranges"], found["balance"](found["load"], 4, 4))
    )
    assert even <= after < 1.1 * even < before


def test_what_the_page_says_is_imported_is_there():
    imports = re.findall(r"`(from deep_ep[\w.]* import [\w, ]+)`", PAGE)
    assert len(imports) >= 6
    path = CliRunner().invoke(cli, ["compat-path"]).output.strip()
    found = os.pathsep.join([path, str(Path(anyep.__file__).parents[1])])
    told = subprocess.run(
        [sys.executable, "-c", "\n".join([*imports, "import deep_ep", "print(hasattr(deep_ep, 'HybridEPBuffer'))"])],
        env={**os.environ, "PYTHONPATH": found},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.stdout == "False\n", told.stderr


@pytest.mark.parametrize("waits_later", [False, True], ids=["Megatron-LM", "torchtitan"])
def test_training_steps(waits_later):
    def rank_main(group, rank):
        mine, x = GIVEN[rank], WHOLE[rank]
        sizes = [
            (config.get_nvl_buffer_size_hint(2 * H, RANKS), config.get_rdma_buffer_size_hint(2 * H, RANKS))
            for config in (Buffer.get_dispatch_config(RANKS), Buffer.get_combine_config(RANKS))
        ]
        buffer = Buffer(group, *map(max, zip(*sizes, strict=True)))
        assert buffer.group == group
        before = {"async_finish": True, "allocate_on_comm_stream": True}
        *layout, event = buffer.get_dispatch_layout(
            mine.topk_idx, E, previous_event=EventOverlap(EventHandle()), **before
        )
        per_rank, per_rdma_rank, per_expert, inside = layout
        recv, idx, weights, counts, handle, event = buffer.dispatch(
            x,
            topk_idx=mine.topk_idx,
            topk_weights=mine.topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=inside,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            **before,
        )
        event.current_stream_wait()
        assert torch.tensor(counts).sum() == (idx >= 0).sum()
        out, none, event = buffer.combine(x=recv, handle=handle, previous_event=EventOverlap(EventHandle()), **before)
        assert none is None
        shared = x.float() * 2 if waits_later else None  # meanwhile
        event.current_stream_wait()
        assert torch.equal(out, x * times(mine)[0])
        grad, *_, event = buffer.dispatch(out, handle=handle, previous_event=EventOverlap(EventHandle()), **before)
        event.current_stream_wait()
        assert grad.shape == recv.shape
        back, back_weights, event = buffer.combine(
            grad.contiguous(),
            handle,
            topk_weights=weights.float(),
            previous_event=EventOverlap(EventHandle()),
            **before,
        )
        event.current_stream_wait()
        assert torch.equal(back, out * times(mine)[0])
        assert torch.equal(back_weights, mine.topk_weights.masked_fill(mine.topk_idx < 0, 0))
        assert shared is None or shared.shape == x.shape

    on_ranks(rank_main)


def decode(buffer, mine, x, *, hook, **options):
    rows, count, handle, event, done = buffer.low_latency_dispatch(
        x, mine.topk_idx, TMAX, E, use_fp8=False, async_finish=not hook, return_recv_hook=hook
    )
    done() if hook else event.current_stream_wait()
    assert count.shape == (E // RANKS,)
    sums, event, done = buffer.low_latency_combine(
        x=rows,
        topk_idx=mine.topk_idx,
        topk_weights=torch.ones_like(mine.topk_weights),
        handle=handle,
        async_finish=not hook,
        return_recv_hook=hook,
        **options,
    )
    done() if hook else event.current_stream_wait()
    assert torch.equal(sums, x * times(mine)[1])
    return sums


@pytest.mark.parametrize("hook", [True, False])
def test_sglang_serves_prefill_and_decode_from_one_buffer(hook):
    def rank_main(group, rank):
        mine, x = GIVEN[rank], WHOLE[rank]
        config = Config(num_sms=24, num_max_nvl_chunked_send_tokens=8, num_max_nvl_chunked_recv_tokens=256)
        rdma = Buffer.get_low_latency_rdma_size_hint(TMAX, H, RANKS, E)
        qps = max(Buffer.num_sms, E // RANKS)
        buffer = Buffer(group, 1 << 20, rdma, low_latency_mode=True, num_qps_per_rank=qps, allow_mnnvl=True)
        assert (buffer.group_size, buffer.low_latency_mode) == (RANKS, True)
        for _ in range(2):
            asynchronous = {"previous_event": Buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}
            per_rank, per_rdma_rank, per_expert, inside, event = buffer.get_dispatch_layout(
                mine.topk_idx, E, **asynchronous
            )
            recv, _, _, counts, handle, event = buffer.dispatch(
                x,
                topk_idx=mine.topk_idx,
                topk_weights=mine.topk_weights,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=inside,
                num_tokens_per_expert=per_expert,
                expert_alignment=128,
                config=config,
                **asynchronous | {"previous_event": event},
            )
            event.current_stream_wait()
            assert all(count % 128 == 0 for count in counts)
            out, _, event = buffer.combine(recv, handle, config=config, **asynchronous)
            event.current_stream_wait()
            assert torch.equal(out, x * times(mine)[0])
            buffer.clean_low_latency_buffer(TMAX, H, E)
            decode(buffer, mine, x, hook=hook)

    on_ranks(rank_main)


def test_vllm_writes_sums_to_its_own_tensors_and_asks_for_masks():
    def rank_main(group, rank):
        mine, x = GIVEN[rank], WHOLE[rank]
        sizes = {"num_nvl_bytes": 1 << 30, "num_rdma_bytes": 1 << 20, "num_qps_per_rank": E // RANKS}
        buffer = Buffer(
            group=group,
            **sizes,
            low_latency_mode=True,
            allow_nvlink_for_low_latency_mode=True,
            allow_mnnvl=False,
            explicitly_destroy=True,
            enable_shrink=True,
        )
        out = torch.empty_like(x)
        assert decode(buffer, mine, x, hook=True, out=out, zero_copy=False) is out
        mask = torch.ones(RANKS, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(mask)
        assert not mask.any()
        buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
        buffer.low_latency_clean_mask_buffer()
        buffer.destroy()

    on_ranks(rank_main)


def elastic_step(buffer, mine, x, *, expand, sync, most):
    recv, idx, weights, handle, event = buffer.dispatch(
        x=x,
        topk_idx=mine.topk_idx,
        topk_weights=mine.topk_weights,
        num_experts=E,
        num_max_tokens_per_rank=most,
        do_expand=expand,
        do_cpu_sync=sync,
        async_with_compute_stream=False,
    )
    assert event.event is None
    assert (idx is None) == expand
    assert weights.dim() == (1 if expand else 2)
    assert bool(handle.num_recv_tokens_per_expert_list) == sync
    assert int(handle.psum_num_recv_tokens_per_scaleup_rank[-1]) <= len(recv) or expand
    out, _, event = buffer.combine(recv, handle, async_with_compute_stream=True)
    event.current_stream_wait()
    assert torch.equal(out, x * times(mine)[expand])


@pytest.mark.parametrize("per_host", ["2", "1"])
def test_elastic_buffers_in_the_modes_of_sglang_and_vllm(per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", per_host)

    def rank_main(group, rank):
        mine, x = GIVEN[rank], WHOLE[rank]
        buffer = ElasticBuffer(
            group,
            num_max_tokens_per_rank=TMAX,
            hidden=H,
            num_topk=3,
            use_fp8_dispatch=False,
            allow_hybrid_mode=True,
            allow_multiple_reduction=True,
            prefer_overlap_with_compute=False,
            sl_idx=0,
            num_cpu_timeout_secs=1800,
            num_gpu_timeout_secs=1800,
            explicitly_destroy=True,
        )
        assert buffer.get_theoretical_num_qps(buffer.get_theoretical_num_sms(E, 3)) > 0
        elastic_step(buffer, mine, x, expand=True, sync=True, most=None)  # vLLM's prefill
        for most in (TMAX, 64, 32):  # its decode
            elastic_step(buffer, mine, x, expand=False, sync=False, most=most)
        elastic_step(buffer, mine, x, expand=False, sync=True, most=TMAX)  # SGLang's prefill
        elastic_step(buffer, mine, x, expand=True, sync=False, most=TMAX)  # its decode
        buffer.destroy()

    on_ranks(rank_main)
