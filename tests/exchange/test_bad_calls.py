"""Bad calls: each gives one clear error, and the buffer works afterwards.

A row is (name, call, error type, words of the message). ``call`` gets a scene: an open buffer, a good batch,
a received batch. Calls that only one rank makes are refused before a word is sent, so the other ranks need not know.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import anyep
from tests.exchange.scene import E, H, K, R, T, check_works, make_scene


def fake(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


def shifted(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """A bias, and an out one row further in the same memory."""
    rows = torch.zeros(T + 1, H, dtype=x.dtype)
    return {"bias": rows[:-1], "out": rows[1:]}


def changed(tensor: torch.Tensor, value: int) -> torch.Tensor:
    other = tensor.clone()
    other[2, 1] = value
    return other


CALLS = [
    ("x is a list", lambda s: s.ep.dispatch([[1.0]], s.idx), TypeError, ["x must be a torch.Tensor", "list"]),
    ("x is None", lambda s: s.ep.dispatch(None, s.idx), TypeError, ["x must be", "NoneType"]),
    ("x of another dtype", lambda s: s.ep.dispatch(s.x.double(), s.idx), TypeError, ["bfloat16", "float64"]),
    ("x in fp16 on a bf16 wire", lambda s: s.ep.dispatch(s.x.half(), s.idx), TypeError, ["bfloat16", "float16"]),
    (
        "x without memory",
        lambda s: s.ep.dispatch(fake(s.x), s.idx),
        TypeError,
        ["with memory", "FakeTensor"],
    ),
    ("x in mkldnn's layout", lambda s: s.fp8.dispatch(s.x.float().to_mkldnn(), s.idx), TypeError, ["dense", "mkldnn"]),
    ("x with another hidden", lambda s: s.ep.dispatch(s.x[:, :32].clone(), s.idx), ValueError, ["[5, 32]", "64"]),
    ("x one-dimensional", lambda s: s.ep.dispatch(s.x[0], s.idx), ValueError, ["[T, hidden]", "[64]"]),
    ("x transposed", lambda s: s.ep.dispatch(torch.empty(H, T, dtype=s.x.dtype).T, s.idx), ValueError, ["contiguous"]),
    ("x strided", lambda s: s.ep.dispatch(s.x.repeat(1, 2)[:, ::2], s.idx), ValueError, [".contiguous()"]),
    ("x on another device", lambda s: s.ep.dispatch(s.x.to("meta"), s.idx), ValueError, ["meta", "cpu"]),
    (
        "x with too many tokens",
        lambda s: s.ep.dispatch(s.x.repeat(20, 1), s.idx.repeat(20, 1)),
        ValueError,
        ["100 tokens", "max_tokens_per_rank=16"],
    ),
    ("a pair on a bf16 wire", lambda s: s.ep.dispatch((s.x, s.weights), s.idx), TypeError, ["tuple", "fp8", "bf16"]),
    (
        "fp8 without scales",
        lambda s: s.fp8.dispatch(s.x.to(torch.float8_e4m3fn), s.idx),
        TypeError,
        ["without scales", "(x, scales)"],
    ),
    (
        "a triple on the fp8 wire",
        lambda s: s.fp8.dispatch((s.x, s.x, s.x), s.idx),
        TypeError,
        ["pair (fp8, scales)", "tuple of 3"],
    ),
    (
        "fp8 pair with bf16 rows",
        lambda s: s.fp8.dispatch((s.x, torch.ones(T, 1)), s.idx),
        TypeError,
        ["x[0]", "float8_e4m3fn", "bfloat16"],
    ),
    (
        "fp8 pair with scales of another dtype",
        lambda s: s.fp8.dispatch((s.x.to(torch.float8_e4m3fn), torch.ones(T, 1).double()), s.idx),
        TypeError,
        ["x[1]", "float32", "float64"],
    ),
    (
        "fp8 pair with scales of another shape",
        lambda s: s.fp8.dispatch((s.x.to(torch.float8_e4m3fn), torch.ones(T, 2)), s.idx),
        ValueError,
        ["x[1]", "[5, 1]", "[5, 2]"],
    ),
    (
        "fp8 pair with no scales",
        lambda s: s.fp8.dispatch((s.x.to(torch.float8_e4m3fn), None), s.idx),
        TypeError,
        ["x[1]", "NoneType"],
    ),
    ("integers on the fp8 wire", lambda s: s.fp8.dispatch(s.x.int(), s.idx), TypeError, ["float32", "int32"]),
    ("no topk_idx", lambda s: s.ep.dispatch(s.x), TypeError, ["topk_idx must be a torch.Tensor", "NoneType"]),
    ("topk_idx in int16", lambda s: s.ep.dispatch(s.x, s.idx.short()), TypeError, ["int64 or int32", "int16"]),
    ("topk_idx in float", lambda s: s.ep.dispatch(s.x, s.idx.float()), TypeError, ["int64 or int32", "float32"]),
    ("topk_idx with another K", lambda s: s.ep.dispatch(s.x, s.idx[:, :2].clone()), ValueError, ["[5, 2]", "[5, 3]"]),
    ("topk_idx with another T", lambda s: s.ep.dispatch(s.x, s.idx[:4]), ValueError, ["[4, 3]", "[5, 3]"]),
    ("topk_idx strided", lambda s: s.ep.dispatch(s.x, s.idx.T.contiguous().T), ValueError, ["topk_idx", "contiguous"]),
    (
        "an expert too large",
        lambda s: s.ep.dispatch(s.x, changed(s.idx, E)),
        ValueError,
        ["topk_idx[2, 1] is 8", "0 to 7"],
    ),
    (
        "an expert below -1",
        lambda s: s.ep.dispatch(s.x, changed(s.idx, -2)),
        ValueError,
        ["topk_idx[2, 1] is -2", "-1 means"],
    ),
    (
        "an expert beyond 32 bits",
        lambda s: s.ep.dispatch(s.x, changed(s.idx, 1 << 40)),
        ValueError,
        ["topk_idx[2, 1] is 1099511627776"],
    ),
    (
        "weights in bf16",
        lambda s: s.ep.dispatch(s.x, s.idx, s.weights.bfloat16()),
        TypeError,
        ["topk_weights", "float32"],
    ),
    ("weights of another shape", lambda s: s.ep.dispatch(s.x, s.idx, s.weights[:, :1].clone()), ValueError, ["[5, 1]"]),
    ("weights on another device", lambda s: s.ep.dispatch(s.x, s.idx, s.weights.to("meta")), ValueError, ["meta"]),
    (
        "an unknown layout",
        lambda s: s.ep.dispatch(s.x, s.idx, layout="dense"),
        ValueError,
        ["layout", "'compact'", "'dense'"],
    ),
    (
        "topk_idx and a handle",
        lambda s: s.ep.dispatch(s.x, s.idx, handle=s.handle),
        ValueError,
        ["topk_idx must be None"],
    ),
    ("a handle with another T", lambda s: s.ep.dispatch(s.x[:3], handle=s.handle), ValueError, ["3 tokens", "sent 5"]),
    ("a tuple as handle", lambda s: s.ep.dispatch(s.x, handle=(1, 2)), TypeError, ["handle", "tuple"]),
    ("another buffer's handle", lambda s: s.ep.dispatch(s.x, handle=s.foreign), ValueError, ["another buffer"]),
    ("combine without a handle", lambda s: s.ep.combine(s.y, None), TypeError, ["handle", "NoneType"]),
    ("combine with another buffer's handle", lambda s: s.ep.combine(s.y, s.foreign), ValueError, ["another buffer"]),
    ("y with too few rows", lambda s: s.ep.combine(s.y[1:], s.handle), ValueError, ["[N, hidden]"]),
    ("y with another hidden", lambda s: s.ep.combine(s.y[:, :8].clone(), s.handle), ValueError, ["[N, hidden]"]),
    ("y in float64", lambda s: s.ep.combine(s.y.double(), s.handle), TypeError, ["bfloat16", "float64"]),
    ("y strided", lambda s: s.ep.combine(s.y.repeat(1, 2)[:, ::2], s.handle), ValueError, ["y must be contiguous"]),
    (
        "y is a Received",
        lambda s: s.ep.combine(s.received, s.handle),
        TypeError,
        ["y must be a torch.Tensor", "Received"],
    ),
    (
        "a Received for its handle",
        lambda s: s.ep.combine(s.y, s.received),
        TypeError,
        ["got the Received itself", "pass received.handle"],
    ),
    ("a wait that is a word", lambda s: s.ep.dispatch(s.x, s.idx, wait="no"), ValueError, ["True, False or", "'no'"]),
    ("a wait that is a number", lambda s: s.ep.combine(s.y, s.handle, wait=0), ValueError, ["True or False", "0"]),
    ("three biases", lambda s: s.ep.combine(s.y, s.handle, bias=(s.x, s.x, s.x)), ValueError, ["at most 2", "3"]),
    ("bias of another shape", lambda s: s.ep.combine(s.y, s.handle, bias=s.x[:2]), ValueError, ["bias", "[2, 64]"]),
    ("bias of another dtype", lambda s: s.ep.combine(s.y, s.handle, bias=s.x.float()), TypeError, ["bias", "float32"]),
    ("out of another shape", lambda s: s.ep.combine(s.y, s.handle, out=s.x[:2]), ValueError, ["out", "[2, 64]"]),
    ("out of another dtype", lambda s: s.ep.combine(s.y, s.handle, out=s.x.float()), TypeError, ["out", "float32"]),
    ("out across bias", lambda s: s.ep.combine(s.y, s.handle, **shifted(s.x)), ValueError, ["out overlaps bias"]),
    ("out inside y", lambda s: s.ep.combine(s.y, s.handle, out=s.y[:T]), ValueError, ["out overlaps y"]),
    (
        "returned weights of another shape",
        lambda s: s.ep.combine(s.y, s.handle, topk_weights=s.weights[:1]),
        ValueError,
        ["topk_weights", "[N, num_topk]"],
    ),
    ("an unknown reduce", lambda s: s.ep.combine(s.y, s.handle, reduce="mean"), ValueError, ["'rank'", "'mean'"]),
    (
        "reduce by expert of compact rows",
        lambda s: s.ep.combine(s.y, s.handle, reduce="expert"),
        ValueError,
        ["layout='expert'"],
    ),
    (
        "rows of no block",
        lambda s: s.ep.combine(s.blocks.x.view(-1, H), s.blocks.handle),
        ValueError,
        ["y must have shape [L, R * Tmax, hidden] = [4, 32, 64]", "[128, 64]"],
    ),
    ("blocks that are too few", lambda s: s.ep.combine(s.blocks.x[:3], s.blocks.handle), ValueError, ["[3, 32, 64]"]),
    (
        "blocks that are too short",
        lambda s: s.ep.combine(s.blocks.x[:, :5].contiguous(), s.blocks.handle),
        ValueError,
        ["[4, 5, 64]"],
    ),
    (
        "blocks that are not contiguous",
        lambda s: s.ep.combine(s.blocks.x.transpose(0, 1).contiguous().transpose(0, 1), s.blocks.handle),
        ValueError,
        ["y must be contiguous"],
    ),
    ("blocks in fp8", lambda s: s.fp8.combine(s.fp8_blocks.x, s.fp8_blocks.handle), TypeError, ["float8_e4m3fn"]),
    ("blocks for a compact handle", lambda s: s.ep.combine(s.blocks.x, s.handle), ValueError, ["[N, hidden]"]),
    ("compact rows for a padded handle", lambda s: s.ep.combine(s.y, s.blocks.handle), ValueError, ["[L, R * Tmax"]),
    (
        "weights of rows for blocks",
        lambda s: s.ep.combine(s.blocks.x, s.blocks.handle, topk_weights=torch.ones(128, K)),
        ValueError,
        ["topk_weights must have shape [T, num_topk] = [5, 3]", "[128, 3]"],
    ),
    (
        "weights of tokens for compact rows",
        lambda s: s.ep.combine(s.y, s.handle, topk_weights=s.weights),
        ValueError,
        ["topk_weights must have shape [N, num_topk]", "[5, 3]"],
    ),
    (
        "weights of blocks in bf16",
        lambda s: s.ep.combine(s.blocks.x, s.blocks.handle, topk_weights=s.weights.bfloat16()),
        TypeError,
        ["topk_weights must be float32", "bfloat16"],
    ),
    (
        "an unknown reduce of blocks",
        lambda s: s.ep.combine(s.blocks.x, s.blocks.handle, reduce="mean"),
        ValueError,
        ["'expert'", "'column'"],
    ),
    (
        "an unknown wire of combine",
        lambda s: s.ep.combine(s.blocks.x, s.blocks.handle, wire="fp8"),
        ValueError,
        ["wire must be one of 'logfmt10'", "'fp8'"],
    ),
    (
        "a wire of combine that is no text",
        lambda s: s.ep.combine(s.blocks.x, s.blocks.handle, wire=10),
        ValueError,
        ["wire must be one of 'logfmt10'", "10"],
    ),
    (
        "logfmt of compact rows",
        lambda s: s.ep.combine(s.y, s.handle, wire="logfmt10"),
        ValueError,
        ["layout='padded'", "layout='compact'"],
    ),
    (
        "logfmt of fp32",
        lambda s: s.ep.combine(s.blocks.x.float(), s.blocks.handle, wire="logfmt10"),
        ValueError,
        ["bfloat16", "float32"],
    ),
    (
        "out inside blocks",
        lambda s: s.ep.combine(s.blocks.x, s.blocks.handle, out=s.blocks.x[0, :T]),
        ValueError,
        ["out overlaps y"],
    ),
    (
        "a layout with a handle's rows of another T",
        lambda s: s.ep.dispatch(s.x[:2], handle=s.blocks.handle),
        ValueError,
        ["2 tokens", "sent 5"],
    ),
    (
        "cached weights of another shape",
        lambda s: s.ep.dispatch(s.x, None, s.weights[:2], handle=s.blocks.handle),
        ValueError,
        ["topk_weights", "[2, 3]"],
    ),
    ("a layout that is no text", lambda s: s.ep.dispatch(s.x, s.idx, layout=["padded"]), ValueError, ["layout"]),
    ("too many experts, split", lambda s: s.ep.dispatch(s.x, changed(s.idx, E), wait=False), ValueError, ["is 8"]),
    ("integer output", lambda s: s.ep.empty_output(s.handle, torch.int32), TypeError, ["bfloat16", "int32"]),
    ("output for a foreign handle", lambda s: s.ep.empty_output(s.foreign), ValueError, ["another buffer"]),
]


def test_the_table_is_long_and_named_apart():
    names = [row[0] for row in CALLS]
    assert len(names) == len(set(names)) >= 40


def test_every_bad_call_is_refused_and_the_buffer_still_works():
    def rank_main(member):
        with ExitStack() as own:
            scene = make_scene(member, own)
            failures = []
            for name, call, error_type, words in CALLS:
                with pytest.raises(error_type) as caught:
                    call(scene)
                if type(caught.value) is not error_type or not all(word in str(caught.value) for word in words):
                    failures.append(f"{name}: {type(caught.value).__name__}: {caught.value}")
                check_works(scene)
            assert not failures, "\n".join(failures)

    anyep.local_group(R).run(rank_main)
