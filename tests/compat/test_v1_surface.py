"""What programs import and ask before anything is sent: names, Config, sizes, events, construction, helpers."""

from __future__ import annotations

import gc
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import anyep
from anyep.cli.main import cli
from anyep.compat import deep_ep
from anyep.compat.deep_ep import toolkit
from anyep.compat.deep_ep.utils import math as ep_math
from anyep.errors import Unavailable
from tests.compat.v1_oracle import E, make_inputs, on_ranks, same_bits, send

SIGNATURES = {
    "__init__": "group num_nvl_bytes=0 num_rdma_bytes=0 low_latency_mode=False num_qps_per_rank=24"
    " allow_nvlink_for_low_latency_mode=True allow_mnnvl=False explicitly_destroy=False enable_shrink=False comm=None",
    "get_dispatch_layout": "topk_idx num_experts previous_event=None async_finish=False allocate_on_comm_stream=False",
    "dispatch": "x handle=None num_tokens_per_rank=None num_tokens_per_rdma_rank=None is_token_in_rank=None"
    " num_tokens_per_expert=None topk_idx=None topk_weights=None expert_alignment=1 num_worst_tokens=0 config=None"
    " previous_event=None async_finish=False allocate_on_comm_stream=False",
    "combine": "x handle topk_weights=None bias=None config=None previous_event=None async_finish=False"
    " allocate_on_comm_stream=False",
    "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts"
    " cumulative_local_expert_recv_stats=None dispatch_wait_recv_cost_stats=None use_fp8=True round_scale=False"
    " use_ue8m0=False async_finish=False return_recv_hook=False",
    "low_latency_combine": "x topk_idx topk_weights handle use_logfmt=False zero_copy=False async_finish=False"
    " return_recv_hook=False out=None combine_wait_recv_cost_stats=None",
    "low_latency_update_mask_buffer": "rank_to_mask mask=False",
    "get_local_buffer_tensor": "dtype size=None offset=0 use_rdma_buffer=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_and_defaults_are_upstreams(name):
    parameters = list(inspect.signature(getattr(deep_ep.Buffer, name)).parameters.values())[1:]
    written = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert written == SIGNATURES[name].split()


NAMES = {
    "deep_ep": "Buffer ElasticBuffer EPHandle EventOverlap EventHandle Config topk_idx_t get_physical_domain_size"
    " get_logical_domain_size __version__ find_cuda_home check_nccl_so init_jit",
    "deep_ep._C": "Config EventHandle topk_idx_t is_sm90_compiled init_jit get_low_latency_rdma_size_hint"
    " get_elastic_buffer_alignment get_local_nccl_unique_id create_nccl_comm destroy_nccl_comm"
    " get_physical_domain_size get_logical_domain_size",
    "deep_ep.utils": "EventHandle EventOverlap",
    "deep_ep.utils.comm": "get_physical_domain_size get_logical_domain_size",
    "deep_ep.utils.envs": "check_torch_deterministic get_physical_domain_size get_logical_domain_size",
    "deep_ep.utils.event": "EventHandle EventOverlap",
    "deep_ep.utils.find_pkgs": "find_cuda_home check_nccl_so",
    "deep_ep.utils.math": "ceil_div align calc_diff per_token_cast_to_fp8 per_token_cast_back",
}


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_is_there(module):
    found = importlib.import_module(f"anyep.compat.{module}")
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_what_belongs_to_the_compiled_half_alone_is_no_attribute_and_says_why():
    compiled = importlib.import_module("anyep.compat.deep_ep._C")
    for name in ("Buffer", "ElasticBuffer", "calculate_elastic_buffer_size", "create_cpu_handle"):
        with pytest.raises(AttributeError, match=r"C\+\+"):
            getattr(compiled, name)
    for name in ("get_local_nccl_unique_id", "create_nccl_comm", "destroy_nccl_comm"):
        with pytest.raises(Unavailable, match="NCCL"):
            getattr(compiled, name)(0)


def test_the_toolkit_is_where_the_environment_says_or_the_error_lists_where_it_was_sought(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolkit, "_CUDA_DIRECTORY", str(tmp_path / "none"))
    with pytest.raises(Unavailable, match=r"CUDA_HOME.*nvcc.*none"):
        deep_ep.find_cuda_home()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert deep_ep.find_cuda_home() == str(tmp_path)
    monkeypatch.setenv("CUDA_PATH", "/elsewhere")
    assert deep_ep.find_cuda_home() == "/elsewhere"


def test_what_upstream_does_at_import_is_nothing_here():
    assert deep_ep.check_nccl_so() is None
    assert deep_ep.init_jit("library", "cuda") is None
    assert deep_ep._C.get_elastic_buffer_alignment() == 2 << 20


def compat_path():
    result = CliRunner().invoke(cli, ["compat-path"])
    assert result.exit_code == 0
    return result.output.strip()


PROBE = """
import sys
import deep_ep, deep_ep.utils, deep_ep_cpp
from deep_ep import Buffer, Config, EventHandle, EventOverlap, topk_idx_t
from deep_ep.buffer import Buffer as again
from deep_ep.utils import EventOverlap as other, EventHandle as handle
from deep_ep.utils.math import ceil_div, align, calc_diff, per_token_cast_to_fp8, per_token_cast_back
import anyep.compat.deep_ep as real
assert again is Buffer is real.Buffer and other is EventOverlap and handle is EventHandle
assert deep_ep_cpp.Config is Config is deep_ep._C.Config
assert not hasattr(deep_ep, "HybridEPBuffer") and deep_ep.__version__
assert not {"numba", "llvmlite"} & set(sys.modules)
print(topk_idx_t, Buffer.is_sm90_compiled())
"""


@pytest.mark.parametrize(("bits", "dtype"), [(None, "int64"), ("32", "int32"), ("8", "int8")])
def test_programs_find_the_names_they_know_on_the_compat_path_and_compile_nothing(bits, dtype):
    import os

    environment = {**os.environ, "PYTHONPATH": f"{compat_path()}:{Path(anyep.__file__).parents[1]}"}
    if bits:
        environment["EP_NUM_TOPK_IDX_BITS"] = bits
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"torch.{dtype}", "False"]


