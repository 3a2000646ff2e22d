"""Handles that are known again: by the memory of a member, or by a copy of one that was looked through before."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils.weak import WeakTensorKeyDictionary

UNCOUNTED = -1


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to; UNCOUNTED where torch does not count, as in inference mode."""
    return UNCOUNTED if tensor.is_inference() else tensor._version


class KnownHandles:
    """What the handles of a group's dispatches stand for, as long as somebody holds the member that tells them."""

    def __init__(self) -> None:
        self._kept: dict[int, object] = {}
        self._members: dict[int, weakref.ref[Any]] = {}
        self._recalled: Any = WeakTensorKeyDictionary()
        """from a member that a caller brought to the version of all that was looked at, and what they stand for"""

    def keep(self, memory: NDArray[Any], kept: object) -> torch.Tensor:
        """Return a tensor on ``memory`` by whose storage a handle is known, as long as ``memory`` lives."""
        tensor = torch.from_numpy(memory)
        self._note(tensor.data_ptr(), memory, kept)
        return tensor

    def keep_tensor(self, tensor: torch.Tensor, kept: object) -> torch.Tensor:
        """Return ``tensor``, by whose storage a handle is known, as long as this object lives."""
        self._note(tensor.data_ptr(), tensor, kept)
        return tensor

    def find(self, tensor: object) -> object:
        """Return what belongs to the handle that ``tensor`` is a member of; None for others."""
        return self._kept.get(tensor.data_ptr()) if isinstance(tensor, torch.Tensor) else None

    def recall(self, member: torch.Tensor, version: Hashable) -> Any:
        """Return what a caller's ``member`` was found to stand for at this version; None where it was written to."""
        noted = self._recalled.get(member)
        return None if noted is None or noted[0] != version else noted[1]

    def note_recalled(self, member: torch.Tensor, version: Hashable, found: object) -> None:
        """Note what ``member`` stands for, as long as it lives, at a version of it and of all else that says so."""
        self._recalled[member] = version, found

    def _note(self, address: int, member: Any, kept: object) -> None:
        self._kept[address] = kept
        self._members[address] = weakref.ref(member, lambda _: self._forget(address))

    def _forget(self, address: int) -> None:
        self._kept.pop(address, None)
        self._members.pop(address, None)
