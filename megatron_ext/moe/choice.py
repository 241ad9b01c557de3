"""What a router chose, without a T x E map.

    router -> Choice (experts [T, K], probs [T, K], counts [E]) -> dispatcher
           -> `maps` [T, E], only for who asks for them (megatron-core's own dispatchers)

Suffixes: T tokens of this rank, K experts of a token, E experts of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The experts of T tokens; every token has exactly K, none dropped.

    experts_TK  int64, contiguous, different within a row; in the order of the router's top-k.
    probs_TK    the routing weights in the logits' dtype, with gradient; the auxiliary losses hang
                on them, so a backward pass must reach them.
    counts_E    int64: assignments of each expert, on the device of the others; their sum is T * K.
    """

    experts_TK: Tensor
    probs_TK: Tensor
    counts_E: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts_E.shape[0]

    @property
    def topk(self) -> int:
        """K."""
        return self.experts_TK.shape[1]


def counted(experts_TK: Tensor, num_experts: int) -> Tensor:
    """[E] int64: how often each expert stands in `experts`."""
    flat = experts_TK.reshape(-1)
    zeros = torch.zeros(num_experts, dtype=flat.dtype, device=flat.device)
    return zeros.scatter_add_(0, flat, torch.ones_like(flat))


def maps(choice: Choice) -> tuple[Tensor, Tensor]:
    """(probabilities, 0 where not chosen; bool map of the chosen), both [T, E], as megatron-core
    hands them on; the gradient of the first goes into `probs_TK`.
    """
    shape = (choice.experts_TK.shape[0], choice.num_experts)
    probs_TK = choice.probs_TK
    probs_TE = probs_TK.new_zeros(shape).scatter(1, choice.experts_TK, probs_TK)
    map_TE = torch.zeros(shape, dtype=torch.bool, device=probs_TK.device)
    return probs_TE, map_TE.scatter_(1, choice.experts_TK, True)
