"""What a V2 dispatch leaves behind, as plain fields that callers may read, copy, pickle and set."""

from __future__ import annotations

import torch


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
    """

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
        self.do_expand = do_expand
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.num_recv_tokens = num_recv_tokens
        self.num_expanded_tokens = num_expanded_tokens
        self.num_recv_tokens_per_expert_list = num_recv_tokens_per_expert_list
        self.psum_num_recv_tokens_per_scaleup_rank = psum_num_recv_tokens_per_scaleup_rank
        self.psum_num_recv_tokens_per_expert = psum_num_recv_tokens_per_expert
        self.num_unaligned_recv_tokens_per_expert = num_unaligned_recv_tokens_per_expert
        self.recv_src_metadata = recv_src_metadata
        self.dst_buffer_slot_idx = dst_buffer_slot_idx
        self.token_metadata_at_forward = token_metadata_at_forward
        self.channel_linked_list = channel_linked_list
        self.announced_counts = announced_counts
        self.cached_recv_src_metadata_before_sort: torch.Tensor | None = None
        """upstream's, for a sort that is not needed here"""

    @property
    def num_rows(self) -> int:
        """Rows of the batch that came with the handle, and of what combine takes."""
        return self.num_expanded_tokens if self.do_expand else self.num_recv_tokens

    @property
    def num_valid_tokens(self) -> int:
        """N without the defined but empty rows of a dispatch that did not wait for the CPU."""
        return int(self.psum_num_recv_tokens_per_scaleup_rank[-1])
