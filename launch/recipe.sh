#!/usr/bin/env bash
# Train a recipe on this machine: bash launch/recipe.sh MODEL [flags of pretrain_moe.py...]
# MODEL is a file of configs/ without .yaml; MACHINE (h100, h200, gb200, mi250x) names the layout in
# configs/layouts, RANKS another number of ranks than the layout's own (its line `# ranks: N`).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=${1:-}
shift || true
machine=${MACHINE:-h100}
for name in "$machine" "${machine/h200/h100}"; do # an H200 node runs the H100's layout
  layout=$root/configs/layouts/$model.$name.yaml
  if [[ -f $layout ]]; then
    break
  fi
done
ranks=${RANKS:-}
if [[ -z $ranks && -f $layout ]]; then
  ranks=$(sed -n 's/^# ranks: //p' "$layout")
fi
# Without a layout the program says which names there are.
exec bash "$root/launch/run.sh" "${ranks:-8}" --config "$model.$machine" "$@"
