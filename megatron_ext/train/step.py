"""One optimizer step: forward and backward of all micro-batches, the sums over ranks, the update.

    attempt     micro-batches -> megatron-core's schedule (1F1B, interleaved) -> loss per token
                -> gradients in DDP's buffers -> finalize (reduce over dp, tp, tied embeddings)
                -> gradient norm -> sums over ranks (one all-reduce)
    guard       not finite, or a spike: the attempt is made again (resilience/guard.py)
    update      optimizer: clip, update, gather the weights

No weight and no optimizer state changes before `update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_ext.config import RunConfig
from megatron_ext.context import zigzag
from megatron_ext.device import current_device
from megatron_ext.model.gradients import averaged_loss
from megatron_ext.moe.close_look import CloseLook, close_look
from megatron_ext.moe.global_counts import counting, forget
from megatron_ext.moe.stats import RoutingRecord, collect
from megatron_ext.optim import update
from megatron_ext.resilience.guard import Guard
from megatron_ext.resilience.samples import mixed
from megatron_ext.resilience.watch import entering, then


@dataclass(frozen=True)
class StepResult:
    """What one step was; identical on all ranks."""

    lm_loss: float
    mtp_loss: float | None
    num_tokens: int
    grad_norm: float
    num_zeros_in_grad: int | None
    was_skipped: bool
    routing: RoutingRecord | None
    stop_by_signal: bool
    stop_by_time: bool
    samples_sha: str
    mean_step_s: float = 0.0  # of the step before, mean over ranks


OF_EACH_TOKEN = ("tokens_BS", "labels_BS", "loss_mask_BS", "own_mask_BS", "position_ids_BS")
"""What a cp rank holds for its own tokens only; document ids stay whole, for the mask."""


def to_device(batch, device: torch.device):
    """This cp rank's chunks of a TokenBatch of whole sequences, its tensors on `device`."""
    layout = zigzag(parallel_state.get_context_parallel_world_size())
    cp_rank = parallel_state.get_context_parallel_rank()
    tensors = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    mine = {name: layout.split(tensors[name], cp_rank) for name in OF_EACH_TOKEN}
    return replace(batch, **{**tensors, **mine})


def language_model_loss(loss_mask_BS: Tensor, is_per_token: bool, loss_BS: Tensor):
    """(sum over the unmasked tokens, their number, what the log wants of both), as megatron-core's
    schedules expect.

    The schedule divides by the tokens of this micro-batch and by the number of micro-batches, DDP
    averages over dp x cp. cp ranks share a micro-batch and may hold unequal shares of its mask, so
    the sum is times cp and the count over all of cp; not with --calculate-per-token-loss
    (`is_per_token`), where megatron-core sums counts over dp x cp and divides once. The report is
    this rank's, reduced nowhere. Clones, because the schedule scales the first tensor in place.
    """
    mask = loss_mask_BS.view(-1).float()
    total = torch.sum(loss_BS.view(-1).float() * mask)
    count = mask.sum()
    report = torch.stack((total.detach().clone(), count.detach().clone())).double()
    cp = parallel_state.get_context_parallel_world_size()
    if cp > 1 and not is_per_token:
        torch.distributed.all_reduce(count, group=parallel_state.get_context_parallel_group())
        total = total * cp
    return total, count.to(torch.int), report


def domain_sums(loss_mask_BS: Tensor, domains_B: Tensor, num_domains: int, loss_BS: Tensor):
    """[2D] float64: loss sum of each domain, then unmasked tokens of each; this rank's."""
    mask_BS = loss_mask_BS.double()
    rows = torch.stack(
        ((loss_BS.detach().double().view_as(mask_BS) * mask_BS).sum(1), mask_BS.sum(1))
    )
    sums = torch.zeros(2, num_domains, dtype=torch.float64, device=rows.device)
    return sums.index_add(1, domains_B, rows).flatten()


def by_domain(loss: Callable, sums: Callable, loss_BS: Tensor):
    """`language_model_loss` with the sums of the domains behind its report."""
    total, count, report = loss(loss_BS)
    return total, count, torch.cat((report, sums(loss_BS)))


def forward_step(batches: Iterator, model: nn.Module, *_, num_domains: int = 0):
    """Run one micro-batch through one model chunk -> (output, function of the output that gives the
    loss). With `num_domains` the report has `domain_sums` behind it.
    """
    entering("forward")
    batch = next(batches)
    output = model(
        input_ids=batch.tokens_BS,
        position_ids=batch.position_ids_BS,
        attention_mask=batch.document_ids_BS,
        labels=batch.labels_BS,
        loss_mask=batch.own_mask_BS,  # of multi-token prediction; the lm loss has its own
    )
    entering("backward")
    is_per_token = get_model_config(model).calculate_per_token_loss
    loss = partial(language_model_loss, batch.loss_mask_BS, is_per_token)
    if num_domains:
        sums = partial(domain_sums, batch.loss_mask_BS, batch.domain_ids_B, num_domains)
        loss = partial(by_domain, loss, sums)
    return output, loss


