"""What "bit for bit equal" means: a digest of a run's history and one of each rank's state.

* `history(run)`: for every step of RUN/metrics.jsonl (the surviving ones) the loss, the gradient
  norm and the samples, to the last bit; `history_digest(run)` is one sha256 over them.
* `state_marks(state)`: name -> sha256 of everything a rank holds: weights, buffers (expert bias,
  router counters), optimizer states and masters, step counts, loss scale, schedule, counters (the
  data cursor is one of them), random streams; `state_digest(state)` is one sha256 over them.
* `recorded(folder)`: train with `pretrain_moe.main` inside, and each rank leaves its `state_marks`
  of the end in folder/state_rank_R.json; `state_digests(folder)` reads them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sha256(*texts: str) -> str:
    """Hash of lines of text."""
    return hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()


def history(run: Path) -> dict[int, str]:
    """Step -> "loss gradient-norm samples" as exact text; of a step that is there twice, the last.

    Python's repr of a float (JSON) and float.hex are both exact; hex makes one bit visible.
    """
    steps: dict[int, str] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "lm_loss" in record:
            loss, norm = float(record["lm_loss"]).hex(), float(record["grad_norm"]).hex()
            samples = f"{record['consumed_samples']} {record.get('samples_sha')}"
            steps[record["step"]] = f"{loss} {norm} {samples}"
    return steps


def repeated_steps(run: Path) -> list[int]:
    """Steps with more than one training record in metrics.jsonl (row 38 wants none)."""
    seen: list[int] = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "lm_loss" in record:
            seen.append(record["step"])
    return sorted({step for step in seen if seen.count(step) > 1})


def history_digest(run: Path) -> str:
    """One hash over the surviving history of a run."""
    return sha256(*(f"{step} {text}" for step, text in sorted(history(run).items())))


def tensor_digest(tensor) -> str:
    """sha256 of dtype, shape and every bit."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    raw = tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw).hexdigest()


def _optimizer_marks(optimizer) -> Iterator[tuple[str, str]]:
    import torch

    from megatron_ext.checkpoint import shards

    for number, leaf in enumerate(shards.leaf_optimizers(optimizer)):
        scaler = getattr(leaf, "grad_scaler", None)
        if scaler is not None:
            yield f"optimizer.{number}.grad_scaler", str(scaler.state_dict())
        if leaf.optimizer is None:
            continue
        for group_number, group in enumerate(leaf.optimizer.param_groups):
            key = f"optimizer.{number}.{group_number}"
            yield key, str({k: v for k, v in group.items() if k != "params"})
            for index, parameter in enumerate(group["params"]):
                yield f"{key}.{index}.master", tensor_digest(parameter)
                for name, value in leaf.optimizer.state[parameter].items():
                    mark = tensor_digest(value) if torch.is_tensor(value) else str(value)
                    yield f"{key}.{index}.{name}", mark


def state_marks(state) -> dict[str, str]:
    """Name -> hash or text of all that this rank holds; `state` is a checkpoint.TrainState."""
    from megatron_ext.checkpoint import rng
    from megatron_ext.checkpoint.state import sync_weights, unwrap

    sync_weights(state.chunks)
    marks = {"progress": str(state.progress)}
    for number, chunk in enumerate(state.chunks):
        tensors = [*unwrap(chunk).named_parameters(), *unwrap(chunk).named_buffers()]
        marks.update({f"{number}.{name}": tensor_digest(tensor) for name, tensor in tensors})
    marks.update(_optimizer_marks(state.optimizer))
    marks["scheduler"] = str(state.scheduler.state_dict())
    marks.update({f"rng.{name}": tensor_digest(bits) for name, bits in rng.capture().items()})
    return marks


def digest_of(marks: dict[str, str]) -> str:
    """One hash over the marks of a rank."""
    return sha256(*(f"{name} {mark}" for name, mark in sorted(marks.items())))


def state_digest(state) -> str:
    """One hash over all that this rank holds."""
    return digest_of(state_marks(state))


def differing(one: dict, other: dict) -> list[str]:
    """Names whose marks differ or which only one of the two has."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """`pretrain_moe.main` inside leaves each rank's marks of the trained state in `folder`, also
    where it was preempted.
    """
    import torch

    from megatron_ext.train import loop

    stock = loop.train

    @functools.wraps(stock)
    def train(run: Any, *args: Any) -> str:
        try:
            return stock(run, *args)
        finally:
            path = folder / f"state_rank_{torch.distributed.get_rank()}.json"
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(state_marks(run.state)))

    loop.train = train
    try:
        yield
    finally:
        loop.train = stock


def recorded_marks(folder: Path) -> dict[int, dict[str, str]]:
    """Rank -> marks that `recorded` left."""
    found = folder.glob("state_rank_*.json")
    return {int(path.stem.rpartition("_")[2]): json.loads(path.read_text()) for path in found}


def state_digests(folder: Path) -> dict[int, str]:
    """Rank -> one hash."""
    return {rank: digest_of(marks) for rank, marks in sorted(recorded_marks(folder).items())}
