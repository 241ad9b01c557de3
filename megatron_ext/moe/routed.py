"""From logits to experts and routing weights in few passes over [T, E], with the gradient by hand.

    logits -> scores [T, E] -> experts [T, K] -> weights [T, K]
                 |-> distribution: balance losses, z loss, tally

megatron-core scores the tokens twice (for the choice and for the balance loss), spreads weights and
choice over three T x E maps and lets autograd keep what lies between. Here the scores are computed
once, outside of autograd, and `Weights` puts one node into the graph. Its backward pass uses

that a balance loss is linear in the distribution: the sum of distribution * pull with a constant
`pull` (from the counts), which is its gradient with respect to the distribution.

megatron-core's `topk_routing_with_score_function` and `compute_routing_scores_for_aux_loss` are the
reference: tests/moe/test_routed.py. Scores are float32 also where the logits are bfloat16
(megatron-core rounds sigmoids to the logits' dtype before it chooses).

Suffixes: T tokens (S of each of B samples, sample fastest), K experts of a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, group_limited_topk
from torch import Tensor

from megatron_ext.moe.group_score import GroupScore


@dataclass(frozen=True)
class Rule:
    """How experts follow from scores: fields of megatron-core's config, `group_score` is ours."""

    topk: int
    score_function: str = "softmax"
    pre_softmax: bool = False
    scaling_factor: float | None = None
    num_groups: int | None = None
    group_topk: int | None = None
    group_score: GroupScore | None = None

    @property
    def is_softmax(self) -> bool:
        """Softmax scores; else sigmoids."""
        return self.score_function == "softmax"

    @property
    def is_normalised(self) -> bool:
        """The weights of a token are divided by their sum."""
        return not self.pre_softmax if self.is_softmax else self.topk > 1


@dataclass(frozen=True)
class Routed:
    """What the logits [T, E] say; no gradient in it.

    logits_TE   float32
    scores_TE   float32: softmax or sigmoid of the logits
    probs_TE    the distribution of each token: the softmax, or sigmoids divided by their sum
    log_probs_TE  its logarithm where it was at hand (softmax), else None
    experts_TK  int64, in no order
    weights_TK  float32, before the scaling factor
    """

    logits_TE: Tensor
    scores_TE: Tensor
    probs_TE: Tensor
    log_probs_TE: Tensor | None
    experts_TK: Tensor
    weights_TK: Tensor

    def logsumexp_T(self) -> Tensor:
        """[T] of the logits."""
        if self.log_probs_TE is None:
            return torch.logsumexp(self.logits_TE, dim=-1)
        best = self.experts_TK[:, :1]  # the log of the probability of an expert is exact to 1e-7
        return (self.logits_TE.gather(1, best) - self.log_probs_TE.gather(1, best)).squeeze(1)


def best_experts(by_TE: Tensor, rule: Rule) -> Tensor:
    """[T, K] the experts with the largest values, within the best groups where the rule has them.

    Without an order, which the routing does not need: on a CPU 1.6-2 times as fast for 16 experts,
    top-2. Repeated maxima and sorting are not faster from 32 experts on.
    """
    if not rule.group_topk:
        return torch.topk(by_TE, rule.topk, dim=1, sorted=False).indices
    if rule.group_score is not None:
        found = rule.group_score.get_replay_topk(
            by_TE, rule.topk, rule.num_groups, rule.group_topk, torch.topk
        )
        return found[1]
    tokens, experts = by_TE.shape
    sizes = (rule.topk, tokens, experts, rule.num_groups, rule.group_topk)
    return group_limited_topk(by_TE, *sizes)[1]


@torch.no_grad()
def route(logits_TE: Tensor, rule: Rule, expert_bias_E: Tensor | None = None) -> Routed:
    """Scores, choice and weights; the bias moves the choice alone (sigmoid only)."""
    logits = logits_TE.detach().float()
    if rule.is_softmax:
        log_probs = torch.log_softmax(logits, dim=-1)
        scores = probs = log_probs.exp()
        experts = best_experts(scores if rule.pre_softmax else logits, rule)
    else:
        log_probs = None
        scores = torch.sigmoid(logits)
        probs = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        experts = best_experts(scores if expert_bias_E is None else scores + expert_bias_E, rule)
    if rule.is_softmax and rule.is_normalised:
        weights = torch.softmax(logits.gather(1, experts), dim=-1)
    else:
        weights = scores.gather(1, experts)
        if rule.is_normalised:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routed(logits, scores, probs, log_probs, experts, weights)


