"""The router of every MoE layer: scores, choice, losses and tally of a micro-batch in one go.

    hidden -> gating (megatron-core) -> logits -> route -> counts -> pull of the balance losses
                                                    |-> Weights: [T, K] with the whole gradient
                                                    |-> tally

Where a setting needs megatron-core's own road (sinkhorn, its fused kernels, its capacity on a
shard, replayed routing, fp64, a padding mask) that is taken: moe/stock_router.py. A dispatcher that
works on a `Choice` gets it (`hand_on_choice`); others get megatron-core's T x E maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.moe.balance import (
    counted_by_sample,
    loss_strength,
    pull_of,
    summed,
    total_pull,
)
from megatron_ext.moe.choice import Choice, counted, maps
from megatron_ext.moe.group_score import GroupScore
from megatron_ext.moe.routed import Routed, Rule, Weights, best_experts, route
from megatron_ext.moe.stock_router import RouterOptions, StockRouter

LOGGED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""megatron-core's kind of balance loss -> its name in the tally."""

__all__ = ["Router", "RouterOptions", "loss_strength"]


def rule_of(config, replay) -> Rule | None:
    """The rule of this config, None where megatron-core's own road is needed. `replay` is what
    stands in the place of its RouterReplay.
    """
    is_ours = (
        config.moe_router_load_balancing_type != "sinkhorn"
        and not config.moe_router_fusion
        and config.moe_router_dtype != "fp64"
        and config.moe_expert_capacity_factor is None
        and (replay is None or isinstance(replay, GroupScore))
        and not torch.are_deterministic_algorithms_enabled()
    )
    if not is_ours:
        return None
    return Rule(
        topk=config.moe_router_topk,
        score_function=config.moe_router_score_function,
        pre_softmax=config.moe_router_pre_softmax,
        scaling_factor=config.moe_router_topk_scaling_factor,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        group_score=replay,
    )


