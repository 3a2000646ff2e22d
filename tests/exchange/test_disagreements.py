"""Ranks that call differently: every rank hears of it, and the buffer goes on."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

import anyep
from tests.exchange.scene import R, check_works, make_scene

DISAGREEMENTS = [
    (
        "layout",
        lambda s, rank: s.ep.dispatch(s.x, s.idx, layout=["compact", "expert"][rank]),
        ["layout", "'expert' on rank 1"],
    ),
    (
        "weights",
        lambda s, rank: s.ep.dispatch(s.x, s.idx, [s.weights, None][rank]),
        ["topk_weights", "not given on rank 1"],
    ),
    (
        "index dtype",
        lambda s, rank: s.ep.dispatch(s.x, [s.idx, s.idx.int()][rank]),
        ["int32 on rank 1", "int64 on rank 0"],
    ),
    (
        "operation",
        lambda s, rank: s.ep.combine(s.y, s.handle) if rank else s.ep.dispatch(s.x, s.idx, s.weights),
        ["the operation", "combine on rank 1"],
    ),
    ("barrier", lambda s, rank: s.ep.barrier() if rank else s.ep.combine(s.y, s.handle), ["barrier on rank 1"]),
    (
        "dtype of y",
        lambda s, rank: s.ep.combine([s.y, s.y.float()][rank], s.handle),
        ["dtype of y", "float32 on rank 1"],
    ),
    (
        "returned weights",
        lambda s, rank: s.ep.combine(s.y, s.handle, topk_weights=[None, s.received.topk_weights][rank]),
        ["topk_weights", "given on rank 1"],
    ),
    (
        "padded or not",
        lambda s, rank: s.ep.dispatch(s.x, s.idx, layout=["padded", "expert"][rank]),
        ["layout", "'padded' on rank 0"],
    ),
    (
        "weights of blocks",
        lambda s, rank: s.ep.dispatch(s.x, s.idx, [s.weights, None][rank], layout="padded"),
        ["topk_weights", "not given on rank 1"],
    ),
    (
        "wire of combine",
        lambda s, rank: s.ep.combine(s.blocks.x, s.blocks.handle, wire=[None, "logfmt10"][rank]),
        ["the wire of combine", "'none' on rank 0", "'logfmt10' on rank 1"],
    ),
    (
        "reduce of blocks",
        lambda s, rank: s.ep.combine(s.blocks.x, s.blocks.handle, reduce=["rank", "expert"][rank]),
        ["reduce", "'rank' on rank 0"],
    ),
    (
        "handles of two layouts",
        lambda s, rank: s.ep.combine([s.y, s.blocks.x][rank], [s.handle, s.blocks.handle][rank], reduce="rank"),
        ["layout is", "'compact' on rank 0"],
    ),
    (
        "cached or not",
        lambda s, rank: s.ep.dispatch(s.x, handle=s.handle) if rank else s.ep.dispatch(s.x, s.idx),
        ["cached dispatch on rank 1"],
    ),
]


def test_ranks_that_call_differently_all_hear_of_it():
    def rank_main(member):
        with ExitStack() as own:
            scene = make_scene(member, own)
            for name, call, words in DISAGREEMENTS:
                with pytest.raises(ValueError, match="ranks disagree") as caught:
                    call(scene, member.rank)
                assert all(word in str(caught.value) for word in words), f"{name}: {caught.value}"
                check_works(scene)
            assert scene.ep.stats().refused == len(DISAGREEMENTS)

    anyep.local_group(R).run(rank_main)


def test_handles_of_different_dispatches():
    def rank_main(member):
        with ExitStack() as own:
            scene = make_scene(member, own)
            again = scene.ep.dispatch(scene.x, scene.idx)
            handle = [scene.handle, again.handle][member.rank]
            with pytest.raises(ValueError, match="the handle is of dispatch"):
                scene.ep.combine(again.x, handle)
            check_works(scene)

    anyep.local_group(R).run(rank_main)


def test_a_closed_buffer_says_so():
    def rank_main(member):
        with ExitStack() as own:
            scene = make_scene(member, own)
            scene.ep.barrier()
            scene.ep.close()
            scene.ep.close()
            for call in (
                lambda: scene.ep.dispatch(scene.x, scene.idx),
                lambda: scene.ep.combine(scene.y, scene.handle),
                lambda: scene.ep.empty_output(scene.handle),
                scene.ep.barrier,
            ):
                with pytest.raises(anyep.ClosedError, match="closed; make a new one"):
                    call()
            assert scene.y.float().isfinite().all(), "received tensors outlive the buffer"

    anyep.local_group(R).run(rank_main)
