"""The file format of routing traces, schema 1: an npz, deflated, without pickles.

N is the tokens of all entries one after another, K top-k, E experts.

================  =======================  ======================================================================
key               dtype and shape          meaning
================  =======================  ======================================================================
``schema``        int64 []                 1
``description``   str []                   where the routing comes from
``num_experts``   int64 []                 E
``num_topk``      int64 []                 K
``layer``         int64 [entries]          which layer's gate chose
``step``          int64 [entries]          when
``rank``          int64 [entries]          whose tokens they were
``num_tokens``    int64 [entries]          T of each entry
``topk_idx``      uint8/16/32 [N, K]       the chosen experts, in the smallest dtype that holds E - 1
``absent``        uint8 [ceil(N K / 8)]    ``np.packbits`` of [N, K]: 1 where no expert was chosen (its ``topk_idx``
                                           is 0); length 0 where every choice is an expert
``topk_weights``  float16 [N, K]           gate weights, rounded to nearest even; beyond 65504 infinite
================  =======================  ======================================================================

float16 and not scaled bytes: it holds any weight a caller may pass, NaN included, and a value survives every further
round trip bit for bit.
"""

from __future__ import annotations

import io
import os
import secrets
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
TABLE = ("layer", "step", "rank", "num_tokens")
"""the columns of :attr:`TraceColumns.table`"""
_KEYS = ("schema", "description", "num_experts", "num_topk", *TABLE, "topk_idx", "absent", "topk_weights")
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError, KeyError)
"""what zipfile and numpy raise for bytes that are no npz or a damaged one"""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceColumns:
    """A trace as the file holds it."""

    description: str
    num_experts: int
    num_topk: int
    table: NDArray[np.int64]
    """[entries, 4]: layer, step, rank, num_tokens"""
    topk_idx: NDArray[np.int32]
    """[N, K], -1 where no expert was chosen"""
    topk_weights: NDArray[np.float16]
    """[N, K]"""


def encode(columns: TraceColumns) -> bytes:
    """Return the file's content: the same bytes for the same trace."""
    absent = columns.topk_idx < 0
    arrays = {
        "schema": np.array(SCHEMA),
        "description": np.array(columns.description),
        "num_experts": np.array(columns.num_experts),
        "num_topk": np.array(columns.num_topk),
        **{key: columns.table[:, column] for column, key in enumerate(TABLE)},
        "topk_idx": np.where(absent, 0, columns.topk_idx).astype(_idx_dtype(columns.num_experts)),
        "absent": np.packbits(absent) if absent.any() else np.empty(0, np.uint8),
        "topk_weights": columns.topk_weights,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


def decode(content: bytes, name: str) -> TraceColumns:
    """Read a file's content. Raises ValueError that names ``name`` for anything but a whole trace of this schema."""
    arrays = _unzip(content, name)
    num_experts, num_topk = int(arrays["num_experts"]), int(arrays["num_topk"])
    table = np.stack([arrays[key] for key in TABLE], axis=1)
    N = int(table[:, 3].sum())
    shape = (N, num_topk)
    if (table < 0).any():
        raise ValueError(f"{name}: layer, step, rank and num_tokens must not be negative")
    for key, dtype in (("topk_idx", _idx_dtype(num_experts)), ("topk_weights", np.dtype(np.float16))):
        found = arrays[key]
        if found.dtype != dtype or found.shape != shape:
            raise ValueError(
                f"{name}: {key} is {found.dtype} {list(found.shape)}, but {dtype} {list(shape)} belongs to "
                f"top-{num_topk} of {num_experts} experts and the entries' {N} tokens"
            )
    highest = int(arrays["topk_idx"].max(initial=0))
    if highest >= num_experts:
        raise ValueError(f"{name}: topk_idx names expert {highest}; experts are 0 to {num_experts - 1}")
    return TraceColumns(
        description=str(arrays["description"]),
        num_experts=num_experts,
        num_topk=num_topk,
        table=table,
        topk_idx=np.where(_absent(arrays["absent"], shape, name), -1, arrays["topk_idx"].astype(np.int32)),
        topk_weights=arrays["topk_weights"],
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write ``path`` at once or not at all. Raises OSError that names it; nothing is left behind then."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"cannot write the routing trace of {len(content)} bytes ({error.strerror}); nothing was left there: "
                "make room or name another path",
                str(path),
            ) from error
        raise


def npz_path(path: str | os.PathLike[str]) -> Path:
    """Return ``path``, which must end in .npz (ValueError)."""
    file = Path(path)
    if file.suffix != ".npz":
        raise ValueError(f"a routing trace's path must end in .npz, got {str(file)!r}")
    return file


def rank_path(file: Path, rank: int | str) -> Path:
    """Return where one rank of a job writes: ``trace.npz``, 3 gives ``trace.rank3.npz``."""
    return file.with_name(f"{file.stem}.rank{rank}{file.suffix}")


def _idx_dtype(num_experts: int) -> np.dtype[Any]:
    return np.min_scalar_type(max(num_experts - 1, 0))


def _unzip(content: bytes, name: str) -> Arrays:
    """Return every key's array. Whole members are read first: their checksums are right before an array is made."""
    if content[:2] != b"PK":
        raise ValueError(f"{name} is no npz file (it begins with {content[:8]!r}), so it is no routing trace")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            present = {entry.removesuffix(".npy") for entry in archive.namelist()}
            members = {key: archive.read(f"{key}.npy") for key in _KEYS if key in present}
        arrays = {
            key: np.lib.format.read_array(io.BytesIO(member), allow_pickle=False) for key, member in members.items()
        }
    except _UNREADABLE as error:
        raise ValueError(f"{name} is truncated or damaged ({error}); copy it again, or record it again") from error
    _check_keys(arrays, name)
    return arrays


def _check_keys(arrays: Arrays, name: str) -> None:
    schema = arrays.get("schema")
    if schema is None:
        raise ValueError(f"{name} is an npz file without the key 'schema', so it is no routing trace")
    if schema.shape != () or schema != SCHEMA:
        raise ValueError(
            f"{name} has routing trace schema {schema}; this version of anyep knows schema {SCHEMA} only: use the "
            "version that wrote the file, or record it again"
        )
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise ValueError(
            f"{name} lacks {', '.join(missing)}; a routing trace of schema {SCHEMA} has {', '.join(_KEYS)}"
        )
    entries = (arrays["num_tokens"].size,)
    shapes = {"description": (), "num_experts": (), "num_topk": (), **dict.fromkeys(TABLE, entries)}
    for key, shape in shapes.items():
        found, wanted = arrays[key], "str" if key == "description" else "int64"
        if (found.dtype.name if found.dtype.kind != "U" else "str") != wanted or found.shape != shape:
            raise ValueError(f"{name}: {key} must be {wanted} {list(shape)}, got {found.dtype} {list(found.shape)}")


def _absent(packed: NDArray[Any], shape: tuple[int, int], name: str) -> NDArray[np.bool_]:
    count = shape[0] * shape[1]
    if packed.size == 0:
        return np.zeros(shape, np.bool_)
    if packed.dtype != np.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(
            f"{name}: absent must be uint8 [0] or [{-(-count // 8)}], got {packed.dtype} {list(packed.shape)}"
        )
    return np.unpackbits(packed, count=count).reshape(shape).astype(np.bool_)
