"""The L2 norm of all weights of the model (--log-params-norm), in every layout the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import param_is_not_shared
from torch import nn

from megatron_ext.device import current_device
from megatron_ext.optim.norm import sum_of_squares


def _copies(parameter: nn.Parameter) -> int:
    """Ranks that hold the same values."""
    if not getattr(parameter, "allreduce", True):
        return parallel_state.get_expert_data_parallel_world_size()
    copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return copies if is_split else copies * parallel_state.get_tensor_model_parallel_world_size()


@torch.no_grad()
def params_norm(chunks: Iterable[nn.Module]) -> float:
    """sqrt of the sum of the squares of every weight once; one all-reduce over all ranks. The
    second copy of tied embeddings is left out.
    """
    total = torch.zeros((), dtype=torch.float64, device=current_device())
    for chunk in chunks:
        for parameter in chunk.parameters():
            if param_is_not_shared(parameter):
                total += sum_of_squares([parameter.detach()]) / _copies(parameter)
    torch.distributed.all_reduce(total)
    return float(total.sqrt())
