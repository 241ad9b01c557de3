"""What tests use to run on several ranks: see megatron_ext/mesh/forks.py."""

from megatron_ext.mesh.forks import (
    RanksFailedError,
    exit_codes,
    free_port,
    run_ranks,
    start_ranks,
)

__all__ = ["RanksFailedError", "exit_codes", "free_port", "run_ranks", "start_ranks"]
