"""megatron-core's TopKRouter with losses of the strength they say and a tally: the road of every
setting, and the reference of the fast one (moe/router.py).

megatron-core scores, selects and drops (softmax or sigmoid, pre/post softmax, group-limited, expert
bias, sinkhorn, capacity). Two things are changed through its own methods:

* the strength of the auxiliary losses (see `loss_strength`), which in 0.16.1 depends on the layout;
* what the router did is written into a `Tally` (moe/stats.py) instead of megatron-core's logging
  tracker, whose reduction hangs pipeline ranks without MoE layers and shows one rank's z-loss only.

Global-batch load-balancing loss: Qiu et al. 2025, "Demons in the Detail", arXiv:2501.11873.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ext.moe.balance import loss_strength
from megatron_ext.moe.capacity import kept_of_micro_batch
from megatron_ext.moe.group_score import GroupScore
from megatron_ext.moe.stats import Tally


@dataclass(frozen=True)
class RouterOptions:
    """What our router, and who builds its layer, is asked beyond megatron-core's config: the fields
    of MoeSection.
    """

    moe_global_aux_scale: str = "exact"
    moe_global_aux_mode: str = "running"
    moe_capacity_scope: str = "micro-batch"
    moe_router_group_score_experts: int | None = None
    moe_kernels: str = "torch"


class StockRouter(TopKRouter):
    """TopKRouter with exact loss strengths and a tally; `global_aux_scale` is
    --moe-global-aux-scale.
    """

    def __init__(self, config, pg_collection=None, *, options: RouterOptions) -> None:
        self.capacity_factor = None
        if (
            options.moe_capacity_scope == "micro-batch"
            and not config.moe_pad_expert_input_to_capacity
        ):
            self.capacity_factor = config.moe_expert_capacity_factor
            config = copy.copy(config)
            config.moe_expert_capacity_factor = None  # dropped below, over the whole micro-batch
        super().__init__(config=config, pg_collection=pg_collection)
        if options.moe_router_group_score_experts is not None:
            self.router_replay = GroupScore(options.moe_router_group_score_experts)
        self.exact_global_scale = options.moe_global_aux_scale == "exact"
        has_global_loss = self.get_aux_loss_coeff("global_aux_loss") > 0
        self.wants_exact_counts = options.moe_global_aux_mode == "exact" and has_global_loss
        self.counted_E: Tensor | None = None
        self.exact_counts_E: Tensor | None = None
        self.groups = pg_collection
        self.balance_scale = 1.0  # of the balance losses' gradient; measurements set it to 0
        self.tally = Tally(config.num_moe_experts)
        self.num_shards = self.tp_cp_group.size()
        self.dp = self.tp_dp_cp_group.size() // self.num_shards

    def begin_counting(self) -> None:
        """The next forward passes (without gradients) only count; see moe/global_counts.py."""
        self.counted_E = torch.zeros(self.num_experts, device=self.weight.device)

    def end_counting(self, exact_counts_E: Tensor | None) -> None:
        """Use these counts per micro-batch of the global batch (None: the running ones)."""
        self.counted_E = None
        self.exact_counts_E = exact_counts_E

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None):
        """logits [S, B, E] -> probabilities and map, both [S*B, E]."""
        if self.counted_E is not None:
            self._count(logits, padding_mask)
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        num_routed = routing_map.shape[0] * self.topk
        if self.capacity_factor is not None:
            probs, routing_map = self._drop(probs, routing_map, batch=logits.shape[1])
            self._count_for_bias(routing_map, padding_mask)
        if self.training:
            self._tally(logits.view(-1, self.num_experts), routing_map, num_routed)
        return probs, routing_map

    def log_loss(self, name: str, share: Tensor) -> None:
        """This rank's share of an unscaled loss, into the tally."""
        self.tally.add_loss(name, share)

    def _tally(self, logits: Tensor, routing_map: Tensor, num_routed: int) -> None:
        """Take down one micro-batch: in the pass with gradients, and for a close look in the pass
        of the chunk itself (the one without gradients where layers are recomputed).
        """
        if torch.is_grad_enabled():
            self.tally.add_routing(routing_map, num_routed)
            self.tally.add_scores(logits, self.score_function)
        if self.tally.look is not None:
            self.tally.look.add(logits, routing_map)

    def _count(self, logits: Tensor, padding_mask: Tensor | None) -> None:
        """Add this rank's choices, as the balance loss counts them (top-k of the scores)."""
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        chosen, _ = compute_routing_scores_for_aux_loss(
            logits.view(-1, self.num_experts), self.topk, self.score_function, padding_mask=mask
        )
        self.counted_E += chosen.sum(dim=0)

    def _drop(self, probs: Tensor, routing_map: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        keep = kept_of_micro_batch(
            probs,
            routing_map,
            batch=batch,
            factor=self.capacity_factor,
            topk=self.topk,
            policy=self.config.moe_token_drop_policy,
            groups=self.groups,
        )
        return probs * keep, keep

    def _count_for_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        super()._apply_expert_bias(routing_map, padding_mask=padding_mask)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count for the expert bias; where tokens are dropped, only after that."""
        if self.capacity_factor is None:
            super()._apply_expert_bias(routing_map, padding_mask=padding_mask)

    def _apply_global_aux_loss(
        self, probs, scores_for_aux_loss, routing_map, with_padding_mask: bool = False
    ) -> Tensor:
        """The running estimate of megatron-core, or the loss on the exact counts of the global
        batch.
        """
        if self.exact_counts_E is None:
            return super()._apply_global_aux_loss(
                probs, scores_for_aux_loss, routing_map, with_padding_mask
            )
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        _, local_tokens, total_tokens = get_tokens_per_expert_and_token_count(
            routing_map=routing_map,
            reduce_group=self.tp_dp_cp_group,
            with_padding_mask=with_padding_mask,
            topk=self.topk,
        )
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=self.exact_counts_E,
            total_num_tokens=total_tokens,
            topk=self.topk,
            num_experts=self.num_experts,
            moe_aux_loss_coeff=coefficient,
        )
        return self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            loss,
            "global_load_balancing_loss",
            self.tp_dp_cp_group,
            reduce_group_has_dp=True,
            valid_token_count=local_tokens,
        )

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
        self.log_loss(aux_loss_name, aux_loss / aux_loss_coeff / ranks_in_mean)
        is_of_samples = aux_loss_name == "seq_load_balancing_loss"  # counts one sample's tokens
        tokens = valid_token_count
        if valid_token_count is None or is_of_samples:
            tokens = activation.shape[0]
        strength = loss_strength(
            shards=self.num_shards,
            dp=self.dp,
            over_global_batch=reduce_group_has_dp,
            exact=self.exact_global_scale,
            tokens=tokens if self.calculate_per_token_loss else None,
        )
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * strength * self.balance_scale)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Router z-loss, mean over tokens of logsumexp(logits)^2 (Zoph et al. 2022, ST-MoE,
        arXiv:2202.08906).
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        share = z_loss_func(logits, 1.0 / self.num_shards, padding_mask=padding_mask)
        self.log_loss("z_loss", share / self.dp)
        tokens = logits.shape[0] if padding_mask is None else (~padding_mask).sum()
        strength = loss_strength(
            shards=self.num_shards,
            dp=self.dp,
            over_global_batch=False,
            exact=True,
            tokens=tokens if self.calculate_per_token_loss else None,
        )
        return MoEAuxLossAutoScaler.apply(logits, share * coefficient * strength)
