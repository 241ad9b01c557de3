#!/usr/bin/env bash
# Train on this machine: bash launch/run.sh RANKS [flags of pretrain_moe.py...]
#   bash launch/run.sh 4 --config configs/quickstart.yaml --train-iters 20
# Exit codes are those of the program (64 usage, 65 data, 73 locked, 74 disk, ...; megatron_ext/errors.py).
# PYTHON names the interpreter; without it, the quickstart's .venv, an active environment, or python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then
  for candidate in "${VIRTUAL_ENV:-}/bin/python" "${VENV:-$root/.venv}/bin/python"; do
    if [[ -x $candidate ]]; then
      python=$candidate
      break
    fi
  done
fi
exec "${python:-python3}" "$root/launch/local.py" "$@"
