"""Hugging Face weights in and out.

python -m megatron_ext.hf import --model HF_DIR --save DIR
    then train: pretrain_moe.py --config DIR/config.yaml --load DIR --finetune --data-path ...
python -m megatron_ext.hf export --load DIR --model HF_DIR
python -m megatron_ext.hf check  --model HF_DIR [--layout tp2-pp2-ep2]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ext.command import CommandLine, number
from megatron_ext.errors import exit_on_fatal


def _flags() -> argparse.ArgumentParser:
    parser = CommandLine("python -m megatron_ext.hf", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("import", help="a Hugging Face folder -> a checkpoint and its YAML")
    take.add_argument(
        "--model", required=True, type=Path, help="folder with config.json and shards"
    )
    take.add_argument("--save", required=True, type=Path, help="new folder of checkpoints")
    take.add_argument(
        "--without-mtp",
        action="store_true",
        help="leave out DeepSeek-V3's multi-token-prediction layer",
    )
    give = commands.add_parser("export", help="a checkpoint -> a Hugging Face folder")
    give.add_argument("--load", required=True, type=Path, help="folder of checkpoints")
    give.add_argument("--model", required=True, type=Path, help="new folder")
    give.add_argument("--ckpt-step", type=number("Whole"), help="default: the newest")
    give.add_argument("--architecture", help="model_type; default: the first that fits")
    most = "default: 5 (10^9 bytes)"
    give.add_argument("--max-shard-gb", type=number("Positive"), default=5.0, help=most)
    check = commands.add_parser("check", help="logits of a folder here and in transformers")
    check.add_argument(
        "--model", required=True, type=Path, help="folder with config.json and shards"
    )
    check.add_argument("--layout", default="single", help="a layout's name, as tp2-sp-pp2-ep2")
    check.add_argument("--tokens", type=number("Size"), default=64, help="tokens of a sequence")
    check.add_argument("--batch", type=number("Size"), default=2, help="sequences")
    check.add_argument("--seed", type=number("Seed"), default=1234)
    largest = "largest difference allowed"
    check.add_argument("--tolerance", type=number("NotNegative"), default=1e-4, help=largest)
    check.add_argument("--without-mtp", action="store_true", help="as for import")
    return parser


def _import(args: argparse.Namespace) -> None:
    from megatron_ext.hf.importer import import_folder, plan_import

    plan = plan_import(args.model, without_mtp=args.without_mtp)
    for note in plan.notes:
        print(f"note: {note}")
    path = import_folder(plan, args.save)
    print(
        f"imported {plan.architecture.model_type}, {plan.num_bytes} bytes, into {args.save};"
        f" train it: --config {path} --load {args.save} --finetune"
    )


def _export(args: argparse.Namespace) -> None:
    from megatron_ext.device import start

    start("cpu")
    from megatron_ext.hf.exporter import export_folder

    one = export_folder(
        args.load,
        args.model,
        step=args.ckpt_step,
        wanted=args.architecture,
        largest_shard=int(args.max_shard_gb * 10**9),
        note=lambda text: print(f"note: {text}"),
    )
    print(f"exported {args.load} as {one.class_name} to {args.model}")


def _check(args: argparse.Namespace) -> int:
    from megatron_ext.hf.check import check_folder

    return check_folder(args)


def main(argv: list[str] | None = None) -> None:
    """Parse and do one of the three."""
    with exit_on_fatal():
        args = _flags().parse_args(argv)
        code = {"import": _import, "export": _export, "check": _check}[args.command](args)
        raise SystemExit(code or 0)


if __name__ == "__main__":
    main()
