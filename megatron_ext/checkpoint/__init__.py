"""Checkpoints: how the state of a run is kept, whole, on disk, and read back in any parallel
layout.

    state (what) -> writer (plan, private copy, bytes) -> folder (temporary name, fsync, rename) ->
    latest latest -> loader (newest complete one) -> state (in place)

    with Checkpointer(cfg.checkpoint, run/checkpoints, load_from, run_info={...}) as checkpointer:
        checkpointer.load(state)          # False: nothing there and that is allowed
        for step in ...:
            ...
            checkpointer.poll()           # finishes asynchronous saves, on all ranks in the same
            step if step % interval == 0:
                checkpointer.save(state)  # returns when the state is copied (--async-save) or on
                disk

On disk (8 ranks, step 100); the shards are megatron-core's `torch_dist` format:

    DIR/latest                              step_00000100
    DIR/latest_checkpointed_iteration.txt   100
    DIR/ledger.jsonl                        requested, staged, durable, failed; time, bytes, seconds
    DIR/lease.json                          host and process that may write here
    DIR/step_00000100/__0_0.distcp ... __7_0.distcp   one file a rank
    DIR/step_00000100/.metadata, metadata.json, common.pt
    DIR/step_00000100/state.json            progress, scheduler, layout, run, size of every file

Nothing in a checkpoint says which rank wrote what: weights have global names
(`decoder.layers.3.mlp.router.weight`) and places in global tensors, optimizer states as well
(`optimizer.state.exp_avg.decoder...`), so tp, pp, vpp, ep, etp, dp and the distributed optimizer
may change between saving and loading. Random states are read in the same layout only.
"""

from megatron_ext.checkpoint.state import Progress, TrainState
from megatron_ext.checkpoint.store import Checkpointer

__all__ = ["Checkpointer", "Progress", "TrainState"]
