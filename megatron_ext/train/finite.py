"""What a save is about to hold is finite: the guard judges a step by its loss and gradient, which a
master weight or a moment that broke between two steps does not show before the next forward pass.
"""

from __future__ import annotations

import itertools

import torch

from megatron_ext.checkpoint import TrainState
from megatron_ext.errors import NumericError
from megatron_ext.mesh.agree import agree
from megatron_ext.observe.memory import states, weights


def check_finite(state: TrainState) -> None:
    """Every weight, master weight and optimizer state of every rank. One read of the state's
    memory, one small collective. Raises NumericError (76) that names the tensor and its rank.
    """
    agree(lambda: _check(state))


def _check(state: TrainState) -> None:
    named = itertools.chain(weights(state.chunks), states(state.optimizer))
    tensors = [(name, one) for name, one in named if one.is_floating_point() and one.numel()]
    # the largest and the smallest are NaN where any is; one transfer from a device for all of them
    ends = [torch.stack(torch.aminmax(one.detach())).float() for _, one in tensors]
    is_good = torch.isfinite(torch.stack(ends)).all(dim=1).tolist() if ends else []
    for (name, one), good in zip(tensors, is_good):
        if not good:
            count = int((~torch.isfinite(one.detach())).sum())
            rank, short = torch.distributed.get_rank(), name.replace("module.", "")
            raise NumericError(
                f"after step {state.progress.step} {count} of {one.numel()} values of {short} on"
                f" rank {rank} are not finite: they are not saved",
                do="start the same command again: it goes on from the last checkpoint, which is"
                " finite; if it comes back, look at this rank's device",
            )
