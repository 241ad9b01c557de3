#!/usr/bin/env bash
# Train on this machine: bash launch/run.sh [--restarts N] RANKS [flags of pretrain_moe.py...]
#   bash launch/run.sh 4 --config configs/quickstart.yaml --train-iters 20
# Exit codes are those of the program (64 usage, 65 data, 73 locked, 74 disk, ...; megatron_ext/errors.py).
# PYTHON names the interpreter; without it, the quickstart's .venv, an active environment, or python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then
  for candidate in "${VENV:-$root/.venv}/bin/python" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}"; do
    if [[ -x $candidate ]]; then
      python=$candidate
      break
    fi
  done
fi
python=${python:-python3}
if ! "$python" -c 'import sys, importlib.util as u; sys.exit(not (u.find_spec("megatron") and u.find_spec("torch")))'; then
  printf 'FATAL 69 rank=0 what=%s has no torch or no megatron-core do=%s\n' "$python" \
    "bash launch/quickstart.sh makes .venv, or PYTHON=/path/to/python names another" >&2
  exit 69
fi
exec "$python" "$root/launch/local.py" "$@"
