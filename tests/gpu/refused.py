"""A process that asks for the GPU's kernels where Triton interprets; prints the refusal."""

from __future__ import annotations

import json

import torch

from anyep.errors import Unavailable
from anyep.kernels.registry import load


def main():
    torch.cuda.is_available = lambda: True
    try:
        load("gpu")
    except Unavailable as refusal:
        print(json.dumps(str(refusal)))


if __name__ == "__main__":
    main()