def test_narrow_indices_come_back_as_narrow(monkeypatch):
    given = make_inputs([9, 31])
    monkeypatch.setattr("anyep.compat.deep_ep.indices.topk_idx_t", torch.int8)

    def rank_main(buffer):
        mine = given[buffer.rank]
        narrow = type(mine)(x=mine.x, topk_idx=mine.topk_idx.to(torch.int8), topk_weights=mine.topk_weights)
        x, idx, *_ = send(buffer, narrow)
        assert idx.dtype == torch.int8
        return x, idx

    def wide(buffer):
        return send(buffer, given[buffer.rank])[:2]

    narrow = on_ranks(2, rank_main)
    monkeypatch.undo()
    for (x, idx), (wide_x, wide_idx) in zip(narrow, on_ranks(2, wide), strict=True):
        assert same_bits(x, wide_x)
        assert idx.tolist() == wide_idx.tolist()


@pytest.mark.parametrize(
    "numbers",
    [(-1,), (20, 0), (20, 6, 6), (20, 6, 256, 0), (20, 6, 256, 128, 128), (20, 6, 256, 6, 5)],
)
def test_configs_that_upstream_refuses_are_runtime_errors(numbers):
    with pytest.raises(RuntimeError, match="Assertion exception"):
        deep_ep.Config(*numbers)


def test_receive_chunks_between_hosts_are_rounded_up_to_a_multiple_of_send_chunks():
    rounded, whole = deep_ep.Config(20, 6, 256, 6, 128), deep_ep.Config(20, 6, 256, 6, 132)
    assert rounded.get_rdma_buffer_size_hint(14336, 16) == whole.get_rdma_buffer_size_hint(14336, 16)


