"""Random rounds of what stands on buffers, layers with gradients and DeepEP's interface, on rank processes that play
hosts; each is judged as its own tests do it: against a dense model, and plain torch on gathered inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import anyep
from anyep.compat.deep_ep import native
from anyep.exchange import across
from anyep.testing.pretend_device import PretendDevice, pretended
from anyep.testing.processes import run_processes
from tests.compat import test_v1_combine, test_v1_low_latency, test_v1_masks, test_v2_combine, test_v2_dispatch
from tests.compat.v1_oracle import make_inputs, on_ranks, same_bits
from tests.compat.v2_world import World
from tests.exchange.rounds import poison_arenas
from tests.hosts.gathered import stand_in
from tests.hosts.shapes import CHUNK_BYTES, STRAIGHT_BYTES
from tests.nn.reference import E, assert_results, make_case, reference
from tests.nn.test_gradients import play
from tests.nn.test_moe import check_layer


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where a round takes place."""

    homes: str
    """which host each rank is on, by letter"""
    told: bool
    """whether ANYEP_RANKS_PER_HOST tells of hosts, which DeepEP's interface then rounds by; else each rank's own name
    does, and that takes all ranks for one host"""

    @property
    def num_ranks(self) -> int:
        return len(self.homes)

    @property
    def per_host(self) -> int:
        """The ranks that DeepEP's interface takes for one host."""
        return self.homes.count("a") if self.told else self.num_ranks

    def set(self, rank: int) -> None:
        for name in ("ANYEP_RANKS_PER_HOST", "ANYEP_HOST_ID"):
            os.environ.pop(name, None)
        if self.told:
            os.environ["ANYEP_RANKS_PER_HOST"] = str(self.per_host)
        else:
            os.environ["ANYEP_HOST_ID"] = f"played-{self.homes[rank]}"


def _tokens(draw: Random, num_ranks: int, most: int) -> list[int]:
    """Draw each rank's number of tokens, often none."""
    return [draw.choice((0, draw.randint(1, most), most)) for _ in range(num_ranks)]


def play_gradients(draw: Random, scene: Scene) -> None:
    case = make_case(_tokens(draw, scene.num_ranks, 9), seed=draw.randrange(1000))
    placement = draw.choice((None, [draw.randrange(scene.num_ranks) for _ in range(E)]))
    options = {"placement": placement, "expert_alignment": draw.choice((1, 4))}
    assert_results(play(case, reduce=draw.choice(("expert", "rank")), options=options), reference(case))


def play_layer(draw: Random, scene: Scene) -> None:
    check_layer(scene.num_ranks, seed=draw.randrange(1000))


def play_normal(draw: Random, scene: Scene) -> None:
    """V1 dispatch and combine, whose numbers cancel half of the time."""
    experts = scene.num_ranks * draw.randint(1, 3)
    given = make_inputs(
        _tokens(draw, scene.num_ranks, 12), topk=draw.randint(1, experts), experts=experts, seed=draw.randrange(1000)
    )
    suite, homes = test_v1_combine, None if scene.told else scene.homes
    numbers = draw.choice(({}, {"outputs": suite.cancelling, "bias_of": suite.cancelling_bias}))
    suite.check_sums(given, scene.per_host, draw.randint(0, 2), experts=experts, homes=homes, **numbers)


def play_low_latency(draw: Random, scene: Scene) -> None:
    """V1 rows in BF16 with their weighted sums, and in FP8 with their scales."""
    suite, experts = test_v1_low_latency, scene.num_ranks * draw.randint(1, 3)
    tokens, pow2 = _tokens(draw, scene.num_ranks, suite.TMAX), draw.random() < 0.5
    given = make_inputs(
        tokens, hidden=suite.H, topk=draw.randint(1, experts), experts=experts, seed=draw.randrange(1000)
    )

    def rank_main(buffer: Any) -> None:
        mine = given[buffer.rank]
        x, count, handle, *_ = suite.low(buffer, given, experts, use_fp8=False)
        suite.check_rows(given, buffer.rank, x, count, handle, lambda row: row, experts)
        y = suite.apply_experts(buffer, x)
        out = buffer.low_latency_combine(y, mine.topk_idx, mine.topk_weights, handle)[0]
        assert same_bits(out, suite.weighted(given, buffer.rank, mine.topk_weights))
        (q, scales), count, handle, *_ = suite.low(buffer, given, experts, round_scale=pow2)
        for part, rows in enumerate((q, scales)):
            expected = lambda row, part=part: suite.quantised(row, pow2)[part]  # noqa: E731
            suite.check_rows(given, buffer.rank, rows, count, handle, expected, experts)

    on_ranks(scene.num_ranks, rank_main, **suite.LL)


