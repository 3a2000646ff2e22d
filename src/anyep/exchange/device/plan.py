"""Where a rank's tokens go, in device memory: a plan of ``exchange/handle.py`` whose numbers nobody has waited for.

One block of memory: what settle found, the verdict of route and the peer tables; then the ledger; then entries; then
what a padded batch's handle needs. The first two parts, the *record*, are what a host that wants to know everything
brings over in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from anyep.errors import Unavailable
from anyep.exchange.device.devices import allocate
from anyep.exchange.geometry import Geometry
from anyep.exchange.handle import SendPlan
from anyep.kernels.spec_device import NUM_PLACES, SUMMARY_WORDS, DeviceKernels
from anyep.kernels.tapes import counted_from
from anyep.transport.base import Words

if TYPE_CHECKING:
    from anyep.exchange.device.endpoint import DeviceEndpoint
    from anyep.exchange.endpoint import Endpoint

PLAN, IDX, WEIGHTS = range(3)
"""Bases (kernels/tapes.py) of what routes: the plan's memory, the caller's topk_idx and topk_weights."""
_KNOWN = (
    "rank_rows",
    "expert_rows",
    "send_start",
    "recv_rows",
    "recv_start",
    "counts",
    "block_start",
    "filled_rows",
)
"""Fields of the ledger that a device fills."""


class PlanMap(SendPlan):
    """Where everything lies in the memory of plans of one size: addresses are counted from a base."""

    __slots__ = (
        *("board_addr", "counts_first", "first_behind", "keeps_weights", "num_experts", "num_ranks"),
        *("num_record_words", "num_words"),
        *("summary_addr", "tables_addr", "verdict_addr", "weights_addr"),
    )

    def __init__(self, end: DeviceEndpoint, geometry: Geometry, num_tokens: int, *, keeps_weights: bool) -> None:
        self.num_ranks = ranks = end.num_ranks
        self.num_experts = end.placement.num_experts
        self.keeps_weights = keeps_weights
        first_word = SUMMARY_WORDS + 1 + NUM_PLACES * ranks
        shape = geometry.plan_shape(num_tokens)
        self.first_behind = 2 * first_word + shape.num_words
        """in int32: padded, where each source's rows begin in each block, and how many [L, R]; the caller's weights"""
        num_sources = 2 * ranks * geometry.shape.num_local if geometry.padded else 0
        num_weights = num_tokens * end.num_topk if keeps_weights else 0
        first_board = (self.first_behind + num_sources + num_weights + 1) // 2 * 2
        keeps_board = geometry.row.token and not geometry.padded
        num_board = ranks * end.boards.message_bytes // 4 if keeps_board else 0
        self.num_words = first_board + num_board
        self.num_record_words = first_word + geometry.shape.num_words // 2
        self.summary_addr = counted_from(PLAN)
        self.verdict_addr = self.summary_addr + 8 * SUMMARY_WORDS
        self.tables_addr = self.verdict_addr + 8
        behind_addr = self.summary_addr + 4 * self.first_behind
        self.weights_addr = behind_addr + 4 * num_sources if keeps_weights else 0
        self.board_addr = self.summary_addr + 4 * first_board if keeps_board else 0
        """a copy of what all ranks announced, where rows say which token they are: handles show it (``announced``)"""
        super().__init__(geometry, _NOT_HERE, self.summary_addr + 8 * first_word, num_tokens, shape)
        self.counts_first = self.first(self.field("counts"))
        """which int32 the counts begin with"""

    def first(self, addr: int) -> int:
        """Return which int32 of the plan's memory an address is."""
        return (addr - self.summary_addr) // 4

    @property
    def table_addr(self) -> list[int]:
        """Where each part's peer table lies."""
        return [self.tables_addr + 8 * self.num_ranks * part for part in range(NUM_PLACES)]

    @property
    def source_addr(self) -> tuple[int, int]:
        """Where the numbers of :meth:`DevicePlan.source_begin` and its count lie."""
        begin = self.summary_addr + 4 * self.first_behind
        return begin, begin + 4 * self.num_ranks * self.geometry.shape.num_local

    def compact_entries(self, end: DeviceEndpoint) -> tuple[int, int]:
        """Return where ranks and slots of entries lie that name each rank once a token; 0 where nobody needs them."""
        if end.padded_slots is None or not self.geometry.padded:
            return 0, 0
        return self.compact_rank_addr, self.compact_slot_addr


