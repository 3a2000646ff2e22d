"""Operations, and results that are still under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from anyep.exchange.handle import Handle

Result = TypeVar("Result")
Out = TypeVar("Out", covariant=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """Tensors of a result that is still under way: the same that it will have, filled when it was waited for."""

    x: torch.Tensor
    scales: torch.Tensor | None = None
    source_token: torch.Tensor | None = None
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    handle: Handle | None = None
    """of a dispatch whose sizes are known"""


class Operation(Protocol[Out]):
    """One rank's part in something that all ranks do together."""

    label: str

    def post(self, epoch: int) -> None: ...

    def wants_background(self) -> bool: ...

    def may_answer(self) -> bool: ...

    def ready(self) -> bool: ...

    def size_up(self) -> None:
        """Await what says how large the result is; :meth:`finish` does if nobody has. Raises RefusedError."""
        ...

    def targets(self) -> Targets | None:
        """Return where the result will stand, if that is known once this is posted, or sized up."""
        ...

    def finish(self) -> Out: ...


class Pending(Generic[Result]):
    """An operation whose first half is done. Its input tensors must not change until ``wait``.

    Unless it goes on in the background, it advances when its rank next waits for anything of the buffer, also when it
    was dropped without waiting: a rank that blocks elsewhere meanwhile may keep others waiting.

    ``targets``: where the result will stand, for who hands tensors on before they are filled. Of a dispatch known where
    the size of the batch is: in the padded layout, with a handle, and with ``wait="sizes"``; None where it is not, or
    the machine lacks memory.
    """

    def __init__(
        self, label: str, done: Callable[[], bool], land: Callable[[], Result], targets: Targets | None = None
    ) -> None:
        self.targets = targets
        self._label = label
        self._done = done
        self._land: Callable[[], Result] | None = land

    def done(self) -> bool:
        """Return whether ``wait`` need not wait for any rank's announcement, or all is over already."""
        return self._done()

    def wait(self) -> Result:
        """Do the second half, or await it, and return the result or raise the operation's error.

        Once: a second call is a ValueError. The errors are those of the call that returned this object, and
        ClosedError when an error has ended the buffer's ``with`` block meanwhile.
        """
        land, self._land = self._land, None
        if land is None:
            raise ValueError(f"this {self._label} was already waited for; keep the result of the first wait()")
        return land()
