#!/usr/bin/env bash
# From a fresh clone to a trained mixture of experts that writes a few lines: bash launch/quickstart.sh
#
#   .venv                      the environment, from requirements.txt (PYTHON and VENV choose others)
#   runs/quickstart/data       corpus, tokenizer and token files, made from the Python library on this machine
#   runs/quickstart            logs, metrics, TensorBoard files, checkpoints, a sample, report.html
#
# What exists is reused. Run again, it resumes from the last checkpoint and trains on;
# `rm -r runs/quickstart` starts from the beginning.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

config=configs/quickstart.yaml
run=runs/quickstart
data=$run/data
ranks=4
vocabulary=4096
resume_steps=20 # after the first training, to show a resume
more_steps=60   # of every later quickstart

headline() { printf '\n[%s/5] %s\n' "$1" "$2"; }

latest_step() {
  local file=$run/checkpoints/latest_checkpointed_iteration.txt
  if [[ -f $file ]]; then cat "$file"; else echo 0; fi
}

train() { PYTHON=$python OMP_NUM_THREADS=1 bash launch/run.sh "$ranks" --config "$config" "$@"; }

make_data() {
  local domain tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$data/tokenizer.model")
  "$python" -m data.corpus --out "$data/corpus"
  "$python" -m data.tokenizer train --input "$data/corpus" --vocab-size "$vocabulary" \
    --model "$data/tokenizer.model"
  for domain in code english; do
    "$python" -m data.prepare --input "$data/corpus/$domain.jsonl" --output "$data/$domain" \
      "${tokenizer[@]}" --append-eod --workers "$(nproc)" --overwrite
  done
  "$python" -m data.unigram --data-path 0.5 "$data/code" 0.5 "$data/english" --split 95,5,0 \
    "${tokenizer[@]}" --out "$data/unigram.json"
}

SECONDS=0
headline 1 "environment"
environment requirements.txt
say "$("$python" --version) in $venv"

headline 2 "corpus, tokenizer, tokens"
if [[ -f $data/unigram.json ]]; then # the last file that make_data writes
  say "reusing $data"
else
  make_data
fi

first_target=$(sed -n 's/^train-iters: *//p' "$config")
step=$(latest_step)
headline 3 "training on $ranks ranks"
if ((step >= first_target)); then
  say "already trained: $run/checkpoints holds step $step"
  more=$more_steps
else
  ((step == 0)) || say "an earlier training stopped after step $step: going on"
  train
  more=$resume_steps
fi

step=$(latest_step)
headline 4 "resuming from the checkpoint of step $step, $more steps more"
train --load "$run/checkpoints" --train-iters $((step + more)) --override-opt-param-scheduler

headline 5 "what the model writes after \"def \""
"$python" -m megatron_ext.generate --load "$run/checkpoints" --prompt "def " \
  --device cpu >"$run/sample.tmp"
mv "$run/sample.tmp" "$run/sample.txt"
say "in $run/sample.txt"
"$python" -m megatron_ext.observe.report "$run" >/dev/null
say "all curves, experts and one step's timeline: $run/report.html"

printf '\n'
"$python" -m megatron_ext.observe.summary "$run"
printf '\nquickstart finished in %d min %d s\n' $((SECONDS / 60)) $((SECONDS % 60))
