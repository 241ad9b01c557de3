"""Check that layouts are the same training:

python -m megatron_ext.parity --config configs/parity.yaml --layouts tp2-sp,pp2-vpp2,dp2-dopt
python -m megatron_ext.parity --config configs/parity.yaml --layouts all --max-ranks 16

Any other flag of pretrain_moe.py may follow and applies to both runs of each comparison. Exits with
1 where a layout fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from megatron_ext.command import CommandLine, number
from megatron_ext.config import parse
from megatron_ext.errors import ConfigError, exit_on_fatal
from megatron_ext.parity import cases as case_list
from megatron_ext.parity.cases import Case


def _flags() -> argparse.ArgumentParser:
    parser = CommandLine("python -m megatron_ext.parity", __doc__)
    parser.add_argument("--config", default="configs/parity.yaml", help="the model, a YAML file")
    parser.add_argument(
        "--layouts",
        default="small",
        help="comma-separated names such as tp2-sp-pp2-vpp2-cp2.p2p-dp2-dopt-ep4-etp1-alltoall,"
        " each with +switches of the model; 'small' (12 cases) or 'all' (every pair of features)",
    )
    most = "largest layout of 'all'"
    parser.add_argument("--max-ranks", type=number("Parts"), default=16, help=most)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    steps = "steps of the loss curve"
    parser.add_argument("--steps", type=number("Count"), default=5, help=steps)
    longest = "longest run of one layout"
    parser.add_argument("--timeout-s", type=number("Wait"), default=300, help=longest)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    return parser


def _base(args: argparse.Namespace, extra: list[str]) -> list[str]:
    flags = ["--config", args.config, "--device", "cpu", "--train-iters", str(args.steps), *extra]
    return [*flags, "--bf16"] if args.dtype == "bf16" else flags


def _refusal(case: Case, base: list[str]) -> str | None:
    """Why the trainer refuses the case, or None."""
    size = ["--world-size", str(case.layout.world_size), "--dry-run"]
    try:
        parse([*base, *case.model_flags, *case.layout_flags, *size], environ={})
        parse([*base, *case.model_flags, "--world-size", "1", "--dry-run"], environ={})
    except ConfigError as error:
        return "; ".join(error.lines())
    return None


def _choose(args: argparse.Namespace, base: list[str]) -> list[Case]:
    """The cases that --layouts asks for. Raises ConfigError for one that the trainer refuses."""
    if args.layouts == "all":
        chosen, impossible = case_list.all_cases(
            lambda case: _refusal(case, base) is None, args.max_ranks
        )
        for pair in sorted(impossible):
            print(f"no legal layout holds {pair}", file=sys.stderr)
        return chosen
    if args.layouts == "small":
        return list(case_list.small_cases())
    return case_list.named_cases(args.layouts)


def _check_legal(chosen: list[Case], base: list[str]) -> None:
    for case in chosen:
        refusal = _refusal(case, base)
        if refusal:
            raise ConfigError(f"--layouts {case.name}: {refusal}")


def main(argv: list[str] | None = None) -> None:
    """Parse, run, report, exit."""
    with exit_on_fatal():
        args, extra = _flags().parse_known_args(argv)
        base = _base(args, extra)
        chosen = _choose(args, base)
        _check_legal(chosen, base)
        if args.list:
            print("\n".join(f"{case.layout.world_size:3d} ranks  {case.name}" for case in chosen))
            return
        from megatron_ext.device import start

        start("cpu")  # before megatron-core is imported

        from megatron_ext.parity import report

        begin = time.monotonic()
        rows = []
        for row in report.run_all(chosen, base, args):
            rows.append(row)
            if not args.json:
                print(report.line(row), flush=True)
        if args.json:
            print(json.dumps([row.as_dict() for row in rows], indent=1))
        else:
            print(report.summary(rows, time.monotonic() - begin))
        failed = any(not row.passed for row in rows)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
