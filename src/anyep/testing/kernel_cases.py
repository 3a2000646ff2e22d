"""Random arguments for the kernel exam: arrays in one guarded stretch of memory, entries, tables, awkward numbers.

Legend: T tokens, H hidden, K top-k, R ranks, W entries a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.kernels.spec import Element

Bytes = NDArray[np.uint8]
_GUARD = 192


class Stretch:
    """Memory for one case: arrays cut from it lie between guard bytes, everything holds random bytes at first.

    Both kernel sets work at the same addresses, one after the other, and then every byte is compared: results, guards,
    and inputs that nobody may touch.
    """

    def __init__(self, rng: np.random.Generator, num_bytes: int) -> None:
        self.rng = rng
        self.memory: Bytes = rng.integers(0, 256, num_bytes, dtype=np.uint8)
        self.names: list[tuple[int, int, str]] = []
        self._used = _GUARD
        self._undefined: list[tuple[int, int]] = []
        self._tables: list[int] = []

    def cut(self, name: str, num_bytes: int, alignment: int = 1) -> int:
        """Return the address of ``num_bytes`` random bytes: a multiple of ``alignment``, and of more only by chance."""
        base = self.memory.ctypes.data
        offset = self._used + int(self.rng.integers(0, 64))
        offset += -(base + offset) % alignment
        end = offset + num_bytes
        assert end + _GUARD <= self.memory.size, f"a stretch of {self.memory.size} bytes is too small for {name}"
        self._used = end + _GUARD
        self.names.append((offset, end, name))
        return base + offset

    def put(self, name: str, values: NDArray[np.generic] | torch.Tensor) -> int:
        """Return the address of a copy of ``values``, aligned to its number type only."""
        array = values.reshape(-1).view(torch.uint8).numpy() if isinstance(values, torch.Tensor) else values
        width = values.itemsize if isinstance(values, torch.Tensor) else array.dtype.itemsize
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self.cut(name, flat.size, width)
        self.at(address, flat.size)[:] = flat
        return address

    def put_table(self, name: str, addresses: NDArray[np.integer] | list[int]) -> int:
        """Return the address of an int64 table of addresses in this stretch, 0 for nowhere."""
        address = self.put(name, np.asarray(addresses, np.int64))
        first = address - self.memory.ctypes.data
        self._tables.extend(range(first, first + 8 * len(addresses), 8))
        return address

    def moved(self, memory: Bytes, distance: int) -> Bytes:
        """Return a copy of ``memory`` in which every table's addresses are ``distance`` further."""
        elsewhere: Bytes = np.array(memory)
        for offset in self._tables:
            entry = elsewhere[offset : offset + 8].view(np.int64)
            entry[0] += distance if entry[0] else 0
        return elsewhere

    def holds(self, address: int) -> bool:
        return 0 <= address - self.memory.ctypes.data < self.memory.size

    def at(self, address: int, num_bytes: int) -> Bytes:
        offset = address - self.memory.ctypes.data
        return self.memory[offset : offset + num_bytes]

    def leave_undefined(self, address: int, num_bytes: int) -> None:
        """Exclude bytes from the comparison: scratch, and results that an error leaves open."""
        offset = address - self.memory.ctypes.data
        self._undefined.append((offset, offset + num_bytes))

    def difference(self, expected: Bytes) -> str | None:
        """Return where the memory first differs from ``expected``, in words, or None."""
        differs = self.memory != expected
        for begin, end in self._undefined:
            differs[begin:end] = False
        places = np.flatnonzero(differs)
        if not len(places):
            return None
        first = int(places[0])
        where = next((f"byte {first - b} of {name}" for b, e, name in self.names if b <= first < e), "a guard byte")
        return f"{where} is 0x{self.memory[first]:02x}, expected 0x{expected[first]:02x}; {len(places)} bytes differ"


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """Which rows a token has: int32 [T, W] each; every (rank, row) at most once."""

    rank_TW: NDArray[np.int32]
    row_TW: NDArray[np.int32]
    num_rows_R: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return int(self.rank_TW.shape[0])

    @property
    def width(self) -> int:
        return int(self.rank_TW.shape[1])


