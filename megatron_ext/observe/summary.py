"""What a run directory says, on one page; reads files only, no torch.

    python -m megatron_ext.observe.summary runs/quickstart

    RUN/config.yaml         -> rank grid
    RUN/metrics.jsonl       -> losses, tokens a second
    RUN/data/unigram.json   -> baseline of the validation loss (python -m data.unigram)
    RUN/expert_load.json    -> load of each layer's experts
    RUN/sample.txt          -> what the model wrote
    RUN/checkpoints         -> the commands to go on

Parts whose file is missing are left out; only config.yaml and metrics.jsonl must be there.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_ext.command import CommandLine
from megatron_ext.config.sections.parallel import ParallelSection
from megatron_ext.errors import DataError, exit_on_fatal
from megatron_ext.mesh.grid import format_grid
from megatron_ext.mesh.layout import layout_of
from megatron_ext.observe.console import expert_lines
from megatron_ext.state_files import read_bytes

RESUME_STEPS = 60
"""Steps that the command to resume adds."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out."""
    try:
        lines = read_bytes(path).splitlines()
    except OSError as error:
        raise DataError(
            f"no metrics of a run: {error.strerror}",
            do="name a run directory, such as runs/quickstart",
            path=path,
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            if number < len(lines):
                raise DataError(f"line {number} is not JSON", path=path) from None
    return records


def read_config(path: Path) -> dict[str, Any]:
    """RUN/config.yaml: section -> field -> value."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"the run's configuration cannot be read: {reason}",
            do="name a run directory, such as runs/quickstart",
            path=path,
        ) from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # an optional part of the page


def grid_lines(config: dict[str, Any]) -> list[str]:
    """Which rank is where."""
    return format_grid(layout_of(ParallelSection(**config["parallel"]))).splitlines()


def loss_lines(steps: list[dict[str, Any]]) -> list[str]:
    """First and last training loss."""
    if not steps:
        return ["no step was finished"]
    first, last = steps[0], steps[-1]
    lines = [
        f"step {one['step']:>6}   lm loss {one['lm_loss']:.4f} nats a token"
        for one in (first, last)[: len(steps)]
    ]
    if "load_balancing_loss" in last:
        lines.append(
            f"load balancing loss {last['load_balancing_loss']:.4f} (1 is an even load),"
            f" experts without a token {last['num_dead_experts']}"
        )
    return lines


def validation_lines(
    evaluations: list[dict[str, Any]], baseline: dict[str, Any] | None
) -> list[str]:
    """The last validation beside the unigram baseline."""
    if not evaluations:
        return []
    last = evaluations[-1]
    if "bits_per_byte" not in last:
        return [f"model     {last['val_loss']:.4f} nats a token, step {last['step']}"]
    lines = [
        f"model              {last['bits_per_byte']:.3f} bits a byte   step {last['step']},"
        f" {last['val_loss']:.4f} nats a token, {last['num_tokens']} tokens"
    ]
    if baseline and "bits_per_byte" in baseline:
        lines.append(
            f"unigram baseline   {baseline['bits_per_byte']:.3f} bits a byte  "
            f" {baseline['nats_per_token']:.4f} nats a token, {baseline['valid_tokens']} tokens"
        )
    return lines


def speed_lines(steps: list[dict[str, Any]]) -> list[str]:
    """Median speed."""
    if not steps:
        return []
    tokens = statistics.median(one["tokens_per_s"] for one in steps)
    seconds = statistics.median(one["step_time_s"] for one in steps)
    return [f"{tokens:,.0f} tokens/s, {seconds:.3f} s a step (medians of {len(steps)} steps)"]


def load_lines(load: dict[str, Any] | None) -> list[str]:
    """The load of each MoE layer's experts in the last step."""
    if not load:
        return []
    return [line.strip() for line in expert_lines(np.asarray(load["counts"]), load["is_moe"])]


def sample_lines(path: Path) -> list[str]:
    """What the model wrote, as it wrote it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    except OSError:
        return []


def command_lines(run: Path, config: dict[str, Any]) -> list[str]:
    """What to type next."""
    observe, checkpoint = config["observe"], config["checkpoint"]
    save = checkpoint["save"] or run / "checkpoints"
    ranks = config["parallel"]["world_size"] or 1
    programs = os.path.relpath(Path(sys.executable).parent)  # .venv/bin
    lines = [
        f"TensorBoard  {programs}/tensorboard --logdir"
        f" {observe['tensorboard_dir'] or run / 'tensorboard'}"
    ]
    if (run / "report.html").exists():
        lines.insert(0, f"report       open {run / 'report.html'} in a browser")
    saved = Path(save) / "latest_checkpointed_iteration.txt"
    if saved.exists():
        more = _longer(config.get("train", {}), int(saved.read_text()))
        lines += [
            f"resume       bash launch/run.sh {ranks} --config {run / 'config.yaml'} --load {save}"
            f" {more} --override-opt-param-scheduler",
            f"write text   {programs}/python -m megatron_ext.generate --load {save}"
            " --prompt 'def '",
        ]
    return [*lines, "tests        bash tests/run.sh"]


def _longer(train: dict[str, Any], step: int) -> str:
    """The flag for a few steps more, in the run's own unit."""
    if train.get("train_samples"):
        more = RESUME_STEPS * train["global_batch_size"]
        return f"--train-samples {train['train_samples'] + more}"
    return f"--train-iters {step + RESUME_STEPS}"


def page(run: Path) -> str:
    """The whole text. Raises DataError (65) where `run` is not a run directory."""
    config, records = read_config(run / "config.yaml"), read_records(run / "metrics.jsonl")
    steps = [record for record in records if "lm_loss" in record]
    evaluations = [record for record in records if record.get("split") == "validation"]
    load = _read_json(run / "expert_load.json")
    tokens = steps[-1]["consumed_tokens"] if steps else 0
    parts = {
        "Ranks": grid_lines(config),
        "Training loss": loss_lines(steps),
        "Validation loss": validation_lines(evaluations, _read_json(run / "data/unigram.json")),
        "Speed": speed_lines(steps),
        f"Expert load of step {load and load['step']}": load_lines(load),
        "Sample": sample_lines(run / "sample.txt"),
        "Next": command_lines(run, config),
    }
    shown = [
        "\n".join([title, *(f"  {line}" for line in lines)])
        for title, lines in parts.items()
        if lines
    ]
    head = f"{run}: {steps[-1]['step'] if steps else 0} steps, {tokens:,} tokens"
    return "\n\n".join([f"{head}\n{'=' * len(head)}", *shown])


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m megatron_ext.observe.summary`."""
    parser = CommandLine("python -m megatron_ext.observe.summary", __doc__)
    parser.add_argument("run", type=Path, help="the run directory, such as runs/quickstart")
    with exit_on_fatal():
        args = parser.parse_args(argv)
        print(page(args.run))


if __name__ == "__main__":
    main()
