"""RMSNorm over all query heads (or all key heads) of a token together, as OLMoE has it.

megatron-core's qk-layernorm normalises each head by itself with one weight of the head's size; here
the mean square is over N heads x D and the weight has N*D numbers (Muennighoff et al. 2024,
arXiv:2409.02060). The heads are split over tp: each rank adds its squares to a sum over tp, so that
the result is that of one rank. Every rank holds the whole weight and uses its heads' part, because
megatron-core sums the gradient of whatever is called q_layernorm or k_layernorm over tp: the other
parts' gradients are zero, and the sum is right.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from megatron_ext.device import current_device


class HeadsNorm(nn.Module):
    """x [S, B, n, D] of this tp rank's n heads -> x * w / sqrt(mean over all heads of x^2 + eps).

    `num_heads` counts the heads of all ranks. The statistics are fp32.
    """

    def __init__(self, config, hidden_size: int, eps: float, num_heads: int) -> None:
        super().__init__()
        self.eps = eps
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.width = num_heads * hidden_size
        weight = torch.ones(self.width, dtype=config.params_dtype, device=current_device())
        self.weight = nn.Parameter(weight)

    def forward(self, x_SBND: Tensor) -> Tensor:
        x = x_SBND.float()
        squares = x.square().sum(dim=(-2, -1), keepdim=True)
        if self.tp_group.size() > 1:
            # the sum over tp, and its gradient from every rank's heads
            squares = reduce_from_tensor_model_parallel_region(squares)
            squares = copy_to_tensor_model_parallel_region(squares)
        normal = (x * torch.rsqrt(squares / self.width + self.eps)).to(x_SBND.dtype)
        mine = self.weight.chunk(self.tp_group.size())[self.tp_group.rank()]
        return normal * mine.to(x_SBND.dtype).view(x_SBND.shape[-2:])