def play_masked(draw: Random, scene: Scene) -> None:
    """V1 low latency, where one rank rests and all others mask it: a forwarder, or its host's only rank."""
    suite, experts = test_v1_masks, scene.num_ranks * draw.randint(1, 3)
    given = make_inputs(
        _tokens(draw, scene.num_ranks, suite.TMAX),
        hidden=suite.H,
        topk=draw.randint(1, experts),
        experts=experts,
        seed=draw.randrange(1000),
    )
    suite.check_going_on(given, away=draw.randrange(scene.num_ranks), experts=experts)


def play_elastic(draw: Random, scene: Scene) -> None:
    """V2 dispatch and combine. (It refuses to be told of hosts of different sizes.)"""
    local = draw.randint(1, 3)
    world = World(
        num_tokens=tuple(_tokens(draw, scene.num_ranks, 9)),
        hidden=draw.choice((1, 24, 37)),
        num_topk=draw.randint(1, local * scene.num_ranks),
        num_experts=local * scene.num_ranks,
        seed=draw.randrange(1000),
    )
    expand, multi = draw.random() < 0.5, draw.random() < 0.5
    test_v2_dispatch.check_order(world, scene.per_host, deterministic=draw.random() < 0.5)
    test_v2_combine.check_sums(world, expand=expand, multi=multi, num_bias=draw.randint(0, 2), per_host=scene.per_host)


def play_elastic_on_a_device(draw: Random, scene: Scene) -> None:
    """The same with rows on a device, which pass through the host's memory."""
    there = native.device_of
    native.device_of = lambda rows: "cuda"
    try:
        with pretended(PretendDevice()):
            play_elastic(draw, scene)
    finally:
        native.device_of = there


KINDS = {
    "gradients": play_gradients,
    "layer": play_layer,
    "normal": play_normal,
    "low latency": play_low_latency,
    "masked": play_masked,
    "elastic": play_elastic,
    "elastic on a device": play_elastic_on_a_device,
}


@dataclass(frozen=True, kw_only=True)
class Round:
    kind: str
    scene: Scene
    straight_bytes: int | None
    chunk_bytes: int
    """of a piece that crosses"""
    seed: int
    """of what is drawn for its kind"""


def draw_rounds(homes: Sequence[str], num_each: int, *, seed: int = 0) -> list[Round]:
    """Draw so many rounds of each kind, every other one with hosts that DeepEP's interface is told of."""
    draw = Random(seed)
    even = len(set(map(homes[0].count, homes[0]))) == 1
    return [
        Round(
            kind=kind,
            scene=Scene(homes=homes[0], told=True)
            if (number + place) % 2 == 0 and (even or "elastic" not in kind)
            else Scene(homes=draw.choice(homes), told=False),
            straight_bytes=draw.choice(STRAIGHT_BYTES),
            chunk_bytes=draw.choice(CHUNK_BYTES),
            seed=draw.randrange(1 << 30),
        )
        for number in range(num_each)
        for place, kind in enumerate(KINDS)
    ]


def play_rounds(num_ranks: int, engine: str, rounds: Sequence[Round], timeout_s: float) -> None:
    """Let one set of processes play and judge all rounds. Raises RankFailed with the round that went wrong."""
    assert rounds, "nothing was drawn"
    done = run_processes(num_ranks, _play_all, engine, list(rounds), timeout_s=timeout_s)
    assert done == [len(rounds)] * num_ranks


def _play_all(group: Any, rank: int, engine: str, rounds: list[Round]) -> int:
    poison_arenas()
    stand_in(group)
    options = anyep.Buffer.__init__.__kwdefaults__  # those above it do not say how rows shall cross
    options["transport"] = engine
    for number, one in enumerate(rounds):
        one.scene.set(rank)
        options["straight_bytes"], across.CHUNK_BYTES = one.straight_bytes, one.chunk_bytes
        try:
            KINDS[one.kind](Random(one.seed), one.scene)
        except BaseException as error:
            raise AssertionError(f"round {number} of {len(rounds)}, {one}") from error
        group.allgather(b"judged")
    return len(rounds)
