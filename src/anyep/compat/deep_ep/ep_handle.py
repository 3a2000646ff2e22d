"""What a V2 dispatch leaves behind, as plain fields that callers may read, copy, pickle and set."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from anyep.compat.deep_ep.checks import refuse

_new, _set = object.__new__, object.__setattr__
FIELDS = (
    "do_expand",
    "num_experts",
    "expert_alignment",
    "num_max_tokens_per_rank",
    "num_sms",
    "topk_idx",
    "num_recv_tokens",
    "num_expanded_tokens",
    "num_recv_tokens_per_expert_list",
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
    "token_metadata_at_forward",
    "channel_linked_list",
    "announced_counts",
    "cached_recv_src_metadata_before_sort",
)


class Source(Protocol):
    """What fields are made from when somebody looks at them."""

    def make(self, handle: EPHandle, name: str) -> Any:
        """Return the field."""


class HandleKind(NamedTuple):
    """What decides which buffer serves a handle, and how."""

    num_experts: int
    num_max_tokens_per_rank: int
    expert_alignment: int
    do_expand: bool
    num_sms: int
    num_tokens: int
    num_topk: int
    static_rows: int
    """rows of a batch that is as large as it can be, for the CPU did not learn how many came; -1 where it did"""


class EPHandle:
    """One dispatch of an :class:`ElasticBuffer`; combine and cached dispatches read it, and nothing besides it.

    Legend: T tokens, K top-k, N received rows (each token once), L local experts, R ranks, S scale-up ranks.

    ``topk_idx`` [T, K]; ``psum_num_recv_tokens_per_scaleup_rank`` int32 [S], inclusive, the last is N;
    ``psum_num_recv_tokens_per_expert`` int32 [L]: with ``do_expand`` where each expert's rows end without padding,
    else the inclusive sum of aligned counts; ``num_unaligned_recv_tokens_per_expert`` int32 [L];
    ``num_recv_tokens_per_expert_list``: aligned counts, empty where the CPU did not wait.

    ``recv_src_metadata`` int32 [N, K + 2]: the token's number at large (rank * num_max_tokens_per_rank + token), its
    rank * K + master column (the highest that names a local expert), and for each column the row of the batch in which
    it is served, or -1. ``dst_buffer_slot_idx`` int32 [T, K]: in each master column this rank * Tmax + how many tokens
    it sent there before, else -1. The two fields of upstream's forwarders are None.

    ``announced_counts`` int32 [R, R + num_experts] is ours: how many tokens each rank sent to each rank, then how many
    (token, column) pairs it had for each expert. Where it is None on all ranks, the next use of the handle asks the
    other ranks for it, and sets it.

    The fields of a handle that a dispatch returned are made when one is first looked at; setting one replaces it.
    """

    __slots__ = ("__weakref__", "_kind", "fields", "route", "source")

    fields: dict[str, Any]
    """those that were made or set"""
    source: Source | None
    """what the others come from"""
    route: Any
    """what was worked out from fields before (elastic_routes.py); a handle works without it"""
    _kind: HandleKind | None
    """None where fields may have been set"""

    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: torch.Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: torch.Tensor,
        psum_num_recv_tokens_per_expert: torch.Tensor,
        num_unaligned_recv_tokens_per_expert: torch.Tensor | None,
        recv_src_metadata: torch.Tensor,
        dst_buffer_slot_idx: torch.Tensor | None = None,
        token_metadata_at_forward: torch.Tensor | None = None,
        channel_linked_list: torch.Tensor | None = None,
        announced_counts: torch.Tensor | None = None,
    ) -> None:
        assert topk_idx is not None, "topk_idx must be a tensor [T, K]: the handle says with it where tokens went"
        given = locals()
        self.fields = {name: given.get(name) for name in FIELDS}

    @classmethod
    def made(cls, kind: HandleKind, source: Source, num_recv_tokens: int) -> EPHandle:
        """Return a handle whose other fields come from ``source``."""
        handle = _new(cls)
        _set_fields(handle, {"num_recv_tokens": num_recv_tokens})
        _set_kind(handle, kind)
        _set_source(handle, source)
        _set_route(handle, None)
        return handle

    def __getattr__(self, name: str) -> Any:
        if name in EPHandle.__slots__:  # of one that was made without its constructor
            _set(self, name, {} if name == "fields" else None)
            return object.__getattribute__(self, name)
        found = self.fields.get(name, self)
        if found is not self:
            return found
        if self.source is None or name not in FIELDS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        made = self.fields[name] = self.source.make(self, name)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        if name in EPHandle.__slots__:
            _set(self, name, value)
        else:
            self.fields[name] = value
            _set(self, "_kind", None)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # typeshed: a plain attribute of object
        """Every field: what ``vars`` returns, and a caller may write to."""
        if self.source is not None:
            for name in FIELDS:
                getattr(self, name)
        _set(self, "_kind", None)
        return self.fields

    def __getstate__(self) -> dict[str, Any]:
        """Return every field: a copy or a pickle needs nothing else, and keeps nothing else."""
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields = state

    @property
    def kind(self) -> HandleKind:
        """What decides which buffer serves it."""
        known = self._kind
        if known is not None:
            return known
        idx = self.topk_idx
        if not isinstance(idx, torch.Tensor) or idx.dim() != 2:
            refuse("a handle's topk_idx must be a tensor [T, K]: it says where tokens went")
        num_tokens, num_topk = idx.shape
        return HandleKind(
            num_experts=self.num_experts,
            num_max_tokens_per_rank=self.num_max_tokens_per_rank,
            expert_alignment=self.expert_alignment,
            do_expand=self.do_expand,
            num_sms=self.num_sms,
            num_tokens=num_tokens,
            num_topk=num_topk,
            static_rows=-1 if self.num_recv_tokens_per_expert_list else self.num_recv_tokens,
        )

    @property
    def untouched(self) -> bool:
        """Whether nobody has set a field since the dispatch."""
        return self._kind is not None

    @property
    def num_rows(self) -> int:
        """Rows of the batch that came with the handle, and of what combine takes."""
        rows: int = self.num_expanded_tokens if self.kind.do_expand else self.num_recv_tokens
        return rows

    @property
    def num_valid_tokens(self) -> int:
        """N without the defined but empty rows of a dispatch that did not wait for the CPU."""
        return int(self.psum_num_recv_tokens_per_scaleup_rank[-1])


_set_fields, _set_kind, _set_source, _set_route = (
    vars(EPHandle)[name].__set__ for name in ("fields", "_kind", "source", "route")
)
"""Write a handle's own slots without a look for their names, which costs as much again."""
