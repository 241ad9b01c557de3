"""The two halves of an optimizer step: `prepare` changes no weight, `apply` does.

megatron-core's `ChainedOptimizer.step` does both at once, so that a gradient norm that is not
finite is known only after the weights are spoilt.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_ext.device import current_device
from megatron_ext.optim.adam import TiledAdam
from megatron_ext.optim.norm import Chain


@torch.no_grad()
def prepare(optimizer: Chain) -> float | None:
    """Copy the gradients to the masters', unscale them, and give their norm over all ranks; None
    where fp16 gradients overflowed (the loss scale has been lowered, the step is to be skipped).
    """
    if optimizer.prepare_grads():
        return None
    return float(optimizer.get_grad_norm())


def _clip(leaf: MegatronOptimizer, grad_norm: float) -> None:
    """Scale the gradients to --clip-grad, now or as a part of the update."""
    if isinstance(leaf.optimizer, TiledAdam):
        scale = (grad_norm + 1.0e-6) / leaf.config.clip_grad
        if scale > 1.0:
            leaf.optimizer.grad_scale = torch.tensor(scale, device=current_device())
        return
    parameters = leaf.get_parameters()
    if parameters:
        decoupled = leaf.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        clip_grad_by_total_norm_fp32(
            parameters, leaf.config.clip_grad, grad_norm, use_decoupled_grad=decoupled
        )


@torch.no_grad()
def apply(optimizer: Chain, grad_norm: float) -> tuple[bool, int | None]:
    """Clip to --clip-grad, update, gather the weights -> (done, zeros in the gradients or None)."""
    for leaf in optimizer.chained_optimizers:
        if leaf.config.clip_grad > 0 and not getattr(leaf, "is_stub_optimizer", False):
            _clip(leaf, grad_norm)
    zeros = optimizer.count_zeros() if optimizer.config.log_num_zeros_in_grad else None
    done = optimizer.step_with_ready_grads()
    return bool(done), None if zeros is None else int(zeros)
