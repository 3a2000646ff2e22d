"""A process in which several ranks' kernels run in turns: ``case first_seed last_seed``.

Prints one JSON object: for each seed what the ranks found, "right" or what was wrong, and a hash of the order of steps.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from anyep.testing.interleaving import Interleaving, InterleavingDeadlock
from anyep.testing.interpreter import interpreted_kernels

R, WORDS, EPOCHS = 3, 64, 3
LIMIT, SHORT_LIMIT = 10_000, 60
STALE = 0x5A5A5A5A


class Scene:
    """R ranks that write a row to each other rank and signal; then each waits and copies what it received.

    All memory is one array of bytes: for each rank the rows that it receives [EPOCHS, R, WORDS], its words [EPOCHS, R],
    what it copied [EPOCHS, R, WORDS], counts and errors [R]. ``meets``: in one launch, without counts.
    """

    def __init__(self, kernels, meets):
        self.kernels = kernels
        self.meets = meets
        row_bytes = 4 * R * EPOCHS * R * WORDS
        self.memory = np.zeros(row_bytes + 8 * R * EPOCHS * R, np.uint8)
        self.rows = self.memory[:row_bytes].view(np.int32).reshape(R, EPOCHS, R, WORDS)
        self.rows[:] = STALE
        self.words = self.memory[row_bytes:].view(np.int64).reshape(R, EPOCHS, R)
        self.found = np.zeros_like(self.rows)
        self.counts = np.zeros((R, R), np.int32)
        self.errors = np.zeros((R, R), np.int64)
        self.sent = np.arange(R * EPOCHS * R * WORDS, dtype=np.int32).reshape(R, EPOCHS, R, WORDS)

    def rank(self, rank, *, silent=False, limit=LIMIT):
        def act():
            numbers = np.arange(1, EPOCHS + 1)
            for epoch in range(EPOCHS):
                number_addr = numbers[epoch:].ctypes.data
                if not silent:
                    for peer in range(R):
                        source, target = self.sent[rank, epoch, peer], self.rows[peer, epoch, rank]
                        self.kernels.copy(source.ctypes.data, target.ctypes.data, 4 * WORDS)
                    table = np.array([self.words[peer, epoch, rank:].ctypes.data for peer in range(R)], np.int64)
                    counts = np.full(R, 10 * rank + epoch, np.int32)
                    if not self.meets:
                        self.kernels.signal(table.ctypes.data, R, number_addr, counts.ctypes.data)
                words, errors = self.words[rank, epoch].ctypes.data, self.errors[rank].ctypes.data
                if self.meets:
                    self.kernels.meet(table.ctypes.data, words, R, number_addr, limit, errors, 8)
                else:
                    self.kernels.wait(words, R, number_addr, limit, self.counts[rank].ctypes.data, errors, 8)
                received, copied = self.rows[rank, epoch], self.found[rank, epoch]
                self.kernels.copy(received.ctypes.data, copied.ctypes.data, received.nbytes)

        return act

    def verdict(self):
        if self.errors.any():
            return f"errors {self.errors.tolist()}"
        if not self.meets and not (self.counts == 10 * np.arange(R) + EPOCHS - 1).all():
            return f"counts {self.counts.tolist()}"
        expected = self.sent.transpose(2, 1, 0, 3)
        return "right" if (self.found == expected).all() else f"{int((self.found != expected).sum())} stale words"


def _run(case, seed):
    scene = Scene(interpreted_kernels(), case.endswith(", met"))
    case = case.removesuffix(", met")
    options = {
        "weak": {"weak_memory": True},
        "no release": {"weak_memory": True, "weakened": "release"},
        "no acquire": {"weak_memory": True, "weakened": "acquire"},
    }.get(case, {})
    patience = 2 * LIMIT if case == "silent" else 3
    interleaving = Interleaving(seed, scene.memory, patience=patience, **options)
    silent = 1 if case in ("silent", "deadlock") else None
    limit = SHORT_LIMIT if case == "silent" else LIMIT
    try:
        interleaving.run([scene.rank(rank, silent=rank == silent, limit=limit) for rank in range(R)])
    except InterleavingDeadlock as deadlock:
        return str(deadlock), 0
    base = scene.memory.ctypes.data
    return scene.verdict(), hash(tuple((rank, address - base) for rank, address, _ in interleaving.trace))


def main(case, first, last):
    print(json.dumps({str(seed): _run(case, seed) for seed in range(int(first), int(last))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
