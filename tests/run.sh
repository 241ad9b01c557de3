#!/usr/bin/env bash
# Check the style and run all tests: bash tests/run.sh [pytest options, paths]
# Two processes share the files of tests; one, for a debugger: bash tests/run.sh -n 0 ...
# Installs what is missing into the quickstart's environment (.venv; PYTHON and VENV choose others).
# Exit code 0: everything holds. Temporary files go into one folder that is removed at the end.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$root"
environment requirements.txt requirements-test.txt requirements-data.txt

TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/pretrain-moe-tests.XXXXXX")
export TMPDIR OMP_NUM_THREADS=1
trap 'rm -rf "$TMPDIR"' EXIT

style=0
"$python" -m ruff check --quiet . || style=$?
if ((style == 0)); then say "ruff: no complaint"; else say "ruff: complaints above (exit code $style)"; fi

tests=0
"$python" -m pytest -n 2 --dist loadfile "$@" </dev/null || tests=$?
exit $((tests != 0 ? tests : style))
