# shellcheck shell=bash
# The virtual environment of this repository; sourced by launch/quickstart.sh and tests/run.sh.
#   PYTHON  the interpreter that makes it (default python3; 3.10, 3.11 or 3.12)
#   VENV    where it lies (default .venv in the repository)
# After `environment requirements.txt ...` the variable `python` names its interpreter.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
python=$venv/bin/python

say() { printf '%s\n' "$*"; }
die() {
  printf 'FATAL %s\n' "$*" >&2
  exit 69
}

# Make the environment where it is missing.
make_venv() {
  local maker=${PYTHON:-python3}
  [[ -x $python && -x $venv/bin/pip ]] && return # pip comes last: without it a kill cut the making
  "$maker" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
    die "what=$maker is not Python 3.10, 3.11 or 3.12 do=PYTHON=/path/to/python3.11 bash ${0##*/}"
  say "making the virtual environment $venv ($("$maker" --version))"
  if ! "$maker" -m venv "$venv" >"$venv.log" 2>&1; then
    tail -n 5 "$venv.log" >&2
    rm -rf "$venv" # half an environment would look like a whole one next time
    die "what=$maker cannot make a virtual environment do=on Debian: apt-get install python3-venv"
  fi
  rm -f "$venv.log"
}

# Install one requirements file where it has changed since it was installed last.
install_requirements() {
  local file=$1 stamp log sum
  stamp=$venv/.${file%.txt}.sha256
  log=$venv/install.log
  sum=$(sha256sum <"$root/$file")
  [[ -f $stamp && $(<"$stamp") == "$sum" ]] && return
  say "installing $file (log: $log)"
  if ! "$python" -m pip install --disable-pip-version-check --no-input -r "$root/$file" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    die "what=$file cannot be installed path=$log do=read the log; a proxy or another index: pip config set global.index-url ..."
  fi
  printf '%s\n' "$sum" >"$stamp"
}

environment() {
  local file
  make_venv
  for file in "$@"; do install_requirements "$file"; done
}
