"""What a set brings beside its loops over rows where counts lie in a device's memory: places are worked out there.

Legend: kernels/spec.py. A *board* is what all ranks announced to this one in an operation: R messages, by rank,
``message_bytes`` apart. A message is

- int64 [HEAD_WORDS]: how many rows fit where it offers memory; :data:`NUM_PLACES` places, each an offset from what the
  reader's table of bases says of that rank, or -1 for nothing; and the verdict of its route (NO_FAULT: all is well);
- int32 [R + E]: how many tokens it sends each rank, and how many (token, column) pairs each expert.

Every rank reads the same numbers and comes to the same places, as in ``exchange/settle.py``, which is the same on a
host. Nothing here waits, so that all of it may be captured in a graph.
"""

from __future__ import annotations

from typing import Protocol

from anyep.kernels.spec import KernelSet
from anyep.kernels.spec_places import PlaceKernels

NO_FAULT = 2**63 - 1
"""The verdict where every expert is one."""
BAD = -2
"""What an index that names no expert is kept as."""
NUM_PLACES = 5
"""Arrays of a row: x, scales, topk_idx, topk_weights, source token. Combine uses two: rows, weights."""
CAPACITY, FIRST_PLACE, FAULT = 0, 1, 1 + NUM_PLACES
HEAD_WORDS = 2 + NUM_PLACES
"""Words of a message before its counts."""
SETTLED, STATIC_TOO_SMALL, BLOCK_TOO_SMALL, LANDING_TOO_SMALL, BAD_EXPERT = range(5)
"""What settle and connect find: the numbers of ``exchange/ledger.py``, and that a rank names an expert that is none."""
SUMMARY_WORDS = 4
"""What they found; rows of this rank's batch; the first rank at fault, and its verdict."""


def message_bytes(num_ranks: int, num_experts: int) -> int:
    """Return how far messages of a board are apart: a multiple of 8.

    >>> message_bytes(2, 3)
    80
    """
    return 8 * HEAD_WORDS + (4 * (num_ranks + num_experts) + 7) // 8 * 8


class DeviceKernels(PlaceKernels, KernelSet, Protocol):
    """A kernel set whose caller does not wait for it. ``anyep.testing.check_device_kernels`` is the exam."""

    def fill_gaps(
        self,
        num_gaps: int,
        gap_begin_addr: int,
        gap_end_addr: int,
        base0: int,
        bytes0: int,
        base1: int,
        bytes1: int,
        base2: int,
        bytes2: int,
        base3: int,
        bytes3: int,
        base4: int,
        bytes4: int,
    ) -> None:
        """``fill_rows`` for the five parts of a row: 0xff in part 2, the indices, and 0 in all others; base 0 for none.

        >>> # num_gaps=1, gaps [1, 2): row 1 of each part
        """
        ...

    def send(
        self,
        x_addr: int,
        element: int,
        hidden: int,
        scale_format: int,
        num_tokens: int,
        width: int,
        entry_rank_addr: int,
        entry_row_addr: int,
        peer_x_addr: int,
        peer_scales_addr: int,
        topk_idx_addr: int,
        idx_bytes: int,
        topk_weights_addr: int,
        num_topk: int,
        by_expert: int,
        expert_rank_addr: int,
        expert_local_addr: int,
        peer_idx_addr: int,
        peer_weights_addr: int,
        peer_token_addr: int,
    ) -> None:
        """Rows and their routing at once: ``quantise_scatter``, or ``scatter`` of rows as they are, and the other.

        ``scale_format`` -1: rows of ``hidden`` bytes are written as they are; ``element`` and ``peer_scales`` are not
        used. Else numbers ``element`` [T, hidden] are quantised. Then ``scatter_routing``; a table of 0: not wanted.

        >>> # R=2, T=2, W=1, rows of hidden=2 bytes x=[[1, 2], [3, 4]], scale_format=-1, entry_rank=[[1], [0]],
        >>> # entry_row=[[5], [0]], peer_x=[a, b], peer_token=[c, d], idx and weights not wanted
        >>> # b + 5 * 2: [1, 2]  a + 0 * 2: [3, 4]  d: int32 [5] is 0  c: int32 [0] is 1
        """
        ...

    def tick(self, clock_addr: int, epoch_addr: int) -> None:
        """Add 1 to int64 ``clock`` [1], and let int64 ``epoch`` [1] be what it is now: below 2 ** 31.

        >>> # clock=[6]: clock=[7] epoch=[7]
        """
        ...

    def signal(self, peer_word_addr: int, num_ranks: int, epoch_addr: int, counts_addr: int) -> None:
        """Publish all that was launched before: write ``epoch << 32 | counts[r]`` to the word of every rank.

        ``epoch`` is int64 [1], ``peer_word`` a peer table, 0 to skip a rank, ``counts`` int32 [R], or 0 for none.
        kernels/gpu/flags.py has the memory order.

        >>> # epoch=[3], counts=[5, 7], peer_word=[a, 0]: word at a: (3 << 32) + 5
        """
        ...

    def wait(
        self,
        words_addr: int,
        num_ranks: int,
        epoch_addr: int,
        limit: int,
        counts_addr: int,
        errors_addr: int,
        error_bytes: int,
    ) -> None:
        """Let what is launched after this wait until every sender's word has reached ``epoch``.

        ``epoch`` is int64 [1], ``words`` int64 [R]; their counts go to int32 [R] ``counts`` (0: nowhere). Where a word
        has not come after ``limit`` looks, the int64 that is r * ``error_bytes`` behind ``errors`` takes ``epoch << 32
        | the epoch that the word holds``, and the count is not written. Errors of words that did come are not touched.

        >>> # epoch=[3], limit=2, error_bytes=8, words=[(3 << 32) + 5, (1 << 32) + 9]
        >>> # counts=[5, .] errors=[., (3 << 32) + 1]
        """
        ...

    def meet(
        self,
        peer_word_addr: int,
        words_addr: int,
        num_ranks: int,
        epoch_addr: int,
        limit: int,
        errors_addr: int,
        error_bytes: int,
    ) -> None:
        """``signal`` and then ``wait``, without counts, in one launch.

        >>> # R=2, epoch=[3], limit=2, error_bytes=8, peer_word=[a, b], words=[3 << 32, 1 << 32]
        >>> # words at a and b: 3 << 32; errors=[., (3 << 32) + 1]
        """
        ...
