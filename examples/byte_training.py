"""The training loop of one rank: the same loss whatever the number of ranks.

A batch is split between ranks by sequences. The loss is a sum over a rank's bytes divided by the bytes of the whole
batch, so that gradients of what all ranks hold alike are to be summed; gradients of experts come summed from combine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# The optimiser imports it. Imported while a process group exists, it keeps that group's threads beyond
# destroy_process_group(), and a process that ends with them sometimes aborts (torch 2.13).
import torch._dynamo
import torch.distributed as dist
from byte_checkpoint import Learner, find_latest, load, save
from byte_model import Model, Sizes
from byte_text import Corpus, read_corpus
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anyep import nn

WARM_UP_STEPS = 60
LARGEST_NORM = 1.0
"""Gradients are scaled down to this norm, over all parameters of all ranks."""
BIAS_RATE = 0.003
"""by how much a step moves an expert's bias (DeepSeek-V3: 0.001, over far more steps)"""
EVALUATION_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run does."""

    sizes: Sizes = field(default_factory=Sizes)
    steps: int = 1000
    minutes: float | None = None
    """stop after so long, whatever the steps"""
    learning_rate: float = 3e-3
    text: Path | None = None
    evaluate_every: int = 100
    checkpoint: Path | None = None
    save_every: int | None = None
    """steps; a checkpoint is also written at the end"""
    resume: bool = False
    progress: bool = True

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: linear up, then 1 / sqrt(step), which needs not know the last step."""
        return self.learning_rate * min((step + 1) / WARM_UP_STEPS, (WARM_UP_STEPS / (step + 1)) ** 0.5)


@dataclass(kw_only=True)
class History:
    """What was measured, on rank 0's clock; the same bits on all ranks but for the seconds."""

    bits: list[float] = field(default_factory=list)
    """per byte, of the batch of each step before the step"""
    seconds: list[float] = field(default_factory=list)
    """training time at the end of each step, evaluation and checkpoints included"""
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, bits per byte)"""
    load: list[float] = field(default_factory=list)
    """of each step, the most an expert got as a multiple of the mean, the worst layer's"""
    digest: str = ""

    @property
    def steps(self) -> int:
        return len(self.bits)


