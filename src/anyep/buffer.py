"""The public class: dispatch tokens to the ranks that own their experts, combine what the experts return.

Legend: T tokens of this rank, H hidden, K top-k, E experts, R ranks, N received rows, G scale groups (ceil(H / 128)).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Literal, overload

import torch

from anyep.errors import Unavailable
from anyep.exchange import outgoing as sending
from anyep.exchange import recall as recalling
from anyep.exchange import returning
from anyep.exchange.arguments import check_choice, check_integer
from anyep.exchange.barrier import Barrier
from anyep.exchange.combine import Combine
from anyep.exchange.dispatch import Dispatch
from anyep.exchange.event import Pending
from anyep.exchange.explain import Explanation
from anyep.exchange.flights import Flights
from anyep.exchange.handle import Combined, Handle, Received, check_handle
from anyep.exchange.options import BufferOptions, placement_tuple
from anyep.exchange.setup import open_endpoint
from anyep.exchange.stats import Stats
from anyep.exchange.wire import ELEMENTS, Wire
from anyep.transport.base import Blame
from anyep.transport.liveness import blame_for

LAYOUTS = ("compact", "expert", "padded")


class Buffer:
    """One rank's side of a group that exchanges tokens. Making it is collective; so is every dispatch and combine.

    ``group``: a torch.distributed process group, an mpi4py communicator, a member of :func:`anyep.local_group`, or None
    inside a torchrun job. All ranks pass the same arguments.

    Sizes: ``hidden`` H, ``num_experts`` E, ``num_topk`` K, ``max_tokens_per_rank``. Experts lie on ranks in contiguous
    ranges, or where ``placement`` (a rank for each expert) says. ``expert_alignment`` pads each expert's rows in the
    expert layout. ``static_rows`` fixes N for every dispatch: the tail has index -1 and zeros, and more rows than
    that are a CapacityError on every rank.

    ``wire``: what rows are made of on their way, ``"bf16"``, ``"fp16"``, ``"fp32"`` or ``"fp8"`` (E4M3 with one scale
    for 128 channels; ``scales``: ``"fp32"`` amax / 448, ``"pow2"`` rounded up to a power of two, ``"ue8m0"`` packed 4
    to an int32). ``"raw8"``, ``"raw16"``, ``"raw32"`` and ``"raw64"`` move rows of uint8, int16, int32 and int64 as
    they are: views of whatever they hold. With ``side_words`` P, dispatch takes a pair (rows [T, H], int32 [T, P]):
    what shall travel beside each row, and arrive in ``Received.scales`` [N, P].

    ``max_in_flight``: how many results of ``wait=False`` may be waited for at a time. ``eager_bytes``: up to how many
    bytes the rows of a pair of ranks come along with the announcement (0: never); measured if None.

    ``num_threads`` splits copies of one rank (results do not depend on it). ``arena_bytes`` is the shared memory
    committed for tensors at the start; more is added when needed. ``timeout_s``: how long a silent rank is waited for.
    ``transport``: ``"auto"``, ``"inprocess"`` (threads), ``"shm"`` (one host), or an engine for what crosses between
    hosts, ``"nixl"`` or ``"gloo"``; ``interface``: the network interface it uses on this rank.
    ``record``: a file for the routing of every dispatch (see docs/routing-traces.md).

    Raises TypeError and ValueError for bad arguments, on every rank if one rank's are bad; CapacityError when the
    machine lacks memory; Unavailable when a transport was asked for that is impossible here.

    >>> def rank_main(member):
    ...     with Buffer(member, hidden=8, num_experts=4, num_topk=2, max_tokens_per_rank=3, wire="fp32") as ep:
    ...         received = ep.dispatch(torch.ones(3, 8), torch.tensor([[0, 3], [1, 0], [-1, 2]]), torch.ones(3, 2))
    ...         return ep.combine(received.x, received.handle)[:, 0].tolist()
    >>> from anyep import local_group
    >>> local_group(2).run(rank_main)
    [[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]]
    """

    def __init__(
        self,
        group: object,
        *,
        hidden: int,
        num_experts: int,
        num_topk: int,
        max_tokens_per_rank: int,
        wire: str = "bf16",
        scales: str = "fp32",
        expert_alignment: int = 1,
        static_rows: int | None = None,
        placement: Sequence[int] | None = None,
        transport: str = "auto",
        kernels: str = "cpu",
        num_threads: int | None = None,
        arena_bytes: int | None = None,
        timeout_s: float = 30.0,
        record: str | None = None,
        max_in_flight: int = 4,
        eager_bytes: int | None = None,
        interface: str | None = None,
        side_words: int = 0,
    ) -> None:
        self._closed = True
        options = BufferOptions(
            hidden=hidden,
            num_experts=num_experts,
            num_topk=num_topk,
            max_tokens_per_rank=max_tokens_per_rank,
            wire=wire,
            scales=scales,
            expert_alignment=expert_alignment,
            static_rows=static_rows,
            placement=placement_tuple(placement),
            transport=transport,
            kernels=kernels,
            num_threads=num_threads,
            arena_bytes=arena_bytes,
            timeout_s=timeout_s,
            record=record,
            max_in_flight=max_in_flight,
            eager_bytes=eager_bytes,
            interface=interface,
            side_words=side_words,
        )
        opened = open_endpoint(group, options)
        self._options = options
        self._end = opened.endpoint
        self._recorder = options.recorder(self._end.rank)
        self._explanation = opened.explanation
        self._identity = object()
        self._flights = Flights(max_in_flight, self._leave, self._count_refusal)
        self._closed = False

    @property
    def rank(self) -> int:
        return self._end.rank

    @property
    def num_ranks(self) -> int:
        return self._end.num_ranks

    @property
    def num_hosts(self) -> int:
        """On how many hosts the ranks live, or play to."""
        return 1 if self._end.across is None else self._end.across.hosts.num_hosts

    @property
    def ended_by(self) -> BaseException | None:
        """The error in the middle of an operation that ended this buffer; None while it goes on, or was closed."""
        return self._flights.broken

    @property
    def options(self) -> BufferOptions:
        """The arguments that this buffer was made from."""
        return self._options

    @property
    def local_experts(self) -> list[int]:
        """The experts that this rank owns, ascending: local expert ``l`` is expert ``local_experts[l]``."""
        owner_E = self._end.placement.expert_rank_E
        return [expert for expert, owner in enumerate(owner_E.tolist()) if owner == self.rank]

    @overload
    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: Handle | None = None,
        layout: str = "compact",
        expert_rows: torch.Tensor | None = None,
        wait: Literal[True] = True,
    ) -> Received: ...

    @overload
    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: Handle | None = None,
        layout: str = "compact",
        expert_rows: torch.Tensor | None = None,
        wait: Literal[False, "sizes"],
    ) -> Pending[Received]: ...

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: Handle | None = None,
        layout: str = "compact",
        expert_rows: torch.Tensor | None = None,
        wait: bool | Literal["sizes"] = True,
    ) -> Received | Pending[Received]:
        """Send each token to the ranks that own its experts.

        ``x`` [T, H] in the wire's dtype; for fp8 in bfloat16, float16 or float32 (quantised on the way), or a pair
        (float8_e4m3fn [T, H], scales). ``topk_idx`` [T, K] int32 or int64, -1 for none, duplicates allowed.
        ``topk_weights`` fp32 [T, K] or None.

        ``layout="compact"``: one row for each token and destination rank, ordered by (source rank, source token).
        ``layout="expert"``: one row for each (token, column), grouped by local expert, groups padded to
        ``expert_alignment``; a row's other columns hold -1. Padding rows have index -1 and zeros.

        ``layout="padded"`` (low latency): x is [L, R * max_tokens_per_rank, H]; expert l's rows are the first
        ``counts[l]`` of its block, one for each (token, column), in the order (source rank, token, column); the rest of
        a block is undefined. ``topk_weights`` do not travel: combine multiplies with them at the origin.

        ``expert_rows`` int32 [E] (compact layout) is announced in place of how often ``topk_idx`` names each expert,
        where ``topk_idx`` stands for ranks.

        ``handle`` of an earlier dispatch: the same tokens' places again, without layout and counts; then
        ``topk_idx`` must be None and ``layout`` is the handle's.

        ``wait=False`` sends what needs no answer and returns; ``Pending.wait()`` receives. Rows that are too many to
        come along with the announcement follow in the background, but for the padded layout, where nothing runs before
        ``wait``. Inputs must not change until then. ``wait="sizes"`` returns when all ranks have announced, so that
        ``Pending.targets`` has the batch's tensors and its handle.

        Raises TypeError and ValueError for this rank's arguments (nothing was sent: call again), ValueError on every
        rank where ranks call differently, CapacityError on every rank where one lacks memory or ``static_rows`` is
        too small, PeerLost and PeerTimeout (they end the buffer), ClosedError.
        """
        self._flights.check_open()
        if handle is not None:
            known = check_handle(handle, self._identity)
            outgoing = sending.prepare_cached(self._end, x, topk_idx, topk_weights, known)
        else:
            check_choice("layout", layout, LAYOUTS)
            outgoing = sending.prepare(self._end, x, topk_idx, topk_weights, layout=layout, expert_rows=expert_rows)
        at_once = wait is True
        operation = Dispatch(self._end, outgoing, buffer=self._identity, recorder=self._recorder, early=not at_once)
        return self._flights.run(operation) if at_once else self._flights.start(operation, sized=wait == "sizes")

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
        reduce: str | None = None,
        wire: str | None = None,
        group: int = 0,
        wait: Literal[True] = True,
    ) -> torch.Tensor: ...

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
        reduce: str | None = None,
        wire: str | None = None,
        group: int = 0,
        wait: Literal[True] = True,
    ) -> Combined: ...

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
        reduce: str | None = None,
        wire: str | None = None,
        group: int = 0,
        wait: Literal[False],
    ) -> Pending[torch.Tensor | Combined]: ...

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
        reduce: str | None = None,
        wire: str | None = None,
        group: int = 0,
        wait: bool = True,
    ) -> torch.Tensor | Combined | Pending[torch.Tensor | Combined]:
        """Bring the experts' outputs back and sum them.

        ``y`` [N, H] bfloat16, float16 or float32, rows as received. out[t] = bias + sum of t's rows, in fp32, rounded
        once: ``reduce="rank"`` in ascending order of the destination rank (``group`` > 0, compact layout: the sum of
        every ``group`` consecutive ranks is rounded before it is added), ``reduce="expert"`` (expert and padded
        layout) in the order of t's top-k columns, which gives the same bits for every number of ranks,
        ``reduce="column"`` (compact layout, raw wires) in the order of the last column that each rank serves; between
        hosts with ``group`` the sums of hosts, in the order of theirs.
        ``bias``: up to two [T, H], added first. ``topk_weights`` fp32 [N, K] travel back too and are summed to
        [T, K]; the result is then a Combined.

        Padded layout: ``y`` [L, R * max_tokens_per_rank, H]; each row is multiplied in fp32 with its weight of
        ``topk_weights`` [T, K] (default: those of the dispatch, else 1), and they are added in top-k order.
        ``wire="logfmt10"`` (padded, bfloat16) sends 10 bits a number instead of 16, with an error of up to
        2.2 % a channel (numerics/logfmt.py).

        Without a copy when ``y`` comes from :meth:`empty_output`. Returns when all ranks have read ``y``. Errors as
        :meth:`dispatch`.
        """
        self._flights.check_open()
        back = returning.prepare(
            self._end,
            y,
            check_handle(handle, self._identity),
            topk_weights=topk_weights,
            bias=bias,
            out=out,
            reduce=reduce,
            wire=wire,
            group=group,
        )
        operation = Combine(self._end, back)
        return self._flights.run(operation) if wait else self._flights.start(operation)

    def variant(
        self,
        *,
        wire: Wire,
        num_topk: int,
        max_tokens_per_rank: int,
        static_rows: int | None = None,
        source_tokens: bool = False,
    ) -> Buffer:
        """Return a buffer for rows of another kind, which shares this one's group, memory and experts. Not collective.

        Calls of both are one sequence on all ranks; handles of one serve the other; it ends with this one, and need
        not be closed. ``source_tokens``: :attr:`Received.source_token` comes with every layout.
        """
        self._flights.check_open()
        end = self._end.variant(
            wire=wire,
            num_topk=check_integer("num_topk", num_topk, at_least=1),
            max_tokens=check_integer("max_tokens_per_rank", max_tokens_per_rank, at_least=0),
            static_rows=static_rows,
            source_tokens=source_tokens,
        )
        other = copy.copy(self)
        other._end, other._closed, other._recorder = end, True, None  # closed: it owns nothing
        return other

    def leave_out(self, ranks: Collection[int]) -> None:
        """Go on without these ranks: from the next call on they are neither told nor waited for. ``()``: all again.

        The ranks that are left must all say so between the same two calls, and send nothing to experts of those ranks
        (-1 in ``topk_idx``). What they had left out may come back if it made as many calls meanwhile.
        Raises ValueError for ranks that do not exist, and for this one; Unavailable between hosts, whose ranks forward
        for each other.
        """
        self._check_one_host("leave_out")
        for rank in ranks:
            check_integer("ranks", rank, at_least=0, at_most=self.num_ranks - 1)
        if self.rank in ranks:
            raise ValueError(f"rank {self.rank} cannot leave out itself; close its buffer instead")
        self._end.crowd.leave_out(ranks)

    def expel_absent(self) -> None:
        """From now on go on without ranks that do not come to a padded operation: as if all had left them out there.

        All ranks must say so before their first operation. A rank is missed when its process has ended, at once, or
        after ``timeout_s``. What others send it in that call is dropped, and its rows count 0 in it; it learns so when
        it calls next, by PeerLost, and cannot come back: :attr:`left_out` names it. A rank that announces an operation
        and then falls silent still ends the buffer. Raises Unavailable between hosts.
        """
        self._check_one_host("expel_absent")
        self._end.crowd.expels = True

    @property
    def left_out(self) -> list[int]:
        """Ranks that take no part: left out, or expelled."""
        return list(self._end.crowd.absent)

    def empty_output(self, handle: Handle, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return an uninitialised tensor [N, H] for the experts' output, where combine reads it without a copy.

        ``dtype``: the wire's, bfloat16 for fp8 and raw rows. Raises CapacityError when the machine lacks memory.
        """
        self._flights.check_open()
        chosen = self._end.wire.output_dtype if dtype is None else dtype
        if chosen not in ELEMENTS:
            raise TypeError(f"dtype must be bfloat16, float16 or float32, got {chosen}")
        return returning.empty_output(self._end, check_handle(handle, self._identity), chosen)

    def recall(
        self,
        topk_idx: torch.Tensor,
        announced: torch.Tensor,
        *,
        layout: str = "compact",
        expert_alignment: int = 1,
    ) -> Handle:
        """Return the handle that a dispatch of ``topk_idx`` [T, K] left, on this buffer or one with the same experts.

        ``announced`` int32 [R, R + E]: ``Handle.announced`` of that dispatch, or of one with the same ``topk_idx`` on
        every rank. Alone: exchanges nothing. Raises TypeError and ValueError.
        """
        self._check_one_host("recall")
        return recalling.recall(
            self._end, self._identity, topk_idx, announced, layout=layout, alignment=expert_alignment
        )

    def adopt(self, handle: Handle) -> Handle:
        """Return a compact handle of another buffer with the same experts and a raw wire as one that recall made."""
        self._flights.check_open()
        if handle.buffer is self._identity:
            return handle
        self._check_one_host("adopt")
        return recalling.adopted(handle, self._identity)

    def by_group(self, handle: Handle, ranks_per_group: int) -> recalling.Grouped:
        """Return a compact handle of a raw wire whose combine sums per (token, group of so many consecutive ranks).

        ``combine(..., reduce="column")`` then returns [T * G, H].
        """
        self._check_one_host("by_group")
        return recalling.summed_by_group(self._end, check_handle(handle, self._identity), ranks_per_group)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._flights.check_open()
        self._flights.run(Barrier(self._end))

    def explain(self) -> Explanation:
        """Say which mode, transport, kernels and memory were chosen, and why. ``print`` it."""
        return self._explanation

    def stats(self) -> Stats:
        """Return this rank's counters since the buffer was made."""
        network_bytes = 0 if self._end.across is None else self._end.across.transport.engine.sent_bytes
        return self._end.counters.snapshot(self._end.transport.waited_ns, network_bytes)

    def close(self) -> None:
        """Leave the group and free the arena; received tensors stay valid. Idempotent.

        What is in flight is finished first, whatever comes of it (its own waits are bounded by ``timeout_s``). Other
        ranks that already have what they wait for are not disturbed; those that still need this rank get PeerLost.
        """
        if self._closed:
            return
        try:
            self._flights.settle()
        finally:
            self._abandon()

    def _abandon(self, blame: Blame | None = None) -> None:
        """Leave at once: what is in flight ends with ClosedError, here within 100 ms, and PeerLost elsewhere."""
        if self._closed:
            return
        self._closed = True
        try:
            self._end.transport.leave(blame)
            self._flights.close()
            self._end.workers.close()
            self._end.transport.close()
        finally:
            if self._recorder is not None:
                self._recorder.close()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close; after an error without waiting for anybody."""
        if error is None:
            self.close()
        else:
            self._abandon(self._own_fault() if self._flights.unfinished else None)

    def __deepcopy__(self, memo: dict[int, object]) -> Buffer:
        """Return this buffer: a module that is copied, for an average of its weights say, works with the same one."""
        return self

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"{self!r} was never closed; use it in a with statement", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        if not hasattr(self, "_end"):
            return "<anyep.Buffer, not made>"
        state = "closed" if self._closed else "open"
        return f"<anyep.Buffer rank {self.rank} of {self.num_ranks}, {self._end.transport.name}, {state}>"

    def _check_one_host(self, what: str) -> None:
        """Raise ClosedError, or Unavailable where ranks forward for each other, and handles say for whom."""
        self._flights.check_open()
        if self._end.across is not None:
            raise Unavailable(f"{what} needs all ranks on one host, and this buffer's live on several")

    def _leave(self, error: BaseException) -> None:
        """Tell the peers why this rank goes, so that they name the culprit."""
        self._end.transport.leave(blame_for(error, self.rank))

    def _own_fault(self) -> Blame:
        """Why a rank leaves in the middle of an operation by itself: peers may still read what it now writes over."""
        return Blame(ranks=(self.rank,), timeout=False)

    def _count_refusal(self) -> None:
        self._end.counters.add(refused=1)
