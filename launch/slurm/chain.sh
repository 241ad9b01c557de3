#!/usr/bin/env bash
# A run that is longer than the cluster's time limit, as N jobs one after the other:
#   bash launch/slurm/chain.sh 10 launch/slurm/deepseek-v3.sbatch --data-path DATA
#   bash launch/slurm/chain.sh 10 --nodes=64 launch/slurm/deepseek-v3.sbatch ...   (options of sbatch)
# All jobs wait in the queue from now on, so the next one gains priority while this one runs. Each begins
# when the one before has ended (afterany: also when it was killed), goes on from the newest checkpoint
# in the same run directory, and cancels those behind it when the run is finished or an error would
# come again (wrong flags, bad data, a full disk, a NaN). Give --save-interval, as always.
#
# On a cluster that allows job arrays, one submission does the same; %1: one at a time:
#   sbatch --array=1-10%1 --no-requeue launch/slurm/deepseek-v3.sbatch --data-path DATA
# Neither is needed where jobs may requeue themselves, which train.sbatch does without a chain.
set -euo pipefail

count=${1:-}
if ! [[ $count =~ ^[1-9][0-9]*$ ]] || (($# < 2)); then
  echo "FATAL 64 rank=0 what=chain.sh: how many jobs? '$count' do=bash launch/slurm/chain.sh 10 launch/slurm/train.sbatch FLAGS" >&2
  exit 64
fi
shift
# One name of the run directory for all jobs, and the name by which they find each other.
export PRETRAIN_MOE_START=${PRETRAIN_MOE_START:-chain-$(date +%Y%m%d-%H%M%S)-$$}
export PRETRAIN_MOE_CHAIN=$PRETRAIN_MOE_START

before=
for ((number = 1; number <= count; number++)); do
  job=$(sbatch --parsable --no-requeue --job-name="$PRETRAIN_MOE_CHAIN" \
    ${before:+"--dependency=afterany:$before"} "$@")
  before=${job%%;*} # JOB;CLUSTER on federations
  echo "job $before: $number of $count of $PRETRAIN_MOE_CHAIN"
done
