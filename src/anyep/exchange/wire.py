"""The wire: which bytes a row is made of, and how a caller's tensors become them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from anyep.exchange.arguments import CPU, check_choice, check_tensor, dtype_text
from anyep.numerics.formats import Element, ScaleFormat

ELEMENTS = {element.dtype: element for element in Element}
"""Dtypes that arithmetic knows: inputs of quantisation, and what combine sums."""
_PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SCALE_FORMATS = {"fp32": ScaleFormat.FP32, "pow2": ScaleFormat.POWER_OF_TWO, "ue8m0": ScaleFormat.UE8M0}
_RAW = {"raw8": torch.uint8, "raw16": torch.int16, "raw32": torch.int32, "raw64": torch.int64}
WIRES = (*_PLAIN, "fp8", *_RAW)
SCALES = tuple(_SCALE_FORMATS)


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Dtype of a row on its way, and of its scales where it has any."""

    name: str
    dtype: torch.dtype
    hidden: int
    scale_format: ScaleFormat | None
    carried_columns: int = 0
    """columns of 4 bytes that only travel beside a row: the caller's own scales, or whatever it likes"""
    carried_dtype: torch.dtype = torch.float32
    by_column: bool = False
    """whether handles can be recalled, and sums stand in the order of columns (``reduce="column"``), not of ranks"""

    @property
    def carried(self) -> bool:
        """Whether rows are bytes with no meaning here, of any dtype."""
        return self.name not in _PLAIN and self.scale_format is None

    @property
    def output_dtype(self) -> torch.dtype:
        """What experts are expected to return: the wire's dtype where that is one to compute with."""
        return self.dtype if self.dtype in ELEMENTS else torch.bfloat16

    @property
    def row_bytes(self) -> int:
        return self.hidden * int(self.dtype.itemsize)

    @property
    def scale_columns(self) -> int:
        """Columns of the scales tensor; 0 without scales."""
        return self.carried_columns if self.scale_format is None else self.scale_format.columns(self.hidden)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.carried_dtype if self.scale_format is None else self.scale_format.dtype

    @property
    def scale_bytes(self) -> int:
        return 4 * self.scale_columns


def make_wire(name: object, scales: object, hidden: int, side_words: int = 0) -> Wire:
    """Check the names and return the wire; ValueError lists the choices."""
    checked = check_choice("wire", name, WIRES)
    scale_name = check_choice("scales", scales, SCALES)
    if checked in _RAW and scale_name == "fp32":
        return carrying_wire(_RAW[checked], hidden, side_words, torch.int32, by_column=True)
    if checked != "fp8" and scale_name != "fp32":
        raise ValueError(f"scales={scale_name!r} goes with wire='fp8', got wire={checked!r}")
    if side_words and checked not in _RAW:
        raise ValueError(f"side_words goes with the wires {', '.join(_RAW)}, got wire={checked!r}")
    fp8 = checked == "fp8"
    return Wire(
        name=checked,
        dtype=torch.float8_e4m3fn if fp8 else _PLAIN[checked],
        hidden=hidden,
        scale_format=_SCALE_FORMATS[scale_name] if fp8 else None,
    )


def carrying_wire(
    dtype: torch.dtype, hidden: int, columns: int, columns_dtype: torch.dtype, *, by_column: bool = False
) -> Wire:
    """Return a wire for rows of any dtype, bytes as they are, with any number of columns of 4 bytes beside each."""
    return Wire(
        name="carried",
        dtype=dtype,
        hidden=hidden,
        scale_format=None,
        carried_columns=columns,
        carried_dtype=columns_dtype,
        by_column=by_column,
    )


class Rows(NamedTuple):
    """The rows that a caller wants sent: as they are, already quantised, or to be quantised on the way."""

    x: torch.Tensor
    scales: torch.Tensor | None
    quantise_from: Element | None

    @property
    def num_tokens(self) -> int:
        return self.x.shape[0]


def check_rows(wire: Wire, x: object, device: torch.device = CPU) -> Rows:
    """Check ``x``: a tensor [T, H] on ``device``, or for fp8 also a pair (fp8 [T, H], scales).

    TypeError or ValueError otherwise. With carried columns: a pair (rows [T, H], [T, columns]).
    """
    if wire.carried_columns:
        return _check_pair(wire, x, device, wanted="a pair (rows, side words)", legend="[T, side_words]")
    if isinstance(x, tuple):
        return _check_quantised(wire, x, device)
    if isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn and wire.scale_format is not None:
        raise TypeError("x is float8_e4m3fn without scales; pass the pair (x, scales), or x in bfloat16")
    quantised = wire.scale_format is not None
    dtypes = ELEMENTS if quantised else (wire.dtype,)
    checked = check_tensor("x", x, dtypes=dtypes, shape=_rows_of(x, wire), legend="[T, hidden]", device=device)
    return Rows(checked, None, ELEMENTS[checked.dtype] if quantised else None)


def _rows_of(x: object, wire: Wire) -> tuple[int | None, int]:
    """Return [T, H], with T as ``x`` has it, if it has any."""
    return (x.shape[0] if isinstance(x, torch.Tensor) and x.ndim else None), wire.hidden


def _check_quantised(wire: Wire, pair: tuple[object, ...], device: torch.device) -> Rows:
    if not wire.scale_columns:
        raise TypeError(
            f"x is a tuple, which only wire='fp8' takes; this buffer's wire is {wire.name!r}: pass a tensor"
        )
    return _check_pair(wire, pair, device, wanted="a tensor or a pair (fp8, scales)", legend="[T, scale groups]")


def _check_pair(wire: Wire, pair: object, device: torch.device, *, wanted: str, legend: str) -> Rows:
    """Check rows with what travels beside them."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        came = f"a tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair).__name__
        raise TypeError(f"x must be {wanted}, got {came}")
    shape = _rows_of(pair[0], wire)
    rows = check_tensor("x[0]", pair[0], dtypes=[wire.dtype], shape=shape, legend="[T, hidden]", device=device)
    if not isinstance(pair[1], torch.Tensor):
        raise TypeError(f"x[1] must be a {dtype_text(wire.scale_dtype)} tensor {legend}, got {type(pair[1]).__name__}")
    beside = check_tensor(
        "x[1]",
        pair[1].contiguous(),  # grouped-matmul libraries keep scales column-major; copying T * G numbers is cheap
        dtypes=[wire.scale_dtype],
        shape=(rows.shape[0], wire.scale_columns),
        legend=legend,
        device=device,
    )
    return Rows(x=rows, scales=beside, quantise_from=None)