class Weights(torch.autograd.Function):
    """The routing weights [T, K], and the gradients of the balance and z losses.

    `pull` [E] or [B, E]: d(balance losses) / d(distribution) of each token (of sample b), None
    without. `z_T` [T]: d(z loss) / d(logsumexp), None without. Both are scaled in the backward pass
    by what the schedule has given to megatron-core's MoEAuxLossAutoScaler.
    """

    @staticmethod
    def forward(ctx, logits_TE, routed: Routed, rule: Rule, pull, z_T) -> Tensor:
        """[T, K] in the dtype of the logits."""
        ctx.rule, ctx.dtype = rule, logits_TE.dtype
        probs_TE = None if rule.is_softmax else routed.probs_TE
        scaled = z_T is not None and not rule.is_softmax
        logits = routed.logits_TE if scaled else None
        ctx.save_for_backward(
            routed.scores_TE, probs_TE, logits, routed.experts_TK, routed.weights_TK, pull, z_T
        )
        weights = routed.weights_TK
        if rule.scaling_factor:
            weights = weights * rule.scaling_factor
        return weights.to(logits_TE.dtype, copy=weights is routed.weights_TK)

    @staticmethod
    def backward(ctx, grad_TK: Tensor):
        """To the logits [T, E]."""
        scores, probs, logits, experts, weights, pull, z = ctx.saved_tensors
        rule, scale = ctx.rule, MoEAuxLossAutoScaler.main_loss_backward_scale
        if scale is not None:
            pull = None if pull is None else pull * scale
            z = None if z is None else z * scale
        chosen = _to_chosen(grad_TK.float(), weights, rule)
        if rule.is_softmax:
            grad = _to_softmax(scores, pull, z, chosen if rule.pre_softmax else None)
        else:
            chosen = chosen * (1 - scores.gather(1, experts))
            grad = _to_softmax(probs, pull, None, None)
            if grad is not None:
                grad = grad.mul_(1 - scores)
            if z is not None:
                more = torch.softmax(logits, dim=-1) * z[:, None]
                grad = more if grad is None else grad.add_(more)
        if grad is None:
            grad = torch.zeros_like(scores)
        return grad.scatter_add_(1, experts, chosen).to(ctx.dtype), None, None, None, None


def _to_chosen(grad_TK: Tensor, weights_TK: Tensor, rule: Rule) -> Tensor:
    """[T, K] what a softmax gives to its chosen logits, without what all experts share of it."""
    if rule.scaling_factor:
        grad_TK = grad_TK * rule.scaling_factor
    chosen = weights_TK * grad_TK
    if rule.is_normalised:
        chosen = chosen - weights_TK * chosen.sum(dim=-1, keepdim=True)
    return chosen


def _to_softmax(
    probs_TE: Tensor, pull: Tensor | None, z_T: Tensor | None, chosen_TK: Tensor | None
) -> Tensor | None:
    """[T, E] probs * (pull - what makes its sum over E zero + z): the gradient of the balance and z
    losses, and the share of all experts in that of the chosen; None where there is nothing.
    """
    minus_T = None if z_T is None else -z_T
    if chosen_TK is not None:
        shared_T = chosen_TK.sum(dim=-1)
        minus_T = shared_T if minus_T is None else minus_T + shared_T
    if pull is None:
        return None if minus_T is None else probs_TE * -minus_T[:, None]
    if pull.dim() == 1:
        mean_T = probs_TE @ pull
        pull_TE = pull
    else:
        by_sample = probs_TE.unflatten(0, (-1, pull.shape[0]))
        mean_T = (by_sample * pull).sum(dim=-1).flatten()
        pull_TE = pull.repeat(by_sample.shape[0], 1)
    minus_T = mean_T if minus_T is None else minus_T + mean_T
    return (pull_TE - minus_T[:, None]).mul_(probs_TE)
