"""Dispatch and combine as a program calls them: check the arguments, then hand an operation to those in flight.

Legend: T tokens of this rank, H hidden, K top-k, E experts, R ranks, N received rows, G scale groups (ceil(H / 128)).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, overload

import torch

from anyep.errors import Unavailable
from anyep.exchange.arguments import CPU, check_choice, check_integer
from anyep.exchange.asking import ask_all
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.event import Pending
from anyep.exchange.flights import Flights
from anyep.exchange.handle import Combined, Handle, Received, check_handle
from anyep.exchange.operations import operations_on
from anyep.exchange.recall import handles_on
from anyep.exchange.stats import Stats
from anyep.exchange.wire import ELEMENTS, Wire
from anyep.layout.trace_file import TraceRecorder

LAYOUTS = ("compact", "expert", "padded")


class Calls:
    """What ranks do with rows of one kind. A buffer's own are those of its constructor; :meth:`variant` makes more."""

    def __init__(self, end: Endpoint, flights: Flights, identity: object, recorder: TraceRecorder | None) -> None:
        self._end = end
        self._operations = operations_on(end)
        self._flights = flights
        self._identity = identity
        """what handles are known by: that of all variants of a buffer"""
        self._recorder = recorder
        self.handles = handles_on(end, identity, flights.check_open, partial(ask_all, flights, identity))

    @property
    def rank(self) -> int:
        """This rank's number in the group, 0 to R - 1."""
        return self._end.rank

    @property
    def num_ranks(self) -> int:
        """R, those that are left out included."""
        return self._end.num_ranks

    @property
    def num_hosts(self) -> int:
        """On how many hosts the ranks live, or play to."""
        return 1 if self._end.across is None else self._end.across.hosts.num_hosts

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
        too small, PeerLost and PeerTimeout (they end the buffer), ClosedError. Gradients stop here, as in combine:
        :mod:`anyep.nn` has the calls that carry them.
        """
        self._flights.check_open()
        if wait is not True and wait is not False and wait != "sizes":
            raise ValueError(f"wait must be True, False or 'sizes', got {wait!r}")
        if wait == "sizes":
            self._check_host_memory('wait="sizes"')
        operation = self._operations.dispatch(
            x,
            topk_idx,
            topk_weights,
            handle=None if handle is None else check_handle(handle, self._identity),
            layout=layout if handle is not None else check_choice("layout", layout, LAYOUTS),
            expert_rows=expert_rows,
            buffer=self._identity,
            recorder=self._recorder,
            early=wait is not True,
        )
        return self._flights.run(operation) if wait is True else self._flights.start(operation, sized=wait == "sizes")

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
        if wait is not True and wait is not False:
            raise ValueError(f"wait must be True or False, got {wait!r}")
        operation = self._operations.combine(
            y,
            check_handle(handle, self._identity),
            topk_weights=topk_weights,
            bias=bias,
            out=out,
            reduce=reduce,
            wire=wire,
            group=group,
        )
        return self._flights.run(operation) if wait else self._flights.start(operation)

    def empty_output(self, handle: Handle, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return an uninitialised tensor [N, H] for the experts' output, where combine reads it without a copy.

        ``dtype``: the wire's, bfloat16 for fp8 and raw rows. Raises CapacityError when the machine lacks memory.
        """
        self._flights.check_open()
        chosen = self._end.wire.output_dtype if dtype is None else dtype
        if chosen not in ELEMENTS:
            raise TypeError(f"dtype must be bfloat16, float16 or float32, got {chosen}")
        return self._operations.empty_output(check_handle(handle, self._identity), chosen)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._flights.check_open()
        self._flights.run(self._operations.barrier())

    def stats(self) -> Stats:
        """Return this rank's counters since the buffer was made."""
        network_bytes = 0 if self._end.across is None else self._end.across.transport.engine.sent_bytes
        return self._end.counters.snapshot(self._end.transport.waited_ns, network_bytes)

    def variant(
        self,
        *,
        wire: Wire,
        num_topk: int,
        max_tokens_per_rank: int,
        static_rows: int | None = None,
        source_tokens: bool = False,
    ) -> Calls:
        """Return the same calls for rows of another kind, with this group, memory and experts. Not collective.

        Calls of both are one sequence on all ranks, and handles of one serve the other. ``source_tokens``:
        :attr:`Received.source_token` comes with every layout.
        """
        self._flights.check_open()
        end = self._end.variant(
            wire=wire,
            num_topk=check_integer("num_topk", num_topk, at_least=1),
            max_tokens=check_integer("max_tokens_per_rank", max_tokens_per_rank, at_least=0),
            static_rows=static_rows,
            source_tokens=source_tokens,
        )
        return Calls(end, self._flights, self._identity, None)

    def _check_host_memory(self, what: str) -> None:
        """Raise Unavailable where tensors lie on a device."""
        if self._end.where is not CPU:
            raise Unavailable(f"{what} works on CPU tensors, and this buffer's lie on {self._end.where}")