class Trainer:
    """One rank's model, optimiser and share of every batch."""

    def __init__(self, ep: nn.BufferPair, plan: Plan, corpus: Corpus, over_ranks: nn.RankSum) -> None:
        self.plan, self.corpus, self.over_ranks = plan, corpus, over_ranks
        model = Model(ep, plan.sizes)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.learner = Learner(ep=ep, model=model, optimiser=optimiser)
        self.history = History(digest=corpus.digest)

    def own(self, text: torch.Tensor) -> torch.Tensor:
        """Return this rank's sequences of a batch."""
        ep = self.learner.ep
        return text.view(ep.num_ranks, -1, text.shape[1])[ep.rank]

    def step(self, out_of_time: bool = False) -> bool:
        """Train on one batch. Returns whether any rank is out of time. Collective, as everything here."""
        sizes, model, optimiser = self.plan.sizes, self.learner.model, self.learner.optimiser
        number = self.history.steps
        text = self.own(self.corpus.batch(number, sizes.batch, sizes.context, seed=sizes.seed))
        optimiser.zero_grad()
        loss = model(text).sum() / (sizes.batch * sizes.context)
        loss.backward()
        replicated, own = (list(one.values()) for one in (model.replicated_parameters(), model.expert_parameters()))
        nn.sum_gradients(replicated, self.over_ranks)
        sums = self.over_ranks(torch.stack([loss.detach().double(), _square(own), torch.tensor(float(out_of_time))]))
        norm = float((_square(replicated) + sums[1]).sqrt())
        for parameter in (*replicated, *own):
            parameter.grad *= min(1.0, LARGEST_NORM / (norm + 1e-12))
        for group in optimiser.param_groups:
            group["lr"] = self.plan.rate(number)
        optimiser.step()
        self._balance()
        self.history.bits.append(float(sums[0]))
        return bool(sums[2])

    def _balance(self) -> None:
        """Move the biases against the loads of all ranks, and note the worst load."""
        worst = 0.0
        for moe in self.learner.model.moes():
            load = self.over_ranks(moe.router.load)
            worst = max(worst, float(load.max() / load.double().mean()))
            moe.router.update_bias(BIAS_RATE, lambda _, load=load: load)
        self.history.load.append(worst)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the bits per byte of held-out files."""
        sizes, model = self.plan.sizes, self.learner.model
        model.eval()
        total = torch.zeros((), dtype=torch.float64)
        for number in range(EVALUATION_BATCHES):
            text = self.corpus.held_out_batch(number, EVALUATION_BATCHES, sizes.batch, sizes.context)
            total += model(self.own(text)).sum()
        model.train()
        return float(self.over_ranks(total)) / (EVALUATION_BATCHES * sizes.batch * sizes.context)

    def save(self) -> None:
        if self.plan.checkpoint is not None:
            extra = {"history": asdict(self.history), "sizes": asdict(self.plan.sizes)}
            save(self.plan.checkpoint, self.history.steps, self.learner, extra)

    def resume(self) -> None:
        """Go on from the last checkpoint. ValueError where that is of another model or text."""
        assert self.plan.checkpoint is not None
        checkpoint = find_latest(self.plan.checkpoint)
        extra = load_matching(checkpoint, self.learner, self.plan.sizes, self.history.digest)
        self.history = History(**extra["history"])

    def run(self, tell: Any) -> History:
        """Train as planned; ``tell`` hears of the history after each step."""
        plan, history = self.plan, self.history
        began = time.monotonic() - (history.seconds[-1] if history.seconds else 0.0)
        stop = False
        while history.steps < plan.steps and not stop:
            stop = self.step(plan.minutes is not None and time.monotonic() - began > 60 * plan.minutes)
            last = stop or history.steps == plan.steps
            if last or history.steps % plan.evaluate_every == 0:
                history.held_out.append((history.steps, self.evaluate()))
            history.seconds.append(time.monotonic() - began)
            if last or (plan.save_every is not None and history.steps % plan.save_every == 0):
                self.save()
            tell(history)
        return history


def load_matching(checkpoint: Path, learner: Learner, sizes: Sizes, digest: str) -> dict[str, Any]:
    """Load a checkpoint of this model and text; ValueError naming what differs."""
    head = torch.load(checkpoint / "replicated.pt", weights_only=True)
    now = {**asdict(sizes), "text": digest}
    then = {**head["sizes"], "text": head["history"]["digest"]}
    other = [f"{name} {then[name]} there, {now[name]} here" for name in now if then[name] != now[name]]
    if other:
        raise ValueError(f"{checkpoint} is of another training: {'; '.join(other)}")
    return load(checkpoint, learner)


def _square(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Return the sum of the squares of all gradients, float64."""
    return sum((p.grad.double().square().sum() for p in parameters), torch.zeros((), dtype=torch.float64))


@contextmanager
def bar(plan: Plan, rank: int) -> Iterator[Any]:
    """Yield what shows the history on rank 0, and nothing elsewhere."""
    if rank or not plan.progress:
        yield lambda history: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=plan.steps)

        def tell(history: History) -> None:
            held = f", held out {history.held_out[-1][1]:.3f}" if history.held_out else ""
            text = f"{history.bits[-1]:.3f} bits a byte{held}, {history.steps / history.seconds[-1]:.1f} steps/s"
            progress.update(task, completed=history.steps, description=text)

        yield tell


def train(group: object, plan: Plan) -> History:
    """Train on all ranks of a group, each a process: a rank draws its model from torch's global generator."""
    torch.set_num_threads(1)  # ranks share the cores
    sizes = plan.sizes
    corpus = read_corpus(plan.text, sizes.context)
    options = {"hidden": sizes.hidden, "num_experts": sizes.experts, "num_topk": sizes.topk, "wire": "fp32"}
    over_ranks = nn.RankSum(group)
    most = sizes.batch // over_ranks.num_ranks * sizes.context
    with nn.open_pair(group, max_tokens_per_rank=most, **options) as ep:
        trainer = Trainer(ep, plan, corpus, over_ranks)
        if plan.resume:
            trainer.resume()
        with bar(plan, ep.rank) as tell:
            return trainer.run(tell)


def rank_main(_group: object, rank: int, num_ranks: int, meeting: str, plan: Plan) -> History:
    """Be one of the rank processes that this example starts; they meet at a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_ranks, timeout=timedelta(minutes=2)
    )
    try:
        return train(dist.group.WORLD, plan)
    finally:
        dist.destroy_process_group()
