"""One optimizer step: forward and backward of all micro-batches, the sums over ranks, the update.

micro-batches -> megatron-core's schedule (1F1B, interleaved) -> loss per token
-> gradients in DDP's buffers -> finalize (reduce over dp, tp, tied embeddings)
-> sums over ranks (one all-reduce) -> optimizer -> scheduler
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
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
from megatron_ext.errors import NumericError
from megatron_ext.moe.global_counts import counting, forget
from megatron_ext.moe.stats import RoutingRecord, collect


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


OF_EACH_TOKEN = ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS")
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


def forward_step(batches: Iterator, model: nn.Module, *_):
    """Run one micro-batch through one model chunk -> (output, function of the output that gives the
    loss).
    """
    batch = next(batches)
    output = model(
        input_ids=batch.tokens_BS,
        position_ids=batch.position_ids_BS,
        attention_mask=batch.document_ids_BS,
        labels=batch.labels_BS,
        loss_mask=batch.loss_mask_BS,
    )
    is_per_token = get_model_config(model).calculate_per_token_loss
    return output, partial(language_model_loss, batch.loss_mask_BS, is_per_token)


def prepare_config(config, optimizer, chunks: Sequence[nn.Module], ddp_config) -> None:
    """Hand megatron-core's schedule the functions that it calls around the micro-batches."""
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
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
) -> list[Tensor]:
    """Every micro-batch through every chunk in megatron-core's order; the reports of the last
    pipeline stage.
    """
    schedule = get_forward_backward_func()
    iterators = [iter(micro_batches) for _ in chunks]
    return schedule(
        forward_step_func=forward_step,
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
        local[:2] = torch.stack(list(reports)).sum(dim=0)
    if extra:
        local[2:] = torch.tensor(extra, dtype=torch.float64)
    torch.distributed.all_reduce(local)
    return local.tolist()


def _collect_routing(chunks: Sequence[nn.Module], config) -> RoutingRecord | None:
    if config.num_moe_experts is None:
        return None
    return collect(
        chunks,
        config.num_layers,
        config.mtp_num_layers or 0,
        config.num_moe_experts,
        current_device(),
    )


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


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise NumericError(
            f"{name} is {value} at step {step}",
            do="resume from the last checkpoint with a lower --lr or --clip-grad, or look at the"
            " data of this step (--no-check-for-nan-in-loss-and-grad trains on)",
        )


@dataclass(frozen=True)
class StepSettings:
    """What every step of a run has in common.

    `exact_balance`: count the global batch's routing before its backward passes (one more forward).
    """

    seq_length: int
    micro_batch_size: int
    check_finite: bool
    exact_balance: bool

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


def train_step(
    state, micro_batches: Sequence, settings: StepSettings, stop: Callable[[], tuple[bool, bool]]
) -> StepResult:
    """One update of all weights of `state` (chunks, optimizer) from this rank's micro-batches.

    Raises NumericError on every rank alike where the loss or the gradient norm is not finite. fp16
    steps whose scaled gradients overflow are skipped, not an error.
    """
    chunks, optimizer = state.chunks, state.optimizer
    config = chunks[0].config
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    shape = {"seq_length": settings.seq_length, "micro_batch_size": settings.micro_batch_size}
    counts_first = settings.exact_balance and len(micro_batches) > 1
    if counts_first:
        with counting(chunks, len(micro_batches)):
            run_schedule(chunks, micro_batches, **shape, forward_only=True)
    reports = run_schedule(chunks, micro_batches, **shape, forward_only=False)
    if counts_first:
        forget(chunks)
    mtp = _take_mtp_loss(len(micro_batches)) if config.mtp_num_layers else 0.0
    total, count, mtp, by_signal, by_time = sum_over_ranks(reports, mtp, *map(float, stop()))
    loss = total / max(count, 1.0)
    tp = parallel_state.get_tensor_model_parallel_world_size()
    routing = _collect_routing(chunks, config)
    step = state.progress.step + 1
    if settings.check_finite:
        _check_finite("lm loss", loss, step)
    succeeded, grad_norm, num_zeros = optimizer.step()
    if settings.check_finite and succeeded and grad_norm is not None:
        _check_finite("gradient norm", float(grad_norm), step)
    return StepResult(
        lm_loss=loss,
        mtp_loss=mtp / _num_last_stage_ranks() if config.mtp_num_layers else None,
        num_tokens=round(count / tp),
        grad_norm=float(grad_norm or 0.0),
        num_zeros_in_grad=None if num_zeros is None else int(num_zeros),
        was_skipped=not succeeded,
        routing=routing,
        stop_by_signal=by_signal > 0,
        stop_by_time=by_time > 0,
    )
