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
# 3: Python ran and found none. Anything else: Python itself could not run here.
found=0
said=$("$python" -c 'import sys, importlib.util as u; sys.exit(0 if u.find_spec("megatron") and u.find_spec("torch") else 3)' 2>&1) ||
  found=$?
if ((found)); then
  what="$python has no torch or no megatron-core"
  way="bash launch/quickstart.sh makes .venv, or PYTHON=/path/to/python names another"
  if ((found != 3)); then
    limits=
    for option in s v d f n u; do
      [[ $(ulimit -$option) == unlimited ]] || limits+=", ulimit -$option is $(ulimit -$option)"
    done
    what="$python cannot run here: exit code $found ${said##*$'\n'}${limits}"
    way="raise what is too low (ulimit -s 8192, the others unlimited), or PYTHON=/path/to/python names another"
  fi
  printf 'FATAL 69 rank=0 what=%s do=%s\n' "$what" "$way" >&2
  exit 69
fi
exec "$python" "$root/launch/local.py" "$@"
