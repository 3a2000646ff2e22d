"""Routing traces: what is recorded comes back, what is broken is named, and replays repeat."""

from __future__ import annotations

import errno
import io
import os
import resource
import zipfile
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyep.errors import ClosedError
from anyep.layout import trace_npz
from anyep.layout.trace_file import RoutingTrace, TraceEntry, TraceRecorder, shipped_trace

KEYS = ("schema", "description", "num_experts", "num_topk", "layer", "step", "rank", "num_tokens")
KEYS += ("topk_idx", "absent", "topk_weights")


def entry(idx, weights=None, *, layer=0, step=0, rank=0):
    idx = np.array(idx, np.int32)
    weights = np.ones(idx.shape) if weights is None else weights
    return TraceEntry(layer=layer, step=step, rank=rank, topk_idx=idx, topk_weights=np.array(weights, np.float16))


def trace_of(*entries, num_experts=4, num_topk=2, description=""):
    return RoutingTrace(num_experts=num_experts, num_topk=num_topk, entries=entries, description=description)


def random_entry(random, num_tokens, *, num_experts=16, num_topk=3, **place):
    idx = random.integers(-1, num_experts, (num_tokens, num_topk))
    return entry(idx, random.random((num_tokens, num_topk)), **place)


def assert_same(trace, other):
    assert (trace.num_experts, trace.num_topk, trace.description) == (
        other.num_experts,
        other.num_topk,
        other.description,
    )
    assert len(trace.entries) == len(other.entries)
    for one, two in zip(trace.entries, other.entries, strict=True):
        assert (one.layer, one.step, one.rank) == (two.layer, two.step, two.rank)
        assert one.topk_idx.dtype == two.topk_idx.dtype == np.int32
        assert one.topk_weights.dtype == two.topk_weights.dtype == np.float16
        assert np.array_equal(one.topk_idx, two.topk_idx)
        assert one.topk_weights.tobytes() == two.topk_weights.tobytes()


@st.composite
def traces(draw):
    num_topk = draw(st.integers(1, 9))
    num_experts = draw(st.sampled_from([1, 2, 255, 256, 257, 65536, 65537, 2**31 - 1]))
    lowest = draw(st.sampled_from([-1, 0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    entries = []
    for _ in range(draw(st.integers(0, 4))):
        num_tokens = draw(st.integers(0, 20))
        place = {key: draw(st.integers(0, 2**40)) for key in ("layer", "step", "rank")}
        bits = random.integers(0, 2**16, (num_tokens, num_topk)).astype(np.uint16)  # NaN, Inf and subnormals too
        idx = random.integers(lowest, num_experts, (num_tokens, num_topk))
        entries.append(entry(idx, bits.view(np.float16), **place))
    text = draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20))
    return trace_of(*entries, num_experts=num_experts, num_topk=num_topk, description=text)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trace=traces())
def test_a_trace_comes_back_bit_for_bit(tmp_path, trace):
    path = tmp_path / "trace.npz"
    trace.save(path)
    first = path.read_bytes()
    loaded = RoutingTrace.load(path)
    assert_same(loaded, trace)
    loaded.save(path)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["trace.npz"]


