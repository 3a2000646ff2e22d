"""What a buffer is made from, checked, and what follows from it before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anyep.exchange.across import bound_bytes
from anyep.exchange.arguments import check_integer
from anyep.exchange.desk import Lanes, lanes_for
from anyep.exchange.eager import slot_bytes_for
from anyep.exchange.straight_rule import most_bytes_for
from anyep.exchange.wire import Wire, make_wire
from anyep.layout.hosts import group_ranks
from anyep.layout.placement import Placement, even_placement, mapped_placement
from anyep.layout.regions import MemoryAccount, RowBytes, account_step
from anyep.layout.trace_file import TraceRecorder
from anyep.transport.arena import rounded_to_segments
from anyep.transport.control import ControlLayout
from anyep.transport.registry import check_name

_MOST = 2**31 - 1
"""Row numbers and sizes are int32 in kernels."""
_MOST_EXPERTS = 1 << 20
_MOST_IN_FLIGHT = 1 << 10


@dataclass(frozen=True, kw_only=True)
class BufferOptions:
    """The arguments of a buffer; equal on all ranks, but for :data:`PRIVATE` ones."""

    hidden: int
    num_experts: int
    num_topk: int
    max_tokens_per_rank: int
    wire: str = "bf16"
    scales: str = "fp32"
    expert_alignment: int = 1
    static_rows: int | None = None
    placement: tuple[int, ...] | None = None
    transport: str = "auto"
    kernels: str = "cpu"
    num_threads: int | None = None
    arena_bytes: int | None = None
    timeout_s: float = 30.0
    record: str | None = None
    max_in_flight: int = 4
    eager_bytes: int | None = None
    interface: str | None = None
    side_words: int = 0
    device: str | None = None
    """None: the host's memory"""
    num_sms: int | None = None
    concurrent: bool = False
    """whether ranks of one device have streams of their own"""
    straight_bytes: int | None = None

    @property
    def ring(self) -> int:
        """Ring slots a lane: twice the operations in flight (transport/base.py has the argument)."""
        return 2 * self.max_in_flight

    def check(self) -> None:
        """Raise TypeError, ValueError or OSError, naming the argument."""
        check_integer("hidden", self.hidden, at_least=1, at_most=_MOST)
        check_integer("num_experts", self.num_experts, at_least=1, at_most=_MOST_EXPERTS)
        check_integer("num_topk", self.num_topk, at_least=1, at_most=_MOST_EXPERTS)
        check_integer("max_tokens_per_rank", self.max_tokens_per_rank, at_least=0, at_most=_MOST)
        check_integer("expert_alignment", self.expert_alignment, at_least=1, at_most=_MOST_EXPERTS)
        check_integer("side_words", self.side_words, at_least=0, at_most=_MOST)
        check_integer("max_in_flight", self.max_in_flight, at_least=1, at_most=_MOST_IN_FLIGHT)
        for name, value, least in (
            ("static_rows", self.static_rows, 0),
            ("num_threads", self.num_threads, 1),
            ("eager_bytes", self.eager_bytes, 0),
            ("straight_bytes", self.straight_bytes, 0),
            ("arena_bytes", self.arena_bytes, 0),
            ("num_sms", self.num_sms, 1),
        ):
            if value is not None:
                check_integer(name, value, at_least=least, at_most=None if name == "arena_bytes" else _MOST)
        self._check_timeout()
        self._check_placement()
        if self.interface is not None and not isinstance(self.interface, str):
            raise TypeError(f"interface must be the name of a network interface, got {self.interface!r}")
        if self.interface == "":
            raise ValueError("interface must be the name of a network interface, or None: the engine chooses; got ''")
        self.make_wire()
        check_name(self.transport)
        self._check_device()
        self.recorder(0)

    def _check_placement(self) -> None:
        if self.placement is None:
            return
        if not isinstance(self.placement, tuple):
            raise TypeError(f"placement must be a sequence of ranks, one an expert, got {self.placement!r}")
        for expert, rank in enumerate(self.placement):
            check_integer(f"placement[{expert}]", rank, at_least=0)
        if len(self.placement) != self.num_experts:
            raise ValueError(
                f"placement must name a rank for each of num_experts={self.num_experts} experts, "
                f"got {len(self.placement)}"
            )

    def _check_device(self) -> None:
        if (self.device is None) == (self.kernels == "gpu"):
            place = "device memory" if self.kernels == "gpu" else "host memory"
            raise ValueError(f"kernels={self.kernels!r} work on {place}, got device={self.device!r}; leave kernels out")
        if self.device is None and self.num_sms is not None:
            raise ValueError("num_sms goes with device='cuda'; num_threads is what CPU tensors are moved by")
        if self.device is None and self.transport == "cuda_symmetric":
            raise ValueError("transport='cuda_symmetric' goes with device='cuda'; for CPU tensors 'shm' is alike")
        if self.device is None and self.concurrent:
            raise ValueError("concurrent goes with device='cuda'; ranks on a CPU always are")

    def _check_timeout(self) -> None:
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, (int, float)):
            raise TypeError(f"timeout_s must be a number of seconds, got {self.timeout_s!r}")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"timeout_s must be positive and finite, got {self.timeout_s}")

    def recorder(self, rank: int) -> TraceRecorder | None:
        """Return what records this rank's routing, if that was asked for; errors of its path as TraceRecorder's."""
        if self.record is None:
            return None
        return TraceRecorder(self.record, num_experts=self.num_experts, num_topk=self.num_topk, rank=rank)

    def make_wire(self) -> Wire:
        return make_wire(self.wire, self.scales, self.hidden, self.side_words)

    def place_experts(self, num_ranks: int) -> Placement:
        """Return which rank owns which expert. ValueError for ranks that do not exist."""
        if self.placement is None:
            return even_placement(self.num_experts, num_ranks)
        return mapped_placement(self.placement, num_ranks)

    def row_bytes(self) -> RowBytes:
        """Return the parts of a row; combine's rows are in the dtype that experts are expected to return."""
        wire = self.make_wire()
        return RowBytes(
            x=wire.row_bytes,
            scales=wire.scale_bytes,
            topk_idx=8 * self.num_topk,
            topk_weights=4 * self.num_topk,
            token=4,
            y=self.hidden * wire.output_dtype.itemsize,
        )

    def lanes(self, num_ranks: int) -> Lanes:
        return lanes_for(self.place_experts(num_ranks))

    def account(self, num_ranks: int, rank: int) -> MemoryAccount:
        """Add up the memory of one rank."""
        placement = self.place_experts(num_ranks)
        step = account_step(
            self.row_bytes(),
            num_ranks=num_ranks,
            max_tokens=self.max_tokens_per_rank,
            num_topk=self.num_topk,
            num_experts=self.num_experts,
            local_experts=int(placement.experts_per_rank_R[rank]),
        )
        tensors_bytes = step.balanced_bytes + step.balanced_bytes // 4 if self.arena_bytes is None else self.arena_bytes
        eager_bytes = self.ring * num_ranks * self.slot_bytes(num_ranks)
        control_bytes = ControlLayout.of(self.lanes(num_ranks).all(), self.ring, num_ranks).num_bytes
        return MemoryAccount(
            step=step,
            control_bytes=control_bytes,
            eager_bytes=eager_bytes,
            heap_bytes=eager_bytes + tensors_bytes,
            committed_bytes=rounded_to_segments(control_bytes + eager_bytes + tensors_bytes),
        )

    def slot_bytes(self, num_ranks: int) -> int:
        """Return the size of an eager slot; 0 for a single rank, which writes to itself."""
        if num_ranks == 1:
            return 0
        widest = max(self.row_bytes().sent, self.row_bytes().y)
        return slot_bytes_for(widest, self.max_tokens_per_rank, self.ring * num_ranks, self.eager_bytes)