def draw_entries(rng: np.random.Generator, num_tokens: int, width: int, num_ranks: int, *, compact: bool) -> Entries:
    """Draw entries with spare rows between them: compact (distinct, ascending, packed), or any ranks in any order."""
    if compact:
        rank_TW = np.full((num_tokens, width), -1, np.int32)
        for ranks_W in rank_TW:
            chosen = rng.choice(num_ranks, size=rng.integers(0, min(width, num_ranks) + 1), replace=False)
            ranks_W[: len(chosen)] = np.sort(chosen)
    else:
        rank_TW = rng.integers(-1, num_ranks, (num_tokens, width), dtype=np.int32)
        rank_TW[rng.random((num_tokens, width)) < rng.choice([0.0, 0.3, 1.0], p=[0.5, 0.4, 0.1])] = -1
    return draw_rows(rng, rank_TW, num_ranks)


def draw_rows(rng: np.random.Generator, rank_TW: NDArray[np.int32], num_ranks: int) -> Entries:
    """Give every entry a row of its own, in any order, and leave up to three rows of each rank unnamed."""
    row_TW = np.full_like(rank_TW, -1)
    num_rows_R = []
    for rank in range(num_ranks):
        named = np.argwhere(rank_TW == rank)
        num_rows = len(named) + int(rng.integers(0, 4))
        row_TW[named[:, 0], named[:, 1]] = rng.permutation(num_rows)[: len(named)]
        num_rows_R.append(num_rows)
    return Entries(rank_TW=rank_TW, row_TW=row_TW, num_rows_R=num_rows_R)


def draw_skipped(rng: np.random.Generator, entries: Entries) -> frozenset[int]:
    """Draw the ranks whose entries are to be skipped: none in half of the cases."""
    chance = rng.choice([0.0, 0.5, 1.0], p=[0.5, 0.4, 0.1])
    return frozenset(np.flatnonzero(rng.random(len(entries.num_rows_R)) < chance).tolist())


def put_peers(
    stretch: Stretch,
    name: str,
    entries: Entries,
    row_bytes: int,
    alignment: int,
    skipped: frozenset[int] = frozenset(),
) -> tuple[int, list[int]]:
    """Cut every rank's array; return the table's address and the arrays'.

    0 stands for the skipped ranks, and may stand for one that no entry names.
    """
    bases = [stretch.cut(f"{name}[{r}]", n * row_bytes, alignment) for r, n in enumerate(entries.num_rows_R)]
    named = set(entries.rank_TW.ravel().tolist())
    kept = [r not in skipped and (r in named or stretch.rng.random() < 0.5) for r in range(len(bases))]
    table = [base if keep else 0 for base, keep in zip(bases, kept, strict=True)]
    return stretch.put_table(f"table of {name}", table), bases


def put_entries(stretch: Stretch, entries: Entries) -> tuple[int, int]:
    """Return the addresses of entry_rank and entry_row."""
    return stretch.put("entry_rank", entries.rank_TW), stretch.put("entry_row", entries.row_TW)


def draw_starts(rng: np.random.Generator, rows: NDArray[np.int32]) -> tuple[NDArray[np.int32], int]:
    """Draw the first rows of bins of these sizes, apart, in any order and with gaps, and how many rows that takes."""
    start, end = np.zeros_like(rows), 0
    for one in rng.permutation(rows.size):
        start.flat[one] = end + rng.integers(0, 3)
        end = int(start.flat[one] + rows.flat[one])
    return start, end + 1


def draw_range(rng: np.random.Generator, num_tokens: int) -> tuple[int, int]:
    """Draw [first, last): everything, nothing, or a part."""
    if rng.random() < 0.4:
        return 0, num_tokens
    first, last = sorted(rng.integers(0, num_tokens + 1, 2).tolist())
    return first, last


_AWKWARD = [
    *(0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf")),
    *(1e-45, -1e-45, 1e-39, 6e-8, -6e-8, 5e-5, 65504.0, 65520.0, 65519.9, 3.4e38, -3.4e38, 448.0, 464.0, 1e-4),
]


def draw_numbers(rng: np.random.Generator, rows: int, hidden: int, element: Element) -> torch.Tensor:
    """Draw [rows, hidden]: each row at its own magnitude, a third of the rows with awkward numbers among them."""
    magnitude = 10.0 ** rng.uniform(-7, 4, (rows, 1))
    x = torch.from_numpy((rng.standard_normal((rows, hidden)) * magnitude).astype(np.float32)).to(element.dtype)
    for row in range(rows):
        if rng.random() < 0.33:
            where = torch.from_numpy(rng.random(hidden) < rng.choice([0.01, 0.2]))
            awkward = torch.tensor(rng.choice(_AWKWARD[4 * (rng.random() < 0.5) :], hidden), dtype=torch.float32)
            x[row] = torch.where(where, awkward.to(element.dtype), x[row])
    return x
