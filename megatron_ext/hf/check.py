"""`check`: import a folder, load it in a layout on forked CPU ranks, and compare its logits with
those of transformers, both in fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.hf.configure import RUN, yaml_text
from megatron_ext.hf.importer import Plan, import_folder, plan_import
from megatron_ext.hf.memory import check_memory
from megatron_ext.parity.names import NamedLayout, parse_layout

PIN = "transformers==5.23.0"
COPIES = 3
"""fp32 copies of the weights that memory must hold: theirs, ours, and one that is on its way."""


def reference_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] by transformers, fp32, plain attention."""
    from transformers import AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


def words_of(
    plan: Plan, layout: NamedLayout, tokens_shape: tuple[int, int], yaml_path: Path
) -> list[str]:
    """The flags of our model in a layout, in fp32; those of the model go into `yaml_path`."""
    batch, length = tokens_shape
    skip = ("tokenizer_type", "seq_length", "bf16", "fp16")
    flags = {k: v for k, v in plan.flags.items() if k not in skip}
    flags["max_position_embeddings"] = max(flags["max_position_embeddings"], length)
    micro_batches = layout.sizes["pp"] if layout.sizes["vpp"] > 1 else 1  # interleaved schedule
    run = {**RUN, "micro_batch_size": batch, "seq_length": length}
    run["global_batch_size"] = batch * layout.sizes["dp"] * micro_batches
    yaml_path.write_text(yaml_text({**flags, **run}, "check"))
    words = ["--config", str(yaml_path), "--mock-data", "--device", "cpu"]
    return [*words, "--world-size", str(layout.world_size), *layout.flags]


def _tokens(plan: Plan, args: Any) -> np.ndarray:
    generator = np.random.default_rng(args.seed)
    size = (args.batch, args.tokens)
    return generator.integers(0, plan.cfg.model.vocab_size, size, dtype=np.int64)


def largest_difference(plan: Plan, folder: Path, args: Any) -> tuple[float, float]:
    """(largest difference of a logit, largest logit of transformers)."""
    from megatron_ext.device import start

    start("cpu")
    from megatron_ext.hf.logits import logits_on_rank
    from megatron_ext.mesh.forks import run_ranks

    layout = parse_layout(args.layout)
    tokens = _tokens(plan, args)
    with tempfile.TemporaryDirectory(prefix="hf-check-") as scratch:
        save = Path(scratch) / "checkpoint"
        import_folder(plan, save)
        words = words_of(plan, layout, tokens.shape, Path(scratch) / "check.yaml")
        words += ["--load", str(save)]
        theirs = reference_logits(folder, tokens)
        found = run_ranks(logits_on_rank, layout.world_size, words, str(save), tokens)
    ours = [logits for logits in found if logits is not None]
    assert ours, "no rank of the last pipeline stage returned logits"
    difference = max(float(np.abs(logits - theirs).max()) for logits in ours)
    return difference, float(np.abs(theirs).max())


def check_folder(args: argparse.Namespace) -> int:
    """Print the largest difference; exit code 1 where it exceeds the tolerance."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("check needs transformers", do=f"pip install {PIN}")
    layout = parse_layout(args.layout)
    if layout.sizes["cp"] > 1:
        raise ConfigError("--layout: check does not split sequences", do="leave cp out")
    plan = plan_import(args.model, without_mtp=args.without_mtp)
    num_weights = sum(torch.Size(entry.size).numel() for entry in plan.entries)
    check_memory(COPIES * 4 * num_weights, "comparing with transformers", args.model)
    difference, scale = largest_difference(plan, args.model, args)
    verdict = "equal" if difference <= args.tolerance else "DIFFERENT"
    print(
        f"{plan.architecture.model_type} {layout.name}: largest difference of a logit"
        f" {difference:.2e} (largest logit {scale:.3g}, tolerance {args.tolerance:g}): {verdict}"
    )
    return 0 if difference <= args.tolerance else 1
