"""Start the ranks of pretrain_moe.py on this machine, let them end together, start them again.

    python launch/local.py [--restarts N] 4 --config configs/quickstart.yaml --train-iters 20

1. The flags are checked once, without torch: a mistake is one FATAL line and exit code 64.
2. This process imports torch and megatron-core and forks the ranks (`warm`; on CUDA each rank
   starts by itself), with torchrun's environment variables and a socket where they meet.
3. When one rank fails the others are stopped (`ranks`).
4. The exit code is that of the rank that failed first (`reason`); a failure that another start may
   cure starts all ranks again from the newest checkpoint, up to --restarts (`restarts`).

launch/run.sh is the way to call it; docs/launching.md has the signals, the codes and the options.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file is started by its path, from any folder

from megatron_ext.mesh.signals import ignore_all, leave_at_once  # noqa: E402

if __name__ == "__main__":
    leave_at_once()  # until the launch hears signals itself

from launch.attempts import Launch, forget_ranks  # noqa: E402
from launch.words import USAGE, Options, WordsError, asks_for_help, read_words  # noqa: E402
from megatron_ext.checkpoint.starting import plan  # noqa: E402
from megatron_ext.config import parse  # noqa: E402
from megatron_ext.costs.dryrun import dry_run  # noqa: E402
from megatron_ext.errors import ConfigError, exit_on_fatal  # noqa: E402
from megatron_ext.mesh.limits import check_limits  # noqa: E402
from megatron_ext.preflight import preflight  # noqa: E402

PROGRAM = ROOT / "pretrain_moe.py"
WITHOUT_RANKS = ("--help", "-h", "--print-config", "--dry-run", "--explain-flags")


def _without_ranks(options: Options) -> int:
    """Let the program itself print what was asked."""
    environment = {**os.environ, "WORLD_SIZE": str(options.world_size)}
    flags = options.flags
    if "--scale-down" in flags:  # it chooses the number of ranks, up to this one
        environment.pop("WORLD_SIZE")
        flags = (*flags, "--world-size", str(options.world_size))
    command = [sys.executable, str(PROGRAM), *flags]
    return subprocess.run(command, env=environment, check=False).returncode


def main(argv: list[str]) -> int:
    """`[options] N flags...` -> the exit code of the run."""
    forget_ranks(os.environ)
    os.environ.setdefault("PRETRAIN_MOE_START", time.strftime("%Y%m%d-%H%M%S"))
    with exit_on_fatal():
        try:
            if asks_for_help(argv):
                print(USAGE, end="")
                return 0
            options = read_words(argv, os.environ)
        except WordsError as error:
            raise ConfigError(str(error), do=error.do) from None
        if any(flag.partition("=")[0] in WITHOUT_RANKS for flag in options.flags):
            return _without_ranks(options)
        # RUN/config.yaml may name another number of ranks
        flags = [*options.flags, "--world-size", str(options.world_size)]
        several = {"WORLD_SIZE": str(options.world_size)} if options.num_nodes > 1 else {}
        cfg = parse(flags, {**os.environ, **several})
        if cfg.scaled and not several:
            options = replace(options, num_ranks=cfg.parallel.world_size)
        dry_run(cfg)
        preflight(cfg)
        start = plan(cfg)
        if start.is_complete:
            print(start.told(cfg))
            return 0
        check_limits()
        return Launch(cfg, options, flags, PROGRAM).run()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        ignore_all()
