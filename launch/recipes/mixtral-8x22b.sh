#!/usr/bin/env bash
# Mixtral-8x22B on this machine: bash launch/recipes/mixtral-8x22b.sh [flags of pretrain_moe.py...]
#   ... --dry-run      check the layout of its 128 H100 and count parameters; starts nothing
#   ... --scale-down   train a tiny model of its kind on 4 CPU ranks; under a minute
# MACHINE=gb200 (h200, mi250x) takes another layout, RANKS another number of ranks than the layout's.
# More than one node: launch/slurm/mixtral-8x22b.sbatch
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh" mixtral-8x22b "$@"
