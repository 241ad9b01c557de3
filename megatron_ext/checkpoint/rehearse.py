"""A dress rehearsal: does this checkpoint load in another layout? On forked CPU ranks, with gloo.

    python -m megatron_ext.checkpoint rehearse RUN/checkpoints --layout tp2,pp2,ep2

The ranks build the model and optimizer of the saved config in that layout, load, and save again;
the two checkpoints are compared tensor by tensor, bit for bit. A vocabulary whose rows the new tp
does not divide gets more rows of padding; the rows of the old one are compared.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import yaml

from megatron_ext.checkpoint import commands, manifest
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.mesh.agree import FailedElsewhere

_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "vpp": "--num-virtual-stages-per-pipeline-rank",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
    "cp": "--context-parallel-size",
}


def parse_layout(text: str) -> tuple[int, list[str]]:
    """`tp2,pp2,dp2` -> (ranks, flags). Raises ConfigError."""
    sizes = {}
    for part in text.split(","):
        match = re.fullmatch(r"([a-z]+)([1-9]\d{0,4})", part.strip())
        if match is None or match[1] not in (*_FLAGS, "dp"):
            raise ConfigError(
                f"--layout {text}: {part!r} is no axis with a size", do="write tp2,pp2,ep2"
            )
        sizes[match[1]] = int(match[2])
    flags = [word for axis, flag in _FLAGS.items() for word in (flag, str(sizes.get(axis, 1)))]
    if sizes.get("vpp", 1) == 1:
        at = flags.index(_FLAGS["vpp"])
        del flags[at : at + 2]
    if sizes.get("tp", 1) > 1:
        flags.append("--sequence-parallel")
    ranks = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1)
    experts = sizes.get("ep", 1) * sizes.get("etp", 1) * sizes.get("pp", 1)
    data = sizes.get("dp")
    if data is None:
        data = max(1, -(-experts // ranks))
    return ranks * data, flags


def _load_and_save(argv: list[str], source: Path, rows: int, target: Path) -> int:
    """One rank: what pretrain_moe.py does up to the first step, then a save."""
    from megatron_ext.checkpoint import Checkpointer, TrainState
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.errors import Fatal, report
    from megatron_ext.mesh.groups import process_groups

    try:
        cfg = parse(argv)
        device = start("cpu")
        from megatron_ext.model.gpt import build_chunks, vocabulary, wrap_for_training
        from megatron_ext.optim.build import build_optimizer, build_scheduler

        with process_groups(cfg.parallel, device, cfg.train.seed):
            words = vocabulary(cfg, rows)
            chunks = wrap_for_training(cfg, build_chunks(cfg, words))
            optimizer = build_optimizer(cfg, chunks)
            state = TrainState(chunks, optimizer, build_scheduler(cfg, optimizer))
            with Checkpointer(cfg.checkpoint, target, source, run_info={}) as keeper:
                keeper.load(state)
                keeper.save(state)
    except Fatal as error:
        import torch

        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if error.lines() and (is_first or not error.every_rank):
            report(error, 0)
        return error.code
    return 0


def rehearse(directory: Path, step: int | None, layout: str) -> None:
    """Load and compare; prints one line. Raises DataError where it does not come out equal."""
    from megatron_ext.mesh.forks import run_ranks

    world, flags = parse_layout(layout)
    path = commands.pick(directory, step)
    record = manifest.read(path).record
    config = record["run"].get("config")
    if not isinstance(config, str):
        raise DataError("the checkpoint does not know its config", path=path)
    table = manifest.read(path).tensors["embedding.word_embeddings.weight"]
    rows = table[0].spot.shape[0]
    with tempfile.TemporaryDirectory(prefix="rehearse-") as temporary:
        argv = [*_argv(config, Path(temporary), flags), "--ckpt-step", str(record["step"])]
        target = Path(temporary) / "again"
        codes = run_ranks(_load_and_save, world, argv, directory, rows, target, timeout_s=600)
        if any(codes):
            raise FailedElsewhere(max(codes), f"it does not load with --layout {layout}")
        if not commands.diff(path, commands.pick(target, None), padding_may_differ=True):
            raise DataError(f"it changes when loaded with --layout {layout}", path=path)
    print(f"step {record['step']} loads with {layout} on {world} ranks, bit for bit")


def _argv(config: str, temporary: Path, flags: list[str]) -> list[str]:
    """The saved config without its launch and its folders, then the layout asked for."""
    saved = yaml.safe_load(config)
    for section in ("parallel", "checkpoint", "observe", "resilience"):
        saved.pop(section, None)
    file = temporary / "config.yaml"
    file.write_text(yaml.safe_dump(saved))
    return ["--config", str(file), *flags, "--make-vocab-size-divisible-by", "1"]
