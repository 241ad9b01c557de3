"""TensorBoard scalars under Megatron-LM's tags."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

STEP_TAGS = {
    "lm_loss": "lm loss",
    "load_balancing_loss": "load_balancing_loss",
    "seq_load_balancing_loss": "seq_load_balancing_loss",
    "global_load_balancing_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
    "mtp_loss": "mtp loss",
    "learning_rate": "learning-rate",
    "global_batch_size": "batch-size",
    "grad_norm": "grad-norm",
    "num_zeros": "num-zeros",
    "params_norm": "params-norm",
    "loss_scale": "loss-scale",
    "step_time_s": "iteration-time",
    "model_tflop_per_s_per_rank": "throughput",
    "tokens_per_s": "tokens-per-second",
    "max_violation": "moe/max violation",
    "num_dead_experts": "moe/dead experts",
}
ALSO_BY_SAMPLES = ("lm_loss", "learning_rate", "global_batch_size", "grad_norm", "num_zeros")


class TensorBoard:
    """Writes the records' known keys as scalars; the resolved config as text at the start."""

    def __init__(self, folder: Path, queue_size: int, config_text: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(folder), max_queue=queue_size, purge_step=first_step + 1 if first_step else None
        )
        self._writer.add_text("config", "```\n" + config_text + "\n```", first_step)

    def write_step(self, record: dict[str, Any]) -> None:
        step, samples = record["step"], record["consumed_samples"]
        for key, tag in STEP_TAGS.items():
            if record.get(key) is not None:
                self._writer.add_scalar(tag, record[key], step)
        for key in ALSO_BY_SAMPLES:
            if record.get(key) is not None:
                self._writer.add_scalar(f"{STEP_TAGS[key]} vs samples", record[key], samples)

    def write_validation(self, record: dict[str, Any], with_perplexity: bool) -> None:
        step, name = record["step"], "validation" if record["split"] == "validation" else "test"
        self._writer.add_scalar(f"lm loss {name}", record["val_loss"], step)
        if with_perplexity:
            self._writer.add_scalar(
                f"lm loss {name} ppl", math.exp(min(20, record["val_loss"])), step
            )
        if record.get("bits_per_byte") is not None:
            self._writer.add_scalar(f"bits per byte {name}", record["bits_per_byte"], step)

    def close(self) -> None:
        self._writer.close()
