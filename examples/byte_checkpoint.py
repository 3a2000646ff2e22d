"""Checkpoints that any number of ranks can resume from: experts are kept under their global numbers.

::

    DIR/step-000300/replicated.pt     what all ranks hold alike, written by rank 0; history and sizes
                    experts-2.pt      the experts of rank 2, whose numbers are inside

A folder gets its name when all of it is written: one without its name was never finished.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from byte_model import Model

from anyep import nn

_STEP = "step-{:06d}"


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What is saved and resumed."""

    ep: nn.BufferPair
    model: Model
    optimiser: torch.optim.Optimizer

    def state_of(self, parameters: dict[str, torch.nn.Parameter]) -> dict[str, dict[str, torch.Tensor]]:
        """Return values and the optimiser's numbers, by the parameter's name."""
        return {name: {"value": one.detach(), **self.optimiser.state[one]} for name, one in parameters.items()}

    @torch.no_grad()
    def take(self, parameter: torch.nn.Parameter, state: dict[str, torch.Tensor]) -> None:
        """Put a parameter and the optimiser's numbers of it back."""
        parameter.copy_(state.pop("value"))
        self.optimiser.state[parameter] = state


def save(folder: Path, step: int, learner: Learner, extra: dict[str, Any]) -> None:
    """Write a checkpoint. Collective."""
    ep, model = learner.ep, learner.model
    done = folder / _STEP.format(step)
    partial = done.with_suffix(".partial")
    if ep.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        replicated = {
            "parameters": learner.state_of(model.replicated_parameters()),
            "buffers": {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()},
            **extra,
        }
        torch.save(replicated, partial / "replicated.pt")
    ep.forward.barrier()
    own = {"numbers": ep.local_experts, "parameters": learner.state_of(model.expert_parameters())}
    torch.save(own, partial / f"experts-{ep.rank}.pt")
    ep.forward.barrier()
    if ep.rank == 0:
        shutil.rmtree(done, ignore_errors=True)
        partial.rename(done)
    ep.forward.barrier()


def find_latest(folder: Path) -> Path:
    """Return the last checkpoint that is whole. ValueError where there is none."""
    whole = sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")
    if not whole:
        raise ValueError(f"there is no checkpoint in {folder}; leave --resume out to begin anew")
    return whole[-1]


def load(checkpoint: Path, learner: Learner) -> dict[str, Any]:
    """Put a checkpoint's state into the learner, of any number of ranks; return what else was saved with it."""
    replicated = torch.load(checkpoint / "replicated.pt", weights_only=True)
    parts = [torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("experts-*.pt"))]
    states = replicated.pop("parameters")
    for name, parameter in learner.model.replicated_parameters().items():
        learner.take(parameter, states[name])
    for name, parameter in learner.model.expert_parameters().items():
        learner.take(parameter, _gathered([(part["numbers"], part["parameters"][name]) for part in parts], learner.ep))
    buffers = dict(learner.model.named_buffers())
    for name, value in replicated.pop("buffers").items():
        buffers[name].copy_(value)
    return dict(replicated)


def _gathered(parts: list[tuple[list[int], dict[str, torch.Tensor]]], ep: nn.BufferPair) -> dict[str, torch.Tensor]:
    """Return the states [L, ...] of this rank's experts, wherever they were; single numbers are alike everywhere."""
    where = {number: (state, place) for numbers, state in parts for place, number in enumerate(numbers)}
    found = [where[number] for number in ep.local_experts]
    gathered = {}
    for key, value in parts[0][1].items():
        pieces = [state[key][place] for state, place in found] if value.dim() else []
        gathered[key] = torch.stack(pieces) if pieces else value.clone()
    return gathered
