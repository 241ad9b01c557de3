"""DDP whose gradient buffers are not zeroed: the first gradient of a step is written, not added.

    zero_grad_buffer   every parameter's main_grad is stale
    backward           first micro-batch: main_grad = grad;  later ones: main_grad += grad
    before a sum over ranks    main_grad = 0 where still stale (no gradient came)

One pass over memory where megatron-core's DDP makes three (zero, read, write). `averaged_loss`
saves another: gradients are averages over dp x cp because the loss is divided, not they.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn


class WrittenGradients(DistributedDataParallel):
    """megatron-core's DDP otherwise. Where kernels add to main_grad themselves (fused weight
    gradients, CUDA graphs), its own hooks and zeros are used.

    Between `zero_grad_buffer` and the end of the backward passes a main_grad may hold the numbers
    of the step before; from `finish_grad_sync` on it holds this step's.
    """

    def __init__(self, config, ddp_config, module: nn.Module, **options) -> None:
        self.is_written = (
            not config.gradient_accumulation_fusion
            and config.cuda_graph_impl == "none"
            and not ddp_config.reuse_grad_buf_for_mxfp8_param_ag
        )
        super().__init__(config, ddp_config, module, **options)
        self.stale: set[nn.Parameter] = set()

    def _make_backward_post_hook(self, param: nn.Parameter) -> Callable[..., None]:
        if not self.is_written:
            return super()._make_backward_post_hook(param)

        def hook(*unused) -> None:
            grad = param.grad
            if grad is not None:
                if param in self.stale:
                    self.stale.discard(param)
                    param.main_grad.copy_(grad)
                else:
                    param.main_grad.add_(grad)
                param.grad = None
            if self.ddp_config.overlap_grad_reduce:
                assert grad is not None, "--overlap-grad-reduce needs a gradient of every parameter"
                self.param_to_bucket_group[param].register_grad_ready(param, self.force_all_reduce)

        return hook

    def sum_gradients(self) -> None:
        """From now on gradients are summed over ranks as they are, without the factor of DDP."""
        for group in self._all_groups():
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = 1.0

    def _all_groups(self) -> list:
        return self.bucket_groups + self.expert_parallel_bucket_groups

    def zero_grad_buffer(self) -> None:
        """Take all gradients for stale; nothing is written."""
        if not self.is_written:
            super().zero_grad_buffer()
            return
        self.stale = set(self.params_with_grad)
        for group in self._all_groups():
            group.reset()

    @torch.no_grad()
    def _zero_stale(self) -> None:
        for param in self.stale:
            param.main_grad.zero_()
        self.stale = set()

    def start_grad_sync(self, *unused) -> None:
        """Zero what got no gradient, then as megatron-core."""
        self._zero_stale()
        super().start_grad_sync(*unused)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Zero what got no gradient, then as megatron-core."""
        self._zero_stale()
        super().finish_grad_sync(force_all_reduce=force_all_reduce)


def averaged_loss(
    chunks: Sequence[WrittenGradients], scale: Callable[[Tensor], Tensor], is_fp16: bool
) -> Callable[[Tensor], Tensor]:
    """`scale`, which the schedule applies to every loss before its backward pass, with the average
    over dp x cp in it; the gradients of `chunks` are only summed then. As it was where gradients
    are not averaged, where the collective does it, or with fp16, which would underflow.
    """
    config, ddp_config = chunks[0].config, chunks[0].ddp_config
    size = chunks[0].dp_cp_group.size()
    if is_fp16 or config.calculate_per_token_loss or ddp_config.average_in_collective or size == 1:
        return scale
    for chunk in chunks:
        chunk.sum_gradients()
    return lambda loss: scale(loss) / size
