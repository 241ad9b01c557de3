"""What ``--dry-run`` prints: the grid, the pipeline, the parameters, the batch and the losses.

A pure function of the configuration: no torch, no process group, any number of ranks in seconds.
`parse` has checked the rules before; this only shows what would run.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.config import RunConfig
from megatron_ext.config.stages import Chunk
from megatron_ext.costs.flops import model_flops_per_token
from megatron_ext.costs.parameters import count_parameters, moe_pattern, padded_vocab_size
from megatron_ext.costs.steps import end_of
from megatron_ext.mesh.grid import format_grid
from megatron_ext.mesh.layout import layout_of

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
STAGES_SHOWN = 16


def dry_run(cfg: RunConfig, looked_at: Sequence[str] = ()) -> str:
    """The text of a dry run, without a final line break. `looked_at`: lines about what is outside
    of the configuration: files, folders, memory.
    """
    parts = [
        format_grid(layout_of(cfg.parallel)),
        _pipeline(cfg),
        _parameters(cfg),
        _batch(cfg),
        *loss_lines(cfg),
        *cfg.scaled,
        *looked_at,
        *(f"warning: {text}" for text in cfg.warnings),
        "dry run: every rule holds; nothing was started",
    ]
    return "\n".join(part for part in parts if part)


def short(number: float) -> str:
    """``46702792704 -> 46.70B``."""
    for size, unit in UNITS:
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:g}"


def _pipeline(cfg: RunConfig) -> str:
    """Layers of each pipeline rank, counted from 0; chunks are separated by bars."""
    table = cfg.stages
    lines = [
        f"  pp {rank}: " + " | ".join(_chunk(chunk) for chunk in chunks)
        for rank, chunks in enumerate(table)
    ]
    if len(lines) > STAGES_SHOWN:
        hidden = len(lines) - STAGES_SHOWN
        lines = [*lines[: STAGES_SHOWN - 1], f"  ... {hidden} more ranks", lines[-1]]
    moe = sum(moe_pattern(cfg))
    layers = cfg.transformer.num_layers
    built = sum(len(chunk.layers) for chunks in table for chunk in chunks)
    vpp = cfg.parallel.virtual_pipeline_model_parallel_size
    order = "interleaved 1F1B, overlapped point-to-point" if vpp else "1F1B"
    if len(table) == 1:
        order = "no pipeline"
    head = f"layers: {built} of {layers} placed, {moe} with experts; {order}"
    return "\n".join([head, *lines])


def _chunk(chunk: Chunk) -> str:
    words = ["embedding"] if chunk.embedding else []
    if chunk.layers:
        first, last = chunk.layers[0], chunk.layers[-1]
        words.append(f"layers {first}-{last}" if last > first else f"layer {first}")
    words += [f"{chunk.mtp_layers} mtp"] if chunk.mtp_layers else []
    words += ["loss"] if chunk.loss else []
    return " + ".join(words) or "empty"


def _parameters(cfg: RunConfig) -> str:
    count = count_parameters(cfg)
    rows = padded_vocab_size(cfg)
    stages = sorted(set(count.per_stage))
    spread = f"{short(stages[0])} to {short(stages[-1])}" if stages[1:] else short(stages[0])
    lines = [
        f"parameters: total {short(count.total)} ({count.total}), active {short(count.active)}"
        f" ({count.active}), per rank {spread} (largest {count.per_rank})"
    ]
    if rows:
        lines.append(f"vocabulary: {rows} rows, {short(count.embedding)} parameters in its tables")
    else:
        lines.append(
            "vocabulary: size unknown until the tokenizer is read (or --vocab-size):"
            " its tables are NOT in the counts above"
        )
    lines.append(f"model FLOPs per token: {short(model_flops_per_token(cfg))}FLOP")
    return "\n".join(lines)


def _batch(cfg: RunConfig) -> str:
    train, dp = cfg.train, cfg.parallel.data_parallel_size
    micro, batch = train.micro_batch_size, train.global_batch_size
    count = batch // (micro * dp)
    tokens = batch * cfg.model.seq_length
    text = (
        f"batch: {batch} sequences = {count} micro-batches x {micro} x dp {dp};"
        f" {tokens} tokens a step"
    )
    if train.rampup_batch_size:
        start, step, samples = train.rampup_batch_size
        text += f"; ramp from {start} by {step} over {samples} samples"
    if train.train_iters is None and train.train_samples is None:
        return text
    end = end_of(train, micro * dp)
    left = (train.train_samples or end.samples) - end.samples
    text += f"; {end.step} steps, {short(end.samples * cfg.model.seq_length)} tokens"
    return text + (f"; the last {left} samples fill no batch and are not read" if left else "")


def loss_lines(cfg: RunConfig) -> list[str]:
    """Balancing losses with the strength that their gradient really has."""
    t = cfg.transformer
    if t.num_moe_experts is None:
        return []
    kinds = t.moe_router_load_balancing_type
    given = t.moe_aux_loss_coeff
    pairs = zip(
        [kinds] if isinstance(kinds, str) else kinds,
        given if isinstance(given, list) else [given],
        strict=True,
    )
    lines = [_loss(cfg, kind, coefficient) for kind, coefficient in pairs]
    if t.moe_z_loss_coeff:
        lines.append(f"z_loss coefficient {t.moe_z_loss_coeff:g}")
    if t.moe_router_enable_expert_bias:
        lines.append(f"expert bias moves by {t.moe_router_bias_update_rate:g} a step")
    return lines


def _loss(cfg: RunConfig, kind: str, coefficient: float) -> str:
    if kind != "global_aux_loss":
        return (
            f"{kind} coefficient {coefficient:g}" if kind.endswith("loss") else f"routing: {kind}"
        )
    scale = cfg.moe.moe_global_aux_scale
    dp = cfg.parallel.data_parallel_size  # cp is no part of it: megatron-core multiplies by cp
    effective = coefficient if scale == "exact" else coefficient / dp
    return (
        f"{kind} coefficient {coefficient:g}, effective {effective:g}"
        f" (--moe-global-aux-scale {scale}, dp {dp})"
    )