class Router(StockRouter):
    """`StockRouter` in few passes; the same outputs, losses and gradients."""

    def __init__(self, config, pg_collection=None, *, options: RouterOptions) -> None:
        super().__init__(config, pg_collection, options=options)
        self.rule = rule_of(self.config, self.router_replay)
        asked = {name: self.get_aux_loss_coeff(name) for name in LOGGED}
        self.coefficients = {name: value for name, value in asked.items() if value > 0}
        self._hands_on = False

    @property
    def gives_choice(self) -> bool:
        """True where no assignment is dropped and the fast road is taken."""
        return self.rule is not None and self.capacity_factor is None

    def hand_on_choice(self) -> bool:
        """From now on `forward` returns (probs [T, K], Choice) instead of two T x E maps, where it
        can; returns whether it does.
        """
        self._hands_on = self.gives_choice
        return self._hands_on

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None):
        """logits [S, B, E] -> probabilities and map, both [S*B, E], or (probs [S*B, K], Choice)."""
        if self.rule is None or padding_mask is not None:
            assert not self._hands_on, "a Choice has no padding mask"
            return super().routing(logits, padding_mask=padding_mask)
        batch = logits.shape[1]
        logits_TE = logits.reshape(-1, self.num_experts)
        routed = route(logits_TE, self.rule, self.expert_bias)
        counts_E = counted(routed.experts_TK, self.num_experts)
        if self.counted_E is not None:
            self.counted_E += self._counts_of_losses(routed, counts_E)
        pull = z_T = None
        if self.training and torch.is_grad_enabled():
            probs_BE = routed.probs_TE.view(-1, batch, self.num_experts).sum(dim=0)
            pull = self._balance(routed, counts_E, probs_BE)
            z_T = self._z(routed)
            self.tally.add_sums(routed, probs_BE)
        probs_TK = Weights.apply(logits_TE, routed, self.rule, pull, z_T)
        choice = Choice(routed.experts_TK, probs_TK, counts_E)
        if self.capacity_factor is not None:
            return self._dropped(choice, logits_TE, batch)
        if self.enable_expert_bias and torch.is_grad_enabled():
            self.local_tokens_per_expert += counts_E
        if self.training and torch.is_grad_enabled():
            self.tally.add_counts(counts_E, logits_TE.shape[0], routed.experts_TK.numel())
        if self.training and self.tally.look is not None:
            self.tally.look.add(logits_TE, maps(choice)[1])
        return (probs_TK, choice) if self._hands_on else maps(choice)

    def _dropped(self, choice: Choice, logits_TE: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """The maps of what the capacity of the micro-batch keeps."""
        probs_TE, map_TE = self._drop(*maps(choice), batch=batch)
        self._count_for_bias(map_TE)
        if self.training and torch.is_grad_enabled():
            self.tally.add_routing(map_TE, choice.experts_TK.numel())
        if self.training and self.tally.look is not None:
            self.tally.look.add(logits_TE, map_TE)
        return probs_TE, map_TE

    def _experts_of_losses(self, routed: Routed) -> Tensor:
        """[T, K] what the balance losses count: the top-k of the distribution, without the expert
        bias and without groups, as in megatron-core.
        """
        if self.expert_bias is None and not self.rule.group_topk:
            return routed.experts_TK
        return best_experts(routed.probs_TE, Rule(self.topk))

    def _counts_of_losses(self, routed: Routed, counts_E: Tensor) -> Tensor:
        experts = self._experts_of_losses(routed)
        return counts_E if experts is routed.experts_TK else counted(experts, self.num_experts)

    @torch.no_grad()
    def _balance(self, routed: Routed, counts_E: Tensor, probs_BE: Tensor) -> Tensor | None:
        """d(all balance losses) / d(distribution), [E] or [B, E]; each loss goes into the tally.
        `probs_BE`: sums of the distribution over the tokens of each sample.
        """
        if not self.coefficients:
            return None
        num_tokens, batch = routed.probs_TE.shape[0], probs_BE.shape[0]
        counts_E, parts = self._counts_of_losses(routed, counts_E), []
        for name, coefficient in self.coefficients.items():
            is_global, samples = name == "global_aux_loss", 1
            if name == "seq_aux_loss":
                samples = batch
                experts = self._experts_of_losses(routed)
                counts = counted_by_sample(experts, batch, self.num_experts)
                counts = summed(counts, self.tp_cp_group)
            else:
                counts = self._global_counts(counts_E) if is_global else None
                counts = summed(counts_E, self.tp_cp_group) if counts is None else counts
            ranks = self.num_shards * (self.dp if is_global else 1)
            tokens = num_tokens // samples * ranks
            pull = pull_of(counts, num_tokens=tokens, topk=self.topk, num_samples=samples)
            ranks_in_mean = 1 if is_global else self.dp
            self.log_loss(LOGGED[name], (probs_BE * pull).sum() / ranks_in_mean)
            strength = coefficient * self.balance_scale * self._strength(num_tokens, is_global)
            parts.append((pull, strength))
        return total_pull(parts)

    def _global_counts(self, counts_E: Tensor) -> Tensor:
        """[E] counts for the global-batch loss: the exact ones of the batch, or the mean of the
        micro-batches so far.
        """
        if self.exact_counts_E is not None:
            return self.exact_counts_E
        self.global_tokens_per_expert += summed(counts_E, self.tp_dp_cp_group)
        self.ga_steps += 1
        return self.global_tokens_per_expert / self.ga_steps

    def _strength(self, num_tokens: int, is_global: bool) -> float:
        return loss_strength(
            shards=self.num_shards,
            dp=self.dp,
            over_global_batch=is_global,
            exact=self.exact_global_scale,
            tokens=num_tokens if self.calculate_per_token_loss else None,
        )

    @torch.no_grad()
    def _z(self, routed: Routed) -> Tensor | None:
        """[T] d(z loss) / d(logsumexp); the loss goes into the tally."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None:
            return None
        logsumexp_T = routed.logsumexp_T()
        num_tokens = logsumexp_T.shape[0]
        share = logsumexp_T.square().mean() / self.num_shards
        self.log_loss("z_loss", share / self.dp)
        strength = coefficient * self._strength(num_tokens, is_global=False)
        return logsumexp_T * (2 * strength / (self.num_shards * num_tokens))