class DevicePlan(SendPlan):
    """A plan whose addresses are the device's. ``numbers`` waits for the device, once."""

    __slots__ = ("changes", "device_memory", "home", "map", "routes", "tokens_R")

    def __init__(self, end: DeviceEndpoint, plan_map: PlanMap) -> None:
        self.map = plan_map
        self.geometry = plan_map.geometry
        self.num_tokens = plan_map.num_tokens
        self.by_column = False
        self.memory = _NOT_HERE
        self.device_memory = allocate(end.device, (plan_map.num_words,), torch.int32, end.account.__str__)
        self.home = end.device.current_stream()
        """the stream on which it was allocated"""
        self.changes = end.device.capturing()
        """whether it belongs to a graph, whose replays write it again"""
        self.routes: torch.Tensor | None = None
        """the caller's topk_idx, until what routes it was launched and is followed by the caller's stream"""
        self.tokens_R: NDArray[np.int32] = _NOT_HERE
        """T of each rank, where its announcement says so"""

    def __getattr__(self, name: str) -> Any:
        """Return what is set in no plan of its own: that of the map, addresses in this plan's memory."""
        value = getattr(self.map, name)
        if value and name.endswith("_addr"):
            return value - self.map.summary_addr + self.device_memory.data_ptr()
        return value

    @property
    def max_tokens(self) -> int:
        """How many tokens a rank may have had, in the padded layout; with a handle others may be allowed now."""
        return self.geometry.shape.block_rows // self.map.num_ranks

    @property
    def record(self) -> torch.Tensor:
        """int64: summary, verdict, tables, and the ledger as int32; a view."""
        return self.device_memory[: 2 * self.map.num_record_words].view(torch.int64)

    def source_begin(self) -> torch.Tensor:
        """Return of a padded batch where each source's rows begin in each block: int32 [L, R], a view."""
        return self._of_sources(0)

    def source_count(self) -> torch.Tensor:
        """Return of a padded batch how many rows of each source are in each block: int32 [L, R], a view."""
        return self._of_sources(1)

    def _of_sources(self, which: int) -> torch.Tensor:
        experts, ranks = self.geometry.shape.num_local, self.map.num_ranks
        return self.device_memory.as_strided(
            (experts, ranks), (ranks, 1), self.map.first_behind + which * experts * ranks
        )

    def kept_weights(self) -> torch.Tensor | None:
        """Return the copy of the caller's weights, fp32 [T, K], for combine; None unless padded. A view."""
        if not self.map.keeps_weights:
            return None
        num_topk, first = self.geometry.num_topk, self.map.first(self.map.weights_addr)
        return self.device_memory.view(torch.float32).as_strided((self.num_tokens, num_topk), (num_topk, 1), first)

    def keep_record(self, words: Words) -> None:
        """Take the record that came to the host."""
        self.memory = words.view(np.int32)[-self.geometry.shape.num_words :]

    def numbers(self, name: str) -> NDArray[np.int32]:
        """Return a field of the ledger; waits for the device where it did not come along with the dispatch."""
        if name == "source_tokens" and self.tokens_R is not _NOT_HERE:
            return self.tokens_R
        if name == "source_rows":
            summed: NDArray[np.int32] = self.numbers("recv_rows").reshape(self.map.num_ranks, -1).sum(1)
            return summed
        if name not in _KNOWN:
            raise Unavailable(f"{name} is not kept on a device; CPU tensors have it")
        if self.memory is _NOT_HERE or self.changes:
            self.keep_record(self.record.cpu().numpy())
        return super().numbers(name)

    def topk_idx(self) -> torch.Tensor:
        """Return topk_idx [T, K] on the device, -2 for an index that names no expert; a view."""
        geometry = self.geometry
        first = self.map.first(self.map.idx_addr)
        words = self.num_tokens * geometry.num_topk * self.idx_bytes // 4
        numbers = self.device_memory[first : first + words]
        return numbers.view(geometry.idx_dtype).view(self.num_tokens, geometry.num_topk)


_NOT_HERE: NDArray[np.int32] = np.zeros(0, np.int32)


