"""A loss or gradient that is not finite: whose it is, and how the run ends (76).

Every rank sees the same sums, so all decide alike; then they tell each other what each knows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.errors import Fatal, NumericError
from megatron_ext.mesh.agree import FailedElsewhere
from megatron_ext.resilience.blame import FORWARD, REDUCED, Finding, first


@dataclass(frozen=True)
class Seen:
    """What one rank knows of a step that is not finite."""

    rank: int
    coordinates: dict[str, int]
    losses: list[float]  # mean of each micro-batch; [] where this is no last pipeline stage
    samples: list[list[int]]  # sample ids of each micro-batch
    findings: list[Finding]

    def bad_micro_batches(self) -> list[int]:
        """Micro-batches whose own loss is not finite."""
        return [number for number, loss in enumerate(self.losses) if not math.isfinite(loss)]


def mean_losses(reports: Sequence[Tensor]) -> list[float]:
    """Loss of each micro-batch from its (sum, tokens)."""
    return [total / max(count, 1.0) for total, count in (one.tolist() for one in reports)]


def seen(reports: Sequence[Tensor], micro_batches: Sequence, findings: list[Finding]) -> Seen:
    """This rank's part."""
    return Seen(
        torch.distributed.get_rank(),
        {
            "dp": parallel_state.get_data_parallel_rank(),
            "pp": parallel_state.get_pipeline_model_parallel_rank(),
            "tp": parallel_state.get_tensor_model_parallel_rank(),
            "cp": parallel_state.get_context_parallel_rank(),
            "ep": parallel_state.get_expert_model_parallel_rank(),
        },
        mean_losses(reports),
        [batch.sample_ids_B.tolist() for batch in micro_batches],
        findings,
    )


def gathered(mine: Seen) -> list[Seen]:
    """What all ranks know, on all ranks."""
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def places(everyone: Sequence[Seen]) -> str:
    """Rank and micro-batch of the losses that are not finite, as text."""
    found = [
        f"rank {one.rank} micro-batch {m}" for one in everyone for m in one.bad_micro_batches()
    ]
    return ", ".join(found) or "only the gradients (no loss of a micro-batch)"


def report(step: int, what: str, everyone: Sequence[Seen]) -> dict[str, Any]:
    """RUN/nonfinite_step_N.json: what, where, which samples, and what each rank saw first."""
    worst = first(finding for one in everyone for finding in one.findings)
    has_bad_loss = any(one.bad_micro_batches() for one in everyone)
    if has_bad_loss and worst is not None and worst.phase != FORWARD:
        worst = None  # all modules gave finite outputs: the loss function itself
    rank, micro_batch = _culprit(worst, everyone)
    module = "the loss function" if has_bad_loss else None
    return {
        "step": step,
        "what": what,
        "rank": rank,
        "micro_batch": micro_batch,
        "sample_ids": everyone[rank].samples[micro_batch] if micro_batch is not None else [],
        "first_bad": module if worst is None else str(worst),
        "ranks": [
            {
                "rank": one.rank,
                **one.coordinates,
                "losses": [loss if math.isfinite(loss) else repr(loss) for loss in one.losses],
                "sample_ids": one.samples,
                "findings": [finding.to_json() for finding in sorted(one.findings)],
            }
            for one in everyone
        ],
    }


def _culprit(worst: Finding | None, everyone: Sequence[Seen]) -> tuple[int, int | None]:
    if worst is not None:
        return worst.rank, worst.micro_batch if worst.phase != REDUCED else None
    for one in everyone:
        if one.bad_micro_batches():
            return one.rank, one.bad_micro_batches()[0]
    return 0, None


def write_report(folder: Path, made: dict[str, Any]) -> Path:
    """Write it whole or not at all; a disk that refuses must not hide the cause."""
    path = folder / f"nonfinite_step_{made['step']}.json"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(made, indent=1))
        os.replace(temporary, path)
    except OSError as error:
        made["what"] += f" (no report: {error.strerror})"
    return path


def error(made: dict[str, Any], path: Path) -> Fatal:
    """The culprit's own error; the others leave with its code."""
    where = f"rank {made['rank']}"
    if made["micro_batch"] is not None:
        where += f" micro-batch {made['micro_batch']} samples {made['sample_ids']}"
    text = f"{made['what']} at step {made['step']}, again in its replay; {where};"
    text += f" first in {made['first_bad'] or 'no module that was watched'}"
    if torch.distributed.get_rank() != made["rank"]:
        return FailedElsewhere(NumericError.code, text)
    return NumericError(
        text,
        do="look at these samples and this module; resume from the last checkpoint with"
        " --skip-samples, a lower --lr or --clip-grad",
        path=path,
    )
