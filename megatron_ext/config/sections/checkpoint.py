"""What is saved, where, and what is read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.ranges import Count, Parts, Whole


@dataclass(frozen=True)
class CheckpointSection:
    """Saving and loading."""

    save: str | None = None
    """Folder of the checkpoints. Default: RUN/checkpoints."""

    save_interval: Whole | None = field(
        default=None,
        metadata={
            "argparse_meta": {"arg_names": ["--save-interval", "--persistent-save-interval"]}
        },
    )
    """Steps between checkpoints; None: only at the end."""

    load: str | None = None
    """Folder to resume from; refused if it holds no checkpoint (see --allow-fresh-start)."""

    allow_fresh_start: bool = False
    """Start from new weights where --load holds no checkpoint."""

    exit_on_missing_checkpoint: bool = False
    """Kept for Megatron-LM's scripts: refusing is the default here."""

    ckpt_step: Whole | None = None
    """Step of the checkpoint to load. Default: the newest."""

    finetune: bool = False
    """Load weights only: step 0, new optimizer, new data order."""

    moe_use_upcycling: bool = False
    """Load the dense checkpoint of --load as experts: converted into RUN/upcycled, then trained as
    with --finetune, where Megatron-LM's flag converts and exits."""

    moe_upcycling_granularity: Parts = 1
    """Experts that one copy of the dense feed-forward layer is cut into by --moe-use-upcycling:
    --moe-ffn-hidden-size is --ffn-hidden-size divided by it."""

    no_save_optim: bool = False
    """Leave the optimizer out of checkpoints."""

    no_save_rng: bool = False
    """Leave the random states out of checkpoints."""

    no_load_optim: bool = False
    """Do not read the optimizer."""

    no_load_rng: bool = False
    """Do not read the random states."""

    async_save: bool = False
    """Copy the state during the next forward and backward and write it in the background."""

    ckpt_staging_bytes: Count | None = None
    """Most host memory of --async-save's private copy on a rank, in bytes; None: the size of what
    the rank writes. Less means that a step may wait for the disk."""

    keep_last: Count | None = None
    """Newest checkpoints to keep; older ones are deleted when a newer one has been read back. None:
    all."""

    keep_every: Count | None = None
    """Steps whose multiples --keep-last never deletes."""

    accept_change: str | None = None
    """Flags, separated by commas, in which a resumed run may differ from the run that wrote the
    checkpoint, such as seed,data_path; data_content and tokenizer_content: what is in the files."""

    ckpt_tiers: str = "store"
    """Where checkpoints go: memory (/dev/shm, and that of the next node), local, store, with
    commas between."""

    ckpt_memory_interval: Count = 1
    """Steps between checkpoints in /dev/shm (--ckpt-tiers memory)."""

    ckpt_local_dir: str | None = None
    """Folder on a disk of the node (--ckpt-tiers local)."""

    ckpt_local_interval: Count | None = None
    """Steps between checkpoints in --ckpt-local-dir."""

    use_persistent_ckpt_worker: bool = False
    """Keep the background writer alive between checkpoints."""

    ckpt_format: Literal["torch", "torch_dist", "torch_dcp", "fsdp_dtensor"] = "torch_dist"
    """File format; torch_dist is the only choice here: megatron-core's sharded state, kept as
    safetensors and one manifest."""

    auto_detect_ckpt_format: bool = False
    """Kept for Megatron-LM's scripts: the format is always read from the checkpoint."""

    ckpt_fully_parallel_save: bool = True
    """Share the writing between data-parallel ranks."""

    ckpt_fully_parallel_load: bool = False
    """Share the reading between data-parallel ranks."""

    ckpt_assume_constant_structure: bool = False
    """Reuse the plan of the first save."""

    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = "assume_ok_unexpected"
    """What missing and unexpected keys of a checkpoint mean."""

    dist_ckpt_optim_fully_reshardable: bool = False
    """Save the optimizer so that another layout can read it."""

    dist_ckpt_save_pre_mcore_014: bool = False
    """Save the optimizer in the form of megatron-core before 0.14."""
