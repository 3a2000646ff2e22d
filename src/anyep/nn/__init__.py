"""Expert parallelism that learns: dispatch and combine with gradients, and the layers that are made of them.

::

    routing     formulas: scores, choice, weights, balance
    router      the gate as a module
    pair        a buffer for tokens, one for gradients
    travel      autograd functions: dispatch and combine, each the other's gradient
    replay      checkpoints that take the same ways again
    calls       dispatch and combine for callers
    experts     experts at work; the hook for existing layers
    moe         router + experts + shared expert
    rank_sum    sums of what every rank has a copy of
"""

from anyep.nn.calls import Batch, combine, dispatch
from anyep.nn.experts import Experts, GroupedMLP
from anyep.nn.moe import MoE
from anyep.nn.pair import BufferPair, open_pair
from anyep.nn.rank_sum import RankSum, sum_gradients
from anyep.nn.replay import checkpoint
from anyep.nn.router import Router, Routing
from anyep.nn.routing import sequence_balance_loss, switch_balance_loss

__all__ = [
    "Batch",
    "BufferPair",
    "Experts",
    "GroupedMLP",
    "MoE",
    "RankSum",
    "Router",
    "Routing",
    "checkpoint",
    "combine",
    "dispatch",
    "open_pair",
    "sequence_balance_loss",
    "sum_gradients",
    "switch_balance_loss",
]