def prepare_config(config, optimizer, chunks: Sequence[nn.Module], ddp_config) -> None:
    """Hand megatron-core's schedule the functions that it calls around the micro-batches."""
    config.finalize_model_grads_func = then("all-reduce", finalize_model_grads)
    config.grad_scale_func = averaged_loss(chunks, optimizer.scale_loss, config.fp16)
    if ddp_config.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        if ddp_config.align_param_gather or len(chunks) > 1:
            starts = [chunk.start_grad_sync for chunk in chunks]
            config.grad_sync_func = starts if len(starts) > 1 else None
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        gathers = [chunk.start_param_sync for chunk in chunks]
        config.param_sync_func = gathers if len(gathers) > 1 else gathers[0]


def run_schedule(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence,
    *,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
    num_domains: int = 0,
) -> list[Tensor]:
    """Every micro-batch through every chunk in megatron-core's order; the reports of the last
    pipeline stage: [loss sum, tokens], and with `num_domains` the same of each domain.
    """
    schedule = get_forward_backward_func()
    iterators = [iter(micro_batches) for _ in chunks]
    return schedule(
        forward_step_func=partial(forward_step, num_domains=num_domains),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=seq_length,
        forward_only=forward_only,
    )


def sum_over_ranks(reports: Sequence[Tensor], *extra: float) -> list[float]:
    """[loss sum, tokens, *extra] summed over all ranks: each of the tp copies of the last stage
    counts in both of the first two, so that their ratio is the mean; other stages add nothing
    there.
    """
    local = torch.zeros(2 + len(extra), dtype=torch.float64, device=current_device())
    if reports:
        local[:2] = torch.stack(list(reports)).sum(dim=0)[:2]
    if extra:
        local[2:] = torch.tensor(extra, dtype=torch.float64)
    torch.distributed.all_reduce(local)
    return local.tolist()


def _collect_routing(
    chunks: Sequence[nn.Module], config, look: CloseLook | None = None
) -> RoutingRecord | None:
    if config.num_moe_experts is None:
        return None
    record = collect(
        chunks,
        config.num_layers,
        config.mtp_num_layers or 0,
        config.num_moe_experts,
        current_device(),
    )
    return look.collect(record) if look else record


def _take_mtp_loss(num_micro_batches: int) -> float:
    """Mean over micro-batches and depths of the multi-token-prediction loss on this rank, 0 where
    it has none; clears megatron-core's tracker, which otherwise grows for ever.
    """
    values = MTPLossLoggingHelper.tracker.get("values")
    if values is None:
        return 0.0
    mean = float(values.mean()) / num_micro_batches
    MTPLossLoggingHelper.clean_loss_in_tracker()
    return mean


def _num_last_stage_ranks() -> int:
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    return torch.distributed.get_world_size() // pp


@dataclass(frozen=True)
class Attempt:
    """One pass over the micro-batches, before any weight changes; the same on all ranks but for
    `reports`. `grad_norm` is None where fp16 gradients overflowed.
    """

    lm_loss: float
    mtp_loss: float | None
    num_tokens: int
    grad_norm: float | None
    is_norm_finite: bool
    routing: RoutingRecord | None
    stop_by_signal: bool
    stop_by_time: bool
    samples_sha: str
    is_checked: bool
    mean_step_s: float
    reports: list[Tensor] = field(repr=False)

    def problem(self) -> str | None:
        """What is not finite, as text; None where all is well or nothing is to be checked."""
        if not self.is_checked:
            return None
        values = {"lm loss": self.lm_loss, "mtp loss": self.mtp_loss or 0.0}
        for name, losses_L in self.routing.losses_L.items() if self.routing else ():
            values |= {f"{name} of layer {i}": v for i, v in enumerate(losses_L.tolist(), 1)}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        return None if self.is_norm_finite else f"gradient norm is {self.grad_norm}"