def test_size_hints_are_the_formulas_of_upstream():
    config = deep_ep.Config(20, 6, 256, 6, 128)
    row = 14336 + 8 + 128 * 8 + 128 * 4 + 128 * 4
    up = lambda n: -(-n // 128) * 128  # noqa: E731
    assert config.get_nvl_buffer_size_hint(14336, 8) == up(10 * 8 * (5 * 4 + 256 * row))
    assert config.get_nvl_buffer_size_hint(14336, 2) == up(10 * 2 * (5 * 4 + 256 * row))
    assert config.get_nvl_buffer_size_hint(14336, 32) == up(10 * 8 * (11 * 4 + 256 * row))
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0
    assert config.get_rdma_buffer_size_hint(14336, 32) == up(10 * 4 * (18 * 2 * 4 + 132 * 2 * (row + 16)))
    for ranks in (9, 12):
        with pytest.raises(RuntimeError, match=str(ranks)):
            config.get_nvl_buffer_size_hint(14336, ranks)
    with pytest.raises(RuntimeError, match="even"):
        deep_ep.Config(21).get_rdma_buffer_size_hint(14336, 16)


def test_the_low_latency_hint_is_that_of_upstream():
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint
    assert round(hint(128, 7168, 8, 288) / 1e6, 2) == 2146.96
    assert round(hint(128, 7168, 8, 256) / 1e6, 1) == 1908.4
    assert hint(128, 7168, 8, 288) % 128 == 0


def test_a_config_answers_hints_and_shows_nothing_else():
    assert {name for name in dir(deep_ep.Config()) if not name.startswith("_")} == {
        "get_nvl_buffer_size_hint",
        "get_rdma_buffer_size_hint",
    }


def test_calls_between_hosts_have_names_of_their_own():
    assert deep_ep.Buffer.internode_dispatch is deep_ep.Buffer.dispatch
    assert deep_ep.Buffer.internode_combine is deep_ep.Buffer.combine


def test_known_rank_counts_have_configs_and_others_are_assertions():
    for ranks in (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160):
        assert isinstance(deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Config)
        assert isinstance(deep_ep.Buffer.get_combine_config(ranks), deep_ep.Config)
    for call in (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config):
        with pytest.raises(
            AssertionError, match=r"Unsupported number of EP ranks: 3;.*without a config take any number"
        ):
            call(3)
    plain, tabled = deep_ep.Config(20, 36, 288, 20, 128), deep_ep.Buffer.get_dispatch_config(16)
    assert tabled.get_rdma_buffer_size_hint(1024, 16) == plain.get_rdma_buffer_size_hint(1024, 16)


def test_the_number_of_multiprocessors_is_even_and_shows_in_handles(monkeypatch):
    monkeypatch.setattr(deep_ep.Buffer, "num_sms", 20)
    with pytest.raises(AssertionError, match="The SM count must be even"):
        deep_ep.Buffer.set_num_sms(7)
    deep_ep.Buffer.set_num_sms(6)
    given = make_inputs([9])

    def rank_main(buffer):
        return send(buffer, given[0])[4][1].shape

    assert on_ranks(1, rank_main) == [(1, 3)]


def test_gigabytes_that_are_asked_for_are_echoed_and_not_taken():
    def rank_main(buffer):
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1 << 34, 1 << 36)
        send(buffer, make_inputs([9, 31])[buffer.rank])
        return buffer.runtime.buffer(E).explain().memory.committed_bytes

    for committed_bytes in on_ranks(2, rank_main, num_nvl_bytes=1 << 34, num_rdma_bytes=1 << 36):
        assert committed_bytes < 16 << 20


def test_sixteen_ranks_may_ask_for_gigabytes_each():
    given = make_inputs([2] * 16, experts=16)

    def rank_main(buffer):
        mine = given[buffer.rank]
        x, _, _, _, handle, _ = send(buffer, mine, experts=16)
        elastic = deep_ep.ElasticBuffer(buffer.group, num_bytes=1 << 34, num_max_tokens_per_rank=2)
        rows, _, _, kept, _ = elastic.dispatch(mine.x, mine.topk_idx, num_experts=16)
        assert elastic.num_bytes == 1 << 34
        assert same_bits(rows[: len(x)].sort(0).values, x.sort(0).values)
        assert elastic.combine(rows, kept)[0].shape == buffer.combine(x, handle)[0].shape
        return [one.explain().memory.committed_bytes for one in (buffer.runtime.buffer(16), elastic.runtime.buffer(16))]

    for committed_bytes in on_ranks(16, rank_main, num_nvl_bytes=1 << 34, num_rdma_bytes=1 << 36):
        assert max(committed_bytes) < 40 << 20


