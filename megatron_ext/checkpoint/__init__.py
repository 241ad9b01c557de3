"""Checkpoints: how the state of a run is kept, whole, on disk, and read back in any parallel
layout.

    state (what) -> plan (who) -> staging (private copy) -> writer (bytes, hashes) -> saving
    (reports, manifest, rename, latest, read back, prune) -> loader (newest whole one) -> state

    with Checkpointer(cfg.checkpoint, run/checkpoints, load_from, run_info={...}) as checkpointer:
        checkpointer.load(state)          # False: nothing there and that is allowed
        for step in ...:
            ...                           # state.before_update() right before the optimizer
            checkpointer.poll()           # what the background has reached, on all ranks alike
            if step % interval == 0:
                checkpointer.save(state)  # returns at once (--async-save) or when it is on disk

On disk (8 ranks, step 100), described in docs/checkpoints.md:

    DIR/latest                              step_00000100
    DIR/latest_checkpointed_iteration.txt   100
    DIR/ledger.jsonl                        requested, staged, durable, verified, pruned, ...
    DIR/lease.json                          host and process that may write here
    DIR/step_00000100/rank_00000.safetensors ... rank_00007.safetensors
    DIR/step_00000100/manifest.json         progress, layout, run, every tensor, every hash

Nothing in a checkpoint says which rank wrote what: weights have global names
(`decoder.layers.3.mlp.router.weight`) and places in global tensors, optimizer states as well
(`optimizer.state.exp_avg.decoder...`), so tp, pp, vpp, ep, etp, dp and the distributed optimizer
may change between saving and loading. Random states are read in the same layout only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ext.checkpoint.state import Progress, TrainState
    from megatron_ext.checkpoint.store import Checkpointer

__all__ = ["Checkpointer", "Progress", "TrainState"]


def __getattr__(name: str) -> Any:
    """The three names on first use: `python -m megatron_ext.checkpoint` lifts megatron-core to the
    CPU before anything imports it.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "store" if name == "Checkpointer" else "state"
    return getattr(import_module(f"{__name__}.{module}"), name)
