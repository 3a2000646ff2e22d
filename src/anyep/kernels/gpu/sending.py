"""What a dispatch sends, in one launch: rows, quantised or as they are, and beside them what each row is for.

Legend: T tokens, W entries a token, K top-k; PLACES, COLUMNS: W, K up to the next power of two; ELEMENT, SCALES,
NATIVE: kernels/gpu/codec.py; SCALES -1: rows go as they are. PIECE: bytes of such a row, or scale groups.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

from anyep.kernels.gpu.encode import quantise_token
from anyep.kernels.gpu.jit import kernel
from anyep.kernels.gpu.memory import fill_stretch, i32_at
from anyep.kernels.gpu.routing import route_token
from anyep.kernels.gpu.rows import scatter_token


@triton.jit
def send_token(
    token,
    piece,
    x_addr,
    hidden,
    width,
    entry_rank_addr,
    entry_row_addr,
    peer_x_addr,
    peer_scales_addr,
    topk_idx_addr,
    topk_weights_addr,
    num_topk,
    by_expert,
    expert_rank_addr,
    expert_local_addr,
    peer_idx_addr,
    peer_weights_addr,
    peer_token_addr,
    ELEMENT: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    IDX_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Send one piece of a token's row, or behind the last its routing."""
    if piece < tl.num_programs(1) - 1:
        first = piece.to(tl.int64) * PIECE
        if SCALES < 0:
            scatter_token(
                *(token, first, x_addr, hidden, width, entry_rank_addr, entry_row_addr, peer_x_addr, PLACES, PIECE)
            )
        else:
            quantise_token(
                *(token, first, x_addr, hidden, width, entry_rank_addr, entry_row_addr, peer_x_addr, peer_scales_addr),
                *(ELEMENT, SCALES, NATIVE, PLACES, PIECE),
            )
    else:
        route_token(
            *(token, topk_idx_addr, topk_weights_addr, num_topk, width, by_expert),
            *(expert_rank_addr, expert_local_addr, entry_rank_addr, entry_row_addr),
            *(peer_idx_addr, peer_weights_addr, peer_token_addr, IDX_BYTES, COLUMNS, PLACES),
        )


@kernel
def send(
    x_addr: tl.int64,
    hidden: tl.int64,
    num_tokens: tl.int64,
    step: tl.int64,
    width: tl.int64,
    entry_rank_addr: tl.int64,
    entry_row_addr: tl.int64,
    peer_x_addr: tl.int64,
    peer_scales_addr: tl.int64,
    topk_idx_addr: tl.int64,
    topk_weights_addr: tl.int64,
    num_topk: tl.int64,
    by_expert: tl.int64,
    expert_rank_addr: tl.int64,
    expert_local_addr: tl.int64,
    peer_idx_addr: tl.int64,
    peer_weights_addr: tl.int64,
    peer_token_addr: tl.int64,
    ELEMENT: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    IDX_BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    BOUNDED: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Grid (step, pieces of PIECE + 1): BOUNDED programs take every ``step``-th token, others one each."""
    piece = tl.program_id(1)
    if BOUNDED:
        for number in tl.range(tl.program_id(0), num_tokens, step, disable_licm=True):
            send_token(
                *(tl.cast(number, tl.int64), piece, x_addr, hidden, width, entry_rank_addr, entry_row_addr),
                *(peer_x_addr, peer_scales_addr, topk_idx_addr, topk_weights_addr, num_topk, by_expert),
                *(expert_rank_addr, expert_local_addr, peer_idx_addr, peer_weights_addr, peer_token_addr),
                *(ELEMENT, SCALES, NATIVE, IDX_BYTES, COLUMNS, PLACES, PIECE),
            )
    else:
        send_token(
            *(tl.program_id(0).to(tl.int64), piece, x_addr, hidden, width, entry_rank_addr, entry_row_addr),
            *(peer_x_addr, peer_scales_addr, topk_idx_addr, topk_weights_addr, num_topk, by_expert),
            *(expert_rank_addr, expert_local_addr, peer_idx_addr, peer_weights_addr, peer_token_addr),
            *(ELEMENT, SCALES, NATIVE, IDX_BYTES, COLUMNS, PLACES, PIECE),
        )


@kernel
def fill_gaps(
    gap_begin_addr: tl.int64,
    gap_end_addr: tl.int64,
    base0: tl.int64,
    bytes0: tl.int64,
    base1: tl.int64,
    bytes1: tl.int64,
    base2: tl.int64,
    bytes2: tl.int64,
    base3: tl.int64,
    bytes3: tl.int64,
    base4: tl.int64,
    bytes4: tl.int64,
    step: tl.int64,
    PIECE: tl.constexpr,
):
    """Grid (gaps, step, 5): the parts of a row."""
    part = tl.program_id(2)
    base = tl.where(part == 0, base0, tl.where(part == 1, base1, tl.where(part == 2, base2, 0)))
    base = tl.where(part == 3, base3, tl.where(part == 4, base4, base))
    row_bytes = tl.where(part == 0, bytes0, tl.where(part == 1, bytes1, tl.where(part == 2, bytes2, 0)))
    row_bytes = tl.where(part == 3, bytes3, tl.where(part == 4, bytes4, row_bytes))
    begin = tl.load(i32_at(gap_begin_addr) + tl.program_id(0)).to(tl.int64)
    end = tl.load(i32_at(gap_end_addr) + tl.program_id(0)).to(tl.int64)
    num_bytes = tl.where(base != 0, (end - begin) * row_bytes, 0)
    byte = tl.where(part == 2, 255, 0).to(tl.int64)
    fill_stretch(base + begin * row_bytes, num_bytes, byte, tl.program_id(1).to(tl.int64), step, PIECE)
