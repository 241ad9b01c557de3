"""The output layer: logits where they are asked for, else what the fused loss needs.

    labels given   hidden -> Deferred(hidden, weight) -> loss (`cross_entropy.py`), no logits
    no labels      hidden -> logits [S, B, V], as megatron-core's ColumnParallelLinear

GPTModel calls the layer and then `compute_language_model_loss` for the model's own loss and for
each multi-token-prediction depth: the pair `Deferred` travels between the two in the place of the
logits.

Shapes: S sequence, B micro-batch, H hidden, V vocabulary rows of this tp rank.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_ext.model.cross_entropy import Columns, linear_cross_entropy


class Deferred(NamedTuple):
    """Logits that are not computed: hidden [S, B, H] (S/tp with sequence parallelism) and weight
    [V, H].
    """

    hidden: Tensor
    weight: Tensor


class OutputLayer(ColumnParallelLinear):
    """ColumnParallelLinear that gives `Deferred` while `defers` is set."""

    defers = False

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor | Deferred, None]:
        if not self.defers:
            return super().forward(input_, weight, runtime_gather_output)
        return Deferred(input_, self.weight if weight is None else weight), None

    def loss(self, labels_BS: Tensor, deferred: Deferred, num_true: int) -> Tensor:
        """Loss per token [B, S] in nats, fp32, over the true vocabulary of all tp ranks; this rank
        has `num_true` of its columns.
        """
        group, hidden = self.tp_group, deferred.hidden
        if self.sequence_parallel:  # backward: reduce-scatter
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        elif group.size() > 1:  # backward: all-reduce
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        columns = Columns(
            first=group.rank() * self.output_size_per_partition,
            num_true=num_true,
            group=group if group.size() > 1 else None,
        )
        size, batch, width = hidden.shape
        loss_T = linear_cross_entropy(
            hidden.reshape(size * batch, width), deferred.weight, labels_BS.t().flatten(), columns
        )
        return loss_T.view(size, batch).t().contiguous()
