"""The public class: dispatch tokens to the ranks that own their experts, combine what the experts return.

Legend: T tokens of this rank, H hidden, K top-k, E experts, R ranks, N received rows, G scale groups (ceil(H / 128)).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import NoReturn

import torch

from anyep.errors import PeerError, Unavailable
from anyep.exchange.arguments import check_integer
from anyep.exchange.calls import Calls
from anyep.exchange.explain import Explanation
from anyep.exchange.flights import Flights
from anyep.exchange.options import BufferOptions, device_name, kernels_for, placement_tuple
from anyep.exchange.setup import open_endpoint
from anyep.transport.base import Blame
from anyep.transport.liveness import blame_for, blame_of


class Buffer(Calls):
    """One rank's side of a group that exchanges tokens. Making it is collective; so is every dispatch and combine.

    ``group``: a torch.distributed process group, an mpi4py communicator, a member of :func:`anyep.local_group`, or None
    inside a torchrun job. All ranks pass the same arguments.

    Sizes: ``hidden`` H, ``num_experts`` E, ``num_topk`` K (also more than E: a token may leave columns -1, or name
    an expert again), ``max_tokens_per_rank``. Experts lie on ranks in contiguous ranges, or where ``placement`` (a rank
    for each expert) says. ``expert_alignment`` pads each expert's rows in the expert layout. ``static_rows`` fixes N
    for every dispatch: the tail has index -1 and zeros, and more rows than that are a CapacityError on every rank.

    ``wire``: what rows are made of on their way, ``"bf16"``, ``"fp16"``, ``"fp32"`` or ``"fp8"`` (E4M3 with one scale
    for 128 channels; ``scales``: ``"fp32"`` amax / 448, ``"pow2"`` rounded up to a power of two, ``"ue8m0"`` packed 4
    to an int32). ``"raw8"``, ``"raw16"``, ``"raw32"`` and ``"raw64"`` move rows of uint8, int16, int32 and int64 as
    they are: views of whatever they hold. With ``side_words`` P, dispatch takes a pair (rows [T, H], int32 [T, P]):
    what shall travel beside each row, and arrive in ``Received.scales`` [N, P].

    ``max_in_flight``: how many results of ``wait=False`` may be waited for at a time. ``eager_bytes``: up to how many
    bytes the rows of a pair of ranks come along with the announcement (0: never); measured if None.
    ``straight_bytes``: up to how many bytes a rank sends straight to the ranks of another host, where nobody then
    forwards them (0: everything is forwarded); measured if None.

    ``num_threads`` splits copies of one rank (results do not depend on it). ``arena_bytes`` is the shared memory
    committed for tensors at the start; more is added when needed. ``timeout_s``: how long a silent rank is waited for
    (0.4 s or less is too short to tell it from a rank that waits for it: either may be named).
    ``transport``: ``"auto"``, ``"inprocess"`` (threads), ``"shm"`` (one host), or an engine for what crosses between
    hosts, ``"nixl"`` or ``"gloo"``; of CUDA tensors ``"inprocess"`` (one GPU) or ``"cuda_symmetric"`` (one a process),
    or an engine.
    ``interface``: the network interface that the engine uses on this rank.
    ``device``: ``"cuda"`` or one of several, for CUDA tensors (docs/gpu.md); None: CPU tensors. ``num_sms``: on how
    many of its multiprocessors rows are moved at a time. ``concurrent``: ranks of a device have streams of their own.
    ``kernels``: ``"cpu"``, ``"gpu"`` or ``"reference"``, by default the device's.
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

    _closed = True
    """until all is made; of the class, for ``__init__`` does not run where an argument has a wrong name"""

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
        kernels: str | None = None,
        num_threads: int | None = None,
        arena_bytes: int | None = None,
        timeout_s: float = 30.0,
        record: str | None = None,
        max_in_flight: int = 4,
        eager_bytes: int | None = None,
        interface: str | None = None,
        side_words: int = 0,
        device: torch.device | str | None = None,
        num_sms: int | None = None,
        concurrent: bool = False,
        straight_bytes: int | None = None,
    ) -> None:
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
            kernels=kernels_for(kernels, device),
            num_threads=num_threads,
            arena_bytes=arena_bytes,
            timeout_s=timeout_s,
            record=record,
            max_in_flight=max_in_flight,
            eager_bytes=eager_bytes,
            interface=interface,
            side_words=side_words,
            device=device_name(kernels, device),
            num_sms=num_sms,
            concurrent=concurrent,
            straight_bytes=straight_bytes,
        )
        opened = open_endpoint(group, options)
        self._options = options
        self._explanation = opened.explanation
        flights = Flights(max_in_flight, self._leave, self._count_refusal)
        super().__init__(opened.endpoint, flights, object(), options.recorder(opened.endpoint.rank))
        self._closed = False

    @property
    def ended_by(self) -> BaseException | None:
        """The error in the middle of an operation that ended this buffer; None while it goes on, or was closed."""
        return self._flights.broken

    @property
    def options(self) -> BufferOptions:
        """The arguments that this buffer was made from."""
        return self._options

    def explain(self) -> Explanation:
        """Say which mode, transport, kernels and memory were chosen, and why. ``print`` it."""
        return self._explanation

    def leave_out(self, ranks: Collection[int]) -> None:
        """Go on without these ranks: from the next call on they are neither told nor waited for. ``()``: all again.

        The ranks that are left must all say so between the same two calls, and send nothing to experts of those ranks
        (-1 in ``topk_idx``). What they had left out may come back if it made as many calls meanwhile.
        Raises ValueError for ranks that do not exist, for this one, and while operations are in flight. Between hosts
        ranks forward for each other: there a handle goes with the ranks that took part when it was made.
        """
        self._flights.check_open()
        if not isinstance(ranks, Collection):
            raise TypeError(f"ranks must be a collection of ranks, got {ranks!r}; for one rank pass [{ranks!r}]")
        for rank in ranks:
            check_integer("ranks", rank, at_least=0, at_most=self.num_ranks - 1)
        if self.rank in ranks:
            raise ValueError(f"rank {self.rank} cannot leave out itself; close its buffer instead")
        if self._flights.unfinished:
            raise ValueError("operations are in flight: wait for them before leave_out")
        self._end.crowd.leave_out(self._end.transport, ranks)

    def expel_absent(self) -> None:
        """From now on go on without ranks that do not come to a padded operation: as if all had left them out there.

        All ranks must say so before their first operation. A rank is missed when its process has ended, at once, or
        after ``timeout_s``. What others send it in that call is dropped, and its rows count 0 in it; it learns so when
        it calls next, by PeerLost, and cannot come back: :attr:`left_out` names it. A rank that announces an operation
        and then falls silent still ends the buffer. Raises Unavailable between hosts: who is missed is settled by a
        word in memory that all ranks share.
        """
        self._flights.check_open()
        if self._end.across is not None:
            raise Unavailable(
                "expel_absent needs all ranks on one host, where a word in shared memory says who is missed, and this "
                "buffer's live on several: leave_out ranks between two operations there, on all that are left"
            )
        self._end.crowd.expels = True

    @property
    def left_out(self) -> list[int]:
        """Ranks that take no part: left out, or expelled."""
        return list(self._end.crowd.absent)

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
        """Close; after an error without waiting for anybody. Peers learn whom another buffer's error names."""
        if error is None:
            self.close()
            return
        holders = self._end.transport.holders
        named = blame_of(error, holders) if isinstance(error, PeerError) and error.holders else None
        self._abandon(named or (self._own_fault() if self._flights.unfinished else None))

    def __copy__(self) -> Buffer:
        """Return this buffer: a module that is copied, for an average of its weights say, works with the same one."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Buffer:
        """The same."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Buffer cannot be pickled: it is this process's part of a group; make one in each process")

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"{self!r} was never closed; use it in a with statement", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        if not hasattr(self, "_end"):
            return "<anyep.Buffer, not made>"
        state = "closed" if self._closed else "open"
        return f"<anyep.Buffer rank {self.rank} of {self.num_ranks}, {self._end.transport.name}, {state}>"

    def _leave(self, error: BaseException) -> None:
        """Tell the peers why this rank goes, so that they name the culprit."""
        self._end.transport.leave(blame_for(error, self.rank, self._end.transport.holders))

    def _own_fault(self) -> Blame:
        """Why a rank leaves in the middle of an operation by itself: peers may still read what it now writes over."""
        return Blame(ranks=(self.rank,), timeout=False)

    def _count_refusal(self) -> None:
        self._end.counters.add(refused=1)
