"""What ``ElasticBuffer`` offers beside dispatch and combine: Engram, pipeline send and receive, gather sessions.

Each feature makes the object of :mod:`anyep.collectives` that it needs when it is first configured, collectively, as
upstream's own calls are; the sizes given to the constructor are only compared with, never committed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import torch

from anyep.collectives.gathering import Gatherer, GatherSession
from anyep.collectives.ring import Ring
from anyep.collectives.rows import RowStore
from anyep.errors import CapacityError
from anyep.transport.rendezvous import find_rendezvous

BUFFER_ALIGNMENT_BYTES = 2 << 20
VECTOR_BYTES = 32
"""What upstream's bulk copies move at a time."""
MOST_GATHERS = 32
_SF_ALIGNMENT = 4
"""Rows to which a column of scale factors is padded: 16 bytes of 4-byte words."""


class RefusedCall(AssertionError, RuntimeError):
    """What upstream's host code refuses: a RuntimeError there, described as an assertion; callers catch either."""


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise RefusedCall(f"Assertion exception: {text}")


@contextmanager
def _refused_as_upstream() -> Iterator[None]:
    """What our own objects refuse for its arguments becomes what upstream's host code raises."""
    try:
        yield
    except (CapacityError, ValueError) as error:
        raise RefusedCall(f"Assertion exception: {error}") from error


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


