"""Write a few lines with a checkpoint:

python -m megatron_ext.generate --load runs/quickstart/checkpoints --prompt "def "

The model and the tokenizer are those of the run that saved the checkpoint; it is loaded into this
one process whatever layout it was trained in. Sampling is greedy with --temperature 0.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import yaml

from megatron_ext.command import CommandLine, number
from megatron_ext.config import RunConfig, parse
from megatron_ext.errors import DataError, exit_on_fatal

LAYOUT_KEYS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "world_size",
    "overlap_p2p_comm",
    "batch_p2p_comm",
    "global_batch_size",
    "rampup_batch_size",
    "load",
    "run_dir",
)


def one_rank_config(run: dict, folder: str, options: list[str]) -> RunConfig:
    """The saved run's configuration for one rank, with `options` (flags) on top."""
    saved = yaml.safe_load(run["config"])
    for section in saved.values():
        if isinstance(section, dict):
            for key in LAYOUT_KEYS:
                section.pop(key, None)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(saved, file)
        file.flush()
        words = ["--config", file.name, "--load", folder, "--world-size", "1", *options]
        return parse(words, environ={})  # one rank also inside a launch of several


def _flags() -> argparse.ArgumentParser:
    parser = CommandLine("python -m megatron_ext.generate", __doc__)
    parser.add_argument("--load", required=True, help="RUN, RUN/checkpoints or one of its steps")
    parser.add_argument(
        "--ckpt-step", type=number("Whole"), help="step to load; default: the newest"
    )
    parser.add_argument("--prompt", type=str, default="", help="text to continue")
    parser.add_argument("--max-new-tokens", type=number("Size"), default=100)
    parser.add_argument("--temperature", type=number("NotNegative"), default=0.8, help="0: greedy")
    top_k = "draw from the k likeliest; 0: all"
    parser.add_argument("--top-k", type=number("Whole"), default=0, help=top_k)
    top_p = "draw from the likeliest that hold this probability"
    parser.add_argument("--top-p", type=number("Portion"), default=0.95, help=top_p)
    parser.add_argument("--seed", type=number("Seed"), default=1234)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser


def _saved_run(folder: Path, step: int | None) -> dict:
    """What the checkpoint says about the run that wrote it."""
    from megatron_ext.checkpoint import folder as on_disk
    from megatron_ext.checkpoint import manifest

    known = on_disk.steps(folder) if folder.is_dir() else []
    chosen = step if step is not None else on_disk.latest_step(folder) or max(known, default=None)
    if chosen not in known:
        raise DataError(
            f"--load holds {'no checkpoint' if not known else f'steps {known}, not {step}'}",
            do="name a run's checkpoints folder, such as runs/quickstart/checkpoints",
            path=folder,
        )
    return manifest.read(folder / on_disk.step_name(chosen)).record["run"]


def write(args: argparse.Namespace) -> None:
    """Load the checkpoint and print the prompt and its continuation."""
    from megatron_ext.device import start

    logging.captureWarnings(True)  # megatron-core's about its own options are no news to a reader
    device = start(args.device)
    options = ["--device", device.kind]
    from megatron_ext.checkpoint import Checkpointer, Progress, TrainState
    from megatron_ext.checkpoint.folder import named_step

    load, step = named_step(Path(args.load), args.ckpt_step)
    if step is not None:
        options += ["--ckpt-step", str(step)]
    cfg = one_rank_config(_saved_run(load, step), str(load), options)
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import build_chunks, vocabulary
    from megatron_ext.train import setup
    from megatron_ext.train.generate import generate

    with process_groups(cfg.parallel, device, cfg.train.seed):
        tokenizer = setup.tokenizer(cfg)
        words = vocabulary(cfg, tokenizer.vocab_size)
        (model,) = build_chunks(cfg, words)
        checkpointer = Checkpointer(cfg.checkpoint, None, load, run_info={})
        checkpointer.load(TrainState([model], None, None, Progress()))
        prompt = tokenizer.encode(args.prompt) or [tokenizer.eod]
        new = generate(
            model,
            prompt,
            max_new_tokens=args.max_new_tokens,
            max_context=cfg.model.max_position_embeddings,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
        print(args.prompt + tokenizer.decode(list(new)))


def main(argv: list[str] | None = None) -> None:
    """Parse, load, write."""
    with exit_on_fatal():
        write(_flags().parse_args(argv))


if __name__ == "__main__":
    main()
