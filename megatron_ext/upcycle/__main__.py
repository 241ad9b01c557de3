"""Turn a dense checkpoint into one of a mixture of experts:

python -m megatron_ext.upcycle --load DENSE --save DIR --num-experts 8 --moe-router-topk 2

Any flag of pretrain_moe.py about the experts may follow. --moe-upcycling-granularity G cuts each
copy of the dense layer into G experts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ext.command import CommandLine, number
from megatron_ext.errors import exit_on_fatal


def _flags() -> argparse.ArgumentParser:
    parser = CommandLine("python -m megatron_ext.upcycle", __doc__)
    parser.add_argument("--load", required=True, type=Path, help="folder of dense checkpoints")
    parser.add_argument("--save", required=True, type=Path, help="new folder")
    parser.add_argument("--ckpt-step", type=number("Whole"), help="default: the newest")
    parts = "experts per copy of the dense layer"
    parser.add_argument("--moe-upcycling-granularity", type=number("Parts"), help=parts)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse and convert."""
    with exit_on_fatal():
        args, options = _flags().parse_known_args(argv)
        from megatron_ext.device import start

        start("cpu")
        from megatron_ext.upcycle.run import YAML, upcycle

        granularity, step = args.moe_upcycling_granularity, args.ckpt_step
        split = upcycle(args.load, args.save, options, granularity=granularity, step=step)
        print(
            f"{split.num_experts} experts of width {split.width} from {split.dense_width};"
            f" train them: --config {args.save / YAML} --load {args.save} --finetune"
        )


if __name__ == "__main__":
    main()
