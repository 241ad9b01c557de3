"""python -m megatron_ext.checkpoint {list,verify,diff,prune,rehearse}: see docs/checkpoints.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.command import CommandLine, number
from megatron_ext.device import start
from megatron_ext.errors import exit_on_fatal


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine("python -m megatron_ext.checkpoint", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("list", help="step, time, size, layout and whether it was read back")
    add.add_argument("folder", type=Path)
    add = commands.add_parser("verify", help="read every byte again; 65 names file and offset")
    add.add_argument("folder", type=Path)
    add.add_argument("--step", type=number("Whole"), help="only this one; default: all")
    add = commands.add_parser("diff", help="config, layout and every tensor of two checkpoints")
    add.add_argument("folders", type=Path, nargs=2, metavar="step_folder")
    add = commands.add_parser("prune", help="delete old checkpoints")
    add.add_argument("folder", type=Path)
    add.add_argument("--keep-last", type=number("Count"), required=True)
    add.add_argument("--keep-every", type=number("Count"))
    add.add_argument("--dry-run", action="store_true", help="only say what would go")
    add = commands.add_parser("rehearse", help="load in another layout on forked CPU ranks")
    add.add_argument("folder", type=Path)
    add.add_argument("--layout", required=True, help="as tp2,pp2,vpp2,ep2,etp1,cp1,dp1")
    add.add_argument("--step", type=number("Whole"), help="default: the newest")
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """The command of `argv`; its exit code. Raises Fatal."""
    asked = _parser().parse_args(argv)
    start("cpu")
    from megatron_ext.checkpoint import commands, rehearse
    from megatron_ext.checkpoint.folder import named_step

    if asked.command == "diff":
        return 0 if commands.diff(*map(commands.step_folder, asked.folders)) else 1
    directory, step = named_step(asked.folder, getattr(asked, "step", None), "--step")
    if asked.command == "list":
        commands.list_(directory)
    elif asked.command == "verify":
        commands.verify(directory, step)
    elif asked.command == "prune":
        commands.prune(directory, asked.keep_last, asked.keep_every, asked.dry_run)
    else:
        rehearse.rehearse(directory, step, asked.layout)
    return 0


if __name__ == "__main__":
    with exit_on_fatal():
        sys.exit(run())
