"""The lines people read: Megatron-LM's words and order, so that their parsers keep working. Pure
text functions.
"""

from __future__ import annotations

import time
from typing import Any


def step_line(record: dict[str, Any], *, num_steps: int, log_throughput: bool) -> str:
    """One training step as Megatron-LM prints it."""
    parts = [
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {record['step']:8d}/{num_steps:8d} |",
        f" consumed samples: {record['consumed_samples']:12d} |",
        f" elapsed time per iteration (ms): {record['step_time_s'] * 1000:.1f} |",
    ]
    if log_throughput:
        parts.append(
            f" throughput per GPU (TFLOP/s/GPU): {record['model_tflop_per_s_per_rank']:.3f} |"
        )
    parts += [
        f" learning rate: {record['learning_rate']:.6E} |",
        f" global batch size: {record['global_batch_size']:5d} |",
        f" lm loss: {record['lm_loss']:.6E} |",
    ]
    if "load_balancing_loss" in record:
        parts.append(f" load_balancing_loss: {record['load_balancing_loss']:.6E} |")
        parts.append(f" z_loss: {record['z_loss']:.6E} |")
    if "mtp_loss" in record:
        parts.append(f" mtp loss: {record['mtp_loss']:.6E} |")
    parts += [
        f" loss scale: {record['loss_scale']:.1f} |",
        f" grad norm: {record['grad_norm']:.3f} |",
    ]
    if record.get("num_zeros") is not None:
        parts.append(f" num zeros: {record['num_zeros']} |")
    if "params_norm" in record:
        parts.append(f" params norm: {record['params_norm']:.3f} |")
    parts += [
        f" number of skipped iterations: {record['num_skipped']:3d} |",
        f" number of nan iterations: {record['num_nan']:3d} |",
    ]
    return "".join(parts)


def expert_line(record: dict[str, Any], num_experts: int) -> str:
    """How the experts of the model are in this step: the worst layer is that of the largest MaxVio;
    layers count from 1.
    """
    violations = record["max_violation_per_layer"]
    worst = max(range(len(violations)), key=violations.__getitem__)
    dead = round(record["dead_expert_share_per_layer"][worst] * num_experts)
    of_worst = f"MaxVio {violations[worst]:.3f}, dead {dead} of {num_experts}"
    return (
        f" experts | MaxVio: {record['max_violation']:.3f} |"
        f" worst layer: {worst + 1} ({of_worst}) |"
        f" dead experts: {record['num_dead_experts']} ({record['dead_expert_share']:.1%}) |"
        f" router entropy: {record['router_entropy_share']:.3f} |"
        f" load entropy: {record['load_entropy_share']:.3f} |"
    )


def validation_line(record: dict[str, Any]) -> str:
    """One evaluation as Megatron-LM prints it, with bits per byte after it."""
    bits = record.get("bits_per_byte")
    tail = f" bits per byte: {bits:.4f} |" if bits is not None else ""
    return (
        f" {record['split']} loss at iteration {record['step']} |"
        f" lm loss value: {record['val_loss']:.6E} |"
        f" lm loss PPL: {record['perplexity']:.6E} |{tail}"
    )


def expert_lines(counts_LE, is_moe_L) -> list[str]:
    """One line per MoE layer: the share of the busiest, the idlest and an even expert, and a bar
    per expert.
    """
    blocks = " ▁▂▃▄▅▆▇█"
    lines = []
    for layer, counts in enumerate(counts_LE.tolist()):
        if not is_moe_L[layer]:
            continue
        total = sum(counts) or 1.0
        peak = max(counts) or 1.0
        bars = "".join(blocks[min(8, round(8 * count / peak))] for count in counts)
        lines.append(
            f"  layer {layer + 1:3d}  busiest {max(counts) / total:6.1%}"
            f"  idlest {min(counts) / total:6.1%}  even {1 / len(counts):6.1%}  |{bars}|"
        )
    return lines