def map_of(end: DeviceEndpoint, geometry: Geometry, num_tokens: int, *, keeps_weights: bool) -> PlanMap:
    """Return where everything lies in plans of that size, made once."""
    key = geometry, num_tokens, keeps_weights
    return end.forms.get(key, lambda: PlanMap(end, geometry, num_tokens, keeps_weights=keeps_weights))


def make_plan(end: Endpoint, topk_idx: torch.Tensor, geometry: Geometry, topk_weights: torch.Tensor | None) -> SendPlan:
    """Make room for a plan of what the caller wants sent; the first half of the dispatch routes it.

    A bad expert is found when all ranks are. Entries that shall stand in the order of columns are routed at once, on
    the caller's stream.
    """
    from anyep.exchange.device.endpoint import DeviceEndpoint

    assert isinstance(end, DeviceEndpoint), "plans of a device are made on its endpoint"
    keeps = geometry.padded and topk_weights is not None
    plan = DevicePlan(end, map_of(end, geometry, topk_idx.shape[0], keeps_weights=keeps))
    if end.wire.by_column and not geometry.by_expert:
        bases = [plan.device_memory.data_ptr(), topk_idx.data_ptr(), address_if_any(topk_weights)]
        device, where = end.device, plan.map
        route = end.forms.get(("route", where), lambda: device.tape(lambda kernels: route_on(kernels, end, where)))
        device.play(route, bases, plan.home)
        _sort_by_column(plan, topk_idx, end.owner_E)
    else:
        plan.routes = topk_idx
    return plan


def route_on(kernels: DeviceKernels, end: DeviceEndpoint, plan: PlanMap) -> None:
    """Begin to route: copy what the caller may change, and find entries."""
    kernels.begin_route(
        *(counted_from(IDX), plan.idx_bytes, plan.num_tokens, end.num_topk),
        *(end.placement.num_experts, end.num_ranks, end.tables.rank_addr, int(plan.geometry.by_expert)),
        *(counted_from(WEIGHTS) if plan.keeps_weights else 0, plan.idx_addr, plan.weights_addr),
        *(plan.entry_rank_addr, plan.entry_slot_addr, *plan.compact_entries(end)),
    )


def _sort_by_column(plan: DevicePlan, topk_idx: torch.Tensor, owner_E: torch.Tensor) -> None:
    """Let each token's entries stand in the order of the last column that each serves (exchange/ordering.py)."""
    plan.by_column = True
    where = plan.map
    numbers, shape = plan.device_memory, (plan.num_tokens, where.width)
    num_topk = plan.geometry.num_topk

    def entries(addr: int) -> torch.Tensor:
        first = where.first(addr)
        return numbers[first : first + plan.num_tokens * where.width].view(shape)

    ranks_TW, slots_TW = entries(where.entry_rank_addr), entries(where.entry_slot_addr)
    idx = topk_idx.long()
    owner_TK = torch.where(idx < 0, -1, owner_E[idx.clamp(0, owner_E.numel() - 1)])
    serves_TWK = owner_TK[:, None, :] == ranks_TW[:, :, None]
    columns = torch.arange(1, num_topk + 1, device=idx.device)
    last_TW = torch.where(ranks_TW < 0, num_topk + 1, (serves_TWK * columns).amax(2))
    order_TW = last_TW.argsort(dim=1, stable=True)
    for part in (ranks_TW, slots_TW):
        part.copy_(part.gather(1, order_TW))


def address_if_any(tensor: torch.Tensor | None) -> int:
    """Return where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


class DeviceCounts(Sequence[int]):
    """Rows of each local expert, on the device; looking at a number waits for it.

    Once, unless they belong to a graph, whose replays change them.
    """

    def __init__(self, plan: DevicePlan) -> None:
        self._memory = plan.device_memory
        self._first = plan.map.counts_first
        self._count = plan.geometry.shape.num_local
        self._changes = plan.changes
        self._numbers: list[int] | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """int32 [L]: what kernels read, without waiting."""
        return self._memory[self._first : self._first + self._count]

    def _known(self) -> list[int]:
        if self._numbers is None or self._changes:
            self._numbers = self.tensor.tolist()
        return self._numbers

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._known()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._known())

    def __eq__(self, other: object) -> bool:
        return self._known() == (list(other) if isinstance(other, DeviceCounts) else other)

    __hash__ = None  # type: ignore[assignment]  # as lists have none

    def __repr__(self) -> str:
        return f"<rows of {len(self)} experts on {self.tensor.device}>"
