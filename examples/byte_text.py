"""The bytes to learn: the .py sources of Python's standard library, some files of which are held out.

Legend: B sequences of a batch, S bytes of a sequence.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT_EVERY = 16
"""Of the files in alphabetical order, each sixteenth is for evaluation only."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """What is learned from, and what is not. Every batch is a function of its number, and of nothing else."""

    training: torch.Tensor
    """uint8 [bytes]"""
    held_out: torch.Tensor
    """uint8 [bytes], of other files"""
    digest: str
    """of both"""

    def batch(self, number: int, size: int, context: int, *, seed: int) -> torch.Tensor:
        """Return training batch ``number``, int64 [B, S + 1], of all ranks together."""
        generator = torch.Generator().manual_seed((seed << 32) + number)
        begins = torch.randint(len(self.training) - context, (size,), generator=generator)
        return _windows(self.training, begins, context)

    def held_out_batch(self, number: int, count: int, size: int, context: int) -> torch.Tensor:
        """Return evaluation batch ``number`` of ``count``, int64 [B, S + 1]: windows at even distances."""
        begins = torch.linspace(0, len(self.held_out) - context - 1, count * size).long()
        return _windows(self.held_out, begins[number * size : (number + 1) * size], context)


def _windows(text: torch.Tensor, begins: torch.Tensor, context: int) -> torch.Tensor:
    return torch.stack([text[begin : begin + context + 1] for begin in begins.tolist()]).long()


def read_corpus(folder: Path | None, context: int) -> Corpus:
    """Read all .py files below ``folder``, the standard library if None. ValueError where there is too little text."""
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    files = [
        path for path in sorted(root.rglob("*.py")) if not _NOT_THE_LIBRARY & set(path.relative_to(root).parts[:-1])
    ]
    texts = [path.read_bytes() for path in files]
    held_out = b"".join(texts[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY])
    training = b"".join(text for number, text in enumerate(texts, 1) if number % _HELD_OUT_EVERY)
    for name, text in (("training", training), ("held-out", held_out)):
        if len(text) <= context + 1:
            raise ValueError(
                f"{root} has {len(files)} .py files with {len(text)} {name} bytes, a sequence needs {context + 2}: "
                f"pass a folder with more text (each {_HELD_OUT_EVERY}th file is held out)"
            )
    return Corpus(
        training=_tensor(training),
        held_out=_tensor(held_out),
        digest=hashlib.sha256(training + held_out).hexdigest()[:16],
    )


def _tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
