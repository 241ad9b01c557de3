#!/usr/bin/env bash
# One rank, started by srun without torchrun or our launcher:
#   srun --ntasks-per-node=8 bash launch/slurm/rank.sh --config qwen3-30b-a3b.h100 --data-path DATA
# (SRUN_RANKS=1 sbatch launch/slurm/train.sbatch does it.) Slurm's variables become torchrun's:
#   SLURM_PROCID  RANK         0 to all ranks - 1; neighbours sit on the same node (block order)
#   SLURM_LOCALID LOCAL_RANK   which GPU of the node
#   SLURM_NTASKS  WORLD_SIZE
# What is missing without the launcher: restarts in place (a failure ends the step), a warm start, and
# the code of the rank that failed first.
set -euo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=${MASTER_ADDR:-$first_node} MASTER_PORT=${MASTER_PORT:-29500}
export PRETRAIN_MOE_START=${PRETRAIN_MOE_START:-slurm-$SLURM_JOB_ID}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

cd "${SLURM_SUBMIT_DIR:-$PWD}"
exec "${PYTHON:-.venv/bin/python}" pretrain_moe.py "$@"