@dataclass(frozen=True)
class StepSettings:
    """What every step of a run has in common.

    `exact_balance`: count the global batch's routing before its backward passes (one more forward).
    `look_domains`: domains of the data in a step with a close look at the routing, else 0.
    `last_step_s`: seconds of the step before on this rank; all ranks learn their mean.
    `judge`: called with the attempt that is taken, before anything is updated; may raise.
    """

    seq_length: int
    micro_batch_size: int
    check_finite: bool
    exact_balance: bool
    look_domains: int = 0
    last_step_s: float = 0.0
    judge: Callable[[Attempt], None] = lambda made: None

    @classmethod
    def of(cls, cfg: RunConfig) -> StepSettings:
        """The settings of a run."""
        kinds = cfg.transformer.moe_router_load_balancing_type
        has_global_loss = cfg.transformer.num_moe_experts and "global_aux_loss" in kinds
        return cls(
            seq_length=cfg.model.seq_length,
            micro_batch_size=cfg.train.micro_batch_size,
            check_finite=cfg.ddp.check_for_nan_in_grad,
            exact_balance=bool(has_global_loss) and cfg.moe.moe_global_aux_mode == "exact",
        )


def _passes(
    state, micro_batches: Sequence, settings: StepSettings
) -> tuple[list[Tensor], CloseLook | None]:
    """Forward and backward of all micro-batches into zeroed gradient buffers, reduced."""
    chunks = state.chunks
    for chunk in chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    shape = {"seq_length": settings.seq_length, "micro_batch_size": settings.micro_batch_size}
    counts_first = settings.exact_balance and len(micro_batches) > 1
    if counts_first:
        with counting(chunks, len(micro_batches)):
            run_schedule(chunks, micro_batches, **shape, forward_only=True)
    num_layers = chunks[0].config.num_layers
    with close_look(chunks, micro_batches, num_layers, settings.look_domains) as look:
        reports = run_schedule(chunks, micro_batches, **shape, forward_only=False)
    if counts_first:
        forget(chunks)
    return reports, look


def attempt(
    state, micro_batches: Sequence, settings: StepSettings, stop: Callable[[], tuple[bool, bool]]
) -> Attempt:
    """Losses and reduced gradients of one global batch; may be made again from a `Snapshot`."""
    config = state.chunks[0].config
    reports, look = _passes(state, micro_batches, settings)
    mtp = _take_mtp_loss(len(micro_batches)) if config.mtp_num_layers else 0.0
    grad_norm = update.prepare(state.optimizer)
    is_bad = grad_norm is not None and not math.isfinite(grad_norm)
    flags = (*map(float, stop()), float(is_bad), settings.last_step_s)
    total, count, mtp, by_signal, by_time, bad_norms, step_s, *samples = sum_over_ranks(
        reports, mtp, *flags, *mixed(micro_batches)
    )
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return Attempt(
        lm_loss=total / max(count, 1.0),
        mtp_loss=mtp / _num_last_stage_ranks() if config.mtp_num_layers else None,
        num_tokens=round(count / tp),
        grad_norm=grad_norm,
        is_norm_finite=bad_norms == 0,
        routing=_collect_routing(state.chunks, config, look),
        stop_by_signal=by_signal > 0,
        stop_by_time=by_time > 0,
        samples_sha="".join(f"{int(part) % 2**32:08x}" for part in samples),
        is_checked=settings.check_finite,
        mean_step_s=step_s / torch.distributed.get_world_size(),
        reports=reports,
    )


def train_step(
    state,
    micro_batches: Sequence,
    settings: StepSettings,
    stop: Callable[[], tuple[bool, bool]],
    guard: Guard | None = None,
) -> StepResult:
    """One update of all weights of `state` (chunks, optimizer) from this rank's micro-batches.

    Raises NumericError on all ranks together where the loss, a balance loss or the gradient norm is
    not finite (twice, where `guard` replays), before anything is updated. fp16 steps whose scaled
    gradients overflow are skipped, not an error.
    """
    step = state.progress.step + 1
    guard = guard or Guard()
    made = guard.settle(
        lambda: attempt(state, micro_batches, settings, stop),
        step,
        state.chunks,
        state.optimizer,
        micro_batches,
    )
    guard.remember(step, made, micro_batches)
    settings.judge(made)
    entering("optimizer")
    state.before_update()
    succeeded, num_zeros = False, None
    if made.grad_norm is not None:
        succeeded, num_zeros = update.apply(state.optimizer, made.grad_norm)
    return StepResult(
        lm_loss=made.lm_loss,
        mtp_loss=made.mtp_loss,
        num_tokens=made.num_tokens,
        grad_norm=made.grad_norm or 0.0,
        num_zeros_in_grad=num_zeros,
        was_skipped=not succeeded,
        routing=made.routing,
        stop_by_signal=made.stop_by_signal,
        stop_by_time=made.stop_by_time,
        samples_sha=made.samples_sha,
        mean_step_s=made.mean_step_s,
    )
