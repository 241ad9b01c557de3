"""RUN/tensorboard: scalars, routing pictures, checkpoint events, the config as text and as HParams.

Scalars of a step are one summary, so that 400 tags cost a few milliseconds. What is known only as
pixels (PNG) is written as it is. Tags are in observe/tags.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary

from megatron_ext.config import RunConfig
from megatron_ext.observe import tags

HPARAMS_AT_MOST = 100


def hyper_parameters(cfg: RunConfig) -> dict[str, bool | float | str]:
    """What was set by a flag or a file, as numbers and texts."""
    found: dict[str, bool | float | str] = {}
    for section in cfg.to_dict().values():
        entries = section.items() if isinstance(section, dict) else ()
        for name, entry in entries:
            if not isinstance(entry, dict) or entry.get("origin") in ("default", "derived", None):
                continue
            value = entry["value"]
            found[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return dict(list(found.items())[:HPARAMS_AT_MOST])


class TensorBoard:
    """Writes records under the tags of `megatron_ext.observe.tags`."""

    def __init__(self, folder: Path, cfg: RunConfig, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._observe = cfg.observe
        self._writer = SummaryWriter(
            str(folder),
            max_queue=cfg.observe.tensorboard_queue_size,
            purge_step=first_step + 1 if first_step else None,
        )
        self._writer.add_text("config", "```\n" + cfg.to_yaml() + "\n```", first_step)
        self._writer.add_custom_scalars(tags.layout(cfg.transformer.num_layers))
        for summary in hparams(hyper_parameters(cfg), {"lm loss": 0.0}):
            self._writer.file_writer.add_summary(summary)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.file_writer.add_summary(Summary(value=found), step)

    def write_step(self, record: Mapping[str, Any]) -> None:
        """A training step."""
        step, values = record["step"], tags.step_scalars(record)
        if self._observe.log_timers_to_tensorboard:
            values |= {
                tag: record[key]
                for key, tag in tags.TIMER_TAGS.items()
                if record.get(key) is not None
            }
        if self._observe.log_memory_to_tensorboard:
            values |= memory_values(record)
        self._scalars(values, step)
        self._scalars(tags.sample_scalars(record), record["consumed_samples"])

    def write_validation(self, record: Mapping[str, Any], with_perplexity: bool) -> None:
        """An evaluation."""
        name = "validation" if record["split"] == "validation" else "test"
        values = {f"lm loss {name}": record["val_loss"]}
        if with_perplexity:
            values[f"lm loss {name} ppl"] = math.exp(min(20, record["val_loss"]))
        if record.get("bits_per_byte") is not None:
            values[f"bits per byte {name}"] = record["bits_per_byte"]
        losses = list((record.get("val_loss_per_domain") or {}).items())
        for place in tags.spread(len(losses), tags.MOST_DOMAINS):
            domain, loss = losses[place]
            values[f"lm loss {name}/{domain}"] = loss
        self._scalars(values, record["step"])

    def write_picture(self, tag: str, png: bytes, step: int) -> None:
        """An image that is a PNG already."""
        image = Summary.Image(encoded_image_string=png, colorspace=3)
        self._writer.file_writer.add_summary(
            Summary(value=[Summary.Value(tag=tag, image=image)]), step
        )

    def write_text(self, tag: str, text: str, step: int) -> None:
        """A text, as Markdown."""
        self._writer.add_text(tag, text, step)

    def write_checkpoint_event(self, event: Mapping[str, Any]) -> None:
        """A line of the checkpoints' ledger, at the step that it is about."""
        step = int(event["step"] or 0)
        rest = ", ".join(
            f"{key} {value}" for key, value in event.items() if key not in ("time", "event", "step")
        )
        self.write_text("checkpoint", f"step {step} **{event['event']}** {rest}", step)
        self._scalars({f"checkpoint/{event['event']}": float(step)}, step)

    def close(self) -> None:
        """Write what is queued."""
        self._writer.close()


def memory_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Megatron-LM's memory tags: torch's statistics of rank 0 on CUDA; on a CPU only the peak, of
    the largest process.
    """
    if torch.cuda.is_available():
        stats = torch.cuda.memory_stats()
        return {tag: float(stats.get(key, 0)) for key, tag in tags.MEMORY_TAGS.items()}
    peak = record.get("memory_peak_max_bytes")
    return {} if peak is None else {"mem-max-allocated-bytes": float(peak)}
