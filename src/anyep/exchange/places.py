"""From all announcements to every place of every row, by the compiled bookkeeping; and why it may refuse."""

from __future__ import annotations

from anyep.errors import CapacityError
from anyep.exchange import ledger
from anyep.exchange.desk import Desk
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.geometry import Geometry
from anyep.exchange.handle import SendPlan
from anyep.exchange.opening import BODY, RefusedError, check_agreement
from anyep.exchange.outgoing import Outgoing
from anyep.transport.base import Words


def size_up(
    end: Endpoint, out: Outgoing, desk: Desk, frame: int, opened_RW: Words, header: Words, limit_rows: int, step: str
) -> bool:
    """Fill the ledger and the peer tables of rows up to here; False where a rank has to offer more memory first.

    ``frame``: exchange/frame.py. Raises RefusedError, on all ranks.
    """
    plan, geometry = out.plan, out.geometry
    found = end.books.size_up(frame, opened_RW, header, end.bases.base_RS, plan.first_addr, limit_rows)
    if found == ledger.SETTLED:
        return True
    if found == ledger.DISAGREE:
        check_agreement(header, opened_RW, step)
    if found == ledger.STATIC_TOO_SMALL:
        raise RefusedError(CapacityError(f"{step}: {_too_many_rows(geometry, plan)}"))
    if found == ledger.BLOCK_TOO_SMALL:
        raise RefusedError(CapacityError(f"{step}: {_too_many_for_an_expert(geometry)}"))
    if found == ledger.UNKNOWN_PLACE:
        connect(end, out, desk, opened_RW, opened_RW, BODY, limit_rows=limit_rows)
    return bool(found == ledger.UNKNOWN_PLACE)


def _too_many_rows(geometry: Geometry, plan: SendPlan) -> str:
    limit, rows = geometry.shape.static_rows, plan.numbers("filled_rows").tolist()
    over = ", ".join(f"rank {rank} would receive {n}" for rank, n in enumerate(rows) if n > limit)
    return f"static_rows={limit} is too small: {over}; raise static_rows or send fewer tokens"


def _too_many_for_an_expert(geometry: Geometry) -> str:
    rows = geometry.shape.block_rows
    return (
        f"an expert would receive more than R * max_tokens_per_rank = {rows} rows, which a block of the padded "
        "layout holds: topk_idx names one expert twice for a token; name each once, or use layout='expert'"
    )


def connect(
    end: Endpoint, out: Outgoing, desk: Desk, opened_RW: Words, offered_RW: Words, offer: int, *, limit_rows: int
) -> None:
    """Fill the peer tables: of rows that this rank sends, or (``limit_rows`` -1) of every place on this host.

    ``offered`` [R, W]: where batches are put, from column ``offer`` on.
    """
    plan, geometry, forward = out.plan, out.geometry, limit_rows < 0
    while True:
        unknown = end.books.connect(
            opened_RW,
            BODY,
            offered_RW,
            offer,
            end.bases.base_RS,
            geometry.part_bytes,
            end.rank,
            limit_rows,
            plan.field("rank_rows"),
            plan.field("batch_rows"),
            desk.recv_slots_R,
            plan.field("source_rows"),
            geometry.slot_offsets,
            desk.forwarded.values if forward else desk.direct.values,
            desk.spare.values if forward else desk.arrived.values,
            desk.spare_R if forward else desk.to_R,
            desk.spare_R if forward else desk.from_R,
            end.far_R,
            desk.spare_tally if forward else desk.tally,
        )
        if unknown < 0:
            return
        end.bases.look_up(end.transport, unknown >> 32, unknown & 0xFFFFFFFF)