def placement_tuple(placement: object) -> tuple[int, ...] | None:
    """Return a list, tuple or array of ranks as a tuple; anything else as it is, for ``check`` to refuse."""
    if hasattr(placement, "tolist"):
        placement = placement.tolist()
    return tuple(placement) if isinstance(placement, list) else placement  # type: ignore[return-value]


def device_name(kernels: str | None, device: object) -> str | None:
    """Return the device's name as given; ``"cuda"`` for the GPU's kernels without one, and None for the CPU."""
    if device is None:
        return "cuda" if kernels == "gpu" else None
    return None if str(device) == "cpu" else str(device)


def kernels_for(kernels: str | None, device: object) -> str:
    """Return the kernels of a device, unless others were asked for."""
    if kernels is not None:
        return kernels
    return "cpu" if device_name(None, device) is None else "gpu"


PRIVATE = ("num_threads", "arena_bytes", "timeout_s", "record", "interface")
"""Options that each rank may choose for itself."""


def memory_account(
    num_ranks: int,
    *,
    rank: int = 0,
    hidden: int,
    num_experts: int,
    num_topk: int,
    max_tokens_per_rank: int,
    wire: str = "bf16",
    scales: str = "fp32",
    placement: Sequence[int] | None = None,
    arena_bytes: int | None = None,
    max_in_flight: int = 4,
    eager_bytes: int | None = None,
    ranks_per_host: int | None = None,
    device: object = None,
) -> MemoryAccount:
    """Return the memory that :class:`anyep.Buffer` with these arguments commits on ``rank``, without allocating it.

    ``ranks_per_host``: where ranks live on several hosts, in order. ``device``: as the buffer's; no GPU is asked.
    Between hosts it is the account of the host's memory, with what is pinned there. TypeError and ValueError as the
    buffer's.

    >>> account = memory_account(8, hidden=7168, num_experts=256, num_topk=8, max_tokens_per_rank=4096, wire="fp8")
    >>> account.step.balanced_rows, account.step.worst_rows, account.committed_bytes >> 20
    (21687, 32768, 630)
    >>> memory_account(
    ...     8, hidden=7168, num_experts=256, num_topk=8, max_tokens_per_rank=4096, wire="fp8", ranks_per_host=4
    ... ).crossing_bytes >> 20
    16
    """
    options = BufferOptions(
        hidden=hidden,
        num_experts=num_experts,
        num_topk=num_topk,
        max_tokens_per_rank=max_tokens_per_rank,
        wire=wire,
        scales=scales,
        placement=placement_tuple(placement),
        arena_bytes=arena_bytes,
        max_in_flight=max_in_flight,
        eager_bytes=eager_bytes,
        device=device_name(None, device),
        kernels=kernels_for(None, device),
    )
    options.check()
    check_integer("num_ranks", num_ranks, at_least=1)
    check_integer("rank", rank, at_least=0, at_most=num_ranks - 1)
    if ranks_per_host is not None:
        check_integer("ranks_per_host", ranks_per_host, at_least=1)
    if options.device is not None:
        from anyep.exchange.device.devices import cuda_device
        from anyep.exchange.device.setup import device_account

        cuda_device(options.device)
        if ranks_per_host is None or ranks_per_host >= num_ranks:
            return device_account(options, num_ranks, rank)
    account = replace(options, device=None, kernels="cpu").account(num_ranks, rank)
    if ranks_per_host is None:
        return account
    crossing_bytes = bound_bytes(
        group_ranks(num_ranks, ranks_per_host),
        rank,
        options.row_bytes(),
        num_topk=num_topk,
        max_tokens=max_tokens_per_rank,
        straight_bytes=most_bytes_for(num_ranks),
    )
    if options.device is not None:
        from anyep.exchange.device.pinned import NUM_SLOTS, SLOT_BYTES

        account = replace(account, pinned_bytes=NUM_SLOTS * SLOT_BYTES)
    return replace(account, crossing_bytes=crossing_bytes)
