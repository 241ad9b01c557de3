"""The L2 norm of all weights of the model (--log-params-norm), in every layout the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_ext.device import current_device

BLOCK = 1 << 16


def _copies(parameter: nn.Parameter) -> int:
    """Ranks that hold the same values."""
    if not getattr(parameter, "allreduce", True):
        return parallel_state.get_expert_data_parallel_world_size()
    copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return copies if is_split else copies * parallel_state.get_tensor_model_parallel_world_size()


def sum_of_squares(weight: Tensor) -> Tensor:
    """float64 scalar. On a CPU in blocks that stay in its cache: 18M bf16 weights in 4 ms, against
    14 ms as a float64 norm and 68 ms by way of a float32 copy.
    """
    if weight.device.type != "cpu":
        return torch.linalg.vector_norm(weight, dtype=torch.float64).square()
    blocks = (block.float() for block in weight.flatten().split(BLOCK))
    return torch.stack([torch.dot(block, block) for block in blocks]).sum(dtype=torch.float64)


@torch.no_grad()
def params_norm(chunks: Iterable[nn.Module]) -> float:
    """sqrt of the sum of the squares of every weight once; one all-reduce over all ranks. The
    second copy of tied embeddings is left out.
    """
    total = torch.zeros((), dtype=torch.float64, device=current_device())
    for chunk in chunks:
        for parameter in chunk.parameters():
            if param_is_not_shared(parameter):
                total += sum_of_squares(parameter.detach()) / _copies(parameter)
    torch.distributed.all_reduce(total)
    return float(total.sqrt())