class ElasticCollectives:
    """The collective calls of ``ElasticBuffer``, which inherits them.

    The heir sets ``group``, ``rank_idx``, ``num_ranks``, ``num_bytes`` and ``num_cpu_bytes`` (as the caller gave them)
    and ``timeout_s`` before the first of these calls, and calls :meth:`close_collectives` when it is destroyed.
    Nothing else is needed, and there is no ``__init__``. Tensors on a CUDA device are staged through CPU memory.
    """

    group: Any
    rank_idx: int
    num_ranks: int
    num_bytes: int
    num_cpu_bytes: int
    timeout_s: float

    _engram: RowStore | None = None
    _engram_hidden = 0
    _engram_sf: torch.Tensor | None = None
    _pp: Ring | None = None
    _pp_max_bytes = 0
    _agrs: Gatherer | None = None
    _agrs_session: GatherSession | None = None

    def close_collectives(self) -> None:
        """End what these calls have made. Idempotent, waits for nobody."""
        for name in ("_engram", "_pp", "_agrs"):
            made = getattr(self, name)
            setattr(self, name, None)
            if made is not None:
                made.close()
        self._agrs_session = None

    def engram_write(self, storage: torch.Tensor, sf: torch.Tensor | None = None) -> None:
        """Store this rank's entries [n, H] (n equal on all ranks); collective, with barriers before and after.

        Entry i of rank r has the number r * n + i. ``storage`` bfloat16, or float8_e4m3fn together with ``sf`` [R * n,
        packs] of 4-byte words, the scale factors of all ranks' entries.
        """
        _require(storage.dim() == 2 and storage.is_contiguous(), "storage must be contiguous [entries, hidden]")
        wanted = torch.bfloat16 if sf is None else torch.float8_e4m3fn
        _require(storage.dtype == wanted, f"storage must be {wanted} {'without' if sf is None else 'with'} sf")
        _require(
            storage.nbytes <= self.num_cpu_bytes,
            f"storage has {storage.nbytes} bytes, and the buffer was made with num_cpu_bytes={self.num_cpu_bytes}",
        )
        if sf is not None:
            _require(
                sf.dim() == 2 and sf.size(0) == self.num_ranks * storage.size(0) and sf.element_size() == 4,
                f"sf must be [{self.num_ranks * storage.size(0)}, packs] of 4-byte words, a row for each entry",
            )
        if self._engram is None:
            self._engram = RowStore(self.group, timeout_s=self.timeout_s)
            weakref.finalize(self, self._engram.close)
        self._engram.write(storage.cpu())
        self._engram_hidden = storage.size(1)
        self._engram_sf = None if sf is None else sf.detach().cpu().clone(memory_format=torch.contiguous_format)

    def engram_fetch(
        self, indices: torch.Tensor, num_qps: int = 0, use_tma_aligned_col_major_sf: bool = False
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """Begin to fetch entries by number; the returned call waits, and returns (data [T, e * H], sf or None).

        ``indices`` int32 [T, e]. ``sf`` is [T, e * packs], row-major, or with ``use_tma_aligned_col_major_sf`` with
        strides (1, T rounded up to 4). Results are fresh tensors. ``num_qps`` has no meaning here.
        """
        store, sf = self._engram, self._engram_sf
        if store is None:
            raise RefusedCall("Assertion exception: nothing was stored yet: call engram_write on every rank first")
        _require(
            indices.dim() == 2 and indices.dtype == torch.int32 and indices.is_contiguous(),
            f"indices must be contiguous int32 [tokens, entries], got {indices.dtype} {list(indices.shape)}",
        )
        hidden, itemsize = self._engram_hidden, 2 if sf is None else 1
        _require(
            indices.numel() * hidden * itemsize <= self.num_bytes,
            f"the fetch takes {indices.numel() * hidden * itemsize} bytes, and the buffer has {self.num_bytes}",
        )
        tokens, entries = indices.shape
        own = indices.cpu().clone()  # upstream reads them in stream order: the caller may change them meanwhile
        pending = store.fetch(own, wait=False)
        results: list[tuple[torch.Tensor, torch.Tensor | None]] = []

        def wait() -> tuple[torch.Tensor, torch.Tensor | None]:
            if not results:
                with _refused_as_upstream():
                    data = pending.wait().view(tokens, entries * hidden).to(indices.device)
                scales = None if sf is None else _pick_sf(sf, own, use_tma_aligned_col_major_sf).to(indices.device)
                results.append((data, scales))
            return results[0]

        return wait

    @staticmethod
    def get_engram_storage_size_hint(
        num_entries: int, hidden: int, num_max_tokens_per_rank: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[int, int]:
        """Return (bytes for what is fetched, bytes for what is stored), in whole 2 MiB."""
        row_bytes = _align(hidden * dtype.itemsize, VECTOR_BYTES)
        fetched, stored = row_bytes * num_max_tokens_per_rank, row_bytes * num_entries
        return _align(fetched, BUFFER_ALIGNMENT_BYTES), _align(stored, BUFFER_ALIGNMENT_BYTES)

    def pp_set_config(self, num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> None:
        """Set the largest tensor and how many may be on their way in one direction; collective.

        What was sent before and not received is dropped.
        """
        wanted = self.get_pp_buffer_size_hint(num_max_tensor_bytes, num_max_inflight_tensors)
        _require(num_max_tensor_bytes % VECTOR_BYTES == 0, f"num_max_tensor_bytes must be a multiple of {VECTOR_BYTES}")
        _require(num_max_inflight_tensors > 0, "num_max_inflight_tensors must be at least 1")
        _require(wanted <= self.num_bytes, f"this takes {wanted} bytes, and the buffer has {self.num_bytes}")
        ring = Ring(
            self.group, max_bytes=num_max_tensor_bytes, slots=num_max_inflight_tensors, timeout_s=self.timeout_s
        )
        weakref.finalize(self, ring.close)
        former, self._pp, self._pp_max_bytes = self._pp, ring, num_max_tensor_bytes
        if former is not None:  # every rank is here, so nobody needs it any more
            former.close()

    def pp_send(self, t: torch.Tensor, dst_rank_idx: int, num_sms: int = 0) -> None:
        """Send to rank +-1; waits while ``num_max_inflight_tensors`` are on their way. ``num_sms``: no meaning here."""
        ring = self._ring_for(t, dst_rank_idx)
        with _refused_as_upstream():
            ring.send(_flat_bytes(t).cpu(), dst_rank_idx)

    def pp_recv(self, t: torch.Tensor, src_rank_idx: int, num_sms: int = 0) -> None:
        """Receive the next tensor of rank +-1 into ``t``, which has as many bytes. ``num_sms``: no meaning here."""
        ring, there = self._ring_for(t, src_rank_idx), _flat_bytes(t)
        with _refused_as_upstream():
            got = ring.recv(src_rank_idx, out=there if there.is_cpu else torch.empty_like(there, device="cpu"))
        if got is not there:
            there.copy_(got)

    def _ring_for(self, t: torch.Tensor, peer: int) -> Ring:
        if self._pp is None:
            raise RefusedCall("Assertion exception: call pp_set_config on every rank first")
        neighbours = sorted({self._pp.previous, self._pp.next})
        _require(
            peer in neighbours,
            f"rank {peer} is no neighbour of rank {self.rank_idx}: {' and '.join(map(str, neighbours))} are",
        )
        _require(t.is_contiguous(), f"the tensor must be contiguous, got strides {t.stride()}")
        _require(
            t.nbytes <= self._pp_max_bytes and t.nbytes % VECTOR_BYTES == 0,
            f"the tensor must have a multiple of {VECTOR_BYTES} bytes up to {self._pp_max_bytes}, got {t.nbytes}",
        )
        return self._pp

    @staticmethod
    def get_pp_buffer_size_hint(num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> int:
        """Return the bytes of four queues (two directions, both ends), in whole 2 MiB."""
        queues = 4 * num_max_inflight_tensors * _align(num_max_tensor_bytes, VECTOR_BYTES)
        return _align(queues, BUFFER_ALIGNMENT_BYTES)

    def agrs_set_config(self, num_max_session_bytes: int, num_max_all_gathers_per_session: int) -> None:
        """Set the sizes of gather sessions; collective, and not within one."""
        _require(self._agrs_session is None, "agrs_set_config within a session: destroy it first")
        _require(
            0 < num_max_all_gathers_per_session <= MOST_GATHERS,
            f"a session may have 1 to {MOST_GATHERS} gathers, got {num_max_all_gathers_per_session}",
        )
        _require(
            num_max_session_bytes <= self.num_bytes,
            f"a session of {num_max_session_bytes} bytes exceeds the buffer's {self.num_bytes}",
        )
        former, self._agrs = self._agrs, None
        if former is not None:
            former.close()
        self._agrs = Gatherer(
            self.group,
            session_bytes=num_max_session_bytes,
            max_gathers=num_max_all_gathers_per_session,
            timeout_s=self.timeout_s,
        )
        weakref.finalize(self, self._agrs.close)

    def create_agrs_session(self) -> None:
        """Enter a session: every rank does."""
        if self._agrs is None:
            raise RefusedCall("Assertion exception: call agrs_set_config on every rank first")
        _require(self._agrs_session is None, "a session is open: destroy it before the next one")
        self._agrs_session = self._agrs.session()

    def destroy_agrs_session(self) -> None:
        """End the session; its results may be written over when all ranks have entered the next one."""
        self._session().close()
        self._agrs_session = None

    @contextmanager
    def agrs_new_session(self, enabled: bool = True) -> Iterator[None]:
        """A session around a block; nothing at all unless ``enabled``."""
        if not enabled:
            yield
            return
        self.create_agrs_session()
        try:
            yield
        finally:
            with suppress(RefusedCall):  # the block may have destroyed the session, or the buffer
                self.destroy_agrs_session()

    def agrs_get_inplace_tensor(
        self, shapes: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return this rank's place in the next gather's result, for one shape or a sequence of them (a tuple then)."""
        session = self._session()
        wanted, single = _as_shapes(shapes)
        with _refused_as_upstream():
            slots = session.slots(wanted, dtype)
        return slots[0] if single else slots

    def all_gather(self, t: torch.Tensor | Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Gather one tensor, or several at once: (result [R, *shape], ..., wait). Results hold within the session.

        ``wait()`` must be called in the same session before results are read.
        """
        session, tensors = self._session(), [t] if isinstance(t, torch.Tensor) else list(t)
        _require(all(x.is_contiguous() for x in tensors), "tensors to gather must be contiguous")
        with _refused_as_upstream():
            started = session.begin([x.cpu() for x in tensors])
        outs = [
            result if x.device.type == "cpu" else torch.empty_like(result, device=x.device)
            for x, result in zip(tensors, started.results, strict=True)
        ]

        def wait() -> None:
            with _refused_as_upstream():
                session.finish(started)
            for out, result in zip(outs, started.results, strict=True):
                if out is not result:
                    out.copy_(result)

        return (*outs, wait)

    def _session(self) -> GatherSession:
        if self._agrs_session is None:
            raise RefusedCall("Assertion exception: no session is open: call create_agrs_session first")
        return self._agrs_session

    @staticmethod
    def get_agrs_num_max_session_bytes(
        group: Any, shapes: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype
    ) -> int:
        """Return the session bytes for gathering these shapes (one, or a sequence), each rounded up to 32."""
        num_ranks = find_rendezvous(group).size
        return sum(_align(num_ranks * prod(shape) * dtype.itemsize, VECTOR_BYTES) for shape in _as_shapes(shapes)[0])

    @staticmethod
    def get_agrs_buffer_size_hint(group: Any, num_max_session_bytes: int) -> int:
        """Return the buffer bytes for such sessions, in whole 2 MiB."""
        return _align(num_max_session_bytes, BUFFER_ALIGNMENT_BYTES)


def _as_shapes(shapes: Sequence[Any]) -> tuple[list[tuple[int, ...]], bool]:
    """Return a list of shapes, and whether it was one shape."""
    single = not shapes or not isinstance(shapes[0], (tuple, list))
    return [tuple(shape) for shape in ([shapes] if single else shapes)], single


def _pick_sf(sf: torch.Tensor, indices: torch.Tensor, column_major: bool) -> torch.Tensor:
    """Return the scale factors of the entries fetched, [T, e * packs]."""
    tokens, entries = indices.shape
    words = sf.view(torch.int32)[indices.flatten().long()].view(tokens, entries * sf.size(1))
    if column_major:
        columns = torch.empty(words.size(1), _align(tokens, _SF_ALIGNMENT), dtype=torch.int32, device="cpu")
        words = columns[:, :tokens].copy_(words.T).T
    return words.view(sf.dtype)