def test_the_file_is_what_the_format_says(tmp_path):
    trace = trace_of(entry([[0, 3], [-1, 2]], [[0.5, 0.25], [0, 1]], layer=5, step=6, rank=7), description="why")
    trace.save(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz", allow_pickle=False) as file:
        found = dict(file)
    assert tuple(found) == KEYS
    assert {key: array.tolist() for key, array in found.items()} == {
        "schema": 1,
        "description": "why",
        "num_experts": 4,
        "num_topk": 2,
        "layer": [5],
        "step": [6],
        "rank": [7],
        "num_tokens": [2],
        "topk_idx": [[0, 3], [0, 2]],
        "absent": [0b00100000],
        "topk_weights": [[0.5, 0.25], [0.0, 1.0]],
    }
    assert (found["topk_idx"].dtype, found["absent"].dtype) == (np.uint8, np.uint8)
    assert found["topk_weights"].dtype == np.float16


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_indices_take_the_smallest_dtype(tmp_path, num_experts, dtype):
    trace_of(entry([[num_experts - 1, 0]]), num_experts=num_experts).save(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz") as file:
        assert file["topk_idx"].dtype == dtype
        assert file["absent"].size == 0


def test_a_trace_is_printed_in_one_line():
    assert repr(shipped_trace()).startswith("<RoutingTrace: top-8 of 256 experts, 98304 tokens in 48 entries, ")


def test_properties():
    trace = trace_of(entry([[0, 1]] * 3, layer=4), entry([[2, 3]] * 2, layer=1), entry([[2, 3]], layer=4))
    assert trace.num_tokens == 6
    assert trace.layers == (1, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trace_of(num_experts=0), r"num_experts must be in \[1, 2147483647\] and num_topk at least 1, got 0"),
        (lambda: trace_of(num_experts=2**31), "got 2147483648 and 2"),
        (lambda: trace_of(num_topk=0), "got 4 and 0"),
        (lambda: trace_of(entry([[0, 1]]), entry([[0, 4]])), "topk_idx of entry 1 names expert 4 at token 0, column 1"),
        (lambda: trace_of(entry([[0, 1], [-2, 1]])), "names expert -2 at token 1, column 0; experts are 0 to 3"),
        (lambda: trace_of(entry([[0, 1, 2]])), r"topk_idx of entry 0 must have shape \[T, 2\], got \[1, 3\]"),
        (lambda: trace_of(entry([0, 1])), r"must have shape \[T, 2\], got \[2\]"),
        (lambda: trace_of(entry([[0, 1]], [[1.0]])), r"topk_weights of entry 0 must have shape \[1, 2\], got \[1, 1\]"),
        (lambda: trace_of(entry([[0, 1]], layer=-1)), "layer -1, step 0 and rank 0; none may be negative"),
        (
            lambda: trace_of(
                TraceEntry(layer=0, step=0, rank=0, topk_idx=np.zeros((1, 2)), topk_weights=np.ones((1, 2)))
            ),
            "entry 0 has float64 indices and float64 weights, expected int32 and float16",
        ),
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def rewritten(path, **changes):
    """Write ``path`` again with some keys changed, or left out where the change is None."""
    with np.load(path) as file:
        arrays = {key: changes.get(key, array) for key, array in file.items()}
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "trace.npz"
    trace_of(entry([[0, 3], [-1, 2]]), entry([[1, 1]], step=1), description="some").save(path)
    return path


@pytest.mark.parametrize("key", KEYS[1:])
def test_a_missing_key_is_named(path, key):
    rewritten(path, **{key: None})
    with pytest.raises(
        ValueError, match=rf"trace.npz lacks {key}; a routing trace of schema 1 has schema, description"
    ):
        RoutingTrace.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": None}, "is an npz file without the key 'schema', so it is no routing trace"),
        ({"schema": np.array(2)}, "has routing trace schema 2; this version of anyep knows schema 1 only"),
        ({"schema": np.array([1])}, r"has routing trace schema \[1\]"),
        ({"num_experts": np.array(3)}, "topk_idx names expert 3; experts are 0 to 2"),
        ({"num_experts": np.array(257)}, r"topk_idx is uint8 \[3, 2\], but uint16 \[3, 2\] belongs to top-2 of 257"),
        ({"num_experts": np.array(-5)}, "names expert 3; experts are 0 to -6"),
        ({"num_experts": np.array(4.0)}, r"num_experts must be int64 \[\], got float64 \[\]"),
        ({"num_topk": np.array([2])}, r"num_topk must be int64 \[\], got int64 \[1\]"),
        ({"num_topk": np.array(3)}, r"but uint8 \[3, 3\] belongs to top-3 of 4 experts and the entries' 3 tokens"),
        ({"layer": np.array([0])}, r"layer must be int64 \[2\], got int64 \[1\]"),
        ({"rank": np.array([0, 1], np.int32)}, r"rank must be int64 \[2\], got int32 \[2\]"),
        ({"num_tokens": np.array(3)}, r"layer must be int64 \[1\], got int64 \[2\]"),
        ({"num_tokens": np.array([2, 2])}, "the entries' 4 tokens"),
        ({"num_tokens": np.array([4, -1])}, "layer, step, rank and num_tokens must not be negative"),
        ({"step": np.array([0, -1])}, "must not be negative"),
        ({"topk_idx": np.zeros((3, 2), np.int8)}, "topk_idx is int8"),
        ({"topk_weights": np.zeros((3, 2))}, "topk_weights is float64"),
        ({"topk_weights": np.zeros((2, 2), np.float16)}, r"topk_weights is float16 \[2, 2\]"),
        ({"absent": np.zeros(2, np.uint8)}, r"absent must be uint8 \[0\] or \[1\], got uint8 \[2\]"),
        ({"absent": np.zeros(1, np.int64)}, r"absent must be uint8 \[0\] or \[1\], got int64 \[1\]"),
        ({"description": np.array(7)}, r"description must be str \[\], got int64 \[\]"),
        ({"topk_weights": np.array([None])}, r"is truncated or damaged \(Object arrays cannot be loaded"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(path, changes, message):
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=rf"{path}.*{message}"):
        RoutingTrace.load(path)


def test_an_index_that_would_wrap_to_none_is_refused(path):
    trace_of(entry([[0, 65536]]), num_experts=65537).save(path)
    rewritten(path, topk_idx=np.array([[0, 2**32 - 1]], np.uint32))
    with pytest.raises(ValueError, match="names expert 4294967295; experts are 0 to 65536"):
        RoutingTrace.load(path)


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_npz_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"trace.npz is no npz file \(it begins with b'.*'\)"):
        RoutingTrace.load(path)


def test_every_truncation_is_noticed(path):
    content = path.read_bytes()
    for length in range(2, len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"trace.npz is truncated or damaged \(.*\); copy it again"):
            RoutingTrace.load(path)


def test_a_flipped_byte_is_noticed_or_harmless(path):
    """A byte of the archive's own bookkeeping (a date, a permission) may change without any effect on the trace."""
    content, intact = path.read_bytes(), RoutingTrace.load(path)
    noticed = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            loaded = RoutingTrace.load(path)
        except ValueError:
            noticed += 1
        else:
            assert_same(loaded, intact)
    assert noticed > len(content) // 2


def test_a_path_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no routing trace .*a.npz, and no a.rank\*.npz beside it"):
        RoutingTrace.load(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="no routing trace"):
        RoutingTrace.load(tmp_path / "nowhere" / "a.npz")
    with pytest.raises(ValueError, match="at least one path"):
        RoutingTrace.load()


def test_a_path_must_say_npz(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .npz, got '.*trace.json'"):
        trace_of().save(tmp_path / "trace.json")
    with pytest.raises(ValueError, match=r"must end in .npz"):
        TraceRecorder(tmp_path / "trace", num_experts=4, num_topk=2)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path):
    before = path.read_bytes()
    random = np.random.default_rng(0)
    large = trace_of(random_entry(random, 5000), num_experts=16, num_topk=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write the routing trace of \d+ bytes \(File too large\)") as caught:
            large.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_named(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trace_npz.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*nothing was left there: make room") as caught:
        trace_of().save(path)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(trace_npz.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace_of().save(tmp_path / "trace.npz")
    assert os.listdir(tmp_path) == []


def test_a_directory_in_the_way(tmp_path):
    (tmp_path / "trace.npz").mkdir()
    with pytest.raises(OSError, match="cannot write the routing trace"):
        trace_of().save(tmp_path / "trace.npz")
    assert os.listdir(tmp_path) == ["trace.npz"]


def test_a_recorder_numbers_its_entries(tmp_path):
    with TraceRecorder(tmp_path / "t.npz", num_experts=4, num_topk=2, num_layers=2, description="d") as recorder:
        for expert in range(3):
            recorder.add(torch.tensor([[expert, -1]]), torch.tensor([[0.5, 0.0]]))
        recorder.add(torch.empty((0, 2), dtype=torch.int32), None, layer=7, step=9)
    trace = RoutingTrace.load(tmp_path / "t.npz")
    assert [(e.layer, e.step, e.rank, e.num_tokens) for e in trace.entries] == [
        (0, 0, 0, 1),
        (1, 0, 0, 1),
        (0, 1, 0, 1),
        (7, 9, 0, 0),
    ]
    assert [e.topk_idx.tolist() for e in trace.entries[:3]] == [[[0, -1]], [[1, -1]], [[2, -1]]]
    assert trace.description == "d"


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_recorder_copies(tmp_path, idx_dtype, weights_dtype):
    recorder = TraceRecorder(tmp_path / "t.npz", num_experts=4, num_topk=2)
    idx = torch.tensor([[0, 3], [2, -1]], dtype=idx_dtype)
    weights = torch.tensor([[0.5, 70000.0], [0.25, 0.0]], dtype=weights_dtype, requires_grad=True)
    recorder.add(idx, weights)
    with torch.no_grad():
        idx.fill_(99)
        weights.fill_(float("nan"))
    (found,) = recorder.trace().entries
    assert found.topk_idx.tolist() == [[0, 3], [2, -1]]
    assert found.topk_weights.tolist() == [[0.5, float("inf")], [0.25, 0.0]]


def test_a_recorder_takes_strided_tensors_and_no_weights(tmp_path):
    recorder = TraceRecorder(tmp_path / "t.npz", num_experts=4, num_topk=2)
    recorder.add(torch.tensor([[0, -1], [2, 3]]).T, None)
    (found,) = recorder.trace().entries
    assert found.topk_idx.tolist() == [[0, 2], [-1, 3]]
    assert found.topk_weights.tolist() == [[1.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("idx", "weights", "error", "message"),
    [
        (torch.zeros(1, 2), None, TypeError, "topk_idx must be int32 or int64, got torch.float32"),
        (torch.zeros(1, 3, dtype=torch.int64), None, ValueError, r"topk_idx must have shape \[T, 2\], got \[1, 3\]"),
        (torch.tensor([[0, 4]]), None, ValueError, "topk_idx names expert 4 at token 0, column 1; experts are 0 to 3"),
        (torch.tensor([[0, 2**32 + 1]]), None, ValueError, "topk_idx names expert 4294967297"),
        (torch.tensor([[0, -2]]), None, ValueError, "topk_idx names expert -2"),
        (torch.tensor([[0, 1]]), torch.ones(2, 2), ValueError, r"topk_weights must have shape \[1, 2\], got \[2, 2\]"),
        (
            torch.tensor([[0, 1]]),
            torch.tensor([[1, 1]]),
            TypeError,
            "topk_weights must be floating point, got torch.int64",
        ),
    ],
)
def test_a_recorder_refuses_and_goes_on(tmp_path, idx, weights, error, message):
    recorder = TraceRecorder(tmp_path / "t.npz", num_experts=4, num_topk=2)
    with pytest.raises(error, match=message):
        recorder.add(idx, weights)
    recorder.add(torch.tensor([[0, 1]]), None)
    assert recorder.trace().num_tokens == 1


def test_a_closed_recorder(tmp_path):
    recorder = TraceRecorder(tmp_path / "t.npz", num_experts=4, num_topk=2)
    recorder.close()
    (tmp_path / "t.npz").unlink()
    recorder.close()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ClosedError, match=r"t.npz is closed"):
        recorder.add(torch.tensor([[0, 1]]), None)


def test_a_recorder_whose_file_cannot_be_written_keeps_everything(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    recorder = TraceRecorder(folder / "t.npz", num_experts=4, num_topk=2)
    recorder.add(torch.tensor([[0, 1]]), None)
    folder.rmdir()
    with pytest.raises(FileNotFoundError, match="cannot write the routing trace"):
        recorder.close()
    recorder.trace().save(tmp_path / "t.npz")
    assert RoutingTrace.load(tmp_path / "t.npz").num_tokens == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be in"),
        ({"num_topk": 0}, ValueError, "num_topk at least 1"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1"),
        ({"rank": -1}, ValueError, "rank at least 0"),
    ],
)
def test_a_recorder_refuses_bad_sizes(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        TraceRecorder(tmp_path / "t.npz", **{"num_experts": 4, "num_topk": 2, **arguments})


def test_a_recorder_refuses_a_missing_directory_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*nowhere"):
        TraceRecorder(tmp_path / "nowhere" / "t.npz", num_experts=4, num_topk=2)


def record_as_rank(path, rank, *, num_experts=16):
    with TraceRecorder(path, num_experts=num_experts, num_topk=2, rank=rank, description="job") as recorder:
        recorder.add(torch.full((2, 2), rank), None)
        recorder.add(torch.full((1, 2), rank + 1), None)
    return recorder.path


def test_ranks_write_their_own_files_and_load_as_one(tmp_path):
    path = tmp_path / "a [job].npz"
    names = [record_as_rank(path, rank).name for rank in (0, 2, 10)]
    assert names == ["a [job].rank0.npz", "a [job].rank2.npz", "a [job].rank10.npz"]
    (tmp_path / "a [job].rankx.npz").write_bytes(b"not ours")
    merged = RoutingTrace.load(path)
    assert [(e.rank, e.step, e.num_tokens) for e in merged.entries] == [
        (0, 0, 2),
        (0, 1, 1),
        (2, 0, 2),
        (2, 1, 1),
        (10, 0, 2),
        (10, 1, 1),
    ]
    assert merged.description == "job"
    assert_same(RoutingTrace.load(*(tmp_path / name for name in names)), merged)
    replayed = merged.batches(3, 2)
    assert [batch.topk_idx[:, 0].tolist() for batch in replayed] == [[0, 0], [2, 2], [10, 10]]


def test_files_of_different_models_do_not_merge(tmp_path):
    path = tmp_path / "t.npz"
    record_as_rank(path, 0)
    record_as_rank(path, 1, num_experts=17)
    with pytest.raises(ValueError, match=r"t.rank1.npz has top-2 of 17 experts, but .*t.rank0.npz has top-2 of 16"):
        RoutingTrace.load(path)


def test_batches_deal_out_runs_layer_by_layer():
    trace = trace_of(
        entry([[0, 1], [1, 2]], [[0.5, 0.25], [1, 1]], layer=1),
        entry([[2, 3]], layer=0, step=1),
        entry([[3, -1]], layer=0, step=0, rank=1),
        entry([[1, 0]], layer=0, step=0, rank=0),
    )
    batches = trace.batches(2, 3)
    assert [batch.topk_idx.tolist() for batch in batches] == [[[1, 0], [3, -1], [2, 3]], [[0, 1], [1, 2], [1, 0]]]
    assert batches[1].topk_weights.tolist() == [[0.5, 0.25], [1.0, 1.0], [1.0, 1.0]]
    assert [batch.topk_idx.tolist() for batch in trace.batches(1, 2, num_topk=1)] == [[[1], [3]]]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    num_ranks=st.integers(1, 9),
    num_tokens=st.integers(0, 40),
    num_topk=st.integers(1, 3),
)
def test_batches_repeat_and_use_every_token_equally(sizes, num_ranks, num_tokens, num_topk):
    random = np.random.default_rng(3)
    entries = [random_entry(random, size, layer=n) for n, size in enumerate(sizes)]
    trace = trace_of(*entries, num_experts=16, num_topk=3)
    if num_tokens and not sum(sizes):
        with pytest.raises(ValueError, match="no tokens to replay"):
            trace.batches(num_ranks, num_tokens)
        return
    one, two = (trace.batches(num_ranks, num_tokens, num_experts=16, num_topk=num_topk) for _ in range(2))
    stream = np.concatenate([e.topk_idx for e in entries])[:, :num_topk]
    for rank, (first, second) in enumerate(zip(one, two, strict=True)):
        assert (first.topk_idx.dtype, first.topk_weights.dtype) == (torch.int64, torch.float32)
        assert torch.equal(first.topk_idx, second.topk_idx)
        assert torch.equal(first.topk_weights, second.topk_weights)
        expected = [stream[n % len(stream)].tolist() for n in range(rank * num_tokens, (rank + 1) * num_tokens)]
        assert first.topk_idx.tolist() == expected


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"num_experts": 8}, "asked for top-2 of 8 experts, but this trace has top-2 of 4"),
        ({"num_experts": 2}, "ask for 4 experts and at most top-2, or record another trace"),
        ({"num_topk": 3}, "asked for top-3 of 4 experts"),
        ({"num_topk": 0}, "asked for top-0"),
    ],
)
def test_batches_of_another_model_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        trace_of(entry([[0, 1]])).batches(2, 2, **request_)