def test_the_constructor_echoes_what_it_was_given():
    def rank_main(member):
        buffer = deep_ep.Buffer(member, 256, 128, True, enable_shrink=True, explicitly_destroy=True)
        assert (buffer.rank, buffer.group_size) == (member.rank, 2)
        assert buffer.group is member
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (256, 128)
        assert (buffer.low_latency_mode, buffer.enable_shrink, buffer.explicitly_destroy) == (True, True, True)
        assert buffer.runtime is not None
        buffer.destroy()
        assert buffer.runtime is None
        buffer.destroy()
        for name in ("num_nvl_bytes", "num_rdma_bytes"):
            with pytest.raises(RuntimeError, match="128"):
                deep_ep.Buffer(member, **{name: 100})

    anyep.local_group(2).run(rank_main)


def test_neither_group_nor_communicator_is_a_value_error():
    with pytest.raises(ValueError, match="comm"):
        deep_ep.Buffer(None)


def test_destroying_needs_its_flag_and_ends_the_buffer():
    def rank_main(member):
        implicit = deep_ep.Buffer(member)
        with pytest.raises(AssertionError, match="explicitly_destroy"):
            implicit.destroy()
        explicit = deep_ep.Buffer(member, explicitly_destroy=True)
        send(explicit, make_inputs([9])[0])
        explicit.destroy()
        with pytest.raises(RuntimeError, match="destroyed"):
            send(explicit, make_inputs([9])[0])

    anyep.local_group(1).run(rank_main)


def test_a_buffer_that_is_forgotten_closes_itself():
    def rank_main(member):
        buffer = deep_ep.Buffer(member)
        x = send(buffer, make_inputs([9])[0])[0]
        runtime = buffer.runtime
        del buffer
        gc.collect()
        assert runtime.closed
        return x

    assert len(anyep.local_group(1).run(rank_main)[0])


def test_a_replaced_constructor_and_subclasses_work():
    class Patched(deep_ep.Buffer):
        pass

    original = Patched.__init__

    def patched(self, group, *args, **options):
        self.patched = True
        original(self, group, *args, **options)

    Patched.__init__ = patched

    def rank_main(member):
        buffer = Patched(member, explicitly_destroy=True)
        assert buffer.patched
        send(buffer, make_inputs([9])[0])
        buffer.destroy()
        Patched.__init__ = lambda self, *args: None
        with pytest.raises(RuntimeError, match="replaced"):
            Patched(member).get_dispatch_layout(torch.tensor([[0]]), 1)

    anyep.local_group(1).run(rank_main)


def test_local_memory_is_addressed_in_bytes():
    def rank_main(member):
        buffer = deep_ep.Buffer(member, 256, 128)
        whole = buffer.get_local_buffer_tensor(torch.int32)
        assert whole.shape == (64,)
        whole.copy_(torch.arange(64))
        part = buffer.get_local_buffer_tensor(torch.int32, torch.Size([2, 3]), offset=8)
        assert part.tolist() == [[2, 3, 4], [5, 6, 7]]
        assert buffer.get_local_buffer_tensor(torch.bfloat16, use_rdma_buffer=True).shape == (64,)
        with pytest.raises(AssertionError, match="fit"):
            buffer.get_local_buffer_tensor(torch.int32, torch.Size([65]))
        with pytest.raises(Unavailable, match="stream"):
            buffer.get_comm_stream()

    anyep.local_group(1).run(rank_main)


def test_tensors_of_another_device_are_refused_with_the_reason():
    def rank_main(buffer):
        with pytest.raises(Unavailable, match=r"pass topk_idx\.cpu"):
            buffer.get_dispatch_layout(torch.zeros(2, 2, dtype=torch.int64, device="meta"), 4)

    on_ranks(1, rank_main)


