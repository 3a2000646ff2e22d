"""Sessions of all-gathers under DeepEP's names (anyep.collectives.gathering)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import torch

from anyep.collectives.gathering import Gatherer, GatherSession
from anyep.compat.deep_ep.elastic_refusals import VECTOR_BYTES, RefusedCall, refused_as_upstream, require
from anyep.compat.deep_ep.elastic_sizes import BUFFER_ALIGNMENT, align
from anyep.transport.rendezvous import find_rendezvous

MOST_GATHERS = 32


class GatherCalls:
    """The heir sets these before the first call, and closes what ``_agrs`` is."""

    group: Any
    num_bytes: int
    timeout_s: float

    _agrs: Gatherer | None = None
    _agrs_session: GatherSession | None = None

    def agrs_set_config(self, num_max_session_bytes: int, num_max_all_gathers_per_session: int) -> None:
        """Set the sizes of gather sessions; collective, and not within one."""
        require(self._agrs_session is None, "agrs_set_config within a session: destroy it first")
        require(
            0 < num_max_all_gathers_per_session <= MOST_GATHERS,
            f"a session may have 1 to {MOST_GATHERS} gathers, got {num_max_all_gathers_per_session}",
        )
        require(
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
        require(self._agrs_session is None, "a session is open: destroy it before the next one")
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
        with refused_as_upstream():
            slots = session.slots(wanted, dtype)
        return slots[0] if single else slots

    def all_gather(self, t: torch.Tensor | Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Gather one tensor, or several at once: (result [R, *shape], ..., wait). Results hold within the session.

        ``wait()`` must be called in the same session before results are read.
        """
        session, tensors = self._session(), [t] if isinstance(t, torch.Tensor) else list(t)
        require(all(x.is_contiguous() for x in tensors), "tensors to gather must be contiguous")
        with refused_as_upstream():
            started = session.begin([x.cpu() for x in tensors])
        outs = [
            result if x.device.type == "cpu" else torch.empty_like(result, device=x.device)
            for x, result in zip(tensors, started.results, strict=True)
        ]

        def wait() -> None:
            with refused_as_upstream():
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
        return sum(align(num_ranks * prod(shape) * dtype.itemsize, VECTOR_BYTES) for shape in _as_shapes(shapes)[0])

    @staticmethod
    def get_agrs_buffer_size_hint(group: Any, num_max_session_bytes: int) -> int:
        """Return the buffer bytes for such sessions, in whole 2 MiB."""
        return align(num_max_session_bytes, BUFFER_ALIGNMENT)


def _as_shapes(shapes: Sequence[Any]) -> tuple[list[tuple[int, ...]], bool]:
    """Return a list of shapes, and whether it was one shape."""
    single = not shapes or not isinstance(shapes[0], (tuple, list))
    return [tuple(shape) for shape in ([shapes] if single else shapes)], single
