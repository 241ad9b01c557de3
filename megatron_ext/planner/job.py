"""The Slurm job of a layout: a thin script over launch/slurm/train.sbatch, as the recipes' are.

    python -m megatron_ext.planner search ... --sbatch v3.job
    sbatch v3.job --data-path DATA [flags of pretrain_moe.py...]

The trap that turns Slurm's warning into a save, restarts, requeues and the settings of a cluster
are train.sbatch's; the job adds the nodes, the configuration and the layout.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.costs.cluster import Cluster


def sbatch(config: str, cluster: Cluster, world: int, flags: Sequence[str], about: str) -> str:
    """The text of the job.

    Args:
        config: the word after --config: a recipe's name, or a file (named by its whole path).
        cluster: its first part says how many ranks a node has.
        world: ranks of all nodes.
        flags: words of pretrain_moe.py, the layout among them.
        about: the layout and its prediction, for the second line.
    """
    part = cluster.parts[0]
    per_node = min(part.gpus_per_node, world)
    nodes = -(-world // per_node)
    if Path(config).is_file():
        config = str(Path(config).resolve())
    device = ["--device", "cpu"] if part.on_cpu else []
    words = " ".join(shlex.quote(word) for word in ("--config", config, *device, *flags))
    return f"""#!/usr/bin/env bash
# {about}
# From the repository, on a disk that all nodes see:
#   sbatch THIS_FILE --data-path DATA [flags of pretrain_moe.py...]   # --mock-data: without data
# What the lines below mean, and the settings of your cluster: train.sbatch, which this one calls.

#SBATCH --job-name=pretrain-moe
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={0 if part.on_cpu else per_node}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=pretrain-moe-%j.log
#SBATCH --open-mode=append

cd "${{SLURM_SUBMIT_DIR:-$PWD}}" || exit 69
export RANKS_PER_NODE=${{RANKS_PER_NODE:-{per_node}}}
exec bash launch/slurm/train.sbatch {words} "$@"
"""
