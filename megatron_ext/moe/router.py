"""The router of every MoE layer: megatron-core's TopKRouter with losses of the strength they say
and a tally.

megatron-core scores, selects and drops (softmax or sigmoid, pre/post softmax, group-limited, expert
bias, sinkhorn, capacity). Two things are changed through its own methods:

* the strength of the auxiliary losses (see `loss_strength`), which in 0.16.1 depends on the layout;
* what the router did is written into a `Tally` (moe/stats.py) instead of megatron-core's logging
  tracker, whose reduction hangs pipeline ranks without MoE layers and shows one rank's z-loss only.

Global-batch load-balancing loss: Qiu et al. 2025, "Demons in the Detail", arXiv:2501.11873.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ext.moe.stats import Tally


def loss_strength(
    *, shards: int, dp: int, over_global_batch: bool, exact: bool, tokens: int | None
) -> float:
    """Factor on a balance or z loss so that its gradient has the strength of its coefficient in
    every layout.

    The loss of one rank is its share of a sum over `shards` = tp x cp token shards (and over dp as
    well for the global-batch loss). The data-parallel reduction then averages over dp, which is
    right for per-micro-batch losses and makes the global-batch one 1/dp of its coefficient; `exact`
    undoes that, `exact=False` keeps megatron-core's strength for recipes tuned with it. With
    --calculate-per-token-loss gradients are divided by the number of tokens of the global batch:
    `tokens` of this rank's shard times `shards` restores the loss (0.16.1 leaves out `shards`).
    """
    strength = 1.0
    if over_global_batch and exact:
        strength *= dp
    if tokens is not None:
        strength *= tokens * shards
    return strength


class Router(TopKRouter):
    """TopKRouter with exact loss strengths and a tally; `global_aux_scale` is
    --moe-global-aux-scale.
    """

    def __init__(self, config, pg_collection=None, *, global_aux_scale: str = "exact") -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.exact_global_scale = global_aux_scale == "exact"
        self.tally = Tally(config.num_moe_experts)
        self.num_shards = self.tp_cp_group.size()
        self.dp = self.tp_dp_cp_group.size() // self.num_shards

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None):
        """logits [S, B, E] -> probabilities and map, both [S*B, E]."""
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        if self.training and torch.is_grad_enabled():
            self.tally.add_routing(routing_map, routing_map.shape[0] * self.topk)
        return probs, routing_map

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group,
        reduce_group_has_dp: bool = False,
        valid_token_count=None,
    ) -> Tensor:
        """Give the loss its gradient (an identity on `activation`) and its line in the tally."""
        ranks_in_mean = 1 if reduce_group_has_dp else self.dp
        self.tally.add_loss(aux_loss_name, aux_loss / aux_loss_coeff / ranks_in_mean)
        tokens = activation.shape[0] if valid_token_count is None else valid_token_count
        strength = loss_strength(
            shards=self.num_shards,
            dp=self.dp,
            over_global_batch=reduce_group_has_dp,
            exact=self.exact_global_scale,
            tokens=tokens if self.calculate_per_token_loss else None,
        )
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * strength)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Router z-loss, mean over tokens of logsumexp(logits)^2 (Zoph et al. 2022, ST-MoE,
        arXiv:2202.08906).
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        share = z_loss_func(logits, 1.0 / self.num_shards, padding_mask=padding_mask)
        self.tally.add_loss("z_loss", share / self.dp)
        tokens = logits.shape[0] if padding_mask is None else (~padding_mask).sum()
        strength = loss_strength(
            shards=self.num_shards,
            dp=self.dp,
            over_global_batch=False,
            exact=True,
            tokens=tokens if self.calculate_per_token_loss else None,
        )
        return MoEAuxLossAutoScaler.apply(logits, share * coefficient * strength)