def test_domains_are_eight_ranks_or_what_the_environment_says(monkeypatch):
    def rank_main(member):
        return deep_ep.get_physical_domain_size(member), deep_ep.get_logical_domain_size(member, False)

    assert anyep.local_group(4).run(rank_main)[0] == ((1, 4), (1, 4))
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "2")
    assert anyep.local_group(4).run(rank_main)[0] == ((2, 2), (1, 4))
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", "0")
    with pytest.raises(ValueError, match="ANYEP_RANKS_PER_HOST"):
        anyep.local_group(1).run(rank_main)


def test_deterministic_memory_filling_is_an_assertion_on_every_call():
    given = make_inputs([9])

    def rank_main(buffer):
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(AssertionError, match="fill_uninitialized_memory"):
                send(buffer, given[0])
            with pytest.raises(AssertionError):
                buffer.low_latency_dispatch(given[0].x, given[0].topk_idx, 9, E)
            torch.utils.deterministic.fill_uninitialized_memory = False
            send(buffer, given[0])
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True

    on_ranks(1, rank_main, low_latency_mode=True)


def step(buffer, mine):
    """Everything that V1 does, as bits."""
    x, idx, weights, counts, handle, _ = send(buffer, mine)
    out, back, _ = buffer.combine(x, handle, weights, bias=mine.x)
    cached = buffer.dispatch(mine.x, handle=handle)[0]
    (q, scales), count, low, _, hook = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 32, E, return_recv_hook=True)
    hook()
    y = torch.ones(q.shape, dtype=torch.bfloat16, device="cpu")
    summed, _, _ = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, low)
    valid = [q[expert, :rows] for expert, rows in enumerate(count.tolist())]
    valid += [scales[expert, :rows] for expert, rows in enumerate(count.tolist())]
    return [x, idx, weights, *handle, out, back, cached, count, low[1], summed, *valid], counts


@pytest.mark.parametrize("per_host", [1, 8])
def test_global_state_of_torch_changes_no_result(per_host, monkeypatch):
    monkeypatch.setenv("ANYEP_RANKS_PER_HOST", str(per_host))
    given = make_inputs([9, 31])

    def plain(buffer):
        return step(buffer, given[buffer.rank])

    def odd(buffer):
        with torch.inference_mode(), torch.device("meta"):
            return step(buffer, given[buffer.rank])

    expected = on_ranks(2, plain, low_latency_mode=True)
    torch.set_default_dtype(torch.float64)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.enable_grad():
            found = on_ranks(2, plain, low_latency_mode=True)
        inference = on_ranks(2, odd, low_latency_mode=True)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.set_default_dtype(torch.float32)
    for results in (found, inference):
        for (tensors, counts), (wanted, wanted_counts) in zip(results, expected, strict=True):
            assert counts == wanted_counts
            assert all(same_bits(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_events_wait_once_and_run_their_hook_once():
    called = []
    event = deep_ep.EventOverlap(deep_ep.EventHandle.of(lambda: called.append("waited")), (torch.ones(1),))
    event.register_hook_after_wait(lambda: called.append("hook"))
    with pytest.raises(AssertionError, match="registered"):
        event.register_hook_after_wait(lambda: None)
    with event(release_handle=True) as same:
        assert same is event
    assert called == ["waited", "hook"]
    assert (event.event, event.extra_tensors) == (None, None)
    with pytest.raises(AssertionError, match="synchronous"):
        event.current_stream_wait()
    captured = deep_ep.Buffer.capture()
    captured.register_hook_after_wait(lambda: called.append("once"))
    captured.current_stream_wait()
    assert captured.hook_after_wait is None
    captured.current_stream_wait()
    assert called[2:] == ["once"]
    assert isinstance(captured.event, deep_ep.EventHandle)


def test_numerical_helpers_invert_each_other_and_round_up():
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    for round_scale in (False, True):
        q, scales = ep_math.per_token_cast_to_fp8(x, round_scale)
        assert (q.shape, scales.shape) == ((5, 384), (5, 3))
        assert ep_math.calc_diff(ep_math.per_token_cast_back(q, scales), x) < 1e-3
    assert ep_math.calc_diff(x, x) == 0
    assert ep_math.ceil_div(9, 4) == 3
    assert ep_math.align(9, 4) == 12