@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(0, 1), (1, -1)])
def test_batches_of_impossible_sizes_are_refused(num_ranks, num_tokens):
    with pytest.raises(ValueError, match="at least 1 rank and 0 tokens"):
        trace_of(entry([[0, 1]])).batches(num_ranks, num_tokens)


def test_the_shipped_trace_serves_the_benchmark():
    content = (resources.files("anyep") / "traces" / "stdlib-256x8.npz").read_bytes()
    assert len(content) <= 2**20
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert {f"{key}.npy" for key in KEYS} == set(archive.namelist())
    trace = shipped_trace()
    assert (trace.num_experts, trace.num_topk) == (256, 8)
    assert "standard library of Python" in trace.description
    for layer in trace.layers:
        assert sum(e.num_tokens for e in trace.entries if e.layer == layer) >= 8 * 4096
    for e in trace.entries:
        assert e.topk_idx.min() >= 0
        assert (np.diff(np.sort(e.topk_idx, axis=1), axis=1) > 0).all(), "a token chose an expert twice"
        assert (np.diff(e.topk_weights, axis=1) <= 0).all(), "the heaviest expert comes first"
        assert (e.topk_weights > 0).all()
        assert np.abs(e.topk_weights.astype(np.float64).sum(1) - 1).max() <= 2**-4  # rounded to 4 significant bits
    batches = trace.batches(8, 4096, num_experts=256, num_topk=8)
    assert [tuple(batch.topk_idx.shape) for batch in batches] == [(4096, 8)] * 8
    ours = np.concatenate([e.topk_idx for e in trace.entries if e.layer == trace.layers[0]])[: 8 * 4096]
    assert np.array_equal(torch.cat([batch.topk_idx for batch in batches]).numpy(), ours), "one layer, each token once"
